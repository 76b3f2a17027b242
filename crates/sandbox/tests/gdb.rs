//! Debuggers of sandboxes on `soft`.

mod common;
#[path = "behaviour/gdb.rs"]
mod gdb;
#[path = "common/rsp.rs"]
mod rsp;

/// What these tests run on.
fn backend() -> skerry_sandbox::Backend {
    skerry_sandbox::Backend::Soft
}
