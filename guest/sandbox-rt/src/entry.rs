//! From the first instruction to the loop that serves requests.

use core::arch::{asm, global_asm};
use core::ptr;

use skerry_sandbox_abi::{Control, PORT, VERSION_MAX, VERSION_MIN, leave};

use crate::calls;

// The host enters here with RDI = control page and RSP as after a CALL.
global_asm!(
    ".globl _start",
    ".type _start, @function",
    "_start:",
    "    xor ebp, ebp",
    "    push rbp",
    "    call {start}",
    "    ud2",
    start = sym start,
);

/// The control page. Written once, before anything else runs.
static mut CONTROL: *mut Control = ptr::null_mut();

/// The host's end of the interface.
#[derive(Clone, Copy)]
pub(crate) struct Host(*mut Control);

macro_rules! fields {
    ($($field:ident: $type:ty;)*) => {$(
        #[inline]
        pub(crate) fn $field(self) -> $type {
            // SAFETY: the control page is mapped for as long as the guest is, and aligned; nothing else
            // runs while the guest does.
            unsafe { (&raw const (*self.0).$field).read_volatile() }
        }
    )*};
}

macro_rules! answers {
    ($($set:ident $field:ident: $type:ty;)*) => {$(
        #[inline]
        pub(crate) fn $set(self, value: $type) {
            // SAFETY: as for reading.
            unsafe { (&raw mut (*self.0).$field).write_volatile(value) }
        }
    )*};
}

impl Host {
    /// What [`start`] was given.
    #[inline]
    pub(crate) fn get() -> Self {
        // SAFETY: written once, before anything else runs; there is one thread and no interrupt.
        Self(unsafe { CONTROL })
    }

    pub(crate) fn address(self) -> u64 {
        self.0 as u64
    }

    /// Leaves the guest for `reason`; returns when the host has answered.
    #[inline]
    pub(crate) fn leave(self, reason: u32) {
        // SAFETY: the host reads and writes the control page and the areas only, which are accessed
        // through raw pointers; the block is a barrier for the compiler.
        unsafe { asm!("out {port}, eax", port = const PORT, in("eax") reason, options(nostack)) }
    }

    fields! {
        version_min: u32;
        version_max: u32;
        request: u32;
        function: u32;
        input_len: u32;
        status: u32;
        host_status: u32;
        host_detail: u32;
        reply_len: u32;
        log_len: u32;
        log_level: u32;
        log_dropped: u32;
        input: u64;
        input_size: u64;
        output: u64;
        output_size: u64;
        log: u64;
        log_size: u64;
        heap: u64;
        heap_size: u64;
        allocations: u64;
        allocated: u64;
        allocated_peak: u64;
        seed: u64;
        image: u64;
        profiled: u64;
    }

    answers! {
        set_version version: u32;
        set_status status: u32;
        set_detail detail: u32;
        set_output_len output_len: u32;
        set_host_function host_function: u32;
        set_host_args_len host_args_len: u32;
        set_reply_at reply_at: u32;
        set_log_len log_len: u32;
        set_log_dropped log_dropped: u32;
        set_allocations allocations: u64;
        set_allocated allocated: u64;
        set_allocated_peak allocated_peak: u64;
    }
}

/// Never returns: each request is answered by leaving.
extern "C" fn start(control: *mut Control) -> ! {
    // SAFETY: the first thing that runs.
    unsafe { CONTROL = control };
    crate::profile::init();
    let host = Host::get();
    let newest = host.version_max().min(VERSION_MAX);
    if newest < host.version_min().max(VERSION_MIN) {
        loop {
            host.leave(leave::NO_VERSION);
        }
    }
    host.set_version(newest);
    crate::memory::init(host.heap(), host.heap_size());
    crate::logging::init();
    calls::run_inits();
    loop {
        host.leave(leave::RETURN);
        calls::serve(host);
    }
}
