//! The guest of the benchmark: the functions that `sandbox-peer` calls, on Hyperlight's own guest library.
#![no_std]
#![no_main]

use core::sync::atomic::{AtomicU8, Ordering};

use hyperlight_guest::error::Result;
use hyperlight_guest_bin::{guest_function, host_function};

const PAGE: usize = 4096;

/// The pages that `Dirty` writes to.
const PAGES: usize = 64;

static MEMORY: [AtomicU8; PAGE * PAGES] = [const { AtomicU8::new(0) }; PAGE * PAGES];

#[host_function("HostAdd")]
fn host_add(a: i32, b: i32) -> Result<i32>;

#[host_function("Started")]
fn started() -> Result<()>;

/// A call that does next to nothing: what it costs is the call.
#[guest_function("Add")]
fn add(a: i32, b: i32) -> i32 {
    a.wrapping_add(b)
}

/// The same, by way of the host.
#[guest_function("AddByHost")]
fn add_by_host(a: i32, b: i32) -> Result<i32> {
    host_add(a, b)
}

/// Writes one byte to each of `pages` pages and says how many differ from zero at their first byte.
#[guest_function("Dirty")]
fn dirty(pages: u32) -> u32 {
    let firsts = || MEMORY.iter().step_by(PAGE);
    for byte in firsts().take(pages as usize) {
        byte.store(1, Ordering::Relaxed);
    }
    firsts()
        .filter(|byte| byte.load(Ordering::Relaxed) != 0)
        .count() as u32
}

/// Tells the host that it runs, and runs until it is killed.
#[guest_function("Spin")]
fn spin() -> Result<i32> {
    started()?;
    loop {
        core::hint::spin_loop();
    }
}
