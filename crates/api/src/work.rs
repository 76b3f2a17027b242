//! What the handlers share: the server's state, and the engine's calls, which may wait, on threads of
//! their own.

use std::sync::Arc;

use parking_lot::Mutex;
use skerry_engine::vms::Registry;
use skerry_engine::{EngineError, Paths};

use crate::docker::{Execs, Reaper};
use crate::error::ApiError;
use crate::server::Options;

/// What every handler is given.
#[derive(Debug)]
pub(crate) struct App {
    pub(crate) options: Options,
    /// Commands that docker's clients have made and not all started yet.
    pub(crate) execs: Mutex<Execs>,
    /// Machines that are to be forgotten when they end.
    pub(crate) reaper: Reaper,
}

/// Shared by all requests.
pub(crate) type Shared = Arc<App>;

impl App {
    pub(crate) fn new(options: Options) -> Self {
        Self {
            options,
            execs: Mutex::default(),
            reaper: Reaper::default(),
        }
    }

    pub(crate) fn paths(&self) -> &Paths {
        &self.options.paths
    }

    pub(crate) fn registry(&self) -> Result<Registry, EngineError> {
        Registry::open(self.paths())
    }
}

/// Runs what may wait on a thread that may.
pub(crate) async fn work<T: Send + 'static>(
    app: &Shared,
    act: impl FnOnce(&App) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let app = app.clone();
    let done = tokio::task::spawn_blocking(move || act(&app)).await;
    done.unwrap_or_else(|error| {
        tracing::error!(%error, "A request was given up");
        Err(ApiError::internal("The request could not be worked on"))
    })
}
