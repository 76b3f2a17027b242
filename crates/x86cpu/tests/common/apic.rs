//! Guest code for the local APIC.

use crate::assemble;

/// Puts it into x2APIC mode and enables it. Changes RAX, RCX and RDX; code may follow.
pub fn enable() -> &'static [u8] {
    assemble!(
        "mov ecx, 0x1b",
        "rdmsr",
        "or eax, 0xc00",
        "wrmsr",
        "mov ecx, 0x80f",
        "mov eax, 0x1ff",
        "xor edx, edx",
        "wrmsr",
    )
}

/// A handler of its interrupts: `body`, which may change RAX, RCX, RDX and flags, and that it is done.
pub fn handler(body: &[u8]) -> Vec<u8> {
    let done = assemble!(
        "mov ecx, 0x80b",
        "xor eax, eax",
        "xor edx, edx",
        "wrmsr",
        "pop rdx",
        "pop rcx",
        "pop rax",
        "iretq",
    );
    [assemble!("push rax", "push rcx", "push rdx"), body, done].concat()
}
