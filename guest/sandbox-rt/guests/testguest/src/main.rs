//! The guest of the function sandbox's own tests and benchmarks: one function per behaviour.

#![no_std]
#![no_main]

extern crate alloc;

use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use core::hint::black_box;
use core::sync::atomic::{AtomicI64, Ordering};

use serde::{Deserialize, Serialize};
use skerry_sandbox_rt::{HostError, guest_fn, guest_init, host_fn, serde_value};

/// A structure that crosses the border.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Order {
    id: u64,
    title: String,
    lines: Vec<(String, i32)>,
    note: Option<String>,
}

serde_value!(Order);

static COUNT: AtomicI64 = AtomicI64::new(0);
static READY: AtomicI64 = AtomicI64::new(0);

#[guest_init]
fn ready() {
    READY.store(42, Ordering::Relaxed);
}

#[host_fn]
fn host_add(a: i32, b: i32) -> i32;

#[host_fn]
fn host_echo(bytes: &[u8]) -> Result<Vec<u8>, HostError>;

#[host_fn]
fn host_fail(message: &str) -> Result<i32, HostError>;

#[guest_fn]
fn nothing() {}

#[guest_fn]
fn add(a: i32, b: i32) -> i32 {
    a.wrapping_add(b)
}

#[guest_fn]
fn initialised() -> i64 {
    READY.load(Ordering::Relaxed)
}

#[guest_fn]
fn count() -> i64 {
    COUNT.fetch_add(1, Ordering::Relaxed) + 1
}

macro_rules! echoes {
    ($($name:ident: $type:ty;)*) => {$(
        #[guest_fn]
        fn $name(value: $type) -> $type {
            value
        }
    )*};
}

echoes! {
    echo_i32: i32;
    echo_u32: u32;
    echo_i64: i64;
    echo_u64: u64;
    echo_f32: f32;
    echo_f64: f64;
    echo_bool: bool;
    echo_string: String;
    echo_bytes: Vec<u8>;
    echo_list: Vec<String>;
    echo_option: Option<i64>;
    echo_order: Order;
    echo_floats: Vec<f64>;
}

#[guest_fn]
fn length(bytes: &[u8]) -> u64 {
    bytes.len() as u64
}

#[guest_fn]
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0_u64, |sum, byte| {
        sum.wrapping_mul(31).wrapping_add(u64::from(*byte))
    })
}

#[guest_fn]
#[expect(clippy::too_many_arguments, reason = "as many types as there are")]
fn many(a: i32, b: u32, c: i64, d: u64, e: f32, f: f64, g: bool, h: &str) -> String {
    alloc::format!("{a} {b} {c} {d} {e} {f} {g} {h}")
}

#[guest_fn]
fn fail(message: &str) -> Result<i32, String> {
    Err(message.to_string())
}

#[guest_fn]
fn call_host(a: i32, b: i32) -> i32 {
    host_add(a, b)
}

#[guest_fn]
fn call_host_often(times: u32) -> i32 {
    (0..times).fold(0, |sum, _| host_add(sum, 1))
}

#[guest_fn]
fn call_host_echo(bytes: &[u8]) -> Result<Vec<u8>, HostError> {
    let back = host_echo(bytes)?;
    match back == bytes {
        true => Ok(back),
        false => Err(HostError::Mismatch("echoed something else".to_string())),
    }
}

#[guest_fn]
fn call_host_fail(message: &str) -> String {
    match host_fail(message) {
        Ok(value) => alloc::format!("ok {value}"),
        Err(error) => alloc::format!("error {error}"),
    }
}

#[guest_fn]
fn panics(message: &str) {
    panic!("{message}");
}

#[guest_fn]
fn spin() {
    loop {
        core::hint::spin_loop();
    }
}

#[guest_fn]
fn work(rounds: u64) -> u64 {
    (0..rounds).fold(1_u64, |x, n| {
        black_box(x.wrapping_mul(6364136223846793005).wrapping_add(n))
    })
}

#[guest_fn]
fn allocate(bytes: u64) -> u64 {
    let block = vec![1_u8; bytes as usize];
    black_box(&block)
        .iter()
        .step_by(4096)
        .map(|byte| u64::from(*byte))
        .sum()
}

#[guest_fn]
fn recurse(depth: u64) -> u64 {
    let frame = black_box([depth; 16]);
    match depth {
        0 => frame[3],
        _ => recurse(depth - 1) + frame[5] - depth,
    }
}

/// What pages of a heap block hold: it stays allocated.
static PAGES: AtomicI64 = AtomicI64::new(0);

#[guest_fn]
fn dirty_pages(pages: u64) -> u64 {
    let mut block = PAGES.load(Ordering::Relaxed) as usize;
    if block == 0 {
        block = Vec::leak(vec![0_u8; 64 * 4096]).as_mut_ptr() as usize;
        PAGES.store(block as i64, Ordering::Relaxed);
    }
    for page in 0..(pages as usize).min(64) {
        let at = (block + page * 4096) as *mut u8;
        // SAFETY: within the block.
        unsafe { at.write_volatile(at.read_volatile().wrapping_add(1)) };
    }
    // SAFETY: within the block.
    unsafe { (block as *const u8).read_volatile().into() }
}

#[guest_fn]
fn peek(address: u64) -> u64 {
    // SAFETY: none: this is what the sandbox is for.
    unsafe { (address as *const u64).read_volatile() }
}

#[guest_fn]
fn poke(address: u64, value: u64) {
    // SAFETY: none: this is what the sandbox is for.
    unsafe { (address as *mut u64).write_volatile(value) }
}

#[guest_fn]
fn jump(address: u64) {
    // SAFETY: none: this is what the sandbox is for.
    let function: extern "C" fn() = unsafe { core::mem::transmute(address as usize) };
    function();
}

#[guest_fn]
fn run_code(code: &[u8]) {
    let block = Vec::leak(code.to_vec());
    jump(block.as_ptr() as u64);
}

#[guest_fn]
fn heap_address() -> u64 {
    Vec::leak(vec![0_u8; 64]).as_ptr() as u64
}

#[guest_fn]
fn stack_address() -> u64 {
    let local = black_box(0_u64);
    &raw const local as u64
}

#[guest_fn]
fn code_address() -> u64 {
    stack_address as fn() -> u64 as usize as u64
}

#[guest_fn]
fn log_all(text: &str) {
    log::error!("{text} 1");
    log::warn!("{text} 2");
    log::info!("{text} 3");
    log::debug!("{text} 4");
    log::trace!("{text} 5");
}

#[guest_fn]
fn log_much(records: u32) {
    for n in 0..records {
        log::info!("record {n}");
    }
}

#[guest_fn]
fn seed() -> u64 {
    skerry_sandbox_rt::seed()
}

/// Leaves values in SSE registers and x87.
#[cfg(target_feature = "sse2")]
#[guest_fn]
fn leave_traces(value: u64) {
    // SAFETY: the registers are named.
    unsafe {
        core::arch::asm!(
            "movq xmm15, {0}", "movq xmm14, {0}", "movq xmm7, {0}",
            "fninit", "fldpi",
            in(reg) value, out("xmm15") _, out("xmm14") _, out("xmm7") _,
        );
    }
}

#[cfg(target_feature = "sse2")]
#[guest_fn]
fn find_traces() -> Vec<u64> {
    let (a, b, c): (u64, u64, u64);
    let mut x87 = [0_u8; 28];
    // SAFETY: reads registers, and stores 28 bytes.
    unsafe {
        core::arch::asm!(
            "movq {0}, xmm15", "movq {1}, xmm14", "movq {2}, xmm7",
            "fnstenv [{3}]",
            out(reg) a, out(reg) b, out(reg) c, in(reg) x87.as_mut_ptr(),
        );
    }
    let tags = u64::from(u16::from_le_bytes([x87[8], x87[9]]));
    vec![a, b, c, tags]
}

/// Instructions that a guest has no right to, by number.
#[guest_fn]
fn forbidden(which: u32) {
    use core::arch::asm;
    // SAFETY: none of them returns.
    unsafe {
        match which {
            0 => asm!("mov rax, cr3", out("rax") _),
            1 => asm!("mov cr3, rax", in("rax") 0_u64),
            2 => asm!("mov rax, dr7", out("rax") _),
            3 => asm!("mov dr0, rax", in("rax") 0_u64),
            4 => asm!("rdmsr", in("ecx") 0xc000_0080_u32, out("eax") _, out("edx") _),
            5 => asm!("wrmsr", in("ecx") 0x10_u32, in("eax") 0, in("edx") 0),
            6 => asm!("hlt"),
            7 => asm!("lidt [{0}]", in(reg) 0x1000_u64),
            8 => asm!("invlpg [{0}]", in(reg) 0x1000_u64),
            9 => asm!("xsetbv", in("ecx") 0, in("eax") 7, in("edx") 0),
            10 => asm!("ud2"),
            11 => asm!("int3"),
            12 => asm!("int 0x80"),
            13 => asm!("div {0:e}", in(reg) 0_u32, out("eax") _, out("edx") _),
            14 => asm!("syscall", out("rcx") _, out("r11") _),
            15 => asm!("swapgs"),
            16 => asm!("wbinvd"),
            17 => asm!("clts"),
            18 => asm!("ltr ax", in("ax") 0_u16),
            _ => {}
        }
    }
}

/// An `OUT` that means nothing to the host.
#[guest_fn]
fn wrong_exit(port: u32, value: u32) {
    // SAFETY: the host decides.
    unsafe { core::arch::asm!("out dx, eax", in("dx") port as u16, in("eax") value) }
}

/// An `IN`, which the host has no use for.
#[guest_fn]
fn port_in(port: u32) -> u32 {
    let value: u32;
    // SAFETY: the host decides.
    unsafe { core::arch::asm!("in eax, dx", in("dx") port as u16, out("eax") value) }
    value
}

/// Overwrites the start of the control page.
#[guest_fn]
fn spoil_control(word: u32, value: u32) {
    let address = skerry_sandbox_rt::control_address() + u64::from(word) * 4;
    poke32(address, value);
}

fn poke32(address: u64, value: u32) {
    // SAFETY: the control page is the guest's to write.
    unsafe { (address as *mut u32).write_volatile(value) }
}
