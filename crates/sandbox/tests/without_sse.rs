//! Guests built without SSE instructions, on soft and on KVM: also on one that emulates and has no SSE.

mod plain;

use skerry_sandbox::{Backend, BuildError, Builder, CallError, Fault, Sandbox, Status};

/// The test guest, or why there is none.
fn builder(backend: Backend) -> Result<Builder, String> {
    let program = plain::folder()?.join("sandbox-testguest");
    Ok(Sandbox::builder()
        .guest(program)
        .backend(backend)
        .host_fn("host_add", |a: i32, b: i32| a.wrapping_add(b))
        .host_fn("host_echo", |bytes: Vec<u8>| bytes)
        .host_fn("host_fail", |message: String| Err::<i32, String>(message)))
}

fn behaves(backend: Backend) {
    let builder = match builder(backend) {
        Ok(builder) => builder,
        Err(why) => return println!("skipped: {why}"),
    };
    let mut sandbox = match builder.build() {
        Ok(sandbox) => sandbox,
        Err(error @ BuildError::Unusable { .. }) => return println!("skipped: {error}"),
        Err(error) => panic!("the guest doesn't start: {error:?}"),
    };
    assert_eq!(sandbox.backend(), backend);
    assert_eq!(sandbox.call::<i32>("add", (1, 2)).unwrap(), 3);
    assert_eq!(sandbox.call::<i32>("call_host", (40, 2)).unwrap(), 42);
    // Floating point is done by functions, and passes as its bits.
    let nan = f64::from_bits(0x7ff4_0000_dead_beef);
    let back: f64 = sandbox.call("echo_f64", (nan,)).unwrap();
    assert_eq!(back.to_bits(), nan.to_bits());
    let text: String = sandbox
        .call("many", (1, 2_u32, 3_i64, 4_u64, 1.5_f32, -0.25, true, "x"))
        .unwrap();
    assert_eq!(text, "1 2 3 4 1.5 -0.25 true x");
    let bytes: Vec<u8> = (0..100_000_u32).map(|n| n as u8).collect();
    let back: Vec<u8> = sandbox.call("call_host_echo", (&bytes[..],)).unwrap();
    assert!(back == bytes);
    assert_eq!(sandbox.call::<i64>("count", ()).unwrap(), 1);

    let snapshot = sandbox.snapshot().unwrap();
    let fault = sandbox.call::<u64>("peek", (8_u64,)).unwrap_err();
    assert!(
        matches!(
            fault,
            CallError::Fault(Fault::AccessViolation { address: 8, .. })
        ),
        "{fault}"
    );
    assert!(matches!(sandbox.status(), Status::Poisoned(_)));
    sandbox.restore(&snapshot).unwrap();
    assert_eq!(sandbox.call::<i64>("count", ()).unwrap(), 2);
    // An exception without an error code, and one by a software interrupt.
    for (which, wanted) in [(10_u32, 6), (11, 3), (13, 0)] {
        let error = sandbox.call::<()>("forbidden", (which,)).unwrap_err();
        assert!(
            matches!(error, CallError::Fault(Fault::Exception { vector, .. }) if vector == wanted),
            "{which}: {error}"
        );
        sandbox.restore(&snapshot).unwrap();
    }
    assert_eq!(sandbox.call::<i64>("count", ()).unwrap(), 2);
}

#[test]
fn the_flag_leaves_no_instruction_on_sse_registers() {
    let folder = match plain::folder() {
        Ok(folder) => folder,
        Err(why) => return println!("skipped: {why}"),
    };
    match plain::sse_instructions(&folder.join("sandbox-testguest")) {
        Some(found) => assert_eq!(found, [""; 0]),
        None => println!("skipped: no objdump"),
    }
}

#[test]
fn a_guest_without_sse_runs_on_soft() {
    behaves(Backend::Soft);
}

#[test]
fn a_guest_without_sse_runs_on_kvm() {
    behaves(Backend::Kvm);
}
