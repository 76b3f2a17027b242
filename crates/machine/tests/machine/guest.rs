//! A multiboot kernel of one page, assembled into the test program itself: the first letter of its
//! arguments says what it does.
#![expect(
    unsafe_code,
    reason = "the guest's code is assembled here and read as bytes between two symbols"
)]

use std::arch::global_asm;
use std::borrow::Cow;

// Loaded at 0x100000 by the header's address fields; every address is a distance from `guest_start`
// added to that.
global_asm!(
    ".pushsection .rodata.guest, \"a\"",
    ".balign 16",
    ".globl guest_start, guest_end",
    ".code32",
    "guest_start:",
    ".long 0x1badb002, 0x10003, -(0x1badb002 + 0x10003)",
    ".long 0x100000, 0x100000, 0, 0x104000, 0x100000 + (entry - guest_start)",
    "entry:",
    "cmp eax, 0x2badb002",
    "jne fail",
    "mov esp, 0x104000",
    "mov ebp, [ebx + 16]", // command line
    "2: mov al, [ebp]",    // its first word is the kernel's name
    "inc ebp",
    "cmp al, 0x20",
    "jne 2b",
    "mov al, [ebp]",
    "cmp al, 'e'",
    "je echo",
    "cmp al, 'm'",
    "je module",
    "cmp al, 'p'",
    "je power_off",
    "cmp al, 'n'",
    "je notify_panic",
    "cmp al, 'r'",
    "je reset",
    "cmp al, 't'",
    "je triple_fault",
    "cmp al, 's'",
    "je spin",
    "cmp al, 'h'",
    "je halt",
    "cmp al, 'i'",
    "je interrupts",
    "cmp al, 'a'",
    "je application_processor",
    "fail:",
    "mov eax, 0x7f",
    "out 0xf4, al",
    // Writes the zero-terminated text at ESI to COM1.
    "print:",
    "mov dx, 0x3f8",
    "2: lodsb",
    "test al, al",
    "jz 3f",
    "out dx, al",
    "jmp 2b",
    "3: ret",
    "done:",
    "mov eax, 0x10",
    "out 0xf4, eax",
    "echo:",
    "mov esi, ebp",
    "call print",
    "jmp done",
    "module:",
    "test dword ptr [ebx], 8",
    "jz fail",
    "mov eax, [ebx + 24]",
    "mov esi, [eax]",
    "mov ecx, [eax + 4]",
    "sub ecx, esi",
    "mov dx, 0x3f8",
    "rep outsb",
    "jmp done",
    "power_off:",
    "mov dx, 0x604",
    "mov ax, 0x3400",
    "out dx, ax",
    "jmp halt",
    "notify_panic:",
    "mov dx, 0x505",
    "mov al, 1",
    "out dx, al",
    "jmp halt",
    // RAM outlives a reset: the second boot ends the run.
    "reset:",
    "inc dword ptr [0x90000]",
    "cmp dword ptr [0x90000], 2",
    "je done",
    "mov al, 0xfe",
    "out 0x64, al",
    "jmp halt",
    "triple_fault:",
    "mov dword ptr [0x103000], 0",
    "mov dword ptr [0x103004], 0",
    "lidt [0x103000]",
    "ud2",
    "spin:",
    "mov dx, 0x3f8",
    "mov al, '.'",
    "2: out dx, al",
    "mov ecx, 1000",
    "3: dec ecx",
    "jnz 3b",
    "jmp 2b",
    "halt:",
    "cli",
    "hlt",
    "jmp halt",
    // Ten PIT interrupts through the PIC and LINT0 in ExtINT mode.
    "interrupts:",
    "mov edi, 0x102000",
    "mov ecx, 0x28",
    ".byte 0xb8", // mov eax, imm32
    ".long 0x100000 + (tick - guest_start)",
    "mov ebx, eax",
    "and eax, 0xffff",
    "or eax, 0x100000", // selector 0x10
    "and ebx, 0xffff0000",
    "or ebx, 0x8e00",
    "2: mov [edi], eax",
    "mov [edi + 4], ebx",
    "add edi, 8",
    "loop 2b",
    "mov word ptr [0x103000], 0x13f",
    "mov dword ptr [0x103002], 0x102000",
    "lidt [0x103000]",
    "mov dword ptr [0xfee000f0], 0x1ff", // enable the local APIC
    "mov dword ptr [0xfee00350], 0x700", // LINT0: ExtINT
    "mov al, 0x11",
    "out 0x20, al",
    "mov al, 0x20",
    "out 0x21, al",
    "mov al, 4",
    "out 0x21, al",
    "mov al, 1",
    "out 0x21, al",
    "mov al, 0xfe",
    "out 0x21, al",
    "mov al, 0x34",
    "out 0x43, al",
    "mov ax, 1193", // 1 ms
    "out 0x40, al",
    "mov al, ah",
    "out 0x40, al",
    "xor ebp, ebp",
    "2: sti",
    "hlt",
    "cmp ebp, 10",
    "jb 2b",
    "jmp done",
    "tick:",
    "inc ebp",
    "mov al, 0x20",
    "out 0x20, al",
    "pop eax", // returns with interrupts off; KVM's emulator has no IRET in protected mode
    "add esp, 8",
    "jmp eax",
    // INIT and SIPI to processor 1, which sets a byte.
    "application_processor:",
    "mov dword ptr [0xfee000f0], 0x1ff", // KVM sends no messages from a disabled local APIC
    ".byte 0xbe",                        // mov esi, imm32
    ".long 0x100000 + (trampoline - guest_start)",
    "mov edi, 0x8000",
    "mov ecx, 16",
    "rep movsb",
    "mov dword ptr [0xfee00310], 0x01000000",
    "mov dword ptr [0xfee00300], 0x4500",
    "mov ecx, 100000",
    "2: pause",
    "loop 2b",
    "mov dword ptr [0xfee00310], 0x01000000",
    "mov dword ptr [0xfee00300], 0x4608",
    "2: pause",
    "cmp byte ptr [0x9100], 0x5a",
    "jne 2b",
    "jmp done",
    "trampoline:",
    ".code16",
    "xor ax, ax",
    "mov ds, ax",
    "mov byte ptr [0x9100], 0x5a",
    "2: hlt",
    "jmp 2b",
    ".code64",
    ".balign 16",
    "guest_end:",
    ".popsection",
);

unsafe extern "C" {
    static guest_start: u8;
    static guest_end: u8;
}

/// The kernel as a file holds it.
pub(crate) fn kernel() -> Cow<'static, [u8]> {
    // SAFETY: both symbols are in one read-only section, the second after the first; nothing but
    // bytes lies between them.
    let bytes = unsafe {
        let start = &raw const guest_start;
        let len = (&raw const guest_end).offset_from(start);
        std::slice::from_raw_parts(start, len as usize)
    };
    Cow::Borrowed(bytes)
}
