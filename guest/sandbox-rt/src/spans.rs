//! Spans and events of the `tracing` crates, on their way to the host.
//!
//! A guest has no clock: the host's spans are entered and left when the host reads the records, which
//! is when the guest leaves for any reason, in the guest's order.

use alloc::vec::Vec;
use core::cell::UnsafeCell;
use core::fmt::{self, Debug, Display, Write};

use skerry_sandbox_abi::log_kind;
use tracing_core::dispatcher::{Dispatch, set_global_default};
use tracing_core::field::{Field, Visit};
use tracing_core::span::{Attributes, Id, Record};
use tracing_core::subscriber::Interest;
use tracing_core::{Event, Level, LevelFilter, Metadata, Subscriber};

use crate::entry::Host;
use crate::logging::{Piece, append, event};

/// The spans that are open: number, and how many handles there are.
#[derive(Default)]
struct Open {
    spans: Vec<(u32, u32)>,
    last: u32,
}

struct Guest(UnsafeCell<Open>);

// SAFETY: there is one thread, and no interrupt returns to guest code.
unsafe impl Sync for Guest {}
// SAFETY: as above.
unsafe impl Send for Guest {}

impl Guest {
    /// Works on the open spans; `work` runs no code of others.
    fn open<T>(&self, work: impl FnOnce(&mut Open) -> T) -> T {
        // SAFETY: one thread, and `work` doesn't come here again.
        work(unsafe { &mut *self.0.get() })
    }
}

/// A level's number: 1 error … 5 trace.
fn number(level: Level) -> u8 {
    match level {
        Level::ERROR => 1,
        Level::WARN => 2,
        Level::INFO => 3,
        Level::DEBUG => 4,
        _ => 5,
    }
}

/// Fields as text: the message first, then `name=value`, with a space before each but the first.
struct Fields<T>(T);

/// What has fields.
trait Recorded {
    fn visit(&self, visitor: &mut dyn Visit);
}

impl Recorded for &Event<'_> {
    fn visit(&self, visitor: &mut dyn Visit) {
        self.record(visitor);
    }
}

impl Recorded for &Attributes<'_> {
    fn visit(&self, visitor: &mut dyn Visit) {
        self.record(visitor);
    }
}

impl Recorded for &Record<'_> {
    fn visit(&self, visitor: &mut dyn Visit) {
        self.record(visitor);
    }
}

struct Text<'a, 'b> {
    out: &'a mut fmt::Formatter<'b>,
    message: bool,
    first: bool,
}

impl Text<'_, '_> {
    fn put(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        if (field.name() == "message") != self.message {
            return;
        }
        // The area takes all that is written to it.
        if !self.first {
            let _ = self.out.write_char(' ');
        }
        self.first = false;
        let _ = match self.message {
            true => write!(self.out, "{value}"),
            false => write!(self.out, "{}={value}", field.name()),
        };
    }
}

impl Visit for Text<'_, '_> {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.put(field, format_args!("{value:?}"));
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        match self.message {
            true => self.put(field, format_args!("{value}")),
            false => self.put(field, format_args!("{value:?}")),
        }
    }
}

impl<T: Recorded> Display for Fields<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = Text {
            out: f,
            message: true,
            first: true,
        };
        self.0.visit(&mut text);
        text.message = false;
        self.0.visit(&mut text);
        Ok(())
    }
}

/// The host's number of a span; those of this subscriber fit.
fn short(id: &Id) -> u32 {
    id.into_u64() as u32
}

fn mark(kind: u8, span: &Id) {
    append(|piece| {
        piece(Piece::Byte(kind));
        piece(Piece::Number(short(span)));
    });
}

impl Subscriber for Guest {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        match self.enabled(metadata) {
            true => Interest::always(),
            false => Interest::never(),
        }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        u32::from(number(*metadata.level())) <= Host::get().log_level()
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(match Host::get().log_level() {
            0 => LevelFilter::OFF,
            1 => LevelFilter::ERROR,
            2 => LevelFilter::WARN,
            3 => LevelFilter::INFO,
            4 => LevelFilter::DEBUG,
            _ => LevelFilter::TRACE,
        })
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let id = self.open(|open| {
            // Zero is no id; a number that is still open is not given twice.
            loop {
                open.last = open.last.wrapping_add(1).max(1);
                let taken = open.spans.iter().any(|(id, _)| *id == open.last);
                if !taken {
                    break;
                }
            }
            open.spans.push((open.last, 1));
            open.last
        });
        let metadata = span.metadata();
        append(|piece| {
            piece(Piece::Byte(log_kind::SPAN_NEW));
            piece(Piece::Byte(number(*metadata.level())));
            piece(Piece::Number(metadata.line().unwrap_or(0)));
            piece(Piece::Number(id));
            piece(Piece::Text(metadata.target()));
            piece(Piece::Text(metadata.file().unwrap_or("")));
            piece(Piece::Text(metadata.name()));
            piece(Piece::Format(format_args!("{}", Fields(span))));
        });
        Id::from_u64(id.into())
    }

    fn record(&self, span: &Id, values: &Record<'_>) {
        append(|piece| {
            piece(Piece::Byte(log_kind::SPAN_RECORD));
            piece(Piece::Number(short(span)));
            piece(Piece::Format(format_args!("{}", Fields(values))));
        });
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, record: &Event<'_>) {
        let metadata = record.metadata();
        event(
            number(*metadata.level()),
            (metadata.file().unwrap_or(""), metadata.line().unwrap_or(0)),
            metadata.target(),
            format_args!("{}", Fields(record)),
        );
    }

    fn enter(&self, span: &Id) {
        mark(log_kind::SPAN_ENTER, span);
    }

    fn exit(&self, span: &Id) {
        mark(log_kind::SPAN_EXIT, span);
    }

    fn clone_span(&self, span: &Id) -> Id {
        self.open(|open| {
            let found = open.spans.iter_mut().find(|(id, _)| *id == short(span));
            if let Some((_, handles)) = found {
                *handles += 1;
            }
        });
        span.clone()
    }

    fn try_close(&self, span: Id) -> bool {
        let closed = self.open(|open| {
            let at = open.spans.iter().position(|(id, _)| *id == short(&span));
            let Some(at) = at else {
                return false;
            };
            open.spans[at].1 -= 1;
            let closed = open.spans[at].1 == 0;
            if closed {
                open.spans.swap_remove(at);
            }
            closed
        });
        if closed {
            mark(log_kind::SPAN_CLOSE, &span);
        }
        closed
    }
}

pub(crate) fn init() {
    let guest = Guest(UnsafeCell::new(Open::default()));
    // Fails only where a guest has set one of its own.
    let _ = set_global_default(Dispatch::new(guest));
}
