//! What holds and what doesn't, in words.

use std::io;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// One way in which a process is confined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Layer {
    /// No program that it could start would gain rights.
    NoNewPrivileges,
    /// Its memory can't be read by other processes of the user's.
    NotDumpable,
    /// It has no capabilities, and no groups besides its own.
    Capabilities,
    /// Namespaces of its own.
    Namespaces,
    /// Only the files that it needs.
    Landlock,
    /// Only the system calls that it needs.
    Seccomp,
}

impl Layer {
    /// A word for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoNewPrivileges => "no-new-privileges",
            Self::NotDumpable => "not-dumpable",
            Self::Capabilities => "capabilities",
            Self::Namespaces => "namespaces",
            Self::Landlock => "landlock",
            Self::Seccomp => "seccomp",
        }
    }
}

/// How one layer is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct LayerReport {
    /// Which.
    pub layer: Layer,
    /// It holds, all of it.
    pub holds: bool,
    /// What of it holds, or why it doesn't.
    pub detail: String,
}

/// How a process is confined.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Report {
    /// The layers, in the order in which they were put on; none where the user wanted none.
    pub layers: Vec<LayerReport>,
}

impl Report {
    pub(crate) fn add(&mut self, layer: Layer, result: Result<String, String>) {
        let holds = result.is_ok();
        let detail = result.unwrap_or_else(|why| why);
        self.layers.push(LayerReport {
            layer,
            holds,
            detail,
        });
    }

    /// Whether `layer` holds.
    #[must_use]
    pub fn holds(&self, layer: Layer) -> bool {
        self.layers
            .iter()
            .any(|one| one.layer == layer && one.holds)
    }

    /// The first layer that doesn't hold.
    #[must_use]
    pub fn missing(&self) -> Option<&LayerReport> {
        self.layers.iter().find(|one| !one.holds)
    }
}

/// Why a process could not be confined.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConfineError {
    /// A layer is missing and all were asked for.
    #[error(
        "The layer {} of confinement can't be had here: {}; --confine auto goes without it",
        .0.layer.name(), .0.detail
    )]
    Missing(LayerReport),
    /// It could not be tried out.
    #[error("Can't find out how a process can be confined here")]
    Probe(#[source] io::Error),
}
