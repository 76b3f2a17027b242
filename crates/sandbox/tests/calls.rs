//! Calls: every type, every error.

mod common;

use common::{builder, sandbox};
use skerry_sandbox::CallError;

#[test]
fn a_call_returns_and_state_stays() {
    let mut sandbox = sandbox();
    assert_eq!(sandbox.call::<i32>("add", (1, 2)).unwrap(), 3);
    assert_eq!(sandbox.call::<i64>("initialised", ()).unwrap(), 42);
    assert_eq!(sandbox.call::<i64>("count", ()).unwrap(), 1);
    assert_eq!(sandbox.call::<i64>("count", ()).unwrap(), 2);
    assert_eq!(sandbox.call::<i32>("call_host", (40, 2)).unwrap(), 42);
}
