//! The repository's own kernel with a first program that works for ever: it writes to pages, prints
//! a dot and sleeps. The program is assembled into the test and packed into an initial RAM disk.
#![expect(
    unsafe_code,
    reason = "the program's code is assembled here and read as bytes between two symbols"
)]

use std::arch::global_asm;

/// Where the program is loaded.
const BASE: u64 = 0x40_0000;
/// The pages that it writes to.
const BUFFER: u64 = 0x100_0000;
const ELF_HEADERS: usize = 64 + 56;

global_asm!(
    ".pushsection .rodata.init, \"a\"",
    ".balign 16",
    ".globl init_start, init_end",
    "init_start:",
    "jmp 1f",
    ".balign 8",
    ".quad 0", // pages
    ".quad 0", // seconds to sleep
    ".quad 0", // and nanoseconds
    "1: mov edi, 0x1000000",
    "mov rcx, [rip + init_start + 8]",
    "2: inc dword ptr [rdi]",
    "add rdi, 4096",
    "dec rcx",
    "jnz 2b",
    "mov eax, 1", // write
    "mov edi, 1",
    "lea rsi, [rip + 3f]",
    "mov edx, 1",
    "syscall",
    "mov eax, 35", // nanosleep
    "lea rdi, [rip + init_start + 16]",
    "xor esi, esi",
    "syscall",
    "jmp 1b",
    "3: .ascii \".\"",
    ".balign 8",
    "init_end:",
    ".popsection",
);

unsafe extern "C" {
    static init_start: u8;
    static init_end: u8;
}

fn program(pages: u64, sleep_ns: u64) -> Vec<u8> {
    // SAFETY: both symbols are in one read-only section, the second after the first; nothing but
    // bytes lies between them.
    let mut code = unsafe {
        let start = &raw const init_start;
        let len = (&raw const init_end).offset_from(start);
        std::slice::from_raw_parts(start, len as usize)
    }
    .to_vec();
    code[8..16].copy_from_slice(&pages.to_le_bytes());
    code[16..24].copy_from_slice(&(sleep_ns / 1_000_000_000).to_le_bytes());
    code[24..32].copy_from_slice(&(sleep_ns % 1_000_000_000).to_le_bytes());
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // Executable, x86-64; entry; where the program header is; sizes.
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    elf.extend((BASE + ELF_HEADERS as u64).to_le_bytes());
    elf.extend(64_u64.to_le_bytes());
    elf.extend([0; 12]);
    elf.extend([64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    // One segment for everything, zero from the code's end on.
    elf.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    let file = (ELF_HEADERS + code.len()) as u64;
    let memory = BUFFER - BASE + pages * 4096;
    for value in [0, BASE, BASE, file, memory, 4096] {
        elf.extend(value.to_le_bytes());
    }
    assert_eq!(elf.len(), ELF_HEADERS);
    elf.extend(code);
    elf
}

fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
    let ino = archive.len() as u32;
    let name_len = name.len() as u32 + 1;
    archive.extend(b"070701");
    let fields = [
        ino,
        mode,
        0,
        0,
        1,
        0,
        data.len() as u32,
        0,
        0,
        device.0,
        device.1,
        name_len,
        0,
    ];
    for field in fields {
        archive.extend(format!("{field:08x}").bytes());
    }
    archive.extend(name.bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(data);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

/// An initial RAM disk whose program writes to `pages` pages, prints a dot and sleeps, again and
/// again.
pub(crate) fn initrd(pages: u64, sleep_ns: u64) -> Vec<u8> {
    let mut archive = Vec::new();
    entry(&mut archive, "dev", 0o040_755, (0, 0), &[]);
    entry(&mut archive, "dev/console", 0o020_600, (5, 1), &[]);
    let init = program(pages, sleep_ns);
    entry(&mut archive, "init", 0o100_755, (0, 0), &init);
    entry(&mut archive, "TRAILER!!!", 0, (0, 0), &[]);
    archive
}

/// Where the kernel is.
pub(crate) const KERNEL: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../guest/kernel/bzImage-x86_64"
);
