//! `skerry sandbox`: functions of programs and modules from the command line.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A guest of `guest/sandbox-rt`, built by the cargo that runs the tests.
fn guest(name: &str) -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let folder = BUILT.get_or_init(|| {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("sandbox-guests");
        let built = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--release", "--locked"])
            .args(["-p", "sandbox-exampleguest", "-p", "sandbox-plainguest"])
            .arg("--manifest-path")
            .arg(repository().join("guest/sandbox-rt/Cargo.toml"))
            .arg("--target-dir")
            .arg(&target)
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env_remove("RUSTFLAGS")
            .status();
        assert!(
            built.expect("cargo runs").success(),
            "the guests don't build"
        );
        target.join("release")
    });
    folder.join(name)
}

fn module() -> PathBuf {
    repository().join("crates/sandbox/tests/fixtures/wasi/program.wasm")
}

fn skerry(arguments: &[&str]) -> Output {
    let program = env!("CARGO_BIN_EXE_skerry");
    let output = Command::new(program)
        .arg("sandbox")
        .args(arguments)
        .output();
    output.expect("skerry runs")
}

/// Its exit status, its stdout, its stderr.
fn said(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

#[test]
fn a_function_is_called_and_only_its_result_is_on_stdout() {
    let plain = guest("sandbox-plainguest");
    let plain = plain.to_str().unwrap();
    for hypervisor in ["soft", "auto"] {
        let output = skerry(&["call", "--hypervisor", hypervisor, plain, "double", "21"]);
        assert_eq!(said(&output), (Some(0), "42\n".into(), String::new()));
    }
    let output = skerry(&["call", "--json", plain, "double", "--", "-4"]);
    assert_eq!(said(&output), (Some(0), "-8\n".into(), String::new()));
}

#[test]
fn mistakes_are_one_line_and_say_what_there_is() {
    let plain = guest("sandbox-plainguest");
    let plain = plain.to_str().unwrap();
    let cases: [(&[&str], &str); 5] = [
        // In whichever order the linker put them.
        (
            &["call", plain, "half", "1"],
            "no function \"half\"; it has: d",
        ),
        (
            &["call", plain, "double"],
            "takes 1 arguments, and 0 were given",
        ),
        (&["call", plain, "double", "x"], "\"x\" is no i32"),
        (
            &["call", "/nonexistent", "f"],
            "Can't read the guest \"/nonexistent\"",
        ),
        (
            &["call", "--grant", "clock", plain, "double", "1"],
            "--grant is for WebAssembly",
        ),
    ];
    for (arguments, expected) in cases {
        let (status, stdout, stderr) = said(&skerry(arguments));
        assert_eq!((status, stdout.as_str()), (Some(125), ""), "{stderr}");
        assert!(
            stderr.contains(expected) && stderr.lines().count() == 1,
            "{stderr}"
        );
    }
    let module = module();
    let module = module.to_str().unwrap();
    for flag in ["--stack", "--buffers"] {
        let (status, _, stderr) = said(&skerry(&["call", flag, "1m", module, "_start"]));
        assert_eq!(status, Some(125), "{stderr}");
        assert!(stderr.contains("are for programs"), "{stderr}");
    }
    let (status, _, stderr) = said(&skerry(&["call", "--heap", "64k", module, "_start"]));
    assert_eq!(status, Some(125), "{stderr}");
    let needy = guest("sandbox-exampleguest");
    let (status, _, stderr) = said(&skerry(&["call", needy.to_str().unwrap(), "picky", "x"]));
    assert_eq!(status, Some(125));
    assert!(
        stderr.contains("lookup(key: String) -> Option<String>"),
        "{stderr}"
    );
    let (status, _, stderr) = said(&skerry(&["call", "/etc/hostname", "f"]));
    assert_eq!(status, Some(125));
    assert!(stderr.contains("not a 64-bit ELF file"), "{stderr}");
}

#[test]
fn inspect_lists_what_a_guest_has_and_needs() {
    let needy = guest("sandbox-exampleguest");
    let (status, stdout, _) = said(&skerry(&["inspect", needy.to_str().unwrap()]));
    assert_eq!(status, Some(0));
    assert!(
        stdout.contains("  word_count(text: String) -> String\n"),
        "{stdout}"
    );
    assert!(
        stdout.contains("needs of its host:\n  lookup(key: String)"),
        "{stdout}"
    );
    let json = skerry(&["inspect", "--format", "json", needy.to_str().unwrap()]);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["imports"][0]["name"], "lookup");
    let (status, stdout, _) = said(&skerry(&["inspect", module().to_str().unwrap()]));
    assert_eq!(status, Some(0));
    assert!(
        stdout.contains("runtime: WebAssembly\n") && stdout.contains("_start()"),
        "{stdout}"
    );
}

#[test]
fn a_time_limit_is_exit_status_124() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("endless.wasm");
    // (module (func (export "spin") (loop (br 0)))), by hand.
    let endless = b"\0asm\x01\0\0\0\x01\x04\x01\x60\0\0\x03\x02\x01\0\x07\x08\x01\x04spin\0\0\x0a\x09\x01\x07\0\x03\x40\x0c\0\x0b\x0b";
    std::fs::write(&path, endless).unwrap();
    let path = path.to_str().unwrap();
    for limit in [["--timeout", "200ms"], ["--cpu-time", "100ms"]] {
        let arguments = [
            &["call"][..],
            &limit,
            &["--hypervisor", "soft", path, "spin"],
        ]
        .concat();
        let (status, stdout, stderr) = said(&skerry(&arguments));
        assert_eq!((status, stdout.as_str()), (Some(124), ""), "{stderr}");
        assert!(
            stderr.contains("longer than") || stderr.contains("processor time"),
            "{stderr}"
        );
    }
    let limited = [
        "call",
        "--instructions",
        "50000000",
        "--hypervisor",
        "soft",
        path,
        "spin",
    ];
    let (status, _, stderr) = said(&skerry(&limited));
    assert_eq!(status, Some(124), "{stderr}");
    assert!(stderr.contains("50000000 instructions"), "{stderr}");
}

#[test]
fn a_crash_leaves_a_core_dump_where_one_is_wanted() {
    let folder = tempfile::tempdir().unwrap();
    let dumps = folder.path().join("dumps");
    std::fs::create_dir(&dumps).unwrap();
    let crashing = guest("sandbox-plainguest");
    let arguments = [
        "call",
        "--hypervisor",
        "soft",
        "--core-dumps",
        dumps.to_str().unwrap(),
    ];
    let output = skerry(
        &[
            &arguments[..],
            &[crashing.to_str().unwrap(), "divide", "1", "0"],
        ]
        .concat(),
    );
    let (status, stdout, stderr) = said(&output);
    assert_eq!((status, stdout.as_str()), (Some(1), ""), "{stderr}");
    assert!(
        stderr.contains("divide by zero") && stderr.contains("Core dump: "),
        "{stderr}"
    );
    let dump = std::fs::read_dir(&dumps).unwrap().next().unwrap().unwrap();
    assert!(std::fs::read(dump.path()).unwrap().starts_with(b"\x7fELF"));
    let (status, _, stderr) = said(&skerry(&["call", "--gdb", "nowhere:x", "a", "f"]));
    assert_eq!(status, Some(125), "{stderr}");
}

#[test]
fn a_bench_measures_what_there_is() {
    let plain = guest("sandbox-plainguest");
    let arguments = [
        "bench",
        "--count",
        "20",
        "--format",
        "json",
        "--hypervisor",
        "soft",
    ];
    let output = skerry(&[&arguments[..], &[plain.to_str().unwrap(), "double", "4"]].concat());
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    for row in [
        "create",
        "create from a snapshot",
        "call",
        "restore after a call",
    ] {
        assert!(
            json["rows"][row]["median_us"].as_f64().unwrap() > 0.0,
            "{row}"
        );
    }
}

fn fixture(name: &str) -> String {
    let folder = repository().join("crates/sandbox/tests/fixtures/component");
    folder.join(name).to_str().unwrap().to_owned()
}

#[test]
fn a_components_functions_are_called_with_values_of_wit() {
    let values = fixture("values.wasm");
    let call = |words: &[&str]| said(&skerry(&[&["call", &values], words].concat()));
    for (words, status, stdout) in [
        (&["fib", "10"][..], 0, "55\n"),
        (&["same-string", "two words"], 0, "two words\n"),
        (
            &["same-tuple", r#"(1, "a", true)"#],
            0,
            "(1, \"a\", true)\n",
        ),
        (
            &["same-tuple", r#"[1, "a", true]"#],
            0,
            "(1, \"a\", true)\n",
        ),
        (&["same-bytes", "[104, 105]"], 0, "hi"),
        (&["nothing"], 0, ""),
        (
            &["same-person", r#"{"name": "Ann", "age": 3, "tags": ["x"]}"#],
            0,
            "{name: \"Ann\", age: some(3), tags: [\"x\"]}\n",
        ),
        (
            &["test:values/shapes@1.2.0#area", "circle(2)"],
            0,
            "ok(12.566370614359172)\n",
        ),
        // A function that says that it failed.
        (
            &["area", "polygon([])"],
            1,
            "err(\"0 points make no polygon\")\n",
        ),
    ] {
        let (code, out, err) = call(words);
        assert_eq!(
            (code, out.as_str(), err.as_str()),
            (Some(status), stdout, ""),
            "{words:?}"
        );
    }
    let json = ["call", "--json", &values, "same-rights", "{read, exec}"];
    let (code, out, _) = said(&skerry(&json));
    assert_eq!((code, out.as_str()), (Some(0), "[\"read\",\"exec\"]\n"));
    for (words, status, message) in [
        (&["fib", "ten"][..], 125, "\"ten\" is no u32"),
        (&["fib"], 125, "fib takes 1 arguments, and 0 were given"),
        (
            &["missing"],
            125,
            "exports no function \"missing\"; it has: ",
        ),
        (&[], 125, "The component is no program"),
        (&["ask-price", "tea"], 1, "test:values/asked@1.2.0.price"),
        (&["panics"], 1, "unreachable"),
    ] {
        let (code, out, err) = call(words);
        // What Rust's library writes before it gives up comes first.
        assert_eq!((code, out.as_str()), (Some(status), ""), "{words:?}: {err}");
        let environment = "wasi.environ";
        assert!(
            err.contains(message) || err.contains(environment),
            "{words:?}: {err}"
        );
    }
    let (code, _, err) = said(&skerry(&["call", "--timeout", "300ms", &values, "spins"]));
    assert_eq!(code, Some(124), "{err}");
    let (code, _, err) = said(&skerry(&["call", "--stack", "1m", &values, "nothing"]));
    assert_eq!(code, Some(125), "{err}");
}

#[test]
fn a_component_that_is_a_program_runs_without_a_functions_name() {
    let program = fixture("program.wasm");
    let run = |words: &[&str]| said(&skerry(&[&["call"], words].concat()));
    let (code, out, err) = run(&["--grant", "clock", &program]);
    assert_eq!((code, out.as_str()), (Some(1), ""), "{err}");
    assert!(err.contains("nothing to do for []"), "{err}");
    let (code, out, err) = run(&["--grant", "clock", &program, "_start", "file"]);
    assert_eq!((code, out.as_str(), err.as_str()), (Some(0), "true\n", ""));
    let (code, _, err) = run(&[&program]);
    assert_eq!(code, Some(1));
    assert!(err.contains("wasi:clocks/monotonic-clock@0.2"), "{err}");
    let (code, _, err) = run(&[module().to_str().unwrap()]);
    assert_eq!(code, Some(125));
    assert!(err.contains("Which function?"), "{err}");
}

#[test]
fn a_component_is_inspected_and_measured() {
    let values = fixture("values.wasm");
    let (status, stdout, _) = said(&skerry(&["inspect", &values]));
    assert_eq!(status, Some(0));
    for line in [
        "runtime: WebAssembly component\n",
        "  same-option: func(value: option<option<u32>>) -> option<option<u32>>\n",
        "  test:values/shapes@1.2.0#same-color: func(value: enum { red, green, blue }) -> enum { red, green, blue }\n",
        "imports:\n",
        "  test:values/asked@1.2.0.price: func(name: string) -> option<u32>\n",
    ] {
        assert!(stdout.contains(line), "{line}: {stdout}");
    }
    let json = skerry(&["inspect", "--format", "json", &values]);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    let exports = json["exports"].as_array().unwrap();
    let fib = exports.iter().find(|function| function["name"] == "fib");
    assert_eq!(fib.unwrap()["returns"], "u32");

    for (guest, words) in [
        (values.as_str(), &["fib", "1"][..]),
        (module().to_str().unwrap(), &[]),
    ] {
        let arguments = ["bench", "--count", "3", "--format", "json", guest];
        let output = skerry(&[&arguments[..], words].concat());
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        for row in ["create", "create from a snapshot"] {
            assert!(
                json["rows"][row]["median_us"].as_f64().unwrap() > 0.0,
                "{row}"
            );
        }
    }
}
