//! Guest instructions a second, in millions, for a few loops. Run it with
//! `cargo bench -p skerry-x86cpu --bench mips`; an argument picks loops by name.

use std::time::Instant;

use skerry_x86cpu::testing::{CODE, DATA, TestCpu};
use skerry_x86cpu::{CpuExit, reg};

/// Name, code. RCX counts iterations, RSI is data; the loop is followed by `out 0xf4, al`.
const LOOPS: &[(&str, &[u8])] = &[
    (
        "alu",
        &[
            0x48, 0x01, 0xd8, // add rax, rbx
            0x48, 0x31, 0xc2, // xor rdx, rax
            0x48, 0x8d, 0x7c, 0x50, 0x07, // lea rdi, [rax+rdx*2+7]
            0x48, 0xc1, 0xe7, 0x03, // shl rdi, 3
            0x89, 0xf8, // mov eax, edi
            0x48, 0x29, 0xd3, // sub rbx, rdx
            0x48, 0xff, 0xc9, // dec rcx
            0x75, 0xe7, // jnz
        ],
    ),
    (
        "memory",
        &[
            0x48, 0x8b, 0x06, // mov rax, [rsi]
            0x48, 0x03, 0x46, 0x08, // add rax, [rsi+8]
            0x48, 0x89, 0x46, 0x10, // mov [rsi+16], rax
            0x83, 0x46, 0x18, 0x01, // add dword [rsi+24], 1
            0x0f, 0xb6, 0x5e, 0x20, // movzx ebx, byte [rsi+32]
            0x48, 0x89, 0x1e, // mov [rsi], rbx
            0x48, 0xff, 0xc9, // dec rcx
            0x75, 0xe5, // jnz
        ],
    ),
    (
        "branches",
        &[
            0x48, 0x85, 0xc9, // test rcx, rcx
            0x74, 0x00, // jz +0
            0xa8, 0x01, // test al, 1
            0x75, 0x02, // jnz +2
            0xff, 0xc0, // inc eax
            0x48, 0x39, 0xc8, // cmp rax, rcx
            0x77, 0x00, // ja +0
            0x48, 0xff, 0xc9, // dec rcx
            0x75, 0xeb, // jnz
        ],
    ),
    (
        "calls",
        &[
            0xe8, 0x07, 0x00, 0x00, 0x00, // call f
            0x48, 0xff, 0xc9, // dec rcx
            0x75, 0xf6, // jnz
            0xeb, 0x08, // jmp end
            0x55, // f: push rbp
            0x48, 0x89, 0xe5, // mov rbp, rsp
            0xff, 0xc0, // inc eax
            0x5d, // pop rbp
            0xc3, // ret
            0x90, // end:
        ],
    ),
    (
        "stride", // one access per page, 512 pages
        &[
            0x48, 0x89, 0xc8, // mov rax, rcx
            0x48, 0xc1, 0xe0, 0x0c, // shl rax, 12
            0x25, 0x00, 0xf0, 0x1f, 0x00, // and eax, 0x1ff000
            0x48, 0x8b, 0x1c, 0x06, // mov rbx, [rsi+rax]
            0x48, 0xff, 0xc9, // dec rcx
            0x75, 0xeb, // jnz
        ],
    ),
];

fn main() {
    let wanted = std::env::args().nth(1).filter(|a| !a.starts_with('-'));
    for (name, code) in LOOPS {
        if wanted.as_ref().is_some_and(|w| w != name) {
            continue;
        }
        let mut best = 0.0f64;
        // Short runs, and the best of many: what other programs take doesn't count.
        for _ in 0..60 {
            let mut t = TestCpu::new64();
            let mut bytes = code.to_vec();
            bytes.extend([0xe6, 0xf4]);
            t.write(CODE, &bytes);
            t.cpu.rip = CODE;
            t.cpu.gpr[usize::from(reg::RCX)] = 200_000;
            t.cpu.gpr[usize::from(reg::RSI)] = DATA;
            let start = Instant::now();
            let exit = t.cpu.run();
            let seconds = start.elapsed().as_secs_f64();
            assert!(matches!(exit, CpuExit::PortOut { .. }), "{name}: {exit:?}");
            best = best.max(t.cpu.instructions as f64 / seconds / 1e6);
        }
        println!("{name:10} {best:7.0} MIPS");
    }
}
