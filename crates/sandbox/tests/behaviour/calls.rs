//! Calls: every type at its limits, every error.

use crate::common::{builder, guest, sandbox};
use serde::{Deserialize, Serialize};
use skerry_sandbox::{BuildError, CallError, Sandbox, Status, serde_value};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Order {
    id: u64,
    title: String,
    lines: Vec<(String, i32)>,
    note: Option<String>,
}

serde_value!(Order);

#[test]
fn a_call_returns_and_state_stays() {
    let mut sandbox = sandbox();
    assert_eq!(sandbox.call::<i32>("add", (1, 2)).unwrap(), 3);
    assert_eq!(sandbox.call::<i64>("initialised", ()).unwrap(), 42);
    assert_eq!(sandbox.call::<i64>("count", ()).unwrap(), 1);
    assert_eq!(sandbox.call::<i64>("count", ()).unwrap(), 2);
    assert_eq!(sandbox.call::<i32>("call_host", (40, 2)).unwrap(), 42);
    assert_eq!(
        sandbox.call::<i32>("call_host_often", (1000_u32,)).unwrap(),
        1000
    );
    sandbox.call::<()>("nothing", ()).unwrap();
    let metrics = sandbox.metrics();
    assert_eq!(
        (metrics.calls, metrics.failed, metrics.host_calls),
        (7, 0, 1001)
    );
    assert!(metrics.allocations > 0 && metrics.allocated_peak >= metrics.allocated);
}

#[test]
fn every_type_goes_round_at_its_limits() {
    let mut sandbox = builder().heap(8 << 20).buffers(2 << 20).build().unwrap();
    macro_rules! round {
        ($name:literal, $type:ty, $($value:expr),*) => {$(
            let value: $type = $value;
            assert_eq!(sandbox.call::<$type>($name, (value.clone(),)).unwrap(), value);
        )*};
    }
    round!("echo_i32", i32, 0, -1, i32::MIN, i32::MAX);
    round!("echo_u32", u32, 0, u32::MAX);
    round!("echo_i64", i64, 0, -1, i64::MIN, i64::MAX);
    round!("echo_u64", u64, 0, u64::MAX);
    round!("echo_bool", bool, true, false);
    round!(
        "echo_f32",
        f32,
        0.0,
        f32::MIN,
        f32::MAX,
        f32::INFINITY,
        f32::MIN_POSITIVE
    );
    round!(
        "echo_f64",
        f64,
        0.0,
        f64::MIN,
        f64::MAX,
        f64::NEG_INFINITY,
        5e-324
    );
    round!(
        "echo_string",
        String,
        String::new(),
        "Grüße 🦀\0".into(),
        "x".repeat(100_000)
    );
    round!(
        "echo_bytes",
        Vec<u8>,
        vec![],
        (0..=255).collect(),
        vec![7; 1 << 20]
    );
    round!(
        "echo_list",
        Vec<String>,
        vec![],
        vec!["a".into(), String::new(), "ccc".into()]
    );
    round!("echo_option", Option<i64>, None, Some(i64::MIN));
    let order = Order {
        id: u64::MAX,
        title: "three lines".into(),
        lines: vec![("a".into(), -1), ("b".into(), i32::MIN)],
        note: None,
    };
    round!(
        "echo_order",
        Order,
        order.clone(),
        Order {
            note: Some("x".into()),
            lines: vec![],
            ..order
        }
    );
    let said = (
        i32::MIN,
        u32::MAX,
        i64::MIN,
        u64::MAX,
        1.5_f32,
        -2.25_f64,
        true,
        "text",
    );
    assert_eq!(
        sandbox.call::<String>("many", said).unwrap(),
        "-2147483648 4294967295 -9223372036854775808 18446744073709551615 1.5 -2.25 true text"
    );
}

#[test]
fn a_nan_keeps_its_payload_and_minus_zero_its_sign() {
    let mut sandbox = sandbox();
    // Quiet and signalling, both signs.
    for bits in [0x7fc0_0001_u32, 0x7f80_0001, 0xffff_ffff, 0x8000_0000] {
        let back: f32 = sandbox.call("echo_f32", (f32::from_bits(bits),)).unwrap();
        assert_eq!(back.to_bits(), bits);
    }
    let many = [
        0x7ff8_0000_0000_0001_u64,
        0x7ff0_0000_0000_0001,
        u64::MAX,
        1 << 63,
    ];
    for bits in many {
        let back: f64 = sandbox.call("echo_f64", (f64::from_bits(bits),)).unwrap();
        assert_eq!(back.to_bits(), bits);
    }
    let floats: Vec<f64> = many.iter().map(|bits| f64::from_bits(*bits)).collect();
    let back: Vec<f64> = sandbox.call("echo_floats", (floats,)).unwrap();
    assert_eq!(back.iter().map(|f| f.to_bits()).collect::<Vec<_>>(), many);
}

#[test]
fn sixty_four_mebibytes_go_in_and_out() {
    const SIZE: usize = 64 << 20;
    let mut sandbox = builder()
        .heap(200 << 20)
        .buffers(SIZE as u64 + 4096)
        .build()
        .unwrap();
    let bytes: Vec<u8> = (0..SIZE).map(|n| ((n * 7) >> 8) as u8).collect();
    // Borrowed on both sides.
    assert_eq!(
        sandbox.call::<u64>("length", (&bytes[..],)).unwrap(),
        SIZE as u64
    );
    let back: Vec<u8> = sandbox.call("echo_bytes", (&bytes[..],)).unwrap();
    assert!(back == bytes);
    let equal = sandbox.call_with(
        "echo_bytes",
        |out| skerry_sandbox::Arguments::encode_all(&(&bytes[..],), out),
        |from| Ok(<&[u8] as skerry_sandbox::Decode<'_>>::decode(from)? == bytes),
    );
    assert!(equal.unwrap());
}

#[test]
fn what_does_not_fit_is_an_error_that_says_so() {
    let mut sandbox = builder().buffers(64 << 10).heap(8 << 20).build().unwrap();
    let error = sandbox
        .call::<u64>("length", (vec![0_u8; 100 << 10],))
        .unwrap_err();
    assert!(
        matches!(
            error,
            CallError::TooLarge {
                what: "arguments",
                size: 102_409,
                ..
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("larger buffers"), "{error}");
    // The result is one byte larger than its area, the argument fits.
    let fits = (64 << 10) - 9;
    assert_eq!(
        sandbox.call::<u64>("length", (vec![0_u8; fits],)).unwrap(),
        fits as u64
    );
    let mut odd = builder();
    odd = odd.config(skerry_sandbox::Config {
        output: 4096,
        ..Default::default()
    });
    let mut small = odd.build().unwrap();
    let error = small
        .call::<Vec<u8>>("echo_bytes", (vec![0_u8; 5000],))
        .unwrap_err();
    assert!(
        matches!(
            error,
            CallError::TooLarge {
                what: "results",
                size: 5005,
                ..
            }
        ),
        "{error}"
    );
    // A host call's arguments and reply.
    let error = small
        .call::<Vec<u8>>("call_host_echo", (vec![0_u8; 5000],))
        .unwrap_err();
    assert!(
        matches!(&error, CallError::Failed(why) if why.contains("don't fit")),
        "{error}"
    );
    assert_eq!(*small.status(), Status::Ready);
    assert_eq!(small.call::<i32>("add", (1, 1)).unwrap(), 2);
}

#[test]
fn a_wrong_name_number_or_type_is_a_typed_error_and_harms_nothing() {
    let mut sandbox = sandbox();
    let error = sandbox.call::<i32>("ad", (1, 2)).unwrap_err();
    assert!(
        matches!(&error, CallError::NoFunction { name, known } if name == "ad" && known.contains("add"))
    );
    let error = sandbox.call::<i32>("add", (1,)).unwrap_err();
    assert!(matches!(error, CallError::Arity { given: 1, .. }));
    assert_eq!(
        error.to_string(),
        "add(a: i32, b: i32) -> i32 was called with 1 arguments"
    );
    let error = sandbox.call::<i32>("add", (1, "two")).unwrap_err();
    assert!(matches!(error, CallError::ArgumentType { index: 1, .. }));
    assert_eq!(
        error.to_string(),
        "add(a: i32, b: i32) -> i32 was called with String for argument 1, and takes i32"
    );
    assert!(matches!(
        sandbox.call::<i32>("add", (1_i64, 2)).unwrap_err(),
        CallError::ArgumentType { index: 0, .. }
    ));
    let error = sandbox.call::<String>("add", (1, 2)).unwrap_err();
    assert!(matches!(error, CallError::ReturnType { .. }), "{error}");
    assert_eq!(*sandbox.status(), Status::Ready);
    assert_eq!(sandbox.call::<i32>("add", (1, 2)).unwrap(), 3);
}

#[test]
fn errors_of_functions_pass_both_ways() {
    let mut sandbox = sandbox();
    let error = sandbox.call::<i32>("fail", ("no luck",)).unwrap_err();
    assert!(matches!(&error, CallError::Failed(why) if why == "no luck"));
    let said: String = sandbox.call("call_host_fail", ("not today",)).unwrap();
    assert_eq!(said, "error not today");
    assert_eq!(*sandbox.status(), Status::Ready);
}

#[test]
fn host_functions_are_linked_when_the_sandbox_is_made() {
    let build = || Sandbox::builder().guest(guest("sandbox-testguest"));
    let error = build()
        .host_fn("host_add", |a: i32, b: i32| a + b)
        .build()
        .unwrap_err();
    assert!(matches!(&error, BuildError::MissingHostFunctions(missing) if missing.len() == 2));
    assert!(
        error
            .to_string()
            .contains("host_echo(bytes: bytes) -> bytes"),
        "{error}"
    );
    let error = build()
        .host_fn("host_add", |a: i64, b: i32| a + i64::from(b))
        .build()
        .unwrap_err();
    assert!(
        matches!(error, BuildError::HostFunctionMismatch { .. }),
        "{error}"
    );
}

#[test]
fn a_host_function_that_panics_poisons_and_no_more() {
    let mut sandbox = builder()
        .host_fn("host_add", |_: i32, _: i32| -> i32 { panic!("on purpose") })
        .build()
        .unwrap();
    let snapshot = sandbox.snapshot().unwrap();
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        sandbox.call::<i32>("call_host", (1, 2))
    }));
    assert!(caught.is_err());
    let error = sandbox.call::<i32>("add", (1, 2)).unwrap_err();
    assert!(
        matches!(&error, CallError::Poisoned(why) if why.contains("host function")),
        "{error}"
    );
    sandbox.restore(&snapshot).unwrap();
    assert_eq!(sandbox.call::<i32>("add", (1, 2)).unwrap(), 3);
}

#[test]
fn a_guest_describes_itself() {
    let sandbox = sandbox();
    let description = sandbox.description();
    let add = description
        .exports
        .iter()
        .find(|f| f.name == "add")
        .unwrap();
    assert_eq!(add.to_string(), "add(a: i32, b: i32) -> i32");
    let many = description
        .exports
        .iter()
        .find(|f| f.name == "many")
        .unwrap();
    assert_eq!(
        many.to_string(),
        "many(a: i32, b: u32, c: i64, d: u64, e: f32, f: f64, g: bool, h: String) -> String"
    );
    let order = description
        .exports
        .iter()
        .find(|f| f.name == "echo_order")
        .unwrap();
    assert_eq!(order.to_string(), "echo_order(value: Order) -> Order");
    assert_eq!(description.imports.len(), 3);
    assert!(description.runtime.starts_with("skerry-sandbox-rt"));
}

#[test]
fn a_sandbox_moves_between_threads() {
    let mut sandbox = sandbox();
    for n in 1..=8_i64 {
        sandbox = std::thread::spawn(move || {
            assert_eq!(sandbox.call::<i64>("count", ()).unwrap(), n);
            sandbox
        })
        .join()
        .unwrap();
    }
}
