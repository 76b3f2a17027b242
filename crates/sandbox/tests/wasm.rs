//! WebAssembly modules: calls, imports, WASI, limits, hostile ones.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use skerry_sandbox::wasm::{Grants, Kind, Trap, Value, Wasm, WasmBuilder, WasmError};
use skerry_sandbox::{Backend, CallError, Status};

fn builder(text: &str) -> WasmBuilder {
    let module = wat::parse_str(text).expect("the test's module is one");
    Wasm::builder().module(module).backend(Backend::Soft)
}

fn module(text: &str) -> Wasm {
    builder(text).build().expect("the module loads")
}

const NUMBERS: &str = r#"(module
    (memory (export "memory") 1 4)
    (global $count (mut i32) (i32.const 0))
    (data (i32.const 8) "hello")
    (func (export "add") (param i32 i32) (result i32) (i32.add (local.get 0) (local.get 1)))
    (func (export "same64") (param i64) (result i64) (local.get 0))
    (func (export "same_f32") (param f32) (result f32) (local.get 0))
    (func (export "same_f64") (param f64) (result f64) (local.get 0))
    (func (export "swap") (param i32 i64) (result i64 i32) (local.get 1) (local.get 0))
    (func (export "root") (param f64) (result f64) (f64.sqrt (local.get 0)))
    (func (export "count") (result i32)
        (global.set $count (i32.add (global.get $count) (i32.const 1)))
        (global.get $count))
    (func (export "peek") (param i32) (result i32) (i32.load (local.get 0)))
    (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
    (func (export "divide") (param i32 i32) (result i32) (i32.div_s (local.get 0) (local.get 1)))
    (func (export "convert") (param f64) (result i32) (i32.trunc_f64_s (local.get 0)))
    (func (export "unreachable") unreachable)
    (func $deep (export "deep") (param i32) (result i32)
        (if (result i32) (i32.eqz (local.get 0))
            (then (i32.const 0))
            (else (i32.add (i32.const 1) (call $deep (i32.sub (local.get 0) (i32.const 1)))))))
    (func (export "spin") (loop (br 0)))
    (table 2 funcref)
    (elem (i32.const 0) $deep)
    (type $nothing (func))
    (func (export "through") (param i32) (call_indirect (type $nothing) (local.get 0)))
    (func (export "refer") (param funcref)))"#;

#[test]
fn numbers_pass_both_ways() {
    let mut wasm = module(NUMBERS);
    assert_eq!(wasm.call::<i32>("add", (i32::MAX, 1)).unwrap(), i32::MIN);
    for value in [0, -1, i64::MIN, i64::MAX] {
        assert_eq!(wasm.call::<i64>("same64", (value,)).unwrap(), value);
    }
    assert_eq!(wasm.call::<u64>("same64", (u64::MAX,)).unwrap(), u64::MAX);
    // A signalling NaN with a payload.
    let nan = f32::from_bits(0x7fa1_2345);
    let back: f32 = wasm.call("same_f32", (nan,)).unwrap();
    assert_eq!(back.to_bits(), nan.to_bits());
    let nan = f64::from_bits(0x7ff4_0000_dead_beef);
    let back: f64 = wasm.call("same_f64", (nan,)).unwrap();
    assert_eq!(back.to_bits(), nan.to_bits());
    assert_eq!(
        wasm.call::<(i64, i32)>("swap", (1_i32, 2_i64)).unwrap(),
        (2, 1)
    );
    assert_eq!(wasm.call::<f64>("root", (2.25,)).unwrap(), 1.5);
    let values = wasm.call_values("add", &[Value::I32(2), Value::I32(3)]);
    assert_eq!(values.unwrap(), [Value::I32(5)]);
}

#[test]
fn what_is_exported_is_told() {
    let mut wasm = module(NUMBERS);
    let exports = wasm.exports().unwrap();
    let swap = exports.iter().find(|export| export.name == "swap").unwrap();
    assert_eq!(swap.parameters, [Kind::I32, Kind::I64]);
    assert_eq!(swap.results, [Kind::I64, Kind::I32]);
    assert!(!exports.iter().any(|export| export.name == "refer"));
}

#[test]
fn wrong_calls_are_typed_errors_and_do_no_harm() {
    let mut wasm = module(NUMBERS);
    let missing = wasm.call::<()>("missing", ()).unwrap_err();
    assert!(matches!(missing, WasmError::NoExport(name) if name == "missing"));
    let few = wasm.call::<i32>("add", (1,)).unwrap_err();
    assert!(matches!(few, WasmError::Arguments(_)), "{few}");
    let other = wasm.call::<i32>("add", (1, 2.0)).unwrap_err();
    assert!(matches!(other, WasmError::Arguments(_)), "{other}");
    let refer = wasm.call::<()>("refer", ()).unwrap_err();
    assert!(matches!(refer, WasmError::Arguments(_)), "{refer}");
    let result = wasm.call::<f64>("add", (1, 2)).unwrap_err();
    assert!(
        matches!(&result, WasmError::Results { wanted, found, .. }
            if *wanted == [Kind::F64] && *found == [Kind::I32]),
        "{result}"
    );
    assert_eq!(wasm.call::<i32>("add", (1, 2)).unwrap(), 3);
}

#[test]
fn traps_are_typed_and_the_module_goes_on() {
    let mut wasm = module(NUMBERS);
    let mut trap = |name: &str, arguments: &[Value]| match wasm.call_values(name, arguments) {
        Err(WasmError::Trap(trap)) => trap,
        other => panic!("{name}: {other:?}"),
    };
    let i32 = Value::I32;
    assert_eq!(trap("unreachable", &[]), Trap::Unreachable);
    assert_eq!(trap("peek", &[i32(65533)]), Trap::MemoryOutOfBounds);
    assert_eq!(trap("peek", &[i32(-1)]), Trap::MemoryOutOfBounds);
    assert_eq!(trap("divide", &[i32(1), i32(0)]), Trap::DivisionByZero);
    assert_eq!(
        trap("divide", &[i32(i32::MIN), i32(-1)]),
        Trap::IntegerOverflow
    );
    assert_eq!(
        trap("convert", &[Value::F64(f64::NAN)]),
        Trap::BadConversion
    );
    assert_eq!(trap("convert", &[Value::F64(1e10)]), Trap::IntegerOverflow);
    assert_eq!(trap("deep", &[i32(i32::MAX)]), Trap::StackExhausted);
    assert_eq!(trap("through", &[i32(0)]), Trap::BadSignature);
    assert_eq!(trap("through", &[i32(1)]), Trap::NullCall);
    assert_eq!(trap("through", &[i32(2)]), Trap::TableOutOfBounds);
    assert_eq!(wasm.call::<i32>("deep", (5000,)).unwrap(), 5000);
    assert_eq!(*wasm.sandbox().status(), Status::Ready);
}

#[test]
fn memory_is_read_written_and_limited() {
    let mut wasm = module(NUMBERS);
    assert_eq!(wasm.memory_size().unwrap(), 65536);
    assert_eq!(wasm.read_memory(8, 5).unwrap(), b"hello");
    wasm.write_memory(65532, &[1, 2, 3, 4]).unwrap();
    assert_eq!(wasm.call::<i32>("peek", (65532,)).unwrap(), 0x0403_0201);
    for (at, len) in [(65533, 4), (u64::MAX, 1), (0, u64::MAX), (65536, 1)] {
        let error = wasm.read_memory(at, len).unwrap_err();
        assert!(matches!(error, WasmError::Range), "{error}");
    }
    assert!(matches!(
        wasm.write_memory(65533, &[0; 4]),
        Err(WasmError::Range)
    ));
    assert_eq!(wasm.call::<i32>("grow", (3,)).unwrap(), 1);
    assert_eq!(wasm.call::<i32>("grow", (1,)).unwrap(), -1);
    assert_eq!(wasm.memory_size().unwrap(), 4 * 65536);
    let mut small = builder(NUMBERS).memory(2 * 65536).build().unwrap();
    assert_eq!(small.call::<i32>("grow", (2,)).unwrap(), -1);
    assert_eq!(small.call::<i32>("grow", (1,)).unwrap(), 1);
    let mut bare = module("(module (func (export \"f\")))");
    assert!(matches!(bare.read_memory(0, 1), Err(WasmError::NoMemory)));
}

#[test]
fn a_snapshot_keeps_the_compiled_module_and_its_state() {
    let mut wasm = module(NUMBERS);
    assert_eq!(wasm.call::<i32>("count", ()).unwrap(), 1);
    let snapshot = wasm.snapshot().unwrap();
    assert_eq!(wasm.call::<i32>("count", ()).unwrap(), 2);
    wasm.restore(&snapshot).unwrap();
    assert_eq!(wasm.call::<i32>("count", ()).unwrap(), 2);
    for _ in 0..3 {
        let mut other = Wasm::from_snapshot_on(&snapshot, &Grants::new(), Backend::Soft).unwrap();
        assert_eq!(other.call::<i32>("count", ()).unwrap(), 2);
        assert_eq!(
            other.exports().unwrap().len(),
            wasm.exports().unwrap().len()
        );
    }
    // One that had another module.
    let mut wrong = module("(module)");
    wrong.restore(&snapshot).unwrap();
    assert_eq!(wrong.call::<i32>("count", ()).unwrap(), 2);
}

#[test]
fn fuel_ends_a_call_the_same_way_every_time() {
    let mut wasm = builder(NUMBERS).fuel(10_000).build().unwrap();
    let error = wasm.call::<()>("spin", ()).unwrap_err();
    assert!(matches!(error, WasmError::Trap(Trap::OutOfFuel)), "{error}");
    assert_eq!(wasm.call::<i32>("deep", (10,)).unwrap(), 10);
    let used = wasm.fuel_used().unwrap();
    assert!(used > 10 && used < 1000, "{used}");
    assert_eq!(wasm.call::<i32>("deep", (10,)).unwrap(), 10);
    assert_eq!(wasm.fuel_used().unwrap(), used);
}

#[test]
fn a_time_out_ends_a_module_that_spins_and_a_restore_mends_it() {
    let mut wasm = builder(NUMBERS)
        .call_timeout(Duration::from_millis(200))
        .build()
        .unwrap();
    let snapshot = wasm.snapshot().unwrap();
    let error = wasm.call::<()>("spin", ()).unwrap_err();
    assert!(
        matches!(&error, WasmError::Call(error) if matches!(**error, CallError::TimedOut(_))),
        "{error}"
    );
    assert!(matches!(wasm.sandbox().status(), Status::Poisoned(_)));
    wasm.restore(&snapshot).unwrap();
    assert_eq!(wasm.call::<i32>("add", (1, 2)).unwrap(), 3);
}

const IMPORTS: &str = r#"(module
    (import "host" "mix" (func $mix (param i32 i64 f32 f64) (result f64)))
    (import "host" "note" (func $note (param i32)))
    (import "env" "fails" (func $fails (result i32)))
    (import "env" "lies" (func $lies (result i32)))
    (import "env" "absent" (func $absent))
    (func (export "mix") (result f64)
        (call $mix (i32.const -1) (i64.const 2) (f32.const 0.5) (f64.const 0.25)))
    (func (export "note") (param i32) (call $note (local.get 0)))
    (func (export "fails") (result i32) (call $fails))
    (func (export "lies") (result i32) (call $lies))
    (func (export "absent") (call $absent)))"#;

#[test]
fn imports_are_the_functions_that_are_granted() {
    let notes = Arc::new(Mutex::new(Vec::new()));
    let kept = notes.clone();
    let grants = Grants::new()
        .import("host", "mix", |a: i32, b: i64, c: f32, d: f64| {
            f64::from(a) + b as f64 + f64::from(c) + d
        })
        .import("host", "note", move |n: i32| kept.lock().unwrap().push(n))
        .import("env", "fails", || Err::<i32, _>("not today"))
        .import("env", "lies", || "text".to_owned());
    let mut wasm = builder(IMPORTS).grants(&grants).build().unwrap();
    assert_eq!(wasm.call::<f64>("mix", ()).unwrap(), 1.75);
    wasm.call::<()>("note", (7,)).unwrap();
    assert_eq!(*notes.lock().unwrap(), [7]);
    let error = wasm.call::<i32>("fails", ()).unwrap_err();
    assert!(
        matches!(&error, WasmError::Host { name, message }
            if name == "env.fails" && message == "not today"),
        "{error}"
    );
    let error = wasm.call::<i32>("lies", ()).unwrap_err();
    assert!(matches!(&error, WasmError::Host { .. }), "{error}");
    let error = wasm.call::<()>("absent", ()).unwrap_err();
    assert!(
        matches!(&error, WasmError::NotGranted { import, needs }
            if import == "env.absent" && needs == "env.absent"),
        "{error}"
    );
    assert_eq!(wasm.call::<f64>("mix", ()).unwrap(), 1.75);
}

#[test]
fn an_import_that_is_no_function_on_numbers_is_refused() {
    for text in [
        r#"(module (import "env" "memory" (memory 1)))"#,
        r#"(module (import "env" "g" (global i32)))"#,
        r#"(module (import "env" "f" (func (param externref))))"#,
        r#"(module (import "env" "f" (func (result i32 i32))))"#,
        r#"(module (import "wasi_snapshot_preview1" "fd_write" (func)))"#,
    ] {
        let error = builder(text).build().unwrap_err();
        assert!(matches!(error, WasmError::Import(_)), "{text}: {error}");
    }
}

const PROGRAM: &[u8] = include_bytes!("fixtures/wasi/program.wasm");

/// Runs the Rust program with these arguments: what it returned and wrote.
fn program(args: &[&str], grants: Grants) -> (Result<i32, WasmError>, String, String) {
    let (out, err) = (
        Arc::new(Mutex::new(Vec::new())),
        Arc::new(Mutex::new(Vec::new())),
    );
    let (to_out, to_err) = (out.clone(), err.clone());
    let args = std::iter::once("program").chain(args.iter().copied());
    let grants = grants
        .args(args)
        .stdout(move |bytes| to_out.lock().unwrap().extend(bytes))
        .stderr(move |bytes| to_err.lock().unwrap().extend(bytes));
    let wasm = Wasm::builder()
        .module(PROGRAM)
        .backend(Backend::Soft)
        .grants(&grants);
    let ended = wasm.build().expect("the program loads").run();
    let text = |bytes: Arc<Mutex<Vec<u8>>>| String::from_utf8(bytes.lock().unwrap().clone());
    (ended, text(out).unwrap(), text(err).unwrap())
}

#[test]
fn a_rust_program_for_wasi_runs() {
    let (ended, out, err) = program(&["env"], Grants::new().clock().env([("GREETING", "hello")]));
    assert_eq!(
        (ended.unwrap(), out.as_str(), err.as_str()),
        (0, "hello\n", "")
    );

    let text = Mutex::new(b"b a b  c a b".to_vec());
    let stdin = move |most: u32| {
        let mut text = text.lock().unwrap();
        let now = text.len().min(most as usize).min(5);
        text.drain(..now).collect()
    };
    let (ended, out, _) = program(&["count"], Grants::new().clock().stdin(stdin).random());
    assert_eq!(ended.unwrap(), 0);
    assert_eq!(out, "[(\"a\", 2), (\"b\", 3), (\"c\", 1)]\n");

    let clock = Mutex::new(1_000_000_000_000_u64);
    let clock = move |_| {
        let mut now = clock.lock().unwrap();
        *now += 1_000_000;
        *now
    };
    let (ended, out, _) = program(&["time"], Grants::new().clock_with(clock));
    assert_eq!((ended.unwrap(), out.as_str()), (0, "1000 true\n"));
    let (ended, out, _) = program(&["time"], Grants::new().clock());
    assert_eq!(ended.unwrap(), 0);
    let seconds: u64 = out.split(' ').next().unwrap().parse().unwrap();
    assert!(seconds > 1_600_000_000, "{seconds}");
}

#[test]
fn a_program_ends_with_its_code_or_its_panic() {
    let clock = || Grants::new().clock();
    assert_eq!(program(&["exit", "7"], clock()).0.unwrap(), 7);
    assert_eq!(program(&["exit", "0"], clock()).0.unwrap(), 0);
    let (ended, _, err) = program(&["other"], clock());
    assert_eq!(ended.unwrap(), 2);
    assert_eq!(err, "nothing to do for [\"other\"]\n");
    let (ended, _, err) = program(&["panic"], clock().env([("A", "B")]));
    assert!(matches!(ended, Err(WasmError::Trap(Trap::Unreachable))));
    assert!(err.contains("on purpose"), "{err}");
}

#[test]
fn what_a_program_is_not_granted_ends_its_call() {
    let ended = |args: &[&str], grants: Grants| match program(args, grants).0 {
        Err(WasmError::NotGranted { import, needs }) => (import, needs),
        other => panic!("{args:?}: {other:?}"),
    };
    let wasi = |name: &str| format!("wasi_snapshot_preview1.{name}");
    assert_eq!(
        ended(&["time"], Grants::new()),
        (wasi("clock_time_get"), "wasi.clock".to_owned())
    );
    let clock = || Grants::new().clock();
    assert_eq!(
        ended(&["env"], clock()),
        (wasi("environ_sizes_get"), "wasi.environ".to_owned())
    );
    assert_eq!(
        ended(&["count"], clock()),
        (wasi("fd_read"), "wasi.stdin".to_owned())
    );
    assert_eq!(
        ended(&["count"], clock().stdin(|_| Vec::new())),
        (wasi("random_get"), "wasi.random".to_owned())
    );
    // No folder is there to open files in: the program's own library says so.
    let (ended, out, _) = program(&["file"], clock());
    assert_eq!((ended.unwrap(), out.as_str()), (0, "true\n"));
}

/// A module whose function calls WASI with addresses that lie.
#[test]
fn wasi_with_wild_addresses_is_an_errno() {
    const FAULT: i32 = 21;
    const BADF: i32 = 8;
    let text = r#"(module
        (import "wasi_snapshot_preview1" "fd_write"
            (func $write (param i32 i32 i32 i32) (result i32)))
        (import "wasi_snapshot_preview1" "fd_read"
            (func $read (param i32 i32 i32 i32) (result i32)))
        (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
        (import "wasi_snapshot_preview1" "args_get" (func $args (param i32 i32) (result i32)))
        (import "wasi_snapshot_preview1" "clock_time_get"
            (func $clock (param i32 i64 i32) (result i32)))
        (memory (export "memory") 1)
        (func (export "write") (param i32 i32 i32 i32) (result i32)
            (call $write (local.get 0) (local.get 1) (local.get 2) (local.get 3)))
        (func (export "read") (param i32 i32 i32 i32) (result i32)
            (call $read (local.get 0) (local.get 1) (local.get 2) (local.get 3)))
        (func (export "random") (param i32 i32) (result i32)
            (call $random (local.get 0) (local.get 1)))
        (func (export "args") (param i32 i32) (result i32)
            (call $args (local.get 0) (local.get 1)))
        (func (export "clock") (param i32 i32) (result i32)
            (call $clock (local.get 0) (i64.const 0) (local.get 1))))"#;
    let grants = Grants::new()
        .stdout(|_| ())
        .stdin(|len| vec![b'x'; len as usize])
        .random()
        .clock()
        .args(["a", "b"]);
    let mut wasm = builder(text).grants(&grants).build().unwrap();
    let mut call = |name: &str, arguments: &[i32]| {
        let values: Vec<Value> = arguments.iter().copied().map(Value::I32).collect();
        match wasm.call_values(name, &values).unwrap()[..] {
            [Value::I32(errno)] => errno,
            _ => panic!("{name}"),
        }
    };
    assert_eq!(call("write", &[1, -8, 1, 0]), FAULT);
    assert_eq!(call("write", &[1, 65530, 1, 0]), FAULT);
    assert_eq!(call("write", &[1, 0, 0, 65533]), FAULT);
    assert_eq!(call("write", &[1, 0, -1, 0]), FAULT);
    assert_eq!(call("write", &[3, 0, 0, 0]), BADF);
    assert_eq!(call("write", &[0, 0, 0, 0]), BADF);
    assert_eq!(call("read", &[0, -1, 1, 0]), FAULT);
    assert_eq!(call("read", &[1, 0, 0, 0]), BADF);
    assert_eq!(call("random", &[65535, 2]), FAULT);
    assert_eq!(call("random", &[0, -1]), FAULT);
    assert_eq!(call("random", &[0, 65536]), 0);
    assert_eq!(call("args", &[-1, 0]), FAULT);
    assert_eq!(call("args", &[0, 65535]), FAULT);
    assert_eq!(call("clock", &[0, 65530]), FAULT);
    assert_eq!(call("clock", &[9, 0]), 28);
    assert_eq!(call("clock", &[0, 0]), 0);
}

#[test]
fn what_is_no_module_is_a_typed_error() {
    let mut garbage: Vec<Vec<u8>> = vec![
        vec![],
        b"\0asm".to_vec(),
        b"\0asm\x01\0\0\0\xff\xff\xff\xff\xff".to_vec(),
        // A component.
        b"\0asm\x0d\0\x01\0".to_vec(),
        vec![0xff; 4096],
    ];
    // A module cut anywhere, and with bytes changed.
    let whole = wat::parse_str(NUMBERS).unwrap();
    garbage.extend(
        (0..whole.len())
            .step_by(37)
            .map(|len| whole[..len].to_vec()),
    );
    for n in (8..whole.len()).step_by(29) {
        let mut bytes = whole.clone();
        bytes[n] ^= 0xff;
        garbage.push(bytes);
    }
    for bytes in garbage {
        let built = Wasm::builder()
            .module(bytes)
            .backend(Backend::Soft)
            .fuel(1_000_000)
            .build();
        match built {
            // A change may leave it one.
            Ok(_) | Err(WasmError::Module(_) | WasmError::Import(_) | WasmError::Trap(_)) => {}
            Err(other) => panic!("{other:?}"),
        }
    }
}

#[test]
fn modules_that_want_too_much_are_typed_errors() {
    let large = builder("(module (memory 65536))").build().unwrap_err();
    assert!(
        matches!(large, WasmError::Trap(Trap::OutOfMemory)),
        "{large:?}"
    );
    let table = builder("(module (table 9000000 funcref))")
        .build()
        .unwrap_err();
    assert!(
        matches!(table, WasmError::Trap(Trap::OutOfMemory)),
        "{table:?}"
    );
    let start = builder("(module (func $f unreachable) (start $f))")
        .build()
        .unwrap_err();
    assert!(
        matches!(start, WasmError::Trap(Trap::Unreachable)),
        "{start:?}"
    );
    let spin = builder("(module (func $f (loop (br 0))) (start $f))")
        .fuel(1000)
        .build();
    assert!(matches!(spin, Err(WasmError::Trap(Trap::OutOfFuel))));
    let segment = builder("(module (memory 1) (data (i32.const 65536) \"x\"))")
        .build()
        .unwrap_err();
    assert!(
        matches!(segment, WasmError::Trap(Trap::MemoryOutOfBounds)),
        "{segment:?}"
    );
    // More than the heap has: the engine gives up, which the sandbox reports.
    let many = format!(
        "(module {})",
        "(func (param i64) (result i64) (local.get 0))".repeat(20_000)
    );
    let full = builder(&many).heap(64 << 10).build().unwrap_err();
    assert!(
        matches!(&full, WasmError::Call(error) if matches!(**error, CallError::OutOfMemory { .. })),
        "{full:?}"
    );
}

#[test]
fn what_of_webassembly_there_is() {
    for (there, text) in [
        (true, "(module (memory 1) (memory 1))"),
        (
            true,
            "(module (func $f) (func (export \"g\") (return_call $f)))",
        ),
        (
            true,
            "(module (global i32 (i32.add (i32.const 1) (i32.const 2))))",
        ),
        (
            false,
            "(module (func (result v128) (v128.const i64x2 1 2)))",
        ),
        (false, "(module (memory i64 1))"),
        (false, "(module (memory 1 1 shared))"),
        (false, "(module (type (struct)))"),
        (false, "(module (tag (param i32)))"),
        (false, "(component)"),
    ] {
        match builder(text).build() {
            Ok(_) => assert!(there, "{text}"),
            Err(WasmError::Module(why)) => assert!(!there, "{text}: {why}"),
            Err(other) => panic!("{text}: {other}"),
        }
    }
}
