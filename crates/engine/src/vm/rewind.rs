//! Taking a machine back to where it began, in place.

use std::time::{Duration, Instant};

use super::start::{give_addresses, greet_again, new_generation};
use super::{Shared, Vm, setup};
use crate::error::EngineError;

/// What taking a machine back came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewound {
    /// Pages of memory that were written since, and hold again what they held.
    pub pages: u64,
    /// How long that took, until the guest's first instruction.
    pub reset: Duration,
    /// How long until its agent took commands again.
    pub ready: Duration,
}

impl Vm {
    /// Takes the machine back to where it began (where it was resumed from, or where its state was
    /// taken last): memory, devices and disk, by undoing only what was written. Connections to it
    /// break. It has new entropy, the time of day and another identity, as every clone has. After
    /// a failure it is no more: kill it.
    pub fn rewind(&self) -> Result<Rewound, EngineError> {
        let begun = Instant::now();
        let books = self.shared.books.lock();
        let origin = books.origin.clone().ok_or(EngineError::NoOrigin)?;
        let machine = self.machine();
        machine.pause()?;
        if let Some(disk) = &self.shared.scratch {
            disk.rewind()?;
        }
        let pages = machine.rewind(&origin)?.pages;
        new_generation(&self.shared.about, machine)?;
        machine.resume();
        let reset = begun.elapsed();
        let mut agent = self.shared.agent.lock();
        let setup = setup(&self.shared.about, self.shared.hostname.as_deref());
        let Shared {
            vsock, listener, ..
        } = &*self.shared;
        let met = greet_again(vsock, listener, &setup).and_then(|mut met| {
            give_addresses(&mut met, self.network())?;
            Ok(met)
        });
        *agent = met.map_err(|error| self.explain(error))?;
        *self.shared.command.lock() = None;
        Ok(Rewound {
            pages,
            reset,
            ready: begun.elapsed(),
        })
    }
}
