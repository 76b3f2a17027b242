//! For guests that run WebAssembly: host functions as imports and as what WASI gives a program. A function
//! that is not there is one that was not granted.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use skerry_sandbox_abi::wasm::{Refusal, wasi as names};
use skerry_sandbox_abi::{Decode, Encode, HostError, Reader, Writer};

use crate::calls::call_by_name_with;

/// The clock that tells the time of day.
pub const REALTIME: u32 = 0;
/// The clock that never goes back.
pub const MONOTONIC: u32 = 1;

/// Bytes that one read or write passes at most: WASI lets both be shorter than was asked.
pub const CHUNK: usize = 64 << 10;

/// Calls the host's function `name` for `import`, and decodes what it returns.
pub fn host<T>(
    import: &str,
    name: &str,
    arguments: impl FnOnce(&mut Writer<'_>),
    decode: impl FnOnce(&mut Reader<'_>) -> Result<T, Refusal>,
) -> Result<T, Refusal> {
    match call_by_name_with(name, arguments) {
        Ok(mut reply) => decode(&mut reply),
        Err(HostError::NoFunction) => Err(Refusal::NotGranted {
            import: import.to_string(),
            needs: name.to_string(),
        }),
        Err(error) => Err(failed(name, &error)),
    }
}

/// The host's function `name` failed, or is of another type.
pub fn failed(name: &str, why: &impl ToString) -> Refusal {
    Refusal::Host {
        name: name.to_string(),
        message: why.to_string(),
    }
}

/// As [`host`], with arguments that were counted and encoded by `count` and `put`, and a type of Rust's.
fn capability<T: for<'a> Decode<'a>>(
    import: &str,
    name: &str,
    count: u32,
    put: impl FnOnce(&mut Writer<'_>),
) -> Result<T, Refusal> {
    let arguments = |out: &mut Writer<'_>| {
        out.put(&count.to_le_bytes());
        put(out);
    };
    host(import, name, arguments, |from| {
        let value = T::decode(from).and_then(|value| from.end().map(|()| value));
        value.map_err(|error| failed(name, &error))
    })
}

/// Writes to a stream: [`names::STDOUT`] or [`names::STDERR`].
pub fn write(import: &str, name: &str, bytes: &[u8]) -> Result<(), Refusal> {
    capability(import, name, 1, |out| bytes.encode(out))
}

/// At most `most` bytes of the standard input, none at its end.
pub fn read(import: &str, most: u32) -> Result<Vec<u8>, Refusal> {
    let bytes: Vec<u8> = capability(import, names::STDIN, 1, |out| most.encode(out))?;
    match bytes.len() <= most as usize {
        true => Ok(bytes),
        false => Err(failed(
            names::STDIN,
            &"it returned more bytes than were asked for",
        )),
    }
}

/// Nanoseconds of the clock of this number.
pub fn clock(import: &str, clock: u32) -> Result<u64, Refusal> {
    capability(import, names::CLOCK, 1, |out| clock.encode(out))
}

/// Fills `room` with random bytes.
pub fn random(import: &str, room: &mut [u8]) -> Result<(), Refusal> {
    const MOST: usize = 4096;
    for part in room.chunks_mut(MOST) {
        let len = part.len() as u32;
        let bytes: Vec<u8> = capability(import, names::RANDOM, 1, |out| len.encode(out))?;
        if bytes.len() != part.len() {
            return Err(failed(
                names::RANDOM,
                &"it returned another number of bytes than was asked for",
            ));
        }
        part.copy_from_slice(&bytes);
    }
    Ok(())
}

/// Strings: [`names::ARGS`] or [`names::ENVIRON`].
pub fn strings(import: &str, name: &str) -> Result<Vec<String>, Refusal> {
    capability(import, name, 0, |_| ())
}
