//! What a virtual machine is, and how it is: what its folder has of it, and lists show.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::ready::ReadyMark;
use super::restart::RestartPolicy;
use crate::command::Surroundings;
use crate::network::Mapping;

/// What a virtual machine is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct VmConfig {
    /// 32 hexadecimal digits.
    pub id: String,
    /// Its name, which no other has.
    pub name: String,
    /// The image, as the user named it.
    pub image: String,
    /// The command and its arguments.
    pub command: Vec<String>,
    /// What further commands in it find.
    pub surroundings: Surroundings,
    /// The command has a terminal.
    pub tty: bool,
    /// Bytes of RAM.
    pub memory: u64,
    /// Virtual processors.
    pub cpus: u32,
    /// The snapshot or machine that it goes on from.
    pub parent: Option<String>,
    /// It is forgotten when it ends.
    pub auto_remove: bool,
    /// It runs behind no terminal, and keeps its output in a log.
    pub detached: bool,
    /// When it was made, in nanoseconds since 1970.
    pub created: u64,
    /// By what it is known to be ready.
    #[serde(default)]
    pub ready_mark: Option<ReadyMark>,
    /// The image's digest: each start is of this one, whatever its name means by then.
    #[serde(default)]
    pub digest: Option<String>,
    /// What the user notes about it.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// When it is started again without being asked.
    #[serde(default)]
    pub restart: RestartPolicy,
    /// Ports of the guest's that the host listens at, as they were asked for.
    #[serde(default)]
    pub ports: Vec<Mapping>,
    /// How much of the host's processors its own may take, in billionths of one, where that is bounded.
    #[serde(default)]
    pub nano_cpus: Option<u64>,
    /// The most processes that its commands have, where that was asked for.
    #[serde(default)]
    pub pids_limit: Option<u32>,
    /// The size of its writable disk in bytes, where that was asked for.
    #[serde(default)]
    pub disk_size: Option<u64>,
}

/// How a virtual machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It has never been started.
    Created,
    /// Its guest starts.
    Starting,
    /// Its command runs.
    Running,
    /// Its command runs, and it has shown what it is ready by.
    Ready,
    /// It stands still.
    Paused,
    /// It has ended.
    Stopped,
    /// It has ended by a failure.
    Failed,
}

impl Status {
    /// The word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Ready => "ready",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        }
    }

    /// Whether its process lives.
    #[must_use]
    pub fn is_alive(self) -> bool {
        matches!(
            self,
            Self::Starting | Self::Running | Self::Ready | Self::Paused
        )
    }
}

/// The part of a virtual machine's description that changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct VmState {
    /// How it is.
    pub status: Status,
    /// Its process, while it lives.
    pub pid: u32,
    /// When its command was started, in nanoseconds since 1970.
    pub started: Option<u64>,
    /// When it was ready.
    #[serde(default)]
    pub ready: Option<u64>,
    /// When it ended.
    pub finished: Option<u64>,
    /// The exit status of its command, as a shell has it, or Skerry's own.
    pub exit_code: Option<u8>,
    /// Why it failed.
    pub error: Option<String>,
    /// How often it was started again without being asked, since it was started.
    #[serde(default)]
    pub restarts: u32,
}

impl VmState {
    /// What it is before it does anything.
    pub(crate) fn new(status: Status, pid: u32) -> Self {
        Self {
            status,
            pid,
            started: None,
            ready: None,
            finished: None,
            exit_code: None,
            error: None,
            restarts: 0,
        }
    }

    /// What it is while its command runs and nothing holds it up.
    #[must_use]
    pub fn under_way(&self) -> Status {
        match self.ready {
            Some(_) => Status::Ready,
            None => Status::Running,
        }
    }
}

/// Exit code of a command whose machine was killed.
pub const KILLED: u8 = 137;

/// A virtual machine, as found in the registry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct VmInfo {
    /// What it is.
    #[serde(flatten)]
    pub config: VmConfig,
    /// How it is; true at the moment of asking.
    #[serde(flatten)]
    pub state: VmState,
}
