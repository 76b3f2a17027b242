//! Addresses at every edge: pages, RAM, what is mapped, the halves of the canonical ranges, 2^32 and
//! 2^64. Each instruction runs at all of them in one processor, so that it is compiled for the first
//! and meets the others; each processor must say the same.

use std::time::Duration;

use skerry_x86cpu::testing::{CODE, DATA, RAM, TestCpu};
use skerry_x86cpu::{TrapKind, Tuning};

use crate::assemble;
use crate::machine::{COMPILING, Deadline, Seen, machine, run_to_trap};

/// Accesses through RBX (RSP for the stack), of all sizes.
fn instructions() -> Vec<(&'static str, &'static [u8])> {
    vec![
        ("load 1", assemble!("mov al, [rbx]")),
        ("load 2", assemble!("mov ax, [rbx]")),
        ("load 4", assemble!("mov eax, [rbx]")),
        ("load 8", assemble!("mov rax, [rbx]")),
        ("load 16", assemble!("movups xmm1, [rbx]")),
        ("load 16, aligned", assemble!("movaps xmm1, [rbx]")),
        ("load 32", assemble!("vmovups ymm1, [rbx]")),
        ("load 10", assemble!("fld tbyte ptr [rbx]", "fstp st(0)")),
        ("movzx", assemble!("movzx eax, word ptr [rbx]")),
        ("store 1", assemble!("mov [rbx], cl")),
        ("store high", assemble!("mov [rbx], ch")),
        ("store 2", assemble!("mov [rbx], cx")),
        ("store 4", assemble!("mov [rbx], ecx")),
        ("store 8", assemble!("mov [rbx], rcx")),
        ("store 16", assemble!("movups [rbx], xmm1")),
        ("store 32", assemble!("vmovups [rbx], ymm1")),
        ("store immediate", assemble!("mov qword ptr [rbx], -5")),
        ("change 1", assemble!("add [rbx], cl")),
        ("change 4", assemble!("sub [rbx], ecx")),
        ("change 8", assemble!("xor [rbx], rcx")),
        ("locked 4", assemble!("lock add [rbx], ecx")),
        ("locked 8", assemble!("lock xadd [rbx], rcx")),
        ("exchange", assemble!("xchg [rbx], rcx")),
        ("compare", assemble!("cmp [rbx], rcx", "setb al")),
        ("indexed", assemble!("mov rax, [rbx + 8*rcx - 8]")),
        (
            "indexed, around",
            assemble!("mov rdx, -1", "mov rax, [rbx + rdx*8 + 8]"),
        ),
        ("displaced", assemble!("mov rax, [rbx + 0x7ffffff8]")),
        ("displaced back", assemble!("mov [rbx - 0x80], rcx")),
        (
            "two near",
            assemble!("mov rax, [rbx]", "mov [rbx + 8], rcx", "mov dl, [rbx + 31]"),
        ),
        (
            // What is constant in the address fits 32 bits only together with the index's share.
            "far, and back by the index",
            assemble!(
                "mov rdx, 0x2000",
                "add rbx, 0x3fffffff",
                "sub rdx, 0x7fffffff",
                "sub rdx, 0x40000000",
                "mov rax, [rbx + rdx + 0x7fffe000]",
                "mov rdi, [rbx + rdx + 0x7fffe008]"
            ),
        ),
        ("segment", assemble!("mov rax, fs:[rbx]")),
        ("segment store", assemble!("mov gs:[rbx + 4], ecx")),
        ("32-bit address", assemble!("mov eax, [ebx]")),
        ("32-bit address store", assemble!("mov [ebx + 8*ecx], ecx")),
        ("push", assemble!("mov rsp, rbx", "push rcx")),
        ("pop", assemble!("mov rsp, rbx", "pop rdx")),
        (
            "push memory",
            assemble!("mov rsp, rbx", "push qword ptr [rsi]"),
        ),
        ("pop memory", assemble!("pop qword ptr [rbx]")),
        (
            "pops",
            assemble!("mov rsp, rbx", "pop rdx", "pop rbp", "pop rdi"),
        ),
        (
            "pushes",
            assemble!(
                "mov rsp, rbx",
                "push rdx",
                "push rbp",
                "push rdi",
                "push rdx"
            ),
        ),
        ("pushf", assemble!("mov rsp, rbx", "pushfq")),
        ("call", assemble!("mov rsp, rbx", "call 2f", "2:", "nop")),
        ("enter", assemble!("mov rsp, rbx", "enter 16, 0")),
        ("leave", assemble!("mov rbp, rbx", "leave")),
        ("ret", assemble!("mov rsp, rbx", "ret")),
        ("jump", assemble!("jmp rbx")),
        ("jump through memory", assemble!("jmp qword ptr [rbx]")),
        ("call through memory", assemble!("call qword ptr [rbx]")),
        ("lods", assemble!("mov rsi, rbx", "lodsq")),
        ("stos", assemble!("mov rdi, rbx", "stosd")),
        (
            "rep movs",
            assemble!("mov rdi, rbx", "mov ecx, 40", "rep movsb"),
        ),
        (
            "rep movs from",
            assemble!("mov rdi, rsi", "mov rsi, rbx", "mov ecx, 9", "rep movsq"),
        ),
        (
            "rep stos",
            assemble!("mov rdi, rbx", "mov ecx, 5", "rep stosq"),
        ),
        (
            "rep stos back",
            assemble!("std", "mov rdi, rbx", "mov ecx, 5", "rep stosd", "cld"),
        ),
        (
            "repe cmps",
            assemble!("mov rdi, rbx", "mov ecx, 12", "repe cmpsd"),
        ),
        ("bit far away", assemble!("bts [rbx], rcx")),
        ("fnstenv", assemble!("fnstenv [rbx]")),
        ("fxsave", assemble!("fxsave [rbx]")),
        (
            "xsave",
            assemble!("mov eax, 7", "xor edx, edx", "xsave [rbx]"),
        ),
        ("sixteen", assemble!("xchg rcx, rdx", "cmpxchg16b [rbx]")),
        (
            "movq",
            assemble!("movq mm1, [rbx]", "movq [rbx + 8], mm1", "emms"),
        ),
        ("scalar", assemble!("addsd xmm1, [rbx]")),
        ("packed", assemble!("paddd xmm1, [rbx]")),
        ("packed, three", assemble!("vpaddd ymm1, ymm2, [rbx]")),
        (
            "fild",
            assemble!("fild qword ptr [rbx]", "fistp dword ptr [rbx + 8]"),
        ),
    ]
}

fn addresses() -> Vec<u64> {
    const EDGES: [u64; 14] = [
        0x1000,
        DATA + 0x1000,
        RAM as u64,
        RAM as u64 - 0x8000,
        // All that is mapped.
        1 << 30,
        1 << 31,
        1 << 32,
        1 << 39,
        1 << 47,
        1 << 63,
        0u64.wrapping_sub(1 << 47),
        0u64.wrapping_sub(1 << 31),
        0,
        0x10000 - 0x200,
    ];
    let mut all = Vec::new();
    for edge in EDGES {
        for back in [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16, 17, 24, 31, 32, 33] {
            all.push(edge.wrapping_sub(back));
        }
    }
    all.extend([DATA, DATA + 3, DATA + 16]);
    all
}

fn prepare(tuning: Tuning) -> TestCpu {
    let t = machine(1, tuning);
    for page in [
        0u64,
        0xf000,
        DATA,
        DATA + 0x1000,
        RAM as u64 - 0x9000,
        RAM as u64 - 0x8000,
    ] {
        let bytes: Vec<u8> = (0..4096u32).map(|n| (n * 7 + n / 64) as u8).collect();
        // Not the descriptor tables.
        if page != 0 {
            t.write(page, &bytes);
        }
    }
    t
}

fn one(t: &mut TestCpu, at: u64, address: u64, fs: u64) -> Seen {
    let mut gpr = std::array::from_fn(|n| n as u64);
    let (data, stack) = (DATA + 0x100, 0x2_0000);
    gpr[..8].copy_from_slice(&[0x1111, 3, 0x2222, address, stack, 0x5555, data, 0x7777]);
    run_to_trap(t, at, &gpr, fs)
}

#[test]
fn every_access_at_every_edge() {
    for (n, (name, code)) in instructions().iter().enumerate() {
        // An OUT ends each.
        let mut code = code.to_vec();
        code.extend([0xe6, 0x99]);
        // Above all pages that are accessed.
        let at = DATA + 0x4000 + 0x100 * n as u64;
        for (how, tuning) in COMPILING {
            let _deadline = Deadline::new(format!("{name} ({how})"), Duration::from_secs(20));
            let mut actual = prepare(tuning);
            let mut reference = prepare(Tuning::INTERPRETER);
            reference.write(at, &code);
            actual.write(at, &code);
            for &address in &addresses() {
                for fs in [0, 0u64.wrapping_sub(0x20), DATA] {
                    if fs != 0 && !name.starts_with("segment") {
                        continue;
                    }
                    let a = one(&mut reference, at, address, fs);
                    let b = one(&mut actual, at, address, fs);
                    assert_eq!(a, b, "{name} at {address:x}, segment {fs:x} ({how})");
                }
            }
            let (a, b) = (reference.read(0, RAM), actual.read(0, RAM));
            if let Some(at) = (0..RAM).find(|&n| a[n] != b[n]) {
                panic!("{name} ({how}): memory at {at:x}");
            }
        }
    }
}

/// Code itself at edges: at the end of RAM, of what is mapped, across pages, in the last bytes of
/// the lower half.
#[test]
fn code_at_edges() {
    for (how, tuning) in crate::machine::TUNINGS {
        for back in 1..12u64 {
            let edge = RAM as u64 - 0x8000;
            let mut t = machine(1, tuning);
            let code = assemble!("mov eax, 0x12345678", "add eax, ebx", "hlt");
            t.write(edge - back, code);
            t.cpu.rip = edge - back;
            t.cpu.gpr[3] = 1;
            crate::machine::run_to_halt(&mut t.cpu, how);
            assert_eq!(t.cpu.gpr[0], 0x1234_5679, "{how}, {back} before a page");
        }
        for rip in [
            (1u64 << 47) - 1,
            1 << 47,
            0u64.wrapping_sub(1 << 47),
            u64::MAX,
            u64::MAX - 3,
            (1 << 30) - 1,
            1 << 30,
        ] {
            let mut t = machine(1, tuning);
            t.cpu.rip = CODE;
            let mut code = vec![0x48, 0xb8];
            code.extend(rip.to_le_bytes());
            code.extend([0xff, 0xe0]);
            t.write(CODE, &code);
            for _ in 0..3 {
                t.cpu.rip = CODE;
                let mut trap = t.run_blocks();
                if matches!(trap, TrapKind::None | TrapKind::Resume) {
                    trap = t.run_blocks();
                }
                let canonical = (rip as i64) << 16 >> 16 == rip as i64;
                let expected = match canonical {
                    // What is mapped but isn't RAM has no instructions.
                    _ if rip < 1 << 30 => 6,
                    true => 14,
                    false => 13,
                };
                match trap {
                    TrapKind::Fault { vector, .. } => {
                        assert_eq!(vector, expected, "{how}: {rip:x}");
                    }
                    other => panic!("{how}: {rip:x}: {other:?}"),
                }
            }
        }
    }
}
