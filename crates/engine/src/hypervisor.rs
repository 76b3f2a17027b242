//! Which backend runs a machine: the one place where their names meet.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;
use std::thread::Builder;

use serde::{Deserialize, Serialize};
use skerry_hypervisor::probe::ProbeReport;
use skerry_hypervisor::{Capabilities, Hypervisor, Unusable};
use skerry_hypervisor_kvm::Kvm;
use skerry_hypervisor_soft::Soft;
use skerry_net::{TapProbe, probe_taps};

use crate::confinement::{self, Report};
use crate::error::EngineError;
use crate::resources::{self, Limit};
use crate::soft::SoftOptions;

/// The backends of this build, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
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

    /// What it can do, or why it can't be used: found out once, with a small guest only where that
    /// can be doubted. [`Backend::probe`] looks again.
    fn usable(self) -> &'static Result<Capabilities, Unusable> {
        static KVM: OnceLock<Result<Capabilities, Unusable>> = OnceLock::new();
        static SOFT: OnceLock<Result<Capabilities, Unusable>> = OnceLock::new();
        match self {
            Self::Kvm => KVM.get_or_init(Kvm::usable),
            Self::Soft => SOFT.get_or_init(Soft::usable),
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What this host can run machines on.
#[derive(Clone, Debug, Serialize)]
pub struct Diagnosis {
    /// What [`Choice::Auto`] takes.
    pub auto: Option<&'static str>,
    /// Every backend.
    pub hypervisors: Vec<ProbeReport>,
    /// How the process of a machine is confined here.
    pub confinement: Option<Report>,
    /// What bounds of a machine's resources hold here, and by what.
    pub resources: Vec<Limit>,
    /// Whether a machine can be on a network of the host's.
    pub tap: TapProbe,
}

/// Probes every backend: each runs a small guest.
#[must_use]
pub fn diagnose() -> Diagnosis {
    // Before the probes' threads: it takes a process with one.
    let confinement = confinement::probe().ok();
    let hypervisors: Vec<_> = Backend::ALL.into_iter().map(Backend::probe).collect();
    let usable = hypervisors.iter().find(|report| report.result.is_ok());
    Diagnosis {
        auto: usable.map(|report| report.backend),
        hypervisors,
        confinement,
        resources: resources::probe(),
        tap: probe_taps(),
    }
}

/// What the user asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
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
    /// How it runs code, where it is [`Backend::Soft`].
    pub soft: SoftOptions,
    /// Why better ones were passed over: a sentence for the user, once.
    pub notes: Vec<String>,
}

/// Starts to find out, in a thread of its own, what [`select`] will want to know, so that whoever
/// has something else to do first waits less for it.
pub fn look_ahead(choice: Choice) {
    let first = choice.candidates().first().copied();
    if let Some(backend) = first.filter(|&backend| backend != Backend::Soft) {
        let thread = Builder::new().name("probe".to_owned());
        // Where no thread can be had, `select` finds out by itself.
        let _ = thread.spawn(move || backend.usable());
    }
}

/// Picks the backend. An explicit choice that can't be used is an error; [`Choice::Auto`] notes
/// what it passed over. Options of the software processor are errors where another one is picked: they
/// are no reason to pick it.
pub fn select(choice: Choice, soft: &SoftOptions) -> Result<Selected, EngineError> {
    let mut refusals = Vec::new();
    for &backend in choice.candidates() {
        match backend.usable() {
            Ok(capabilities) => {
                soft.check(backend)?;
                let notes = refusals
                    .iter()
                    .map(|(passed_over, unusable): &(Backend, &Unusable)| {
                        format!("using {backend}, not {passed_over}: {unusable}")
                    })
                    .collect();
                return Ok(Selected {
                    backend,
                    capabilities: capabilities.clone(),
                    soft: soft.clone(),
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
            source: unusable.clone(),
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
