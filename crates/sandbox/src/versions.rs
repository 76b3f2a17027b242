//! Which versions of the interface a host speaks.
//!
//! The control page says which; the guest chooses the newest that both know, or leaves with
//! [`NO_VERSION`](skerry_sandbox_abi::leave::NO_VERSION). A version grows by fields at the end of the control page, by
//! requests and by kinds of log records, which an older side never looks at; what would mislead an older
//! side takes a new version.

use std::ops::RangeInclusive;

use skerry_sandbox_abi::{VERSION_MAX, VERSION_MIN};

use crate::error::BuildError;

/// The versions that a host offers.
#[derive(Clone, Debug)]
pub(crate) struct Versions(RangeInclusive<u32>);

impl Default for Versions {
    fn default() -> Self {
        Self(VERSION_MIN..=VERSION_MAX)
    }
}

impl Versions {
    pub(crate) fn min(&self) -> u32 {
        *self.0.start()
    }

    pub(crate) fn max(&self) -> u32 {
        *self.0.end()
    }

    /// Whether a guest may choose this one. One that speaks none has chosen 0.
    pub(crate) fn check(&self, chosen: u32) -> Result<(), BuildError> {
        match self.0.contains(&chosen) {
            true => Ok(()),
            false => Err(BuildError::Version {
                min: self.min(),
                max: self.max(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Backend, Builder, Sandbox};

    /// Speaks version 1 and no other.
    static FIRST: &[u8] = include_bytes!("../tests/fixtures/interface-1/testguest-x86_64");

    fn build(guest: &[u8], versions: RangeInclusive<u32>) -> Result<Sandbox, BuildError> {
        let builder = Builder::default().guest(guest).backend(Backend::Soft);
        let builder = builder
            .host_fn("host_add", |a: i32, b: i32| a.wrapping_add(b))
            .host_fn("host_echo", |bytes: Vec<u8>| bytes)
            .host_fn("host_fail", |message: String| Err::<i32, String>(message));
        builder.versions(Versions(versions)).build()
    }

    #[test]
    fn a_guest_chooses_the_newest_that_both_speak() {
        for versions in [1..=1, 1..=2, 1..=u32::MAX] {
            let mut sandbox = build(FIRST, versions.clone()).unwrap();
            assert_eq!(sandbox.control.version(), 1, "{versions:?}");
            assert_eq!(sandbox.call::<i32>("call_host", (2, 3)).unwrap(), 5);
        }
    }

    #[test]
    fn a_guest_that_speaks_none_is_refused_and_both_sides_are_named() {
        for (versions, said) in [(2..=2, "2 to 2"), (2..=3, "2 to 3")] {
            let error = build(FIRST, versions.clone()).unwrap_err();
            assert!(
                matches!(&error, BuildError::Version { min, max } if (min..=max) == (versions.start()..=versions.end())),
                "{error:?}"
            );
            assert!(error.to_string().contains(said), "{error}");
        }
    }
}
