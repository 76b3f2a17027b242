//! WebAssembly components: values of every type, imports, WASI 0.2, limits, hostile ones.

use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use skerry_sandbox::component::{
    Component, ComponentBuilder, Grants, Type, Val, WasmError, Wit, WitValue, compile, is_component,
};
use skerry_sandbox::wasm::{Trap, Wasm};
use skerry_sandbox::{Backend, CallError, Status};

const VALUES: &[u8] = include_bytes!("fixtures/component/values.wasm");
const PROGRAM: &[u8] = include_bytes!("fixtures/component/program.wasm");
const SHAPES: &str = "test:values/shapes@1.2.0";
const ASKED: &str = "test:values/asked@1.2.0";

/// What a test uses as often as this is compiled once.
fn compiled(component: &'static [u8], fuel: bool) -> Vec<u8> {
    static MADE: Mutex<Vec<(usize, bool, Vec<u8>)>> = Mutex::new(Vec::new());
    let mut made = MADE.lock().unwrap();
    let key = (component.as_ptr().addr(), fuel);
    if let Some((.., artifact)) = made.iter().find(|(at, fuel, _)| (*at, *fuel) == key) {
        return artifact.clone();
    }
    let artifact = compile(component, fuel).expect("it compiles");
    made.push((key.0, key.1, artifact.clone()));
    artifact
}

/// What Rust's library needs to tell of a panic.
fn panics() -> Grants {
    Grants::new().env([("RUST_BACKTRACE", "0")]).stderr(drop)
}

fn builder() -> ComponentBuilder {
    Component::builder()
        .compiled(compiled(VALUES, false))
        .backend(Backend::Soft)
        .grants(&panics())
}

fn values() -> Component {
    builder().build().expect("the component loads")
}

fn text(text: &str) -> ComponentBuilder {
    let component = wat::parse_str(text).expect("the test's component is one");
    Component::builder()
        .component(component)
        .backend(Backend::Soft)
}

#[test]
fn values_of_every_type_pass_both_ways() {
    fn same<T: WitValue + Clone + PartialEq + std::fmt::Debug>(
        component: &mut Component,
        name: &str,
        values: &[T],
    ) {
        for value in values {
            let back: T = component.call(name, (value.clone(),)).unwrap();
            assert_eq!(back, *value, "{name}");
        }
    }
    let mut all = values();
    let component = &mut all;
    same(component, "same-bool", &[false, true]);
    same(component, "same-s8", &[i8::MIN, -1, 0, i8::MAX]);
    same(component, "same-u8", &[0, u8::MAX]);
    same(component, "same-s16", &[i16::MIN, i16::MAX]);
    same(component, "same-u16", &[0, u16::MAX]);
    same(component, "same-s32", &[i32::MIN, i32::MAX]);
    same(component, "same-u32", &[0, u32::MAX]);
    same(component, "same-s64", &[i64::MIN, i64::MAX]);
    same(component, "same-u64", &[0, u64::MAX]);
    same(component, "same-f32", &[f32::MIN, -0.0, f32::INFINITY]);
    same(
        component,
        "same-f64",
        &[f64::MAX, 5e-324, f64::NEG_INFINITY],
    );
    let nan: f64 = component.call("same-f64", (f64::NAN,)).unwrap();
    assert!(nan.is_nan());
    same(
        component,
        "same-char",
        &['\0', '\u{d7ff}', '\u{e000}', '\u{10ffff}'],
    );
    let long = "é".repeat(100_000);
    same(
        component,
        "same-string",
        &[String::new(), "a\0b".into(), long],
    );
    let bytes: Vec<u8> = (0..100_000_u32).map(|n| n as u8).collect();
    same(component, "same-bytes", &[Vec::new(), vec![0], bytes]);
    let lists = vec![vec![], vec![String::new(), "x".into()]];
    same(component, "same-lists", &[vec![], lists]);
    same(
        component,
        "same-option",
        &[None, Some(None), Some(Some(7_u32))],
    );
    same(
        component,
        "same-result",
        &[Ok::<_, u8>("good".to_owned()), Err(255)],
    );
    same(component, "same-tuple", &[(1_u8, "two".to_owned(), true)]);
    component.call::<()>("nothing", ()).unwrap();
}

fn point(x: i32, y: i32) -> Val {
    Val::Record(vec![("x".into(), Val::S32(x)), ("y".into(), Val::S32(y))])
}

#[test]
fn records_variants_enums_and_flags_pass() {
    let mut component = values();
    let mut same = |name: &str, value: Val| {
        let name = format!("{SHAPES}#{name}");
        let back = component.call_values(&name, std::slice::from_ref(&value));
        assert_eq!(back.unwrap(), Some(value));
    };
    let person = Val::Record(vec![
        ("name".into(), Val::String("Ann".into())),
        ("age".into(), Val::Option(Some(Box::new(Val::U8(255))))),
        ("tags".into(), Val::List(vec![])),
    ]);
    same("same-person", person);
    same("same-shape", Val::Variant("dot".into(), None));
    let circle = Val::Variant("circle".into(), Some(Box::new(Val::F64(-1.5))));
    same("same-shape", circle);
    let points = Val::List(vec![point(0, 0), point(4, 0), point(0, i32::MIN)]);
    same(
        "same-shape",
        Val::Variant("polygon".into(), Some(Box::new(points))),
    );
    same("same-color", Val::Enum("green".into()));
    same("same-rights", Val::Flags(vec![]));
    same(
        "same-rights",
        Val::Flags(vec!["read".into(), "exec".into()]),
    );

    // Fields are found by their names.
    let turned = Val::Record(vec![
        ("tags".into(), Val::List(vec![Val::String("x".into())])),
        ("age".into(), Val::Option(None)),
        ("name".into(), Val::String(String::new())),
    ]);
    let name = format!("{SHAPES}#same-person");
    let Some(Val::Record(fields)) = component.call_values(&name, &[turned]).unwrap() else {
        panic!("no record");
    };
    let names: Vec<_> = fields.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["name", "age", "tags"]);

    let area = format!("{SHAPES}#area");
    let polygon =
        |points: Vec<Val>| Val::Variant("polygon".into(), Some(Box::new(Val::List(points))));
    let square = polygon(vec![point(0, 0), point(2, 0), point(2, 2), point(0, 2)]);
    let found: Result<f64, String> = component.call(&area, (square,)).unwrap();
    assert_eq!(found, Ok(4.0));
    let found: Result<f64, String> = component.call(&area, (polygon(vec![]),)).unwrap();
    assert_eq!(found, Err("0 points make no polygon".into()));
}

#[test]
fn what_is_exported_and_imported_is_told() {
    let mut component = values();
    let exports = component.exports().unwrap();
    let told = |name: &str| {
        let found = exports.iter().find(|func| func.name == name);
        found.unwrap_or_else(|| panic!("{name}")).to_string()
    };
    assert_eq!(
        told("same-tuple"),
        "same-tuple: func(value: tuple<u8, string, bool>) -> tuple<u8, string, bool>"
    );
    assert_eq!(told("nothing"), "nothing: func()");
    assert_eq!(
        told(&format!("{SHAPES}#area")),
        format!(
            "{SHAPES}#area: func(value: variant {{ dot, circle(f64), \
             polygon(list<record {{ x: s32, y: s32 }}>) }}) -> result<f64, string>"
        )
    );
    let imports = component.imports().unwrap();
    let price = imports
        .iter()
        .find(|func| func.name == format!("{ASKED}.price"));
    assert_eq!(
        price.unwrap().result,
        Some(Type::Option(Box::new(Type::U32)))
    );
}

#[test]
fn wrong_calls_are_typed_errors_and_do_no_harm() {
    let mut component = values();
    for name in [
        "missing",
        "no:such/thing#f",
        "",
        "#",
        &format!("{SHAPES}#none"),
        SHAPES,
    ] {
        let error = component.call::<()>(name, ()).unwrap_err();
        assert!(
            matches!(&error, WasmError::NoExport(missing) if missing == name),
            "{error}"
        );
    }
    let color = format!("{SHAPES}#same-color");
    for (name, arguments) in [
        ("same-u8", vec![]),
        ("same-u8", vec![Val::U8(1), Val::U8(2)]),
        ("same-u8", vec![Val::U32(1)]),
        (
            "same-option",
            vec![Val::Option(Some(Box::new(Val::U32(1))))],
        ),
        ("same-tuple", vec![Val::Tuple(vec![Val::U8(1)])]),
        (&color, vec![Val::Enum("mauve".into())]),
    ] {
        let error = component.call_values(name, &arguments).unwrap_err();
        assert!(matches!(error, WasmError::Arguments(_)), "{name}: {error}");
    }
    let error = component.call::<String>("same-u8", (1_u8,)).unwrap_err();
    assert!(
        matches!(&error, WasmError::Result { wanted, .. } if wanted == "string"),
        "{error}"
    );
    assert_eq!(component.call::<u8>("same-u8", (1_u8,)).unwrap(), 1);
}

#[test]
fn a_trap_is_typed_and_a_restore_makes_the_component_callable_again() {
    let mut component = values();
    assert_eq!(component.call::<u32>("count", ()).unwrap(), 1);
    let snapshot = component.snapshot().unwrap();
    let error = component.call::<()>("panics", ()).unwrap_err();
    assert!(
        matches!(error, WasmError::Trap(Trap::Unreachable)),
        "{error}"
    );
    // The component model's own rule: what trapped is not entered again.
    let error = component.call::<u32>("count", ()).unwrap_err();
    assert!(matches!(error, WasmError::Ended), "{error}");
    assert_eq!(*component.sandbox().status(), Status::Ready);
    component.restore(&snapshot).unwrap();
    assert_eq!(component.call::<u32>("count", ()).unwrap(), 2);
    let error = component.call::<u32>("deep", (u32::MAX,)).unwrap_err();
    assert!(
        matches!(
            error,
            WasmError::Trap(Trap::StackExhausted | Trap::MemoryOutOfBounds)
        ),
        "{error}"
    );
    component.restore(&snapshot).unwrap();
    assert_eq!(component.call::<u32>("deep", (1000_u32,)).unwrap(), 1000);
    for _ in 0..3 {
        let other = Component::from_snapshot_on(&snapshot, &Grants::new(), Backend::Soft);
        assert_eq!(other.unwrap().call::<u32>("count", ()).unwrap(), 2);
    }
}

#[test]
fn every_trap_of_the_core_is_told_apart() {
    let module = r#"(component
        (core module $m
            (memory 1)
            (table 2 funcref)
            (elem (i32.const 0) $deep)
            (type $nothing (func))
            (func (export "peek") (param i32) (result i32) (i32.load (local.get 0)))
            (func (export "divide") (param i32 i32) (result i32)
                (i32.div_s (local.get 0) (local.get 1)))
            (func (export "convert") (param f64) (result i32) (i32.trunc_f64_s (local.get 0)))
            (func (export "through") (param i32) (call_indirect (type $nothing) (local.get 0)))
            (func $deep (export "deep") (param i32) (result i32) (call $deep (local.get 0))))
        (core instance $i (instantiate $m))
        (func (export "peek") (param "a" u32) (result u32) (canon lift (core func $i "peek")))
        (func (export "divide") (param "a" s32) (param "b" s32) (result s32)
            (canon lift (core func $i "divide")))
        (func (export "convert") (param "a" f64) (result s32)
            (canon lift (core func $i "convert")))
        (func (export "through") (param "a" u32) (canon lift (core func $i "through")))
        (func (export "deep") (param "a" u32) (result u32) (canon lift (core func $i "deep"))))"#;
    let mut component = text(module).build().unwrap();
    let snapshot = component.snapshot().unwrap();
    for (name, arguments, wanted) in [
        ("peek", vec![Val::U32(65533)], Trap::MemoryOutOfBounds),
        ("peek", vec![Val::U32(u32::MAX)], Trap::MemoryOutOfBounds),
        (
            "divide",
            vec![Val::S32(1), Val::S32(0)],
            Trap::DivisionByZero,
        ),
        (
            "divide",
            vec![Val::S32(i32::MIN), Val::S32(-1)],
            Trap::IntegerOverflow,
        ),
        ("convert", vec![Val::F64(f64::NAN)], Trap::BadConversion),
        ("convert", vec![Val::F64(1e10)], Trap::IntegerOverflow),
        ("through", vec![Val::U32(0)], Trap::BadSignature),
        ("through", vec![Val::U32(1)], Trap::NullCall),
        ("through", vec![Val::U32(2)], Trap::TableOutOfBounds),
        ("deep", vec![Val::U32(0)], Trap::StackExhausted),
    ] {
        match component.call_values(name, &arguments) {
            Err(WasmError::Trap(trap)) => assert_eq!(trap, wanted, "{name}"),
            other => panic!("{name}: {other:?}"),
        }
        component.restore(&snapshot).unwrap();
    }
}

#[test]
fn a_component_that_lies_about_its_values_breaks_its_interface() {
    let component = |kind: &str, memory: &str| {
        let component = format!(
            r#"(component
            (core module $m
                (memory (export "memory") 1)
                (data (i32.const 8) "{memory}")
                (func (export "f") (result i32) (i32.const 8)))
            (core instance $i (instantiate $m))
            {kind})"#
        );
        let mut component = text(&component).build().unwrap();
        component.call_values("f", &[]).unwrap_err()
    };
    let returns = |kind: &str| {
        format!(
            r#"(func (export "f") (result {kind})
            (canon lift (core func $i "f") (memory (core memory $i "memory"))))"#
        )
    };
    // A string at 16 of 2 bytes that are no UTF-8; a string of 4 GiB; a char that is none.
    for (kind, memory) in [
        ("string", r"\10\00\00\00\02\00\00\00\ff\fe"),
        ("string", r"\10\00\00\00\ff\ff\ff\ff"),
        ("(list u64)", r"\10\00\00\00\ff\ff\ff\0f"),
    ] {
        let error = component(&returns(kind), memory);
        assert!(
            matches!(
                error,
                WasmError::Interface(_) | WasmError::Trap(Trap::MemoryOutOfBounds)
            ),
            "{kind}: {error:?}"
        );
    }
    let one = component(&returns("(option char)"), r"\07\00\00\00");
    assert!(matches!(one, WasmError::Interface(_)), "{one:?}");
}

#[test]
fn fuel_ends_a_call_the_same_way_every_time() {
    let mut component = Component::builder()
        .compiled(compiled(VALUES, true))
        .backend(Backend::Soft)
        .fuel(1_000_000)
        .build()
        .unwrap();
    let snapshot = component.snapshot().unwrap();
    let error = component.call::<()>("spins", ()).unwrap_err();
    assert!(matches!(error, WasmError::Trap(Trap::OutOfFuel)), "{error}");
    component.restore(&snapshot).unwrap();
    // The first call also runs what the program's own library does once.
    component.call::<()>("nothing", ()).unwrap();
    assert_eq!(component.call::<u32>("fib", (10_u32,)).unwrap(), 55);
    let used = component.fuel_used().unwrap();
    assert!((500..50_000).contains(&used), "{used}");
    assert_eq!(component.call::<u32>("fib", (10_u32,)).unwrap(), 55);
    assert_eq!(component.fuel_used().unwrap(), used);
    // What was compiled without counting can't be used to count.
    let error = builder().fuel(1000).build().unwrap_err();
    assert!(matches!(error, WasmError::Module(_)), "{error}");
}

#[test]
fn a_time_out_ends_a_component_that_spins_and_a_restore_mends_it() {
    let mut component = builder()
        .call_timeout(Duration::from_millis(300))
        .build()
        .unwrap();
    let snapshot = component.snapshot().unwrap();
    let error = component.call::<()>("spins", ()).unwrap_err();
    assert!(
        matches!(&error, WasmError::Call(error) if matches!(**error, CallError::TimedOut(_))),
        "{error}"
    );
    assert!(matches!(component.sandbox().status(), Status::Poisoned(_)));
    component.restore(&snapshot).unwrap();
    assert_eq!(component.call::<u32>("count", ()).unwrap(), 1);
}

#[test]
fn memory_is_limited() {
    let mut component = builder().memory(4 << 20).build().unwrap();
    let snapshot = component.snapshot().unwrap();
    assert_eq!(
        component.call::<u32>("grows", (1_u32 << 20,)).unwrap(),
        1 << 20
    );
    let error = component.call::<u32>("grows", (8_u32 << 20,)).unwrap_err();
    assert!(
        matches!(error, WasmError::Trap(Trap::Unreachable)),
        "{error}"
    );
    component.restore(&snapshot).unwrap();
    // Two memories of one component count together.
    let two = |limit: u64| {
        text(
            r#"(component
            (core module $m (memory 3))
            (core instance (instantiate $m))
            (core instance (instantiate $m)))"#,
        )
        .memory(limit)
        .build()
    };
    two(6 << 16).unwrap();
    let error = two(5 << 16).unwrap_err();
    assert!(
        matches!(error, WasmError::Trap(Trap::OutOfMemory)),
        "{error}"
    );
    // Less heap than the engine needs.
    let error = builder().heap(64 << 10).build().unwrap_err();
    assert!(
        matches!(
            error,
            WasmError::Call(_) | WasmError::Build(_) | WasmError::Trap(Trap::OutOfMemory)
        ),
        "{error}"
    );
}

#[test]
fn imports_are_the_functions_that_are_granted() {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let kept = asked.clone();
    let grants = Grants::new()
        .import(ASKED, "price", move |name: String| {
            kept.lock().unwrap().push(name.clone());
            (!name.is_empty()).then_some(name.len() as u32)
        })
        .import(
            ASKED,
            "mix",
            |a: Wit<u8>, b: Wit<char>, c: Wit<(i16, f32)>| match a.0 {
                0 => Wit(Err::<String, u64>(u64::MAX)),
                a => Wit(Ok(format!("{a} {} {:?}", b.0, c.0))),
            },
        );
    let mut component = builder().grants(&grants).build().unwrap();
    let snapshot = component.snapshot().unwrap();
    let price: Option<u32> = component.call("ask-price", ("tea",)).unwrap();
    assert_eq!(price, Some(3));
    let price: Option<u32> = component.call("ask-price", ("",)).unwrap();
    assert_eq!(price, None);
    assert_eq!(*asked.lock().unwrap(), ["tea", ""]);
    type Mixed = Result<String, u64>;
    let mixed: Mixed = component
        .call("ask-mix", (9_u8, 'é', (-1_i16, 0.5_f32)))
        .unwrap();
    assert_eq!(mixed, Ok("9 é (-1, 0.5)".into()));
    let mixed: Mixed = component
        .call("ask-mix", (0_u8, 'x', (0_i16, 0.0_f32)))
        .unwrap();
    assert_eq!(mixed, Err(u64::MAX));

    let error = component.call::<()>("ask-never", ()).unwrap_err();
    let never = format!("{ASKED}.never");
    assert!(
        matches!(&error, WasmError::NotGranted { import, needs } if *import == never && *needs == never),
        "{error}"
    );
    component.restore(&snapshot).unwrap();

    // Grants are those of the one that is made.
    let lies = Grants::new()
        .import(ASKED, "price", |_: String| "text".to_owned())
        .import(ASKED, "never", |_: Vec<u8>| Err::<(), _>("not today"));
    let mut other = Component::from_snapshot_on(&snapshot, &lies, Backend::Soft).unwrap();
    let error = other
        .call::<Option<u32>>("ask-price", ("tea",))
        .unwrap_err();
    assert!(
        matches!(&error, WasmError::Host { message, .. } if message.contains("option<u32>")),
        "{error}"
    );
    other.restore(&snapshot).unwrap();
    let error = other.call::<()>("ask-never", ()).unwrap_err();
    assert!(
        matches!(&error, WasmError::Host { name, message } if *name == never && message == "not today"),
        "{error}"
    );
}

#[test]
fn functions_of_no_interface_are_the_roots() {
    let component = r#"(component
        (import "twice" (func $twice (param "n" u32) (result u32)))
        (core func $lowered (canon lower (func $twice)))
        (core module $m
            (import "" "twice" (func $twice (param i32) (result i32)))
            (func (export "f") (param i32) (result i32) (call $twice (local.get 0))))
        (core instance $i (instantiate $m
            (with "" (instance (export "twice" (func $lowered))))))
        (func (export "f") (param "n" u32) (result u32) (canon lift (core func $i "f"))))"#;
    let grants = Grants::new().import("$root", "twice", |n: u32| n * 2);
    let mut granted = text(component).grants(&grants).build().unwrap();
    assert_eq!(granted.call::<u32>("f", (21_u32,)).unwrap(), 42);
    let mut bare = text(component).build().unwrap();
    let error = bare.call::<u32>("f", (21_u32,)).unwrap_err();
    assert!(
        matches!(&error, WasmError::NotGranted { needs, .. } if needs == "$root.twice"),
        "{error}"
    );
}

#[test]
fn what_is_no_component_is_a_typed_error() {
    let module = wat::parse_str("(module)").unwrap();
    assert!(is_component(VALUES) && is_component(PROGRAM));
    assert!(!is_component(&module) && !is_component(b"\0asm") && !is_component(b""));
    for bytes in [&b""[..], b"\0asm", b"\x7fELF", &module, &VALUES[..1000]] {
        let error = Component::builder().component(bytes).build().unwrap_err();
        assert!(matches!(error, WasmError::Compile(_)), "{error}");
    }
    // A component as a module, too.
    let error = Wasm::builder()
        .module(VALUES)
        .backend(Backend::Soft)
        .build()
        .unwrap_err();
    assert!(matches!(error, WasmError::Module(_)), "{error}");
    // Every 97th byte changed: it compiles, or it doesn't.
    for at in (0..VALUES.len()).step_by(VALUES.len() / 97) {
        let mut bytes = VALUES.to_vec();
        bytes[at] ^= 0x55;
        let _ = compile(&bytes, false);
    }
}

#[test]
fn an_artifact_that_is_damaged_harms_no_more_than_its_sandbox() {
    let artifact = compiled(VALUES, false);
    let load = |artifact: &[u8]| {
        Component::builder()
            .compiled(artifact)
            .backend(Backend::Soft)
            .call_timeout(Duration::from_secs(2))
            .build()
    };
    for len in [0, 1, 64, 1000, artifact.len() / 2, artifact.len() - 1] {
        let error = load(&artifact[..len]).unwrap_err();
        assert!(
            matches!(error, WasmError::Module(_) | WasmError::Call(_)),
            "{len}: {error}"
        );
    }
    // What was changed may load, and then do anything but harm.
    for at in (0..artifact.len()).step_by(artifact.len() / 41) {
        let mut artifact = artifact.clone();
        artifact[at] ^= 0xff;
        if let Ok(mut component) = load(&artifact) {
            let _ = component.call::<u32>("fib", (5_u32,));
        }
    }
    load(&artifact).unwrap();
}

/// Runs the Rust program with these arguments: what it returned and wrote.
fn program(args: &[&str], grants: Grants) -> (Result<i32, WasmError>, String, String) {
    let written = || Arc::new(Mutex::new(Vec::new()));
    let (out, err) = (written(), written());
    let (to_out, to_err) = (out.clone(), err.clone());
    let args = std::iter::once("program").chain(args.iter().copied());
    let grants = grants
        .args(args)
        .stdout(move |bytes| to_out.lock().unwrap().extend(bytes))
        .stderr(move |bytes| to_err.lock().unwrap().extend(bytes));
    static SNAPSHOT: OnceLock<Arc<skerry_sandbox::Snapshot>> = OnceLock::new();
    let snapshot = SNAPSHOT.get_or_init(|| {
        let component = Component::builder().compiled(compiled(PROGRAM, false));
        let component = component.backend(Backend::Soft).build();
        component.expect("the program loads").snapshot().unwrap()
    });
    let component = Component::from_snapshot_on(snapshot, &grants, Backend::Soft);
    let ended = component.unwrap().run();
    let text = |bytes: Arc<Mutex<Vec<u8>>>| String::from_utf8(bytes.lock().unwrap().clone());
    (ended, text(out).unwrap(), text(err).unwrap())
}

#[test]
fn a_rust_program_for_wasi_runs() {
    let all = || {
        Grants::new()
            .clock()
            .env([("GREETING", "hello"), ("EMPTY", "")])
    };
    let (ended, out, err) = program(&["env"], all());
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
    let (ended, out, err) = program(&["count"], all().stdin(stdin).random());
    assert_eq!((ended.unwrap(), err.as_str()), (0, ""));
    assert_eq!(out, "[(\"a\", 2), (\"b\", 3), (\"c\", 1)]\n");

    let clock = Mutex::new(1_000_000_000_000_u64);
    let clock = move |_| {
        let mut now = clock.lock().unwrap();
        *now += 1_000_000;
        *now
    };
    let (ended, out, _) = program(&["time"], all().clock_with(clock));
    assert_eq!((ended.unwrap(), out.as_str()), (0, "1000 true\n"));
}

#[test]
fn a_program_ends_with_its_code_or_its_panic() {
    let all = || Grants::new().clock().env([("A", "B")]);
    assert_eq!(program(&["exit", "0"], all()).0.unwrap(), 0);
    // WASI 0.2 has no more than success and failure.
    assert_eq!(program(&["exit", "7"], all()).0.unwrap(), 1);
    let (ended, _, err) = program(&["other"], all());
    assert_eq!(ended.unwrap(), 1);
    assert_eq!(err, "nothing to do for [\"other\"]\n");
    let (ended, _, err) = program(&["panic"], all());
    assert!(
        matches!(ended, Err(WasmError::Trap(Trap::Unreachable))),
        "{ended:?}"
    );
    assert!(err.contains("on purpose"), "{err}");
    let (ended, out, _) = program(&["file"], all());
    assert_eq!((ended.unwrap(), out.as_str()), (0, "true\n"));
}

#[test]
fn what_a_program_is_not_granted_ends_its_call() {
    let ended = |args: &[&str], grants: Grants| match program(args, grants).0 {
        Err(WasmError::NotGranted { import, needs }) => {
            // Whichever version of the interface it was built for.
            let (interface, function) = import.split_once('@').expect("a version");
            let function = function.rsplit_once('.').expect("a function").1;
            (format!("{interface} {function}"), needs)
        }
        other => panic!("{args:?}: {other:?}"),
    };
    let pair = |import: &str, needs: &str| (import.to_owned(), needs.to_owned());
    let clock = || Grants::new().clock();
    assert_eq!(
        ended(&["time"], Grants::new()),
        pair("wasi:clocks/monotonic-clock now", "wasi.clock")
    );
    assert_eq!(
        ended(&["env"], clock()),
        pair("wasi:cli/environment get-environment", "wasi.environ")
    );
    let (import, needs) = ended(&["count"], clock());
    assert!(import.starts_with("wasi:io/streams "), "{import}");
    assert_eq!(needs, "wasi.stdin");
    let (_, needs) = ended(&["count"], clock().stdin(|_| Vec::new()));
    assert_eq!(needs, "wasi.random");
}

#[test]
fn a_library_is_no_program() {
    let error = values().run().unwrap_err();
    assert!(matches!(error, WasmError::NoExport(_)), "{error}");
}
