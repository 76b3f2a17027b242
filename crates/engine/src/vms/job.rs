//! A virtual machine to be: what it begins with, its command, and what the registry is to have of it.

use std::sync::OnceLock;

use skerry_oci::Image;
use skerry_protocol::message::ExecRequest;

use super::info::VmConfig;
use super::launch::Launch;
use crate::command::{self, Surroundings};
use crate::error::EngineError;
use crate::frozen::{About, CommandAbout, Frozen};
use crate::run::RunSpec;
use crate::statistics::Statistics;

/// The agent's number for the first command of a machine.
const FIRST_SESSION: u32 = 1;

/// What a virtual machine begins with.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// A start of an image.
    Image {
        /// The image.
        image: &'a Image,
        /// How the user calls it.
        name: &'a str,
    },
    /// Where another machine was.
    Frozen {
        /// Its state.
        frozen: &'a Frozen,
        /// The snapshot or machine.
        parent: &'a str,
    },
}

/// A virtual machine to be, and its command.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// What it begins with.
    pub source: Source<'a>,
    /// The machine and its command; of one that goes on, only what [`ResumeSpec`](crate::vm::ResumeSpec) has. Without a
    /// command, that goes on which was running.
    pub spec: &'a RunSpec,
    /// Its name; empty for any.
    pub name: &'a str,
    /// It is forgotten when it ends.
    pub auto_remove: bool,
    /// It runs behind no terminal.
    pub detached: bool,
    /// By what it can be started again; its disk is kept then.
    pub launch: Option<&'a Launch>,
    /// This process is the machine's own, and is confined to it for good.
    pub own_process: bool,
    /// What its processors have done is put here when it has ended.
    pub statistics: Option<&'a OnceLock<Statistics>>,
}

/// The command of a machine to be.
pub(super) struct Plan {
    argv: Vec<String>,
    /// `None`: the one that runs already goes on.
    pub(super) request: Option<ExecRequest>,
    /// The agent's number for it.
    session: u32,
    tty: bool,
    pub(super) stdin: bool,
    pub(super) surroundings: Surroundings,
}

impl Plan {
    pub(super) fn of(job: &Job<'_>) -> Result<Self, EngineError> {
        let spec = &job.spec.command;
        let (argv, found, session) = match job.source {
            Source::Image { image, name } => {
                let argv = command::argv(&image.config, spec);
                if argv.is_empty() {
                    return Err(EngineError::NoCommand(name.to_owned()));
                }
                (argv, Surroundings::of(&image.config), FIRST_SESSION)
            }
            Source::Frozen { frozen, parent } => {
                let about = &frozen.about;
                match &about.command {
                    Some(command) if spec.command.is_empty() => {
                        return Ok(Self {
                            argv: command.argv.clone(),
                            request: None,
                            session: command.session,
                            tty: command.tty,
                            stdin: command.stdin,
                            surroundings: about.surroundings.clone(),
                        });
                    }
                    None if spec.command.is_empty() => {
                        return Err(EngineError::NothingRuns(parent.to_owned()));
                    }
                    running => {
                        let session = running.as_ref().map_or(0, |command| command.session);
                        let argv = spec.command.clone();
                        (
                            argv,
                            about.surroundings.clone(),
                            session.wrapping_add(FIRST_SESSION),
                        )
                    }
                }
            }
        };
        Ok(Self {
            request: Some(command::request(argv.clone(), &found, spec)),
            argv,
            session,
            tty: spec.tty.is_some(),
            stdin: spec.stdin,
            surroundings: found.with(spec),
        })
    }

    pub(super) fn about(&self) -> CommandAbout {
        CommandAbout {
            argv: self.argv.clone(),
            tty: self.tty,
            stdin: self.stdin,
            session: self.session,
        }
    }
}

/// What the registry keeps of a machine.
pub(super) fn config(job: &Job<'_>, plan: &Plan) -> VmConfig {
    let options = &job.spec.vm.options;
    let (image, memory, cpus, parent) = match job.source {
        Source::Image { name, .. } => (name, options.memory, options.cpus, None),
        Source::Frozen { frozen, parent } => {
            let About { machine, image, .. } = &frozen.about;
            (
                image.name.as_str(),
                machine.memory,
                machine.cpus,
                Some(parent),
            )
        }
    };
    VmConfig {
        id: String::new(),
        name: job.name.to_owned(),
        image: image.to_owned(),
        command: plan.argv.clone(),
        surroundings: plan.surroundings.clone(),
        tty: plan.tty,
        memory,
        cpus,
        parent: parent.map(str::to_owned),
        auto_remove: job.auto_remove,
        detached: job.detached,
        created: 0,
        ready_mark: job.spec.ready.clone(),
        digest: match job.source {
            Source::Image { image, .. } => Some(image.digest.to_string()),
            Source::Frozen { .. } => None,
        },
        labels: job.spec.labels.clone(),
        restart: job.spec.restart,
        ports: job.spec.vm.network.publish.clone(),
        nano_cpus: options.nano_cpus,
        pids_limit: job.spec.vm.pids_limit,
        disk_size: job.spec.vm.disk_size,
    }
}
