//! Nanoseconds per guest vector and x87 instruction, for a few loops. Run it with
//! `cargo bench -p skerry-x86cpu --bench simd`; an argument picks loops by name.

use std::time::Instant;

use skerry_x86cpu::testing::{CODE, DATA, TestCpu};
use skerry_x86cpu::{CpuExit, reg};

/// Name, code. RCX counts iterations, RSI is data; the loop is followed by `out 0xf4, al`.
const LOOPS: &[(&str, &[u8])] = &[
    (
        "scalar",
        &[
            0xf2, 0x0f, 0x59, 0xc1, // mulsd xmm0, xmm1
            0xf2, 0x0f, 0x58, 0xc2, // addsd xmm0, xmm2
            0xf2, 0x0f, 0x59, 0xd9, // mulsd xmm3, xmm1
            0xf2, 0x0f, 0x58, 0xda, // addsd xmm3, xmm2
            0xf2, 0x0f, 0x5c, 0xe2, // subsd xmm4, xmm2
            0xf2, 0x0f, 0x59, 0xe1, // mulsd xmm4, xmm1
            0x48, 0xff, 0xc9, // dec rcx
            0x75, 0xe3, // jnz
        ],
    ),
    (
        "packed",
        &[
            0x66, 0x0f, 0xfe, 0xc1, // paddd xmm0, xmm1
            0x66, 0x0f, 0x38, 0x00, 0xd1, // pshufb xmm2, xmm1
            0x0f, 0x59, 0xdc, // mulps xmm3, xmm4
            0x66, 0x0f, 0xef, 0xe9, // pxor xmm5, xmm1
            0x66, 0x0f, 0x74, 0xf1, // pcmpeqb xmm6, xmm1
            0x66, 0x0f, 0xd7, 0xc6, // pmovmskb eax, xmm6
            0x48, 0xff, 0xc9, // dec rcx
            0x75, 0xe3, // jnz
        ],
    ),
    (
        "memory",
        &[
            0xf3, 0x0f, 0x6f, 0x06, // movdqu xmm0, [rsi]
            0x66, 0x0f, 0x74, 0x46, 0x10, // pcmpeqb xmm0, [rsi+16]
            0x0f, 0x29, 0x46, 0x20, // movaps [rsi+32], xmm0
            0xf2, 0x0f, 0x10, 0x4e, 0x30, // movsd xmm1, [rsi+48]
            0x66, 0x0f, 0xd6, 0x4e, 0x38, // movq [rsi+56], xmm1
            0xf2, 0x0f, 0x58, 0x4e, 0x40, // addsd xmm1, [rsi+64]
            0x48, 0xff, 0xc9, // dec rcx
            0x75, 0xdf, // jnz
        ],
    ),
    (
        "avx",
        &[
            0xc5, 0xf5, 0xfe, 0xc2, // vpaddd ymm0, ymm1, ymm2
            0xc5, 0xfe, 0x6f, 0x1e, // vmovdqu ymm3, [rsi]
            0xc5, 0xe5, 0x74, 0x66, 0x20, // vpcmpeqb ymm4, ymm3, [rsi+32]
            0xc5, 0xfd, 0xd7, 0xc4, // vpmovmskb eax, ymm4
            0xc4, 0xe2, 0xcd, 0xb8, 0xef, // vfmadd231pd ymm5, ymm6, ymm7
            0xc5, 0xfe, 0x7f, 0x6e, 0x40, // vmovdqu [rsi+64], ymm5
            0x48, 0xff, 0xc9, // dec rcx
            0x75, 0xe0, // jnz
        ],
    ),
    (
        "x87",
        &[
            0xdd, 0x06, // fld qword [rsi]
            0xd8, 0xc9, // fmul st, st(1)
            0xdc, 0x46, 0x08, // fadd qword [rsi+8]
            0xd8, 0xf1, // fdiv st, st(1)
            0xdd, 0x5e, 0x10, // fstp qword [rsi+16]
            0x48, 0xff, 0xc9, // dec rcx
            0x75, 0xef, // jnz
        ],
    ),
];

fn main() {
    let wanted = std::env::args().nth(1).filter(|a| !a.starts_with('-'));
    for (name, code) in LOOPS {
        if wanted.as_ref().is_some_and(|w| w != name) {
            continue;
        }
        let mut best = f64::INFINITY;
        for _ in 0..40 {
            let mut t = TestCpu::new64();
            // fld1; fld1: something to compute with.
            let mut bytes = vec![0xd9, 0xe8, 0xd9, 0xe8];
            bytes.extend_from_slice(code);
            bytes.extend([0xe6, 0xf4]);
            t.write(CODE, &bytes);
            t.write(DATA, &1.5f64.to_le_bytes().repeat(16));
            t.cpu.rip = CODE;
            t.cpu.gpr[usize::from(reg::RCX)] = 400_000;
            t.cpu.gpr[usize::from(reg::RSI)] = DATA;
            let start = Instant::now();
            let exit = t.cpu.run();
            let seconds = start.elapsed().as_secs_f64();
            assert!(matches!(exit, CpuExit::PortOut { .. }), "{name}: {exit:?}");
            best = best.min(seconds * 1e9 / t.cpu.instructions as f64);
        }
        println!("{name:10} {best:6.2} ns per instruction");
    }
}
