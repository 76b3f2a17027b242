//! Log records of the guest, as events of `tracing`.

use skerry_sandbox_abi::{LOG_HEADER, Reader, log_kind};
use tracing::Level;
use tracing::level_filters::LevelFilter;

use crate::debug::Profile;

/// A level as the guest has it: 1 error … 5 trace.
pub(crate) fn number(level: Level) -> u32 {
    match level {
        Level::ERROR => 1,
        Level::WARN => 2,
        Level::INFO => 3,
        Level::DEBUG => 4,
        Level::TRACE => 5,
    }
}

/// What this program's subscriber wants at most.
pub(crate) fn wanted() -> u32 {
    LevelFilter::current().into_level().map_or(0, number)
}

/// One message.
struct Event<'a> {
    level: u8,
    line: u32,
    target: &'a str,
    file: &'a str,
    text: &'a str,
}

fn text<'a>(from: &mut Reader<'a>) -> Option<&'a str> {
    let len = from.u32().ok()?;
    std::str::from_utf8(from.take(len as usize).ok()?).ok()
}

fn event<'a>(record: &'a [u8]) -> Option<Event<'a>> {
    let mut from = Reader::new(record);
    let [kind, level] = from.array().ok()?;
    if kind != log_kind::EVENT {
        return None;
    }
    Some(Event {
        level,
        line: from.u32().ok()?,
        target: text(&mut from)?,
        file: text(&mut from)?,
        text: std::str::from_utf8(from.rest()).ok()?,
    })
}

macro_rules! emit {
    ($level:expr, $event:expr) => {
        tracing::event!(
            target: "skerry_guest",
            $level,
            guest_target = $event.target,
            guest_file = $event.file,
            guest_line = $event.line,
            "{}",
            $event.text
        )
    };
}

/// Shows all records of a log area, but for allocations, which go into the profile; what is none is counted.
pub(crate) fn show(area: &[u8], mut profile: Option<&mut Profile>) -> u32 {
    let mut from = Reader::new(area);
    let mut damaged = 0;
    while from.rest().len() >= LOG_HEADER {
        let record = from.u32().and_then(|len| from.take(len as usize));
        let Ok(record) = record else {
            return damaged + 1;
        };
        if record.first() == Some(&log_kind::ALLOCATION) {
            // Without profile they are of a guest that makes them unasked.
            let kept = profile.as_deref_mut().and_then(|p| p.add(record));
            damaged += u32::from(kept.is_none());
            continue;
        }
        match event(record) {
            None => damaged += 1,
            Some(event) => match event.level {
                1 => emit!(Level::ERROR, event),
                2 => emit!(Level::WARN, event),
                3 => emit!(Level::INFO, event),
                4 => emit!(Level::DEBUG, event),
                _ => emit!(Level::TRACE, event),
            },
        }
    }
    damaged
}
