//! Random bytes of the host.

use std::io;

use crate::error::EngineError;

/// So many.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], EngineError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)
        .map_err(|error| EngineError::host("get random numbers")(io::Error::other(error)))?;
    Ok(bytes)
}
