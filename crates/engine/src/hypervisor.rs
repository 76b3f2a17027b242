//! Which backend runs a machine: the one place where their names meet.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use skerry_hypervisor::probe::ProbeReport;
use skerry_hypervisor::{Capabilities, Hypervisor};
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

/// Picks the backend. An explicit choice that can't be used is an error; [`Choice::Auto`] notes
/// what it passed over.
pub fn select(choice: Choice) -> Result<Selected, EngineError> {
    let candidates: &[Backend] = match &choice {
        Choice::Auto => &Backend::ALL,
        Choice::Only(backend) => std::slice::from_ref(backend),
    };
    let mut refusals = Vec::new();
    for &backend in candidates {
        match backend.probe().result {
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

/// Opens `backend` as `H`, without probing it again.
pub(crate) fn open<H: Hypervisor>(backend: Backend) -> Result<H, EngineError> {
    H::open().map_err(|unusable| EngineError::Hypervisor {
        backend,
        remedy: unusable.remedy.clone(),
        source: unusable,
    })
}
