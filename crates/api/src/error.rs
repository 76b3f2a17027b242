//! What a request is answered that can't be done.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use skerry_engine::EngineError;
use utoipa::ToSchema;

/// The body of an answer that is an error; docker's clients print `message` too.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Problem {
    /// One sentence: what was tried on what, and what to do.
    message: String,
    /// A word that stays the same whatever the sentence: `not_found`, `conflict`, `invalid`, `timeout`
    /// or `failed`.
    code: &'static str,
}

/// An error with its status.
#[derive(Debug)]
pub(crate) struct ApiError {
    status: StatusCode,
    message: String,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { status, message }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    pub(crate) fn missing(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, message)
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    #[cfg(test)]
    pub(crate) fn into_message(self) -> String {
        self.message
    }

    fn code(&self) -> &'static str {
        match self.status {
            StatusCode::NOT_FOUND => "not_found",
            StatusCode::CONFLICT => "conflict",
            StatusCode::REQUEST_TIMEOUT => "timeout",
            status if status.is_client_error() => "invalid",
            _ => "failed",
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let code = self.code();
        let problem = Problem {
            message: self.message,
            code,
        };
        (self.status, Json(problem)).into_response()
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        let status = status(&error);
        Self::new(status, chain(&error))
    }
}

impl From<std::io::Error> for ApiError {
    fn from(error: std::io::Error) -> Self {
        Self::internal(error.to_string())
    }
}

/// An error with what it came from.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

fn status(error: &EngineError) -> StatusCode {
    use EngineError as E;
    if error.is_missing() {
        return StatusCode::NOT_FOUND;
    }
    match error {
        E::NameTaken { .. }
        | E::ImageNeeded { .. }
        | E::PoolTaken { .. }
        | E::VmRuns { .. }
        | E::VmStopped { .. }
        | E::VmPaused { .. }
        | E::VmNotPaused { .. }
        | E::NoReadyMark { .. }
        | E::EndedUnready { .. }
        | E::CopyStopped { .. }
        | E::NetworkExists { .. }
        | E::NetworkInUse { .. }
        | E::VolumeExists(_)
        | E::VolumeInUse { .. }
        | E::CapturePaused => StatusCode::CONFLICT,
        E::Unready { .. } => StatusCode::REQUEST_TIMEOUT,
        E::UnknownHypervisor(_)
        | E::NetworkOff
        | E::BadNetworkName { .. }
        | E::BadSubnet { .. }
        | E::BadGateway { .. }
        | E::BadMtu { .. }
        | E::TapAlone
        | E::TapOfOne
        | E::TapAddresses { .. }
        | E::TapDns { .. }
        | E::NoCard
        | E::SoftOption { .. }
        | E::NothingCompiled { .. }
        | E::CodeMemory { .. }
        | E::CpuModel(_)
        | E::ImageName(_)
        | E::RegistryName(_)
        | E::TagWithDigest(_)
        | E::NotFromRegistry(_)
        | E::ReservedName { .. }
        | E::NoCommand(_)
        | E::BadVmName { .. }
        | E::AmbiguousVm { .. }
        | E::NothingRuns(_)
        | E::ForkCount { .. }
        | E::NoParent { .. } => StatusCode::BAD_REQUEST,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}
