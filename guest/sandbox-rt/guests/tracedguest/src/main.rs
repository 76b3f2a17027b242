//! A guest with spans: what the host's tests of them call.

#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec::Vec;

use skerry_sandbox_rt::{guest_fn, host_fn};
use tracing::field::Empty;
use tracing::{debug_span, error, info, info_span, trace_span};

#[host_fn]
fn host_note(text: &str);

/// Two spans, an event in each, a call of the host's in the inner one.
#[guest_fn]
fn nested(depth: u32) -> u32 {
    let outer = info_span!("outer", depth, name = "first", later = Empty);
    let _entered = outer.enter();
    info!(depth, "in the outer one");
    outer.record("later", 7);
    let inner = debug_span!("inner").entered();
    error!(code = -1, text = "two words", "in the inner one");
    host_note("within");
    drop(inner);
    depth + 1
}

/// A span that is entered twice, and one that the host doesn't want.
#[guest_fn]
fn again() {
    let span = info_span!("again");
    span.in_scope(|| info!("once"));
    let other = span.clone();
    drop(span);
    let _unwanted = trace_span!("unwanted").entered();
    other.in_scope(|| info!("twice"));
}

/// Never leaves its span.
#[guest_fn]
fn stuck() {
    let _span = info_span!("stuck").entered();
    host_note("stuck");
    loop {
        core::hint::spin_loop();
    }
}

/// A span that is left and closed by nobody.
#[guest_fn]
fn forgotten() {
    core::mem::forget(info_span!("forgotten").entered());
}

/// More spans than the host keeps.
#[guest_fn]
fn many(count: u32) {
    let spans: Vec<_> = (0..count).map(|n| info_span!("one", n)).collect();
    for span in &spans {
        span.in_scope(|| ());
    }
}
