//! The behaviour of sandboxes on `kvm`; on `soft` again, with a note that says so, where there is none.

#[path = "behaviour/calls.rs"]
mod calls;
#[path = "behaviour/cancel.rs"]
mod cancel;
mod common;
#[path = "common/kvm.rs"]
mod here;
#[path = "behaviour/mappings.rs"]
mod mappings;
#[path = "behaviour/memory.rs"]
mod memory;
#[path = "behaviour/snapshots.rs"]
mod snapshots;

/// What these tests run on.
fn backend() -> skerry_sandbox::Backend {
    here::backend()
}
