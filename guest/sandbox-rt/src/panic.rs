//! Giving up.

use core::fmt::{self, Write};
use core::panic::PanicInfo;
use core::slice;

use skerry_sandbox_abi::{leave, status};

use crate::entry::Host;

/// Text in an area; what does not fit is cut.
struct Text<'a> {
    area: &'a mut [u8],
    at: usize,
}

impl Write for Text<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.area.get_mut(self.at..).unwrap_or_default();
        let len = text.len().min(room.len());
        room[..len].copy_from_slice(&text.as_bytes()[..len]);
        self.at += len;
        Ok(())
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let host = Host::get();
    // An allocation that failed leaves its status; every other status is of the past.
    let status = match host.status() {
        status::OUT_OF_MEMORY => status::OUT_OF_MEMORY,
        _ => status::PANIC,
    };
    // SAFETY: the area is mapped, and what else had it does not go on.
    let area =
        unsafe { slice::from_raw_parts_mut(host.output() as *mut u8, host.output_size() as usize) };
    let mut text = Text { area, at: 0 };
    let _ = match info.location() {
        Some(location) => write!(text, "{} at {location}", info.message()),
        None => write!(text, "{}", info.message()),
    };
    host.set_output_len(text.at as u32);
    host.set_status(status);
    loop {
        host.leave(leave::ABORT);
    }
}

// Parts of `core` that were compiled to unwind name these; nothing calls them where panics abort.

/// Never called.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// Never called.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() {}
