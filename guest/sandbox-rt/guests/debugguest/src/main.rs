//! The guest of the tests of debuggers, core dumps and allocation profiles: functions with names that stay.

#![no_std]
#![no_main]

extern crate alloc;

use alloc::string::String;
use alloc::vec::Vec;
use core::arch::asm;
use core::hint::black_box;
use core::sync::atomic::{AtomicU64, Ordering};

use skerry_sandbox_rt::guest_fn;

/// Written by [`debug_target`].
#[unsafe(no_mangle)]
static DEBUG_WATCHED: AtomicU64 = AtomicU64::new(0);
/// Ends [`debug_spin`].
#[unsafe(no_mangle)]
static DEBUG_STOP: AtomicU64 = AtomicU64::new(0);

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn debug_target(a: u64, b: u64) -> u64 {
    DEBUG_WATCHED.store(a, Ordering::Relaxed);
    debug_leaf(a) + b
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn debug_leaf(a: u64) -> u64 {
    black_box(a) * 3
}

#[guest_fn]
fn calculate(a: u64, b: u64) -> u64 {
    debug_target(a, b)
}

/// The sum over calls of a function, so that its code is compiled.
#[guest_fn]
fn calculate_often(times: u64) -> u64 {
    (0..times).fold(0, |sum: u64, n| sum.wrapping_add(debug_target(n, 1)))
}

/// The same without a store to what may be watched, but for the last.
#[guest_fn]
fn leaf_often(times: u64) -> u64 {
    let sum = (0..times).fold(0, |sum: u64, n| sum.wrapping_add(debug_leaf(n)));
    DEBUG_WATCHED.store(sum, Ordering::Relaxed);
    sum
}

#[guest_fn]
fn watched() -> u64 {
    DEBUG_WATCHED.load(Ordering::Relaxed)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn debug_spin() -> u64 {
    let mut rounds = 0_u64;
    while DEBUG_STOP.load(Ordering::Relaxed) == 0 {
        rounds = rounds.wrapping_add(1);
    }
    rounds
}

#[guest_fn]
fn spin() -> bool {
    debug_spin();
    DEBUG_STOP.store(0, Ordering::Relaxed);
    true
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn debug_inner(address: u64) -> u64 {
    // SAFETY: none: this is what the sandbox is for.
    unsafe { (black_box(address) as *mut u64).write_volatile(1) };
    address
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn debug_outer(address: u64) -> u64 {
    debug_inner(address) + 1
}

#[guest_fn]
fn crash(address: u64) -> u64 {
    debug_outer(address) + 1
}

#[guest_fn]
fn divide(a: u64, b: u64) -> u64 {
    let quotient: u64;
    // SAFETY: the guest may divide by zero.
    unsafe { asm!("div {}", in(reg) b, inout("rax") a => quotient, inout("rdx") 0_u64 => _) };
    quotient
}

#[guest_fn]
fn illegal() {
    // SAFETY: none: it ends here.
    unsafe { asm!("ud2") }
}

#[guest_fn]
fn panics(message: &str) {
    panic!("{message}");
}

/// A breakpoint of the guest's own, with something in a register of each kind.
#[guest_fn]
fn own_breakpoint() -> u64 {
    let (xmm, rbx): (u64, u64);
    // SAFETY: the registers are named.
    unsafe {
        asm!(
            "movq xmm3, {value}",
            "fninit",
            "fldpi",
            "int3",
            "fstp st(0)",
            "movq {xmm}, xmm3",
            value = in(reg) 0x1234_5678_9abc_def0_u64,
            xmm = out(reg) xmm,
            inout("r12") 5_u64 => rbx,
            out("xmm3") _,
        );
    }
    xmm ^ rbx
}

#[unsafe(no_mangle)]
#[inline(never)]
fn debug_small(times: u64) -> u64 {
    (0..times)
        .map(|n| black_box(Vec::<u8>::with_capacity(16 + (n as usize & 1))).capacity() as u64)
        .sum()
}

#[unsafe(no_mangle)]
#[inline(never)]
fn debug_large(times: u64) -> u64 {
    (0..times)
        .map(|_| black_box(Vec::<u64>::with_capacity(1000)).capacity() as u64)
        .sum()
}

#[guest_fn]
fn allocates(small: u64, large: u64) -> u64 {
    debug_small(small) + debug_large(large)
}

#[guest_fn]
fn text(value: u64) -> String {
    alloc::format!("{value}")
}
