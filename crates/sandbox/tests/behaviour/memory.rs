//! The guest's memory: what it may do with which page, and how it is told when it does else.

use crate::common::{builder, sandbox};
use skerry_sandbox::{Access, CallError, Fault, Sandbox, Status};

fn fault(sandbox: &mut Sandbox, name: &str, arguments: impl skerry_sandbox::Arguments) -> Fault {
    match sandbox.call::<u64>(name, arguments) {
        Err(CallError::Fault(fault)) => {
            assert!(matches!(sandbox.status(), Status::Poisoned(_)));
            let error = sandbox.call::<i32>("add", (1, 2)).unwrap_err();
            assert!(matches!(error, CallError::Poisoned(_)), "{error}");
            fault
        }
        other => panic!("{name}: {other:?}"),
    }
}

fn violation(fault: &Fault) -> (u64, Access, bool) {
    match fault {
        Fault::AccessViolation {
            address,
            access,
            mapped,
            ..
        } => (*address, *access, *mapped),
        other => panic!("{other:?}"),
    }
}

#[test]
fn accesses_without_right_are_told_with_address_and_right() {
    let mut sandbox = sandbox();
    let code: u64 = sandbox.call("code_address", ()).unwrap();
    let heap: u64 = sandbox.call("heap_address", ()).unwrap();
    let stack: u64 = sandbox.call("stack_address", ()).unwrap();
    let snapshot = sandbox.snapshot().unwrap();
    // Null, wild, not canonical's neighbour, the system's pages, a page table's place.
    for address in [
        0_u64,
        8,
        0xfff,
        0xdead_0000,
        0x7fff_ffff_f000,
        0xffff_ff80_0000_0000,
    ] {
        for (name, access) in [("peek", Access::Read), ("jump", Access::Execute)] {
            let fault = fault(&mut sandbox, name, (address,));
            assert_eq!(violation(&fault).0, address, "{fault}");
            assert_eq!(violation(&fault).1, access, "{fault}");
            sandbox.restore(&snapshot).unwrap();
        }
        let told = fault(&mut sandbox, "poke", (address, 1_u64));
        assert_eq!(violation(&told).1, Access::Write);
        sandbox.restore(&snapshot).unwrap();
    }
    // Code is not written, heap and stack are not executed.
    let told = fault(&mut sandbox, "poke", (code & !7, 1_u64));
    assert_eq!(violation(&told), (code & !7, Access::Write, true));
    sandbox.restore(&snapshot).unwrap();
    for address in [heap, stack] {
        let told = fault(&mut sandbox, "jump", (address,));
        assert_eq!(violation(&told), (address, Access::Execute, true));
        assert!(told.to_string().contains("it may not"), "{told}");
        sandbox.restore(&snapshot).unwrap();
    }
    assert!(matches!(
        fault(&mut sandbox, "peek", (0x8000_0000_0000_0000_u64,)),
        Fault::Exception { vector: 13, .. }
    ));
    sandbox.restore(&snapshot).unwrap();
    assert_eq!(sandbox.call::<i32>("add", (1, 2)).unwrap(), 3);
}

#[test]
fn a_stack_that_overflows_says_so() {
    for stack in [16_u64 << 10, 256 << 10, 1 << 20] {
        let mut sandbox = builder().stack(stack).build().unwrap();
        let snapshot = sandbox.snapshot().unwrap();
        assert_eq!(sandbox.call::<u64>("recurse", (10_u64,)).unwrap(), 0);
        let told = fault(&mut sandbox, "recurse", (1_u64 << 40,));
        assert!(
            matches!(told, Fault::StackOverflow { size, .. } if size == stack),
            "{told}"
        );
        sandbox.restore(&snapshot).unwrap();
        assert_eq!(sandbox.call::<u64>("recurse", (10_u64,)).unwrap(), 0);
    }
}

#[test]
fn a_heap_that_is_full_says_so() {
    let mut sandbox = builder().heap(4 << 20).build().unwrap();
    let snapshot = sandbox.snapshot().unwrap();
    assert_eq!(
        sandbox.call::<u64>("allocate", (2_u64 << 20,)).unwrap(),
        512
    );
    let error = sandbox.call::<u64>("allocate", (5_u64 << 20,)).unwrap_err();
    assert!(
        matches!(error, CallError::OutOfMemory { bytes } if bytes == 5 << 20),
        "{error}"
    );
    assert!(matches!(sandbox.status(), Status::Poisoned(_)));
    sandbox.restore(&snapshot).unwrap();
    assert_eq!(
        sandbox.call::<u64>("allocate", (2_u64 << 20,)).unwrap(),
        512
    );
}

#[test]
fn a_large_heap_is_usable_to_its_end() {
    let mut sandbox = builder().heap(512 << 20).build().unwrap();
    assert_eq!(
        sandbox.call::<u64>("allocate", (500_u64 << 20,)).unwrap(),
        500 * 256
    );
}

#[test]
fn a_panic_is_told_with_its_place() {
    let mut sandbox = sandbox();
    let snapshot = sandbox.snapshot().unwrap();
    let error = sandbox.call::<()>("panics", ("oh no",)).unwrap_err();
    match &error {
        CallError::Panicked(text) => {
            assert!(
                text.starts_with("oh no at ") && text.contains("main.rs:"),
                "{text}"
            );
        }
        other => panic!("{other:?}"),
    }
    sandbox.restore(&snapshot).unwrap();
    assert_eq!(sandbox.call::<i32>("add", (1, 2)).unwrap(), 3);
}

#[test]
fn what_ring_0_may_is_not_the_guests() {
    let mut sandbox = sandbox();
    let snapshot = sandbox.snapshot().unwrap();
    for which in 0..=18_u32 {
        let told = match sandbox.call::<()>("forbidden", (which,)) {
            Err(CallError::Fault(Fault::Exception { vector, .. })) => vector,
            // A KVM that runs guests in ring 3 itself doesn't look at EFER.SCE: SYSCALL goes to where LSTAR
            // says, 0, and nothing is there.
            Err(CallError::Fault(Fault::AccessViolation { rip: 0, .. })) if which == 14 => 6,
            // QEMU's nested SVM, below a KVM, lets a hypervisor intercept WBINVD before it looks at the ring;
            // KVM goes on behind it.
            Ok(()) if which == 16 && crate::backend() == skerry_sandbox::Backend::Kvm => continue,
            other => panic!("{which}: {other:?}"),
        };
        // XSETBV without OSXSAVE and SYSCALL without SCE are invalid opcodes; a KVM that runs guests
        // in ring 3 itself can't tell the former.
        let expected: &[u8] = match which {
            9 | 12 => &[6, 13],
            10 | 14 => &[6],
            11 => &[3],
            13 => &[0],
            _ => &[13],
        };
        assert!(expected.contains(&told), "instruction {which}: {told}");
        sandbox.restore(&snapshot).unwrap();
        assert_eq!(sandbox.call::<i32>("add", (1, 2)).unwrap(), 3);
    }
}

/// Whether a port that means nothing has ended a call as it should.
fn as_told(port: u32, error: &CallError) -> bool {
    match (port, error) {
        (_, CallError::Misbehaved(_)) => true,
        // The guest's own port is always let through.
        (0x5c, _) => false,
        (_, CallError::Fault(Fault::Exception { vector, .. })) => *vector == 13,
        _ => false,
    }
}

#[test]
fn ports_that_mean_nothing_are_an_error() {
    let mut sandbox = sandbox();
    let snapshot = sandbox.snapshot().unwrap();
    // The guest's port for reasons that there are none of; all others, the stubs' own among them, are not the
    // guest's to use: they end the call, or on a KVM without I/O privilege levels the instruction faults.
    let exits = [
        (0x5c, 0),
        (0x5c, 99),
        (0x80_u32, 0_u32),
        (0x5d, 0),
        (0x60, 0),
        (0xffff, 7),
    ];
    for (port, value) in exits {
        let error = sandbox.call::<()>("wrong_exit", (port, value)).unwrap_err();
        assert!(as_told(port, &error), "port {port:#x}: {error}");
        sandbox.restore(&snapshot).unwrap();
    }
    for port in [0x5c_u32, 0x60] {
        let error = sandbox.call::<u32>("port_in", (port,)).unwrap_err();
        assert!(as_told(port, &error), "port {port:#x}: {error}");
        sandbox.restore(&snapshot).unwrap();
    }
    assert_eq!(sandbox.call::<i32>("add", (1, 2)).unwrap(), 3);
}

#[test]
fn a_spoiled_control_page_harms_the_guest_alone() {
    let mut sandbox = sandbox();
    let snapshot = sandbox.snapshot().unwrap();
    for word in 0..64_u32 {
        for value in [0, 1, 0x7fff_ffff, u32::MAX] {
            // Whatever comes back; and the next calls with it.
            let _ = sandbox.call::<()>("spoil_control", (word, value));
            let _ = sandbox.call::<i32>("call_host", (1, 2));
            let _ = sandbox.call::<()>("log_all", ("text",));
            let _ = sandbox.metrics();
            sandbox.restore(&snapshot).unwrap();
            assert_eq!(sandbox.call::<i32>("add", (1, 2)).unwrap(), 3);
        }
    }
}
