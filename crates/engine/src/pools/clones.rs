//! Clean virtual machines, kept ready.

use std::sync::Arc;

use skerry_oci::Image;

use super::{Pool, PoolOptions, Template};
use crate::command::{CommandSpec, Surroundings};
use crate::error::EngineError;
use crate::frozen::Frozen;
use crate::hypervisor::select;
use crate::paths::Paths;
use crate::vm::{ResumeSpec, Vm, VmSpec};

/// Makes a pool's machines: clones of one state.
#[derive(Debug)]
pub struct Clones {
    paths: Paths,
    frozen: Arc<Frozen>,
    spec: ResumeSpec,
}

/// A pool of virtual machines.
pub type VmPool = Pool<Clones>;

impl Clones {
    /// Machines that begin where `frozen` is. `note` is told what the user should know once.
    pub fn of(
        paths: &Paths,
        frozen: Frozen,
        spec: ResumeSpec,
        note: &mut dyn FnMut(&str),
    ) -> Result<Self, EngineError> {
        let selected = select(spec.hypervisor, &spec.soft)?;
        selected.notes.iter().for_each(|text| note(text));
        frozen.check(&selected)?.iter().for_each(|text| note(text));
        Ok(Self {
            paths: paths.clone(),
            frozen: Arc::new(frozen),
            spec: ResumeSpec {
                hypervisor: selected.backend.into(),
                rewindable: true,
                ..spec
            },
        })
    }

    /// Machines that begin where one from `image`, which the user calls `name`, is ready and has
    /// run `prewarm`, which must succeed.
    pub fn of_image(
        paths: &Paths,
        (image, name): (&Image, &str),
        spec: &VmSpec,
        prewarm: Option<&CommandSpec>,
        note: &mut dyn FnMut(&str),
    ) -> Result<Self, EngineError> {
        let vm = Vm::start(paths, image, name, spec, note)?;
        if let Some(command) = prewarm {
            vm.prewarm(command)?;
        }
        let frozen = vm.capture()?.frozen;
        vm.kill();
        // File systems in memory are part of the state; of folders, each machine has a server of its own.
        let folders = spec.mounts.iter().filter(|mount| mount.is_bind());
        let resume = ResumeSpec {
            hypervisor: frozen.about.backend.into(),
            soft: spec.options.soft.clone(),
            time_limit: None,
            hostname: spec.hostname.clone(),
            network: spec.network.clone(),
            mounts: folders.cloned().collect(),
            show_console: spec.show_console,
            rewindable: true,
            sampled: false,
            nano_cpus: spec.options.nano_cpus,
            pids_limit: spec.pids_limit,
        };
        Self::of(paths, frozen, resume, note)
    }

    /// What commands in the machines find.
    #[must_use]
    pub fn surroundings(&self) -> &Surroundings {
        &self.frozen.about.surroundings
    }
}

impl Template for Clones {
    type Member = Vm;
    type Error = EngineError;

    fn make(&self) -> Result<Vm, EngineError> {
        let note = &mut |text: &str| tracing::debug!(text);
        Vm::resume(&self.paths, &self.frozen, &self.spec, note)
    }

    fn reset(&self, vm: &mut Vm) -> Result<(), EngineError> {
        vm.rewind().map(drop)
    }

    fn is_good(&self, vm: &Vm) -> bool {
        !vm.machine().is_ending()
    }
}

impl VmPool {
    /// Opens a pool of machines.
    pub fn of_machines(clones: Clones, options: PoolOptions) -> Result<Self, EngineError> {
        Ok(Self::open(clones, options)?)
    }
}
