//! A guest that was built for the first version of the interface runs for ever: this one never changes.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use skerry_sandbox::{Backend, CallError, HostFunctions, Sandbox, Snapshot, Status, serde_value};

static FIRST: &[u8] = include_bytes!("fixtures/interface-1/testguest-x86_64");

/// As the guest has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Order {
    id: u64,
    title: String,
    lines: Vec<(String, i32)>,
    note: Option<String>,
}

serde_value!(Order);

fn functions() -> Arc<HostFunctions> {
    let mut functions = HostFunctions::new();
    functions.add("host_add", |a: i32, b: i32| a.wrapping_add(b));
    functions.add("host_echo", |bytes: Vec<u8>| bytes);
    functions.add("host_fail", |message: String| Err::<i32, String>(message));
    Arc::new(functions)
}

fn sandbox() -> Sandbox {
    Sandbox::builder()
        .guest(FIRST)
        .backend(Backend::Soft)
        .host_functions(&functions())
        .build()
        .expect("an old guest starts")
}

#[test]
fn it_is_described() {
    let description = sandbox().description();
    let signatures: Vec<_> = description
        .exports
        .iter()
        .map(ToString::to_string)
        .collect();
    for signature in [
        "add(a: i32, b: i32) -> i32",
        "echo_order(value: Order) -> Order",
        "fail(message: String) -> i32",
        "checksum(bytes: bytes) -> u64",
    ] {
        assert!(signatures.iter().any(|s| s == signature), "{signatures:#?}");
    }
    assert_eq!(description.imports.len(), 3, "{description:?}");
}

#[test]
fn values_pass_both_ways() {
    let mut sandbox = sandbox();
    let order = Order {
        id: u64::MAX,
        title: "ß".into(),
        lines: vec![("a".into(), -1), (String::new(), i32::MIN)],
        note: None,
    };
    let back: Order = sandbox.call("echo_order", (order.clone(),)).unwrap();
    assert_eq!(back, order);
    let text: String = sandbox
        .call(
            "many",
            (1, 2_u32, -3_i64, 4_u64, 0.5_f32, 0.25, true, "eight"),
        )
        .unwrap();
    assert_eq!(text, "1 2 -3 4 0.5 0.25 true eight");
    let list = vec!["x".to_owned(), String::new()];
    assert_eq!(
        sandbox
            .call::<Vec<String>>("echo_list", (list.clone(),))
            .unwrap(),
        list
    );
    let floats: Vec<f64> = sandbox
        .call("echo_floats", (vec![f64::NAN, -0.0],))
        .unwrap();
    assert!(floats[0].is_nan() && floats[1].is_sign_negative());
    assert_eq!(
        sandbox
            .call::<Option<i64>>("echo_option", (None::<i64>,))
            .unwrap(),
        None
    );
    assert_eq!(
        sandbox.call::<i32>("call_host_often", (100_u32,)).unwrap(),
        100
    );
    let bytes: Vec<u8> = sandbox
        .call("call_host_echo", (&[7_u8; 5000][..],))
        .unwrap();
    assert_eq!(bytes, [7; 5000]);
}

#[test]
fn errors_are_what_they_were() {
    let mut sandbox = sandbox();
    let fresh = sandbox.snapshot().unwrap();
    let failed = sandbox.call::<i32>("fail", ("no",)).unwrap_err();
    assert!(
        matches!(&failed, CallError::Failed(message) if message == "no"),
        "{failed:?}"
    );
    let said: String = sandbox.call("call_host_fail", ("away",)).unwrap();
    assert!(said.contains("away"), "{said}");
    let panicked = sandbox.call::<()>("panics", ("oh",)).unwrap_err();
    assert!(
        matches!(&panicked, CallError::Panicked(message) if message.contains("oh")),
        "{panicked:?}"
    );
    assert!(matches!(sandbox.status(), Status::Poisoned(_)));
    sandbox.restore(&fresh).unwrap();
    let full = sandbox.call::<u64>("allocate", (1_u64 << 30,)).unwrap_err();
    assert!(matches!(full, CallError::OutOfMemory { .. }), "{full:?}");
    sandbox.restore(&fresh).unwrap();
    assert_eq!(sandbox.call::<i32>("add", (1, 2)).unwrap(), 3);
}

#[test]
fn it_is_kept_and_loaded() {
    let mut sandbox = sandbox();
    assert_eq!(sandbox.call::<i64>("count", ()).unwrap(), 1);
    let store = tempfile::tempdir().unwrap();
    let id = sandbox.snapshot().unwrap().save(store.path()).unwrap();
    let loaded = Snapshot::load(store.path(), &id.to_string()).unwrap();
    let mut copy = Sandbox::from_snapshot_on(&loaded, &functions(), Backend::Soft).unwrap();
    assert_eq!(copy.call::<i64>("count", ()).unwrap(), 2);
    assert_eq!(sandbox.call::<i64>("count", ()).unwrap(), 2);
}
