//! Loops over arrays in the first-level caches: packed SSE2 and AVX2, x87, and glibc's `memcpy` and
//! `strlen`, which choose their instructions by what the processor says it has.
#![expect(
    unsafe_code,
    reason = "vector intrinsics, x87 as inline assembly, and C's string functions"
)]

use std::arch::asm;
use std::arch::x86_64::*;
use std::ffi::c_char;
use std::hint::black_box;

use crate::inputs::{Random, checksum};

/// Numbers in each array: 4 KiB.
const NUMBERS: usize = 1024;

#[repr(align(64))]
struct Floats([f32; NUMBERS]);

#[repr(align(64))]
struct Integers([u32; NUMBERS]);

struct Arrays {
    x: Box<Floats>,
    y: Box<Floats>,
    a: Box<Integers>,
    b: Box<Integers>,
}

impl Arrays {
    fn new() -> Self {
        let mut random = Random::new(0x1234_5678_9abc_def1);
        let mut float = || (random.next() % 1000) as f32 / 1000.0;
        let x = Box::new(Floats(std::array::from_fn(|_| float())));
        let y = Box::new(Floats(std::array::from_fn(|_| float())));
        let a = Box::new(Integers(std::array::from_fn(|_| random.next() as u32)));
        let b = Box::new(Integers(std::array::from_fn(|_| random.next() as u32)));
        Self { x, y, a, b }
    }

    fn checksum(&self) -> u64 {
        let bytes: Vec<u8> = (self.y.0.iter().map(|f| f.to_bits()))
            .chain(self.b.0.iter().copied())
            .flat_map(u32::to_le_bytes)
            .collect();
        checksum(&bytes)
    }
}

/// `y = max(a x + y / 2, x)` on floats, and multiplications, shuffles and sums on integers.
pub fn sse2(count: u64) -> u64 {
    let mut arrays = Arrays::new();
    for _ in 0..count / 8 {
        let Arrays { x, y, a, b } = black_box(&mut arrays);
        sse2_once(x, y, a, b);
    }
    arrays.checksum()
}

fn sse2_once(x: &Floats, y: &mut Floats, a: &Integers, b: &mut Integers) {
    let (x, y) = (x.0.as_ptr(), y.0.as_mut_ptr());
    let (a, b) = (a.0.as_ptr(), b.0.as_mut_ptr());
    // SAFETY: SSE2 is a part of x86-64; every index is below NUMBERS, which 4 divides, and the
    // arrays are aligned to 64 bytes.
    unsafe {
        let (half, factor) = (_mm_set1_ps(0.5), _mm_set1_ps(0.9));
        for at in (0..NUMBERS).step_by(4) {
            let x = _mm_load_ps(x.add(at));
            let to = y.add(at);
            let y = _mm_mul_ps(_mm_load_ps(to), half);
            _mm_store_ps(to, _mm_max_ps(_mm_add_ps(_mm_mul_ps(x, factor), y), x));

            let a = _mm_load_si128(a.add(at).cast());
            let to: *mut __m128i = b.add(at).cast();
            let b = _mm_load_si128(to);
            let product = _mm_add_epi64(_mm_mul_epu32(a, b), _mm_sad_epu8(a, b));
            let mixed = _mm_xor_si128(_mm_shuffle_epi32::<0x1b>(product), _mm_srli_epi32::<3>(b));
            _mm_store_si128(to, _mm_add_epi32(mixed, _mm_unpacklo_epi16(a, b)));
        }
    }
}

/// The same with twice the width, in AVX and AVX2. 0 where there is none.
pub fn avx2(count: u64) -> u64 {
    if !is_x86_feature_detected!("avx2") {
        return 0;
    }
    let mut arrays = Arrays::new();
    for _ in 0..count / 4 {
        let Arrays { x, y, a, b } = black_box(&mut arrays);
        // SAFETY: AVX2 is there, as asked above.
        unsafe { avx2_once(x, y, a, b) };
    }
    arrays.checksum()
}

#[target_feature(enable = "avx2")]
fn avx2_once(x: &Floats, y: &mut Floats, a: &Integers, b: &mut Integers) {
    let (x, y) = (x.0.as_ptr(), y.0.as_mut_ptr());
    let (a, b) = (a.0.as_ptr(), b.0.as_mut_ptr());
    let (half, factor) = (_mm256_set1_ps(0.5), _mm256_set1_ps(0.9));
    for at in (0..NUMBERS).step_by(8) {
        // SAFETY: every index is below NUMBERS, which 8 divides, and the arrays are aligned.
        unsafe {
            let x = _mm256_load_ps(x.add(at));
            let to = y.add(at);
            let y = _mm256_mul_ps(_mm256_load_ps(to), half);
            let sum = _mm256_add_ps(_mm256_mul_ps(x, factor), y);
            _mm256_store_ps(to, _mm256_max_ps(sum, x));

            let a = _mm256_load_si256(a.add(at).cast());
            let to: *mut __m256i = b.add(at).cast();
            let b = _mm256_load_si256(to);
            let product = _mm256_add_epi64(_mm256_mul_epu32(a, b), _mm256_sad_epu8(a, b));
            let turned = _mm256_permute4x64_epi64::<0x4e>(_mm256_shuffle_epi32::<0x1b>(product));
            let mixed = _mm256_xor_si256(turned, _mm256_srli_epi32::<3>(b));
            _mm256_store_si256(to, _mm256_add_epi32(mixed, _mm256_unpacklo_epi16(a, b)));
        }
    }
}

/// A polynomial of degree 4 by Horner's rule, at 64 places, on the x87 stack.
pub fn x87(count: u64) -> u64 {
    let mut random = Random::new(7);
    let places: [f64; 64] = std::array::from_fn(|_| (random.next() % 1000) as f64 / 999.0);
    let factors = [0.25f64, -1.5, 3.0, 0.125, 7.0];
    let mut results = [0f64; 64];
    for _ in 0..count {
        // SAFETY: 64 numbers are read and 64 written, by an index that goes from 64 down to 1;
        // what is pushed on the x87 stack is popped again.
        unsafe {
            asm!(
                "2:",
                "fld qword ptr [{x} + {n} * 8 - 8]",
                "fld qword ptr [{f}]",
                "fmul st(0), st(1)",
                "fadd qword ptr [{f} + 8]",
                "fmul st(0), st(1)",
                "fadd qword ptr [{f} + 16]",
                "fmul st(0), st(1)",
                "fadd qword ptr [{f} + 24]",
                "fmulp st(1), st(0)",
                "fadd qword ptr [{f} + 32]",
                "fabs",
                "fsqrt",
                "fadd qword ptr [{y} + {n} * 8 - 8]",
                "fmul qword ptr [{f}]",
                "fstp qword ptr [{y} + {n} * 8 - 8]",
                "dec {n}",
                "jnz 2b",
                x = in(reg) places.as_ptr(),
                y = in(reg) results.as_mut_ptr(),
                f = in(reg) factors.as_ptr(),
                n = inout(reg) 64u64 => _,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            );
        }
    }
    let bytes: Vec<u8> = results.iter().flat_map(|f| f.to_le_bytes()).collect();
    checksum(&bytes)
}

/// Copies of 16 bytes to 16 KiB, aligned and not.
pub fn memcpy(count: u64) -> u64 {
    const SIZES: [usize; 8] = [16, 40, 100, 256, 1000, 1500, 4096, 16384];
    let mut random = Random::new(3);
    let from: Vec<u8> = (0..20_000).map(|_| random.next() as u8).collect();
    let mut to = vec![0u8; 20_000];
    for n in 0..count {
        for (k, size) in SIZES.into_iter().enumerate() {
            let (a, b) = ((n as usize + k) % 64, (k * 5) % 64);
            // SAFETY: both buffers have 20 000 bytes; an offset below 64 and 16 384 fit.
            unsafe {
                libc::memcpy(
                    black_box(to.as_mut_ptr().add(b)).cast(),
                    black_box(from.as_ptr().add(a)).cast(),
                    black_box(size),
                );
            }
        }
    }
    checksum(&to)
}

/// Lengths of strings of 3 to 4000 bytes.
pub fn strlen(count: u64) -> u64 {
    const LENGTHS: [usize; 8] = [3, 9, 31, 64, 150, 500, 1400, 4000];
    let strings: Vec<Vec<u8>> = LENGTHS
        .iter()
        .map(|length| {
            let mut text = vec![b'x'; *length];
            text.push(0);
            text
        })
        .collect();
    let mut sum = 0u64;
    for n in 0..count {
        for string in &strings {
            let skip = n as usize % 4;
            // SAFETY: each ends with a NUL, and has at least 3 bytes before it.
            sum += unsafe { libc::strlen(black_box(string.as_ptr().add(skip)).cast::<c_char>()) }
                as u64;
        }
    }
    sum
}
