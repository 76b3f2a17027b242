//! Which backend runs a machine: the one place where their names meet.

use std::fmt;
use std::str::FromStr;
use std::thread::{Builder, JoinHandle};

use serde::{Deserialize, Serialize};
use skerry_hypervisor::probe::ProbeReport;
use skerry_hypervisor::{Capabilities, Hypervisor, Unusable};
use skerry_hypervisor_kvm::Kvm;
use skerry_hypervisor_soft::Soft;

use crate::error::EngineError;

/// The backends of this build, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// Linux KVM.
    Kvm,
    /// Skerry's own processor.
    Soft,
}

impl Backend {
    /// All of them, in the order in which [`Choice::Auto`] tries them.
    pub const ALL: [Self; 2] = [Self::Kvm, Self::Soft];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Soft => "soft",
        }
    }

    /// Runs the backend's probe: a small guest.
    pub fn probe(self) -> ProbeReport {
        match self {
            Self::Kvm => ProbeReport::of::<Kvm>(self.name()),
            Self::Soft => ProbeReport::of::<Soft>(self.name()),
        }
    }

    /// What it can do, or why it can't be used: with a small guest only where that can be doubted.
    fn usable(self) -> Result<Capabilities, Unusable> {
        match self {
            Self::Kvm => Kvm::usable(),
            Self::Soft => Soft::usable(),
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What the user asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Choice {
    /// The first backend that works.
    #[default]
    Auto,
    /// This one or an error.
    Only(Backend),
}

impl Choice {
    /// The backends to try, in turn.
    fn candidates(&self) -> &[Backend] {
        match self {
            Self::Auto => &Backend::ALL,
            Self::Only(backend) => std::slice::from_ref(backend),
        }
    }
}

impl From<Backend> for Choice {
    fn from(backend: Backend) -> Self {
        Self::Only(backend)
    }
}

impl FromStr for Choice {
    type Err = EngineError;

    fn from_str(name: &str) -> Result<Self, EngineError> {
        if name == "auto" {
            return Ok(Self::Auto);
        }
        Backend::ALL
            .into_iter()
            .find(|backend| backend.name() == name)
            .map(Self::Only)
            .ok_or_else(|| EngineError::UnknownHypervisor(name.to_owned()))
    }
}

/// A backend that works here.
#[derive(Clone, Debug)]
pub struct Selected {
    /// Which.
    pub backend: Backend,
    /// What it can do.
    pub capabilities: Capabilities,
    /// Why better ones were passed over: a sentence for the user, once.
    pub notes: Vec<String>,
}

/// A choice that is being made: what takes time goes on in a thread of its own, so that whoever
/// asks early waits little.
#[derive(Debug)]
pub struct Selecting {
    choice: Choice,
    /// Finds out about the first candidate.
    first: Option<JoinHandle<Result<Capabilities, Unusable>>>,
}

impl Selecting {
    /// Starts to choose.
    pub fn begin(choice: Choice) -> Self {
        let first = choice.candidates().first().copied();
        let doubtful = first.filter(|&backend| backend != Backend::Soft);
        let first = doubtful.and_then(|backend| {
            let thread = Builder::new().name("probe".to_owned());
            // Where no thread can be had it is done in `finish`.
            thread.spawn(move || backend.usable()).ok()
        });
        Self { choice, first }
    }

    /// Picks the backend. An explicit choice that can't be used is an error; [`Choice::Auto`] notes
    /// what it passed over.
    pub fn finish(mut self) -> Result<Selected, EngineError> {
        let mut refusals = Vec::new();
        for &backend in self.choice.candidates() {
            let begun = self.first.take().and_then(|thread| thread.join().ok());
            match begun.unwrap_or_else(|| backend.usable()) {
                Ok(capabilities) => {
                    let notes = refusals
                        .iter()
                        .map(|(passed_over, unusable): &(Backend, _)| {
                            format!("using {backend}, not {passed_over}: {unusable}")
                        })
                        .collect();
                    return Ok(Selected {
                        backend,
                        capabilities,
                        notes,
                    });
                }
                Err(unusable) => refusals.push((backend, unusable)),
            }
        }
        match refusals.pop() {
            Some((backend, unusable)) => Err(EngineError::Hypervisor {
                backend,
                remedy: unusable.remedy.clone(),
                source: unusable,
            }),
            None => Err(EngineError::UnknownHypervisor(String::new())),
        }
    }
}

/// Picks the backend at once: [`Selecting`].
pub fn select(choice: Choice) -> Result<Selected, EngineError> {
    Selecting::begin(choice).finish()
}

/// Opens `backend` as `H`, without probing it again.
pub(crate) fn open<H: Hypervisor>(backend: Backend) -> Result<H, EngineError> {
    H::open().map_err(|unusable| EngineError::Hypervisor {
        backend,
        remedy: unusable.remedy.clone(),
        source: unusable,
    })
}
