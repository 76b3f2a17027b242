//! Records of allocations, while the host wants them: bytes, and who asked.
//!
//! Callers are found by frame pointers where all of the program keeps them (`-C
//! force-frame-pointers=yes`), else by what on the stack looks like a return address; the host sorts
//! out what is none.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

use skerry_sandbox_abi::{frames, log_kind};

use crate::entry::Host;
use crate::logging::{self, Piece};

/// Return addresses of a record.
const FRAMES: usize = 12;
/// Frames that are followed to find the end of the chain.
const DEPTH: usize = 256;
/// Words of the stack that are looked at without a chain.
const WORDS: u64 = 160;

/// The end of the stack.
static TOP: AtomicU64 = AtomicU64::new(0);

/// Where the stack of whoever asks ends.
#[inline(always)]
pub(crate) fn stack_pointer() -> u64 {
    let rsp: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, rsp", out(reg) rsp, options(nomem, nostack, preserves_flags)) };
    rsp
}

/// Called from the guest's first function.
#[inline(always)]
pub(crate) fn init() {
    // It ends with a page, and this is the last one.
    TOP.store(stack_pointer().next_multiple_of(4096), Ordering::Relaxed);
}

/// A word of the stack between here and [`TOP`].
fn word(at: u64) -> u64 {
    // SAFETY: the callers have checked that it is there; it is aligned.
    unsafe { (at as *const u64).read_volatile() }
}

struct Found {
    how: u8,
    len: usize,
    addresses: [u64; FRAMES],
}

impl Found {
    fn new(how: u8) -> Self {
        Self {
            how,
            len: 0,
            addresses: [0; FRAMES],
        }
    }

    fn push(&mut self, address: u64) {
        if let Some(slot) = self.addresses.get_mut(self.len) {
            *slot = address;
            self.len += 1;
        }
    }
}

/// Follows frame pointers; `None` unless they lead to the guest's entry, where the first is zero.
fn chain(image: u64, size: u64, low: u64, top: u64) -> Option<Found> {
    let mut frame: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, rbp", out(reg) frame, options(nomem, nostack, preserves_flags)) };
    let mut low = low;
    let mut found = Found::new(frames::CHAIN);
    for _ in 0..DEPTH {
        if frame < low || frame > top - 16 || !frame.is_multiple_of(8) {
            return None;
        }
        let (next, address) = (word(frame), word(frame + 8));
        if address.wrapping_sub(image) >= size {
            return None;
        }
        found.push(address);
        if next == 0 {
            return Some(found);
        }
        low = frame + 16;
        frame = next;
    }
    None
}

/// What lies on the stack and leads into the program.
fn scan(image: u64, size: u64, low: u64, top: u64) -> Found {
    let mut found = Found::new(frames::SCAN);
    let end = top.min(low + WORDS * 8);
    let mut at = low;
    while at < end {
        let address = word(at);
        if address.wrapping_sub(image) < size {
            found.push(address);
        }
        at += 8;
    }
    found
}

/// Tells the host. `below` is the end of the caller's stack: what lies there now is of no interest, copies of
/// earlier records among it.
#[cold]
#[inline(never)]
pub(crate) fn record(bytes: u64, below: u64) {
    let host = Host::get();
    if logging::is_busy() {
        // Within another record.
        host.set_log_dropped(host.log_dropped() + 1);
        return;
    }
    // The return address of this function is the first that counts: who allocates may have had the allocator
    // compiled into it.
    let (image, size) = (host.image(), host.profiled());
    let (low, top) = (stack_pointer(), TOP.load(Ordering::Relaxed));
    let found = chain(image, size, low, top).unwrap_or_else(|| scan(image, size, below - 8, top));
    logging::append(|piece| {
        piece(Piece::Byte(log_kind::ALLOCATION));
        piece(Piece::Byte(found.how));
        piece(Piece::Number(found.len as u32));
        piece(Piece::Word(bytes));
        for address in found.addresses.iter().take(found.len) {
            piece(Piece::Word(*address));
        }
    });
}
