//! Calls as spans of `tracing`, and the time that they take.

use std::time::{Duration, Instant};

use tracing::level_filters::{LevelFilter, STATIC_MAX_LEVEL};
use tracing::span::EnteredSpan;
use tracing::{Level, field};

use super::Aids;
use crate::error::CallError;
use crate::sandbox::Sandbox;

/// One call that is watched.
pub(crate) struct Watch {
    began: Instant,
    /// Without it the time alone is wanted.
    span: Option<EnteredSpan>,
    measured: bool,
}

impl Watch {
    /// Begins to watch, if anybody wants to know: else this is a load and two comparisons.
    #[inline]
    pub(crate) fn begin(name: &str, measured: bool) -> Option<Self> {
        let traced = Level::TRACE <= STATIC_MAX_LEVEL && Level::TRACE <= LevelFilter::current();
        match traced || measured {
            true => Self::begin_watched(name, measured),
            false => None,
        }
    }

    #[cold]
    #[inline(never)]
    fn begin_watched(name: &str, measured: bool) -> Option<Self> {
        let span = tracing::trace_span!(
            target: "skerry_sandbox::call",
            "call",
            function = name,
            duration_us = field::Empty,
            error = field::Empty
        );
        // A subscriber may want other targets only.
        let span = (!span.is_disabled()).then(|| span.entered());
        (measured || span.is_some()).then(|| Self {
            began: Instant::now(),
            span,
            measured,
        })
    }

    /// The call has ended; its time, if that is to be counted.
    #[cold]
    #[inline(never)]
    pub(crate) fn end(self, error: Option<&CallError>) -> Duration {
        let time = self.began.elapsed();
        if let Some(span) = self.span {
            span.record("duration_us", time.as_secs_f64() * 1e6);
            if let Some(error) = error {
                span.record("error", field::display(error));
            }
        }
        match self.measured {
            true => time,
            false => Duration::ZERO,
        }
    }
}

impl Aids {
    /// Whether calls are timed.
    #[inline]
    pub(crate) fn measures(&self) -> bool {
        self.measures
    }
}

impl Sandbox {
    /// Adds up the time of calls from now on, in [`Metrics::time`](crate::Metrics::time), or no more. It
    /// takes the clock twice per call.
    pub fn measure_time(&mut self, on: bool) {
        self.aids.measures = on;
    }
}
