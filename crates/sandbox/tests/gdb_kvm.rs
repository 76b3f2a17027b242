//! Debuggers of sandboxes on `kvm`; on `soft` again, with a note that says so, where there is none.

mod common;
#[path = "behaviour/gdb.rs"]
mod gdb;
#[path = "common/kvm.rs"]
mod here;
#[path = "common/rsp.rs"]
mod rsp;

/// What these tests run on.
fn backend() -> skerry_sandbox::Backend {
    here::backend()
}
