//! Records of the `log` crate, on their way to the host.

use core::fmt::{self, Write};
use core::slice;
use core::sync::atomic::{AtomicBool, Ordering};

use log::{Level, LevelFilter, Log, Metadata, Record};
use skerry_sandbox_abi::{LOG_HEADER, leave, log_kind};

use crate::entry::Host;

/// What is left of the log area.
struct Room {
    area: &'static mut [u8],
    at: usize,
}

impl Room {
    fn put(&mut self, bytes: &[u8]) {
        let end = self.at.saturating_add(bytes.len());
        if let Some(room) = self.area.get_mut(self.at..end) {
            room.copy_from_slice(bytes);
        }
        self.at = end;
    }
    fn text(&mut self, text: &str) {
        self.put(&(text.len() as u32).to_le_bytes());
        self.put(text.as_bytes());
    }
}

impl Write for Room {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.put(text.as_bytes());
        Ok(())
    }
}

/// Appends a record; where there is no room the host empties the area first. One that is larger than
/// the area is counted and dropped.
pub(crate) fn append(record: impl Fn(&mut dyn FnMut(Piece<'_>))) {
    BUSY.store(true, Ordering::Relaxed);
    put(record);
    BUSY.store(false, Ordering::Relaxed);
}

/// Whether a record is being made: what makes one now would be lost in it.
pub(crate) fn is_busy() -> bool {
    BUSY.load(Ordering::Relaxed)
}

static BUSY: AtomicBool = AtomicBool::new(false);

fn put(record: impl Fn(&mut dyn FnMut(Piece<'_>))) {
    let host = Host::get();
    for _ in 0..2 {
        // SAFETY: the area is mapped and only used here; a record's own `Display` that logs makes a
        // record that is overwritten by the one it is part of.
        let area =
            unsafe { slice::from_raw_parts_mut(host.log() as *mut u8, host.log_size() as usize) };
        let start = host.log_len() as usize;
        let mut room = Room {
            area,
            at: start + LOG_HEADER,
        };
        record(&mut |piece| match piece {
            Piece::Byte(byte) => room.put(&[byte]),
            Piece::Number(number) => room.put(&number.to_le_bytes()),
            Piece::Word(word) => room.put(&word.to_le_bytes()),
            Piece::Text(text) => room.text(text),
            Piece::Format(format) => {
                let _ = room.write_fmt(format);
            }
        });
        let end = room.at;
        if end <= room.area.len() {
            room.at = start;
            room.put(&((end - start - LOG_HEADER) as u32).to_le_bytes());
            host.set_log_len(end as u32);
            return;
        }
        if start == 0 {
            break;
        }
        host.leave(leave::FLUSH_LOG);
    }
    host.set_log_dropped(host.log_dropped() + 1);
}

/// A part of a record.
pub(crate) enum Piece<'a> {
    /// One byte.
    Byte(u8),
    /// Four bytes.
    Number(u32),
    /// Eight bytes.
    Word(u64),
    /// Length and bytes.
    Text(&'a str),
    /// Text to the end of the record.
    Format(fmt::Arguments<'a>),
}

struct Logger;

static LOGGER: Logger = Logger;

/// A level's number: 1 error … 5 trace.
fn number(level: Level) -> u8 {
    level as u8
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        event(
            number(record.level()),
            (record.file().unwrap_or(""), record.line().unwrap_or(0)),
            record.target(),
            *record.args(),
        );
    }

    fn flush(&self) {}
}

/// A message, from `file` and line.
pub(crate) fn event(level: u8, (file, line): (&str, u32), target: &str, text: fmt::Arguments<'_>) {
    append(|piece| {
        piece(Piece::Byte(log_kind::EVENT));
        piece(Piece::Byte(level));
        piece(Piece::Number(line));
        piece(Piece::Text(target));
        piece(Piece::Text(file));
        piece(Piece::Format(text));
    });
}

/// A message that doesn't come from Rust: level 1 (error) to 5 (trace), if the host wants so much.
pub fn write_log(level: u8, file: &str, line: u32, target: &str, text: &str) {
    let wanted = Host::get().log_level();
    if (1..=5).contains(&level) && u32::from(level) <= wanted {
        event(level, (file, line), target, format_args!("{text}"));
    }
}

pub(crate) fn init() {
    let level = match Host::get().log_level() {
        0 => LevelFilter::Off,
        1 => LevelFilter::Error,
        2 => LevelFilter::Warn,
        3 => LevelFilter::Info,
        4 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    // Fails only where a guest has set one of its own in an earlier life.
    let _ = log::set_logger(&LOGGER);
    log::set_max_level(level);
    #[cfg(feature = "tracing")]
    crate::spans::init();
}
