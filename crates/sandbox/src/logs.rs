//! Log records of the guest, as events and spans of `tracing`.
//!
//! Each span of the guest's is one of the host's, and is current while the guest's is: host functions run
//! within it, and events lie in it. The host has no more of them than it says here, whatever the guest
//! does, and none is current or left over when a call has failed or a snapshot was restored.

use std::collections::HashMap;

use skerry_sandbox_abi::{LOG_HEADER, Reader, log_kind};
use tracing::level_filters::LevelFilter;
use tracing::{Level, Span};

use crate::debug::Profile;

/// The most spans that a guest can have open.
const OPEN_MAX: usize = 1024;
/// The most that can be current at once.
const ENTERED_MAX: usize = 256;

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

/// Where something of the guest's comes from.
struct Place<'a> {
    level: u8,
    line: u32,
    target: &'a str,
    file: &'a str,
}

fn text<'a>(from: &mut Reader<'a>) -> Option<&'a str> {
    let len = from.u32().ok()?;
    std::str::from_utf8(from.take(len as usize).ok()?).ok()
}

fn rest<'a>(from: &Reader<'a>) -> Option<&'a str> {
    std::str::from_utf8(from.rest()).ok()
}

/// Runs a macro of `tracing`'s with a level that is known only now.
macro_rules! at_level {
    ($level:expr, $emit:ident $arguments:tt) => {
        match $level {
            1 => $emit!(Level::ERROR, $arguments),
            2 => $emit!(Level::WARN, $arguments),
            3 => $emit!(Level::INFO, $arguments),
            4 => $emit!(Level::DEBUG, $arguments),
            _ => $emit!(Level::TRACE, $arguments),
        }
    };
}

macro_rules! emit_event {
    ($level:expr, ($place:expr, $text:expr)) => {
        tracing::event!(
            target: "skerry_guest",
            $level,
            guest_target = $place.target,
            guest_file = $place.file,
            guest_line = $place.line,
            "{}",
            $text
        )
    };
}

macro_rules! make_span {
    ($level:expr, ($place:expr, $name:expr, $fields:expr)) => {
        tracing::span!(
            target: "skerry_guest",
            $level,
            "guest",
            guest_name = $name,
            guest_fields = $fields,
            guest_target = $place.target,
            guest_file = $place.file,
            guest_line = $place.line,
            guest_recorded = tracing::field::Empty,
        )
    };
}

/// The guest's spans.
#[derive(Debug, Default)]
pub(crate) struct Spans {
    open: HashMap<u32, Span>,
    /// Those that are current on this thread, the innermost last.
    entered: Vec<(u32, Span)>,
}

impl Spans {
    /// Shows all records of a log area, but for allocations, which go into the profile; those that are
    /// none are counted.
    pub(crate) fn show(&mut self, area: &[u8], mut profile: Option<&mut Profile>) -> u32 {
        let mut from = Reader::new(area);
        let mut damaged = 0;
        while from.rest().len() >= LOG_HEADER {
            let record = from.u32().and_then(|len| from.take(len as usize));
            let Ok(record) = record else {
                return damaged + 1;
            };
            let shown = match record.first() {
                // Without profile they are of a guest that makes them unasked.
                Some(&log_kind::ALLOCATION) => profile.as_deref_mut().and_then(|p| p.add(record)),
                _ => self.record(record),
            };
            damaged += u32::from(shown.is_none());
        }
        damaged
    }

    fn record(&mut self, record: &[u8]) -> Option<()> {
        let mut from = Reader::new(record);
        let [kind] = from.array().ok()?;
        match kind {
            log_kind::EVENT => {
                let [level] = from.array().ok()?;
                let place = Place {
                    level,
                    line: from.u32().ok()?,
                    target: text(&mut from)?,
                    file: text(&mut from)?,
                };
                let text = rest(&from)?;
                at_level!(place.level, emit_event(place, text));
            }
            log_kind::SPAN_NEW => return self.begin(&mut from),
            log_kind::SPAN_RECORD => {
                let span = self.open.get(&from.u32().ok()?)?;
                span.record("guest_recorded", rest(&from)?);
            }
            log_kind::SPAN_ENTER => {
                let id = only_id(&mut from)?;
                let span = self.open.get(&id)?;
                if self.entered.len() == ENTERED_MAX {
                    return None;
                }
                enter(span);
                self.entered.push((id, span.clone()));
            }
            log_kind::SPAN_EXIT => {
                let id = only_id(&mut from)?;
                let at = self.entered.iter().rposition(|(other, _)| *other == id)?;
                leave(&self.entered.remove(at).1);
            }
            log_kind::SPAN_CLOSE => {
                let id = only_id(&mut from)?;
                self.open.remove(&id)?;
            }
            _ => return None,
        }
        Some(())
    }

    fn begin(&mut self, from: &mut Reader<'_>) -> Option<()> {
        let [level] = from.array().ok()?;
        let line = from.u32().ok()?;
        let id = from.u32().ok()?;
        let place = Place {
            level,
            line,
            target: text(from)?,
            file: text(from)?,
        };
        let (name, fields) = (text(from)?, rest(from)?);
        if self.open.len() == OPEN_MAX && !self.open.contains_key(&id) {
            return None;
        }
        let span = at_level!(place.level, make_span(place, name, fields));
        self.open.insert(id, span);
        Some(())
    }

    /// Ends what the guest has left current: the thread is the caller's again. The guest has left it at
    /// the end of a call that succeeds, or has forgotten to.
    pub(crate) fn leave_all(&mut self) {
        while let Some((_, span)) = self.entered.pop() {
            leave(&span);
        }
    }

    /// Ends them all: the guest that would have doesn't go on.
    pub(crate) fn close_all(&mut self) {
        self.leave_all();
        self.open.clear();
    }
}

fn only_id(from: &mut Reader<'_>) -> Option<u32> {
    let id = from.u32().ok()?;
    from.end().ok()?;
    Some(id)
}

/// Entering lasts longer than a guard could be kept.
fn enter(span: &Span) {
    span.with_subscriber(|(id, dispatch)| dispatch.enter(id));
}

fn leave(span: &Span) {
    span.with_subscriber(|(id, dispatch)| dispatch.exit(id));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn framed(record: &[u8]) -> Vec<u8> {
        let mut bytes = (record.len() as u32).to_le_bytes().to_vec();
        bytes.extend(record);
        bytes
    }

    #[test]
    fn a_span_that_is_not_there_is_counted() {
        let mut spans = Spans::default();
        for kind in log_kind::SPAN_ENTER..=log_kind::SPAN_RECORD {
            assert_eq!(spans.show(&framed(&[kind, 9, 0, 0, 0]), None), 1, "{kind}");
        }
        assert_eq!(spans.show(&framed(&[0xee]), None), 1);
        assert_eq!(spans.show(&framed(&[]), None), 1);
    }

    #[test]
    fn a_guest_makes_no_more_spans_than_there_may_be() {
        let mut spans = Spans::default();
        let mut new = vec![log_kind::SPAN_NEW, 3, 0, 0, 0, 0];
        new.extend([0; 16]);
        let mut damaged = 0;
        for n in 0..OPEN_MAX as u32 + 10 {
            new[6..10].copy_from_slice(&n.to_le_bytes());
            damaged += spans.show(&framed(&new), None);
        }
        assert_eq!((damaged, spans.open.len()), (10, OPEN_MAX));
        let enter = framed(&[log_kind::SPAN_ENTER, 1, 0, 0, 0]);
        let refused: u32 = (0..ENTERED_MAX + 5).map(|_| spans.show(&enter, None)).sum();
        assert_eq!((refused, spans.entered.len()), (5, ENTERED_MAX));
        spans.close_all();
        assert!(spans.open.is_empty() && spans.entered.is_empty());
    }

    proptest! {
        #[test]
        fn no_area_makes_it_fail(
            records in prop::collection::vec((0_u8..8, prop::collection::vec(0_u8..4, 0..32)), 0..64),
            tail in prop::collection::vec(any::<u8>(), 0..16),
        ) {
            let mut spans = Spans::default();
            let mut area = Vec::new();
            for (kind, record) in &records {
                let mut bytes = vec![*kind];
                bytes.extend(record);
                area.extend(framed(&bytes));
            }
            area.extend(&tail);
            prop_assert!(spans.show(&area, None) <= records.len() as u32 + 5);
            spans.close_all();
        }
    }
}
