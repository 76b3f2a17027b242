//! Names for compiled code in Linux `perf`: a line per trace in `/tmp/perf-PID.map`.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;

pub(super) struct Map(Option<File>);

impl Map {
    /// Opens the map of this process, if it is wanted and can be had.
    pub(super) fn new(wanted: bool) -> Self {
        if !wanted {
            return Self(None);
        }
        let path = format!("/tmp/perf-{}.map", std::process::id());
        let open = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(&path);
        Self(
            open.inspect_err(|e| tracing::warn!("Can't write {path}: {e}"))
                .ok(),
        )
    }

    /// Names `len` bytes of code.
    pub(super) fn add(&mut self, code: u64, len: usize, number: u32) {
        if let Some(file) = &mut self.0
            && writeln!(file, "{code:x} {len:x} skerry-trace-{number}").is_err()
        {
            self.0 = None;
        }
    }
}
