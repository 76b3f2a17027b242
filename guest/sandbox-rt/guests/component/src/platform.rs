//! What the engine needs of a platform: a pointer for each thread. There is one thread.

use core::ptr;
use core::sync::atomic::{AtomicPtr, Ordering};

/// The engine's own and one for asynchronous components, which it is built without.
static SLOTS: [AtomicPtr<u8>; 2] = [const { AtomicPtr::new(ptr::null_mut()) }; 2];

#[unsafe(no_mangle)]
extern "C" fn wasmtime_tls_get(slot: usize) -> *mut u8 {
    SLOTS
        .get(slot)
        .map_or(ptr::null_mut(), |slot| slot.load(Ordering::Relaxed))
}

#[unsafe(no_mangle)]
extern "C" fn wasmtime_tls_set(slot: usize, value: *mut u8) {
    if let Some(slot) = SLOTS.get(slot) {
        slot.store(value, Ordering::Relaxed);
    }
}
