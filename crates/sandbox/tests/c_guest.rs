//! A guest in C, with the header and the library of `guest/sandbox-rt`.

#[expect(
    dead_code,
    reason = "of the helpers, only the one that builds guests is used"
)]
mod common;
mod plain;

use std::path::{Path, PathBuf};
use std::process::Command;

use skerry_sandbox::{Backend, BuildError, Builder, CallError, Fault, Sandbox};

/// What the other tests' helpers run on.
fn backend() -> Backend {
    Backend::Soft
}

/// How the guest is compiled.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Sse,
    Plain,
}

/// Compiles the example, or says why that can't be done here.
fn compiled(kind: Kind) -> Result<PathBuf, String> {
    let rt = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guest/sandbox-rt");
    let (folder, flags): (PathBuf, &[&str]) = match kind {
        Kind::Sse => {
            let built = common::guest("sandbox-testguest");
            (built.parent().expect("a folder").to_owned(), &[])
        }
        Kind::Plain => (plain::folder()?, &["-mgeneral-regs-only", "-mno-sse"]),
    };
    let threads = std::thread::current().name().unwrap_or("test").to_owned();
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("c-{kind:?}-{threads}"));
    let compiler = Command::new("cc")
        .args(["-O2", "-Wall", "-Wextra", "-Werror"])
        .args(flags)
        .args([
            "-ffreestanding",
            "-fno-stack-protector",
            "-nostdlib",
            "-static",
        ])
        .arg("-I")
        .arg(rt.join("include"))
        .arg(rt.join("c/example/guest.c"))
        .arg(folder.join("libskerry_sandbox.a"))
        .arg("-o")
        .arg(&program)
        .status();
    match compiler {
        Ok(status) => assert!(status.success(), "the example compiles"),
        Err(error) => return Err(format!("no C compiler: {error}")),
    }
    Ok(program)
}

fn builder(program: PathBuf) -> Builder {
    Sandbox::builder()
        .guest(program)
        .backend(backend())
        .host_fn("host_add", |a: i32, b: i32| a.wrapping_add(b))
        .host_fn("host_name", |n: i32| match n {
            0.. => Ok(format!("number {n}")),
            _ => Err("no name for a negative number"),
        })
}

/// What every C guest does, on whichever backend.
fn behaves(builder: Builder) {
    let mut sandbox = builder.build().expect("the guest starts");
    assert_eq!(sandbox.call::<i32>("initialised", ()).unwrap(), 42);
    assert_eq!(sandbox.call::<i32>("add", (i32::MAX, 1)).unwrap(), i32::MIN);
    assert_eq!(sandbox.call::<i64>("count", ()).unwrap(), 1);
    sandbox.call::<()>("nothing", ()).unwrap();
    assert!(sandbox.call::<bool>("echo_bool", (true,)).unwrap());
    assert_eq!(
        sandbox.call::<u32>("echo_u32", (u32::MAX,)).unwrap(),
        u32::MAX
    );
    assert_eq!(
        sandbox.call::<i64>("echo_i64", (i64::MIN,)).unwrap(),
        i64::MIN
    );
    assert_eq!(
        sandbox.call::<u64>("echo_u64", (u64::MAX,)).unwrap(),
        u64::MAX
    );
    let nan = f32::from_bits(0x7fa1_2345);
    let back: f32 = sandbox.call("echo_f32", (nan,)).unwrap();
    assert_eq!(back.to_bits(), nan.to_bits());
    assert_eq!(sandbox.call::<f64>("echo_f64", (-0.5,)).unwrap(), -0.5);
    assert_eq!(
        sandbox.call::<String>("echo_string", ("grüße",)).unwrap(),
        "grüße"
    );
    assert_eq!(sandbox.call::<String>("echo_string", ("",)).unwrap(), "");
    let bytes: Vec<u8> = (0..=255).collect();
    assert_eq!(
        sandbox
            .call::<Vec<u8>>("echo_bytes", (&bytes[..],))
            .unwrap(),
        bytes
    );
    let back: Vec<u8> = sandbox.call("reverse", (&bytes[..],)).unwrap();
    assert!(back.iter().rev().eq(&bytes));
    let sum: u64 = (1..=100).map(|n| 4 * n).sum();
    let before = sandbox.metrics().allocated;
    // What `realloc` keeps is zero where `calloc` made it.
    assert_eq!(sandbox.call::<u64>("blocks", (100_u32,)).unwrap(), sum);
    assert_eq!(sandbox.metrics().allocated, before, "all was freed");
    assert_eq!(sandbox.call::<String>("ask", (40,)).unwrap(), "number 42");
    assert_eq!(sandbox.metrics().allocated, before, "all was freed");

    let refused = sandbox.call::<i32>("refuse", ("x",)).unwrap_err();
    assert!(
        matches!(&refused, CallError::Failed(why) if why == "not today"),
        "{refused}"
    );
    let host = sandbox.call::<String>("ask", (-40,)).unwrap_err();
    assert!(
        matches!(&host, CallError::Failed(why) if why == "no name for a negative number"),
        "{host}"
    );
    let arity = sandbox.call::<i32>("add", (1,)).unwrap_err();
    assert!(
        matches!(arity, CallError::Arity { given: 1, .. }),
        "{arity}"
    );
    let kind = sandbox.call::<i32>("add", (1, 2_i64)).unwrap_err();
    assert!(
        matches!(&kind, CallError::ArgumentType { index: 1, expected, found, .. }
            if expected == "i32" && found == "i64"),
        "{kind}"
    );
    let unknown = sandbox.call::<i32>("absent", ()).unwrap_err();
    assert!(matches!(unknown, CallError::NoFunction { .. }));
    assert_eq!(sandbox.call::<i32>("add", (1, 2)).unwrap(), 3);

    let snapshot = sandbox.snapshot().unwrap();
    let fault = sandbox.call::<u64>("peek", (8_u64,)).unwrap_err();
    assert!(
        matches!(
            fault,
            CallError::Fault(Fault::AccessViolation { address: 8, .. })
        ),
        "{fault}"
    );
    sandbox.restore(&snapshot).unwrap();
    let panic = sandbox.call::<()>("give_up", ()).unwrap_err();
    assert!(matches!(&panic, CallError::Panicked(why) if why.contains("given up in C")));
    sandbox.restore(&snapshot).unwrap();
    assert_eq!(sandbox.call::<i64>("count", ()).unwrap(), 2);
}

#[test]
fn a_guest_in_c_is_called_like_any() {
    match compiled(Kind::Sse) {
        Ok(program) => {
            let mut sandbox = builder(program.clone()).build().unwrap();
            assert_eq!(sandbox.call::<f64>("half", (3.0,)).unwrap(), 1.5);
            let known = sandbox.description();
            let add = known.exports.iter().find(|function| function.name == "add");
            assert_eq!(add.unwrap().to_string(), "add(i32, i32) -> i32");
            behaves(builder(program));
        }
        Err(why) => println!("skipped: {why}"),
    }
}

#[test]
fn a_guest_in_c_without_sse_is_called_like_any() {
    match compiled(Kind::Plain) {
        Ok(program) => {
            match plain::sse_instructions(&program) {
                Some(found) => assert_eq!(found, [""; 0], "SSE registers are used"),
                None => println!("not checked for SSE registers: no objdump"),
            }
            behaves(builder(program.clone()));
            match builder(program.clone()).backend(Backend::Kvm).build() {
                Ok(_) => behaves(builder(program).backend(Backend::Kvm)),
                Err(error @ BuildError::Unusable { .. }) => println!("not on KVM: {error}"),
                Err(error) => panic!("the guest doesn't start on KVM: {error:?}"),
            }
        }
        Err(why) => println!("skipped: {why}"),
    }
}
