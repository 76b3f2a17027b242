//! Whether KVM runs sandboxes here.

use std::sync::OnceLock;

use skerry_sandbox::{Backend, Sandbox};

use crate::common::guest;

/// KVM where it runs sandboxes, else `soft`, with a note that says so.
pub fn backend() -> Backend {
    static WORKS: OnceLock<Backend> = OnceLock::new();
    *WORKS.get_or_init(|| {
        let made = Sandbox::builder()
            .guest(guest("sandbox-plainguest"))
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
