//! Scripts: values, functions of the host, state, limits, hostile ones.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use skerry_sandbox::script::{
    DEPTH, Grants, Limit, Limits, Position, Script, ScriptBuilder, ScriptError, Value, from_value,
    guest,
};
use skerry_sandbox::{Backend, CallError, Decode, Fault, Reader, Sandbox, Snapshot, Status, Tag};
use skerry_sandbox_abi::script::Outcome;

fn builder(source: &str) -> ScriptBuilder {
    Script::builder().source(source).backend(Backend::Soft)
}

fn script(source: &str) -> Script {
    builder(source).build().expect("the script loads")
}

/// One that text is evaluated in.
fn blank() -> Script {
    script("")
}

fn shop() -> &'static str {
    concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/fixtures/scripts/shop.rhai"
    )
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum Shape {
    Point,
    Circle(f64),
    Box { width: u32, height: Option<u32> },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Drawing {
    name: String,
    shapes: Vec<Shape>,
    pair: (i8, bool),
    by_name: BTreeMap<String, f32>,
}

fn same<T>(script: &mut Script, value: T)
where
    T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let back: T = script.call("same", (&value,)).unwrap();
    assert_eq!(back, value);
}

#[test]
fn values_of_all_types_pass_both_ways() {
    let mut script = script("fn same(x) { x } fn kind(x) { type_of(x) }");
    same(&mut script, ());
    same(&mut script, true);
    for number in [0, -1, i64::MIN, i64::MAX] {
        same(&mut script, number);
    }
    same(&mut script, u8::MAX);
    same(&mut script, -0.5);
    same(&mut script, f64::INFINITY);
    same(&mut script, f64::MIN_POSITIVE);
    let nan: f64 = script.call("same", (f64::NAN,)).unwrap();
    assert!(nan.is_nan());
    same(&mut script, 'ü');
    same(&mut script, String::from("a\0ü\u{10ffff}"));
    same(&mut script, String::new());
    same(&mut script, vec![1, 2, 3]);
    same(&mut script, vec![0_u8, 255]);
    same(&mut script, (1, "x".to_owned(), Some(2), None::<i32>));
    same(
        &mut script,
        Drawing {
            name: "one".into(),
            shapes: vec![
                Shape::Point,
                Shape::Circle(1.5),
                Shape::Box {
                    width: u32::MAX,
                    height: None,
                },
            ],
            pair: (-128, true),
            by_name: BTreeMap::from([("x".into(), 0.25)]),
        },
    );
    let bytes = Value::Bytes(vec![0, 1, 255]);
    assert_eq!(
        script
            .call_values("same", std::slice::from_ref(&bytes))
            .unwrap(),
        bytes
    );
    for (value, kind) in [
        (Value::Unit, "()"),
        (Value::Int(1), "i64"),
        (Value::Float(1.0), "f64"),
        (bytes, "blob"),
        (Value::Array(Vec::new()), "array"),
        (Value::Map(BTreeMap::new()), "map"),
    ] {
        let told: String = script.call("kind", (&value,)).unwrap();
        assert_eq!(told, kind);
    }
    // An integer where a fraction could be.
    assert_eq!(script.call::<f64>("same", (3,)).unwrap(), 3.0);
}

#[test]
fn what_cannot_pass_is_a_typed_error() {
    let mut script = script("fn same(x) { x } fn closure() { |x| x } fn range() { 1..2 }");
    let error = script.call::<u64>("same", (u64::MAX,)).unwrap_err();
    assert!(matches!(error, ScriptError::Argument(_)), "{error}");
    let error = script.call::<u8>("same", (256,)).unwrap_err();
    assert!(
        matches!(&error, ScriptError::Result { of, wanted: "u8", found: "int", .. } if of == "same"),
        "{error}"
    );
    for name in ["closure", "range"] {
        let error = script.call::<()>(name, ()).unwrap_err();
        assert!(matches!(error, ScriptError::Value(_)), "{error}");
    }
    let deep = |levels: usize| format!("let a = []; for i in 0..{levels} {{ a = [a]; }} a");
    // The innermost one is a level too.
    assert!(script.eval_value(&deep(DEPTH - 1)).is_ok());
    let error = script.eval_value(&deep(DEPTH)).unwrap_err();
    assert!(matches!(error, ScriptError::Value(_)), "{error}");
    // As much again as the buffers have.
    let huge = "x".repeat(2 << 20);
    let error = script.call::<()>("same", (&huge,)).unwrap_err();
    assert!(
        matches!(&error, ScriptError::Call(error) if matches!(**error, CallError::TooLarge { .. })),
        "{error}"
    );
    let mut narrow = builder("").buffers(100_000).build().unwrap();
    let error = narrow
        .eval::<String>("let s = \"x\"; s.pad(200000, 'y'); s")
        .unwrap_err();
    assert!(
        matches!(&error, ScriptError::Call(error) if matches!(**error, CallError::TooLarge { .. })),
        "{error}"
    );
    assert_eq!(script.call::<i32>("same", (1,)).unwrap(), 1);
    let mut roomy = builder("fn len(x) { x.len() }")
        .buffers(4 << 20)
        .limits(Limits {
            string: 4 << 20,
            ..Limits::default()
        })
        .build()
        .unwrap();
    assert_eq!(roomy.call::<usize>("len", (&huge,)).unwrap(), huge.len());
}

#[test]
fn variables_stay_and_a_run_starts_over() {
    let mut script = script("let n = 10; fn add(m) { n += m; n } n");
    // Compiled, and not run.
    let error = script.call::<i32>("add", (1,)).unwrap_err();
    assert!(matches!(error, ScriptError::Runtime { .. }), "{error}");
    assert_eq!(script.run::<i32>().unwrap(), 10);
    assert_eq!(script.call::<i32>("add", (1,)).unwrap(), 11);
    assert_eq!(script.call::<i32>("add", (1,)).unwrap(), 12);
    assert_eq!(script.eval::<i32>("n += 8; n").unwrap(), 20);
    script
        .eval::<()>("let m = n * 2; fn twice(x) { x * 2 }")
        .unwrap();
    assert_eq!(script.call::<i32>("twice", (4,)).unwrap(), 8);
    assert_eq!(script.eval::<i32>("twice(m)").unwrap(), 80);
    // An error leaves what there was, and what was done before it.
    assert!(script.eval::<()>("n = 1; throw 2").is_err());
    assert_eq!(script.eval::<i32>("n").unwrap(), 1);
    assert_eq!(script.run::<i32>().unwrap(), 10);
    let error = script.call::<i32>("twice", (4,)).unwrap_err();
    assert!(
        matches!(&error, ScriptError::NoFunction(name) if name == "twice"),
        "{error}"
    );
    assert!(script.eval::<i32>("m").is_err());
    for (text, value) in [("return 3; 4", 3), ("exit(5); 6", 5), ("7", 7)] {
        assert_eq!(script.eval::<i32>(text).unwrap(), value);
    }
}

#[test]
fn functions_are_told_and_wrong_calls_are_typed() {
    let mut script =
        script("fn f(a) { a } fn f(a, b) { a + b } private fn p() { 1 } fn g() { || 1 }");
    let functions = script.functions().unwrap();
    let told: Vec<_> = functions
        .iter()
        .map(|function| format!("{}({})", function.name, function.parameters.join(", ")))
        .collect();
    assert_eq!(told, ["f(a)", "f(a, b)", "g()"]);
    assert_eq!(script.call::<i32>("f", (1,)).unwrap(), 1);
    assert_eq!(script.call::<i32>("f", (1, 2)).unwrap(), 3);
    let error = script.call::<i32>("f", ()).unwrap_err();
    assert!(
        matches!(&error, ScriptError::Arity { takes, given: 0, .. } if *takes == [1, 2]),
        "{error}"
    );
    assert_eq!(
        error.to_string(),
        "f takes 1 or 2 arguments, and 0 were given"
    );
    for name in ["p", "missing", "", "print", "anon$0", "f\0"] {
        let error = script.call::<i32>(name, ()).unwrap_err();
        assert!(
            matches!(error, ScriptError::NoFunction(_)),
            "{name}: {error}"
        );
    }
    assert_eq!(*script.sandbox().status(), Status::Ready);
}

fn at(line: u32, column: u32) -> Option<Position> {
    Some(Position { line, column })
}

#[test]
fn errors_say_where() {
    let error = builder("let x = 1;\nlet y = ;").build().unwrap_err();
    let ScriptError::Parse { place, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(place.position, at(2, 9));
    assert!(
        error.to_string().ends_with(" at line 2, column 9"),
        "{error}"
    );
    let mut script = script(
        "fn inner(n) {\n    10 / n\n}\nfn outer(n) {\n    let list = [1];\n    inner(n) + list[n]\n}",
    );
    let error = script.call::<i32>("outer", (0,)).unwrap_err();
    let ScriptError::Runtime { place, message } = &error else {
        panic!("{error}");
    };
    assert!(message.contains("Division by zero"), "{message}");
    assert_eq!(place.position, at(2, 8));
    assert_eq!(place.calls, ["inner", "outer"]);
    let error = script.call::<i32>("outer", (2,)).unwrap_err();
    let ScriptError::Runtime { place, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(place.position, at(6, 21));
    for text in [
        "nothing_of_that_name",
        "nothing(1)",
        "1 + ()",
        "(1).property",
        "let s = \"a\"; s[1]",
        "for i in 5 {}",
        "const C = 1; C = 2",
        "this",
        "9223372036854775807 + 1",
        "parse_int(\"x\")",
    ] {
        let error = script.eval::<()>(text).unwrap_err();
        let known = match &error {
            ScriptError::Runtime { place, .. } | ScriptError::Parse { place, .. } => place.position,
            other => panic!("{text}: {other}"),
        };
        assert!(known.is_some(), "{text}: {error}");
    }
    assert_eq!(*script.sandbox().status(), Status::Ready);
}

#[test]
fn what_is_thrown_is_caught_or_arrives() {
    let mut script = script("fn f(x) { throw x; }");
    let value = Value::Map(BTreeMap::from([("code".into(), Value::Int(7))]));
    let error = script
        .call_values("f", std::slice::from_ref(&value))
        .unwrap_err();
    let ScriptError::Thrown {
        value: thrown,
        place,
    } = &error
    else {
        panic!("{error}");
    };
    assert_eq!((thrown, &place.calls[..]), (&value, &["f".to_owned()][..]));
    assert_eq!(
        error.to_string(),
        "The script threw at line 1, column 11 in f: #{code: 7}"
    );
    let caught: i32 = script
        .eval("let r = 0; try { f(41) } catch (e) { r = e + 1; } r")
        .unwrap();
    assert_eq!(caught, 42);
    let caught: String = script
        .eval("let r = 0; try { 1 / 0 } catch (e) { r = e.message; } r")
        .unwrap();
    assert!(caught.contains("Division by zero"), "{caught}");
    let error = script.eval::<()>("throw |x| x").unwrap_err();
    assert!(matches!(error, ScriptError::Thrown { .. }), "{error}");
}

fn prices() -> Grants {
    Grants::new()
        .fallible("price", |item: String| match item.as_str() {
            "pear" => Ok(2.5),
            _ => Err(format!("nobody sells {item:?}")),
        })
        .function("area", |shape: Shape| match shape {
            Shape::Point => 0.0,
            Shape::Circle(radius) => radius * radius * 3.0,
            Shape::Box { width, height } => f64::from(width) * f64::from(height.unwrap_or(width)),
        })
        .function("huge", || u64::MAX)
        .function(
            "eight",
            |a: i64, b: i64, c: i64, d: i64, e: i64, f: i64, g: i64, h: i64| {
                [a, b, c, d, e, f, g, h].iter().sum::<i64>()
            },
        )
}

#[test]
fn functions_of_the_host_are_called_by_name() {
    let mut script = builder("fn cost(item, n) { price(item) * n }")
        .grants(&prices())
        .build()
        .unwrap();
    assert_eq!(script.call::<f64>("cost", ("pear", 2.0)).unwrap(), 5.0);
    assert_eq!(script.eval::<f64>("area(\"Point\")").unwrap(), 0.0);
    assert_eq!(script.eval::<f64>("area(#{Circle: 2})").unwrap(), 12.0);
    let area: f64 = script.eval("area(#{Box: #{width: 3}})").unwrap();
    assert_eq!(area, 9.0);
    assert_eq!(script.eval::<i64>("eight(1,2,3,4,5,6,7,8)").unwrap(), 36);
    // As a method, and as a value.
    assert_eq!(script.eval::<f64>("\"pear\".price()").unwrap(), 2.5);
    let each: Vec<f64> = script.eval("[\"pear\"].map(|item| price(item))").unwrap();
    assert_eq!(each, [2.5]);
    let error = script.call::<f64>("cost", ("plum", 2.0)).unwrap_err();
    let ScriptError::Host {
        name,
        message,
        place,
    } = &error
    else {
        panic!("{error}");
    };
    assert_eq!(
        (name.as_str(), message.as_str()),
        ("price", "nobody sells \"plum\"")
    );
    assert_eq!((place.position, place.calls.len()), (at(1, 20), 1));
    for (text, expected) in [
        ("area(5)", "argument 1"),
        ("area(|x| x)", "can't be passed"),
        ("eight(1,2,3,4,5,6,7,\"8\")", "argument 8"),
        ("huge()", "larger than a script's"),
        ("price()", "takes 1 arguments"),
        ("price(1, 2)", "takes 1 arguments"),
    ] {
        let error = script.eval::<()>(text).unwrap_err();
        assert!(
            matches!(&error, ScriptError::Host { message, .. } if message.contains(expected)),
            "{text}: {error}"
        );
    }
    assert_eq!(*script.sandbox().status(), Status::Ready);
}

#[test]
fn errors_of_host_functions_can_be_caught() {
    let mut script = builder("").grants(&prices()).build().unwrap();
    let caught: (String, String, String) = script
        .eval("let r = 0; try { price(\"plum\") } catch (e) { r = [e.function, e.message, `${e}`]; } r")
        .unwrap();
    let message = "nobody sells \"plum\"";
    assert_eq!(
        caught,
        ("price".into(), message.into(), format!("price: {message}"))
    );
    // Thrown on, it is still what it was.
    let error = script
        .eval::<()>("try { price(\"plum\") } catch (e) { throw e; }")
        .unwrap_err();
    assert!(matches!(error, ScriptError::Host { .. }), "{error}");
    // A function that is not granted is unknown as any other.
    let error = blank().eval::<()>("price(\"plum\")").unwrap_err();
    assert!(
        matches!(&error, ScriptError::Runtime { message, .. } if message.contains("no function price")),
        "{error}"
    );
}

#[test]
fn the_last_grant_of_a_name_counts_and_the_scripts_own_function_goes_before_it() {
    let grants = Grants::new()
        .function("next", |_: String| 7)
        .function("next", |_: String| 8);
    let mut script = builder("fn f(s) { next(s) } fn own(x) { 1 } own(2)")
        .grants(&grants)
        .grants(&Grants::new().function("own", |_: i64| 9))
        .build()
        .unwrap();
    assert_eq!(script.call::<i32>("f", ("abc",)).unwrap(), 8);
    assert_eq!(script.run::<i32>().unwrap(), 1);
    // And so does the language's.
    let grants = Grants::new().function("len", |_: Value| 9);
    let mut script = builder("").grants(&grants).build().unwrap();
    assert_eq!(
        script.eval::<(i32, i32)>("[len(\"ab\"), len(5)]").unwrap(),
        (2, 9)
    );
}

#[test]
fn what_is_printed_goes_where_it_is_granted() {
    let lines = Arc::new(Mutex::new(Vec::new()));
    let (out, debug) = (lines.clone(), lines.clone());
    let grants = Grants::new()
        .print(move |line| out.lock().unwrap().push(line))
        .debug(move |line| debug.lock().unwrap().push(format!("debug: {line}")));
    let text = "print(`a ${1 + 1}`);\nprint([1, \"x\"]);\ndebug(#{a: 1}); print()";
    let mut script = builder(text).grants(&grants).build().unwrap();
    script.run::<()>().unwrap();
    let lines = lines.lock().unwrap();
    assert_eq!(
        *lines,
        ["a 2", "[1, \"x\"]", "debug: line 3: #{\"a\": 1}", ""]
    );
    // Nowhere is no error.
    blank().eval::<()>("print(1); debug(2)").unwrap();
}

#[test]
fn a_snapshot_has_the_script_compiled_and_run() {
    let mut script = Script::builder()
        .path(shop())
        .grants(&prices())
        .backend(Backend::Soft)
        .build()
        .unwrap();
    script.run::<()>().unwrap_err();
    assert_eq!(script.run::<i32>().unwrap(), 0);
    let order = |count: i32| serde_json::json!({"customer": "ada", "lines": [{"item": "pear", "count": count}]});
    let snapshot = script.snapshot().unwrap();
    let mut other = Script::from_snapshot_on(&snapshot, &prices(), Backend::Soft).unwrap();
    for script in [&mut script, &mut other] {
        let total: serde_json::Value = script.call("total", (order(100),)).unwrap();
        assert_eq!(
            total,
            serde_json::json!({"customer": "ada", "sum": 225.0, "sold": 1})
        );
    }
    let error = other.call::<()>("total", (order(0),)).unwrap_err();
    assert!(
        matches!(&error, ScriptError::Thrown { place, .. } if place.calls == ["cost", "total"]),
        "{error}"
    );
    script.restore(&snapshot).unwrap();
    assert_eq!(script.eval::<i32>("sold").unwrap(), 0);
    // The names that it can call are the snapshot's, what they do is the grants'.
    let cheap = Grants::new().function("price", |_: String| 0.0);
    let mut other = Script::from_snapshot_on(&snapshot, &cheap, Backend::Soft).unwrap();
    assert_eq!(other.eval::<f64>("price(\"plum\")").unwrap(), 0.0);
    let mut other = Script::from_snapshot_on(&snapshot, &Grants::new(), Backend::Soft).unwrap();
    let error = other.eval::<f64>("price(\"plum\")").unwrap_err();
    assert!(
        matches!(&error, ScriptError::NotGranted { name, .. } if name == "price"),
        "{error}"
    );
    // Through files.
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path();
    let saved = snapshot.save(place).unwrap().to_string();
    let loaded = Snapshot::load(place, &saved).unwrap();
    let mut other = Script::from_snapshot_on(&loaded, &prices(), Backend::Soft).unwrap();
    assert_eq!(other.eval::<f64>("price(\"pear\")").unwrap(), 2.5);
}

#[track_caller]
fn reached(script: &mut Script, text: &str) -> Limit {
    match script.eval_value(text) {
        Err(ScriptError::Limit { limit, .. }) => limit,
        other => panic!("{}: {other:?}", &text[..text.len().min(100)]),
    }
}

#[test]
fn limits_are_typed_and_the_script_goes_on() {
    let mut script = blank();
    for text in [
        "fn f(n) { f(n + 1) + 1 } f(0)",
        "fn g() { try { g() } catch (e) { 0 } } g()",
        "fn a() { b() } fn b() { a() } a()",
        "let f = |f, n| f.call(f, n + 1) + 1; f.call(f, 0)",
        "fn h(x) { [x].map(h) } h(1)",
    ] {
        assert_eq!(reached(&mut script, text), Limit::Calls, "{text}");
    }
    assert_eq!(
        reached(&mut script, "let s = \"x\"; loop { s += s }"),
        Limit::Size
    );
    assert_eq!(
        reached(&mut script, "let a = [1]; loop { a += a }"),
        Limit::Size
    );
    assert_eq!(
        reached(&mut script, "let a = []; a.pad(1000000, 1)"),
        Limit::Size
    );
    assert_eq!(reached(&mut script, "blob(1000000000000)"), Limit::Size);
    let long = format!("\"{}\"", "x".repeat(2 << 20));
    let error = script.eval_value(&long).unwrap_err();
    assert!(matches!(&error, ScriptError::Call(_)), "{error}");
    let many: String = (0..1100).map(|n| format!("let v{n} = 1;")).collect();
    assert_eq!(reached(&mut script, &many), Limit::Variables);
    let many: String = (0..1100).map(|n| format!("fn f{n}() {{ 1 }}")).collect();
    assert_eq!(reached(&mut script, &many), Limit::Functions);
    assert_eq!(*script.sandbox().status(), Status::Ready);
    assert_eq!(script.eval::<i32>("1 + 1").unwrap(), 2);
    let small = Limits {
        map: 3,
        ..Limits::default()
    };
    let mut small = builder("").limits(small).build().unwrap();
    assert_eq!(
        reached(&mut small, "#{a: 1, b: 2, c: 3, d: 4}"),
        Limit::Size
    );
    // A limit that is larger is.
    let mut larger = builder("fn f(n) { if n == 0 { 0 } else { 1 + f(n - 1) } }")
        .limits(Limits {
            calls: 2000,
            ..Limits::default()
        })
        .stack(64 << 20)
        .build()
        .unwrap();
    assert_eq!(larger.call::<i32>("f", (1500,)).unwrap(), 1500);
}

#[test]
fn operations_are_counted_the_same_each_time() {
    let mut script = builder("fn count(n) { let s = 0; for i in 0..n { s += i } s }")
        .operations(10_000)
        .build()
        .unwrap();
    assert_eq!(script.call::<i32>("count", (10,)).unwrap(), 45);
    let used = script.operations_used().unwrap();
    assert!((10..200).contains(&used), "{used}");
    script.call::<i32>("count", (10,)).unwrap();
    assert_eq!(script.operations_used().unwrap(), used);
    for text in [
        "loop {}",
        "while true { try { loop {} } catch (e) {} }",
        "let n = 0; do { n += 1 } while true",
        // The engine forgets what was done in a function that its own functions called.
        "let a = []; a.pad(500, 1); a.map(|x| { let n = 0; while n < 500 { n += 1 } n })",
        "let a = []; a.pad(500, 1); a.sort(|x, y| { let n = 0; while n < 500 { n += 1 } n }); 1",
        "eval(\"loop {}\")",
    ] {
        assert_eq!(reached(&mut script, text), Limit::Operations, "{text}");
        // `sort` goes on with its other elements, each of which then ends at once.
        let used = script.operations_used().unwrap();
        assert!((10_001..12_000).contains(&used), "{text}: {used}");
    }
    assert_eq!(script.call::<i32>("count", (10,)).unwrap(), 45);
}

/// Texts that lie deep in themselves.
fn deep(levels: usize) -> Vec<(&'static str, String)> {
    let around = |open: &str, middle: &str, close: &str| {
        format!("{}{middle}{}", open.repeat(levels), close.repeat(levels))
    };
    vec![
        ("parentheses", around("(", "1", ")")),
        ("arrays", around("[", "1", "]")),
        ("maps", around("#{a:", "1", "}")),
        ("blocks", around("{", "1", "}")),
        ("ifs", around("if true {", "1", "}")),
        ("else ifs", around("if false {} else ", "if true {}", "")),
        ("loops", around("while false {", "", "}")),
        ("nots", around("!", "true", "")),
        ("minuses", around("- ", "1", "")),
        ("sums", around("1 + ", "1", "")),
        ("sums of sums", around("(1 + ", "1", ")")),
        ("powers", around("2 ** ", "1", "")),
        ("ands", around("true && ", "true", "")),
        ("coalesces", around("() ?? ", "1", "")),
        ("indices", format!("let a = []; a{}", "[0]".repeat(levels))),
        (
            "indices of indices",
            format!("let a = []; {}", around("a[", "0", "]")),
        ),
        (
            "properties",
            format!("let a = #{{}}; a{}", ".a".repeat(levels)),
        ),
        ("calls", around("f(", "1", ")")),
        ("methods", format!("1{}", ".abs()".repeat(levels))),
        ("closures", around("|x| ", "x", "")),
        ("closures in blocks", around("|| {", "1", "}")),
        (
            "functions",
            format!("fn f() {{ {} }}", around("(", "1", ")")),
        ),
        ("strings", around("`${", "1", "}`")),
        ("switches", around("switch 1 { 1 => ", "1", " }")),
        ("tries", around("try {", "1", "} catch {}")),
        (
            "assignments",
            format!("let a = 1; {}", around("a = ", "1", "")),
        ),
        ("comments", around("/*", "", "*/")),
        ("open", "(".repeat(levels)),
        ("open strings", "`${".repeat(levels)),
    ]
}

#[test]
fn texts_that_lie_deep_are_values_or_errors() {
    let mut script = builder("")
        .call_timeout(Duration::from_secs(20))
        .build()
        .unwrap();
    for levels in [20, 60, 64, 70, 1000, 50_000] {
        for (what, text) in deep(levels) {
            match script.eval_value(&text) {
                Ok(_) | Err(ScriptError::Value(_)) => {}
                Err(
                    ScriptError::Parse { .. }
                    | ScriptError::Runtime { .. }
                    | ScriptError::Limit { .. },
                ) => {}
                Err(error) => panic!("{levels} {what}: {error:?}"),
            }
            assert_eq!(*script.sandbox().status(), Status::Ready, "{levels} {what}");
        }
    }
}

#[test]
fn the_deepest_that_the_limits_allow_fits_the_stack() {
    // As deep as expressions may lie in each other, in each of as many calls as there may be.
    for (open, close) in [
        ("(1 + ", ")"),
        ("[", "][0]"),
        ("if true {", "}"),
        ("`${", "}`"),
    ] {
        let mut deepest = None;
        for levels in 1..Limits::default().nesting as usize {
            let body = format!("{}f(n + 1){}", open.repeat(levels), close.repeat(levels));
            let text = format!("fn f(n) {{ {body} }} f(0)");
            let mut script = match builder(&text).build() {
                Ok(script) => script,
                Err(ScriptError::Limit {
                    limit: Limit::Nesting,
                    ..
                }) => break,
                Err(error) => panic!("{levels} {open}: {error}"),
            };
            deepest = Some((levels, script.run_value()));
        }
        let (levels, ended) = deepest.expect("one level");
        assert!(levels > 5, "{open}: {levels}");
        let limit = match ended {
            Err(ScriptError::Limit { limit, .. }) => limit,
            other => panic!("{levels} {open}: {other:?}"),
        };
        assert_eq!(limit, Limit::Calls, "{levels} {open}");
    }
}

#[test]
fn without_limits_the_sandbox_still_has_its_own() {
    let unlimited = Limits {
        operations: None,
        calls: u64::MAX,
        nesting: u64::MAX,
        string: u64::MAX,
        array: u64::MAX,
        map: u64::MAX,
        variables: u64::MAX,
        functions: u64::MAX,
    };
    let mut script = builder("").limits(unlimited).build().unwrap();
    let clean = script.snapshot().unwrap();
    for text in [
        "fn f(n) { f(n + 1) + 1 } f(0)".to_owned(),
        format!("{}1{}", "(".repeat(100_000), ")".repeat(100_000)),
        format!("{}true", "!".repeat(100_000)),
    ] {
        match script.eval_value(&text) {
            Err(ScriptError::Call(error)) => assert!(
                matches!(*error, CallError::Fault(Fault::StackOverflow { .. })),
                "{error:?}"
            ),
            other => panic!("{}: {other:?}", &text[..30]),
        }
        assert!(matches!(script.sandbox().status(), Status::Poisoned(_)));
        assert!(script.eval_value("1").is_err());
        script.restore(&clean).unwrap();
    }
    script
        .sandbox()
        .set_call_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    for text in [
        "let s = \"x\"; loop { s += s }",
        "let a = [0]; loop { a += a }",
        "let a = []; loop { a.push(blob(1000000)) }",
        "let m = #{}; let i = 0; loop { m[`${i}`] = \"x\".to_blob(); m[`${i}`].pad(100000, 1); i += 1 }",
        "blob(1000000000000)",
    ] {
        match script.eval_value(text) {
            Err(ScriptError::Call(error)) => {
                assert!(
                    matches!(
                        *error,
                        CallError::OutOfMemory { .. } | CallError::Panicked(_)
                    ),
                    "{text}: {error:?}"
                );
            }
            other => panic!("{text}: {other:?}"),
        }
        script.restore(&clean).unwrap();
        assert_eq!(script.eval::<i32>("1 + 1").unwrap(), 2);
    }
}

#[test]
fn a_script_that_never_ends_is_ended() {
    let time = Duration::from_millis(100);
    let mut script = builder("fn spin() { loop {} }").build().unwrap();
    let clean = script.snapshot().unwrap();
    for text in [
        "loop {}",
        "try { loop {} } catch (e) {}",
        "let n = 1; while n > 0 { n = n ^ 1 | 2 }",
        "let x = 0; for i in 0..9000000000000000000 { x += 1 }",
    ] {
        script.sandbox().set_call_timeout(Some(time)).unwrap();
        let started = Instant::now();
        let error = script.eval::<()>(text).unwrap_err();
        assert!(
            matches!(&error, ScriptError::Call(error) if matches!(**error, CallError::TimedOut(_))),
            "{error}"
        );
        assert!(started.elapsed() < Duration::from_secs(20));
        script.sandbox().set_call_timeout(None).unwrap();
        script.restore(&clean).unwrap();
    }
    let mut limited = builder("fn spin() { loop {} }")
        .call_cpu_time(Duration::from_secs(1))
        .build()
        .unwrap();
    let error = limited.call::<()>("spin", ()).unwrap_err();
    assert!(
        matches!(&error, ScriptError::Call(error) if matches!(**error, CallError::CpuTime(_))),
        "{error}"
    );
}

/// A number that is another each time.
fn next(state: &mut u64) -> u64 {
    *state = state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

#[test]
fn texts_of_random_words_are_values_or_errors() {
    const WORDS: &str = "let fn if else loop while for in switch return throw try catch ( ) [ ] { } #{ , ; \
        : . .. ..= | || && ! - + * ** / % << >> & ^ == != < > = += -= ?? ?. ?[ => _ x y f 0 1 -1 9223372036854775807 \
        0x8000000000000000 1e308 'a' 'ü' \"s\" `${x}` `${ } ` this const private is_def_var call curry Fn \
        type_of len push pop map filter reduce sort split keys values eval debug blob to_blob chars range \
        0..3 true false () break continue do until import export /* */ // \n";
    let words: Vec<&str> = WORDS.split(' ').collect();
    let mut script = builder("let x = [1, 2]; let y = #{a: 1}; fn f(x) { x }")
        .operations(20_000)
        .build()
        .unwrap();
    script.run::<()>().unwrap();
    let clean = script.snapshot().unwrap();
    let mut state = 1;
    for round in 0..3000 {
        let len = 1 + next(&mut state) % 24;
        let text: Vec<&str> = (0..len)
            .map(|_| words[next(&mut state) as usize % words.len()])
            .collect();
        let text = text.join(" ");
        if let Err(ScriptError::Call(error)) = script.eval_value(&text) {
            panic!("{text:?}: {error:?}");
        }
        if round % 100 == 0 {
            script.restore(&clean).unwrap();
        }
    }
}

#[test]
fn the_guest_refuses_what_makes_no_sense() {
    let mut sandbox = Sandbox::builder()
        .guest(guest())
        .heap(32 << 20)
        .stack(1 << 20)
        .backend(Backend::Soft)
        .build()
        .unwrap();
    let snapshot = sandbox.snapshot().unwrap();
    let mut empty = Script::from_snapshot_on(&snapshot, &Grants::new(), Backend::Soft).unwrap();
    for error in [
        empty.run_value().unwrap_err(),
        empty.eval_value("1").unwrap_err(),
        empty.call_values("f", &[]).unwrap_err(),
    ] {
        assert!(matches!(error, ScriptError::State), "{error}");
    }
    for (name, arguments) in [("eval", 1_u32), ("call", 5), ("load", 0)] {
        let error = sandbox.call::<String>(name, (arguments,)).unwrap_err();
        assert!(
            matches!(
                error,
                CallError::ArgumentType { .. } | CallError::Arity { .. }
            ),
            "{error}"
        );
    }
    let error = Script::builder().source("1").path("/nonexistent").build();
    assert!(matches!(error, Err(ScriptError::Build(_))));
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), [0xff]).unwrap();
    let error = Script::builder().path(file.path()).build();
    assert!(matches!(error, Err(ScriptError::NotText)));
}

proptest! {
    #[test]
    fn whatever_a_guest_answers_is_a_value_or_an_error(
        some in any::<bool>(),
        item in prop::collection::vec(any::<u8>(), 0..300),
        arrays in 0_usize..400,
    ) {
        // One CBOR item in its block, in arrays of one (RFC 8949 §3, major type 4).
        let item = [vec![0x81; arrays], item].concat();
        let mut bytes = match some {
            true => vec![Tag::Some as u8, Tag::Struct as u8],
            false => vec![Tag::Struct as u8],
        };
        bytes.extend_from_slice(&(item.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&item);
        if let Ok(Outcome(Ok(value))) = Outcome::<Value>::decode(&mut Reader::new(&bytes)) {
            let _ = (value.to_string(), from_value::<Drawing>(value));
        }
    }
}
