//! What a guest gets of a call to the host.

use alloc::string::{String, ToString};
use core::fmt;

use crate::codec::{DecodeError, Reader};
use crate::value::Decode;

/// Why a host function gave no value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostError {
    /// The function's own error.
    Failed(String),
    /// The host has none of that name.
    NoFunction,
    /// The host's function has other parameters, or returns another type.
    Mismatch(String),
    /// Arguments or reply need a larger area: bytes.
    TooLarge(u32),
}

impl fmt::Display for HostError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(message) => f.write_str(message),
            Self::NoFunction => f.write_str("the host has no such function"),
            Self::Mismatch(why) => write!(f, "the host's function {why}"),
            Self::TooLarge(bytes) => write!(f, "{bytes} bytes don't fit the area for calls"),
        }
    }
}

impl core::error::Error for HostError {}

impl From<DecodeError> for HostError {
    fn from(error: DecodeError) -> Self {
        Self::Mismatch(error.to_string())
    }
}

/// What a `#[host_fn]` may return: a value (an error of the host's is then a panic), or a `Result`.
pub trait HostReturned: Sized {
    /// Appends the name of the value's type.
    fn type_name(out: &mut String);
    /// From the host's answer.
    fn from_answer(name: &str, answer: Result<Reader<'static>, HostError>) -> Self;
}

fn value<T: for<'a> Decode<'a>>(
    answer: Result<Reader<'static>, HostError>,
) -> Result<T, HostError> {
    let mut from = answer?;
    let value = T::decode(&mut from)?;
    from.end()?;
    Ok(value)
}

impl<T: for<'a> Decode<'a>> HostReturned for T {
    fn type_name(out: &mut String) {
        <T as Decode<'_>>::type_name(out);
    }
    #[inline]
    fn from_answer(name: &str, answer: Result<Reader<'static>, HostError>) -> Self {
        match value(answer) {
            Ok(value) => value,
            Err(error) => panic!("host function {name}: {error}"),
        }
    }
}

impl<T: for<'a> Decode<'a>> HostReturned for Result<T, HostError> {
    fn type_name(out: &mut String) {
        <T as Decode<'_>>::type_name(out);
    }
    #[inline]
    fn from_answer(_: &str, answer: Result<Reader<'static>, HostError>) -> Self {
        value(answer)
    }
}
