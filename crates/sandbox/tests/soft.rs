//! The behaviour of sandboxes on `soft`.

#[path = "behaviour/calls.rs"]
mod calls;
#[path = "behaviour/cancel.rs"]
mod cancel;
mod common;
#[path = "behaviour/mappings.rs"]
mod mappings;
#[path = "behaviour/memory.rs"]
mod memory;
#[path = "behaviour/snapshots.rs"]
mod snapshots;

/// What these tests run on.
fn backend() -> skerry_sandbox::Backend {
    skerry_sandbox::Backend::Soft
}
