//! The behaviour of sandboxes on `kvm`; on `soft` again, with a note that says so, where there is none.

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
    use skerry_sandbox::{Backend, Sandbox};
    static WORKS: std::sync::OnceLock<Backend> = std::sync::OnceLock::new();
    *WORKS.get_or_init(|| {
        let guest = common::guest("sandbox-plainguest");
        let made = Sandbox::builder()
            .guest(guest)
            .backend(Backend::Kvm)
            .build();
        let called = made.map(|mut sandbox| sandbox.call::<i32>("double", (1,)));
        match called {
            Ok(Ok(2)) => Backend::Kvm,
            other => {
                eprintln!("KVM runs no sandbox here, these tests run on soft: {other:?}");
                Backend::Soft
            }
        }
    })
}
