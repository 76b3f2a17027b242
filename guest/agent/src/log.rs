//! Messages of the agent: into the kernel's log, where the console shows them.

use std::fmt;
use std::fs::OpenOptions;
use std::io::Write;

/// Logs a problem. Priority 3 of the facility "daemon" (`3 * 8 + 3`, Linux `dev-kmsg`).
pub fn error(message: fmt::Arguments<'_>) {
    write(27, message);
}

/// Logs what is worth knowing.
pub fn info(message: fmt::Arguments<'_>) {
    write(30, message);
}

fn write(priority: u8, message: fmt::Arguments<'_>) {
    let line = format!("<{priority}>skerry-agent: {message}\n");
    // One write is one record; without a log there is nobody to tell.
    if let Ok(mut log) = OpenOptions::new().write(true).open("/dev/kmsg") {
        let _ = log.write_all(line.as_bytes());
    }
}
