//! WASI 0.2, as much of it as a program without files and sockets needs. Each capability is a function
//! of the host's, the same as for modules.
//!
//! What isn't here is linked like any import: to a host function of its name. No folder is pre-opened, so
//! that no function on files is ever reached. There are three streams, which are always ready, and so are
//! their pollables; what would wait for a time isn't here.

use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use skerry_sandbox_rt::abi::wasm::{Refusal, Trap, wasi as names};
use skerry_sandbox_rt::wasm as host;
use wasmtime::component::{ComponentType, Lift, LinkerInstance, Lower, Resource, ResourceType};
use wasmtime::{Result, StoreContextMut};

use crate::imports::{Unknown, end, full_name};
use crate::instance::State;

/// Resources: a number each, see [`STDOUT`] and [`STDERR`], or nothing.
#[derive(Debug)]
enum InputStream {}
#[derive(Debug)]
enum OutputStream {}
#[derive(Debug)]
enum Pollable {}
#[derive(Debug)]
enum IoError {}
#[derive(Debug)]
enum TerminalInput {}
#[derive(Debug)]
enum TerminalOutput {}

const STDIN: u32 = 0;
const STDOUT: u32 = 1;
const STDERR: u32 = 2;

/// `wasi:io/streams.stream-error`.
#[derive(ComponentType, Lift, Lower)]
#[component(variant)]
enum StreamError {
    #[component(name = "last-operation-failed")]
    LastOperationFailed(Resource<IoError>),
    #[component(name = "closed")]
    Closed,
}

/// `wasi:clocks/wall-clock.datetime`.
#[derive(ComponentType, Lift, Lower)]
#[component(record)]
struct Datetime {
    seconds: u64,
    nanoseconds: u32,
}

type Store<'a> = StoreContextMut<'a, State>;
type Link<'a> = LinkerInstance<'a, State>;
/// What a function of a stream's returns.
type Streamed<T> = Result<(core::result::Result<T, StreamError>,)>;

/// The interface without its version, if it is one of WASI 0.2.
fn interface(name: &str) -> Option<&str> {
    let (interface, version) = name.split_once('@')?;
    let ours = version.starts_with("0.2.");
    interface.strip_prefix("wasi:").filter(|_| ours)
}

/// The type of a resource that is here.
pub(crate) fn resource(from: &str, name: &str) -> Option<ResourceType> {
    interface(from)?;
    Some(match name {
        "input-stream" => ResourceType::host::<InputStream>(),
        "output-stream" => ResourceType::host::<OutputStream>(),
        "pollable" => ResourceType::host::<Pollable>(),
        "error" => ResourceType::host::<IoError>(),
        "terminal-input" => ResourceType::host::<TerminalInput>(),
        "terminal-output" => ResourceType::host::<TerminalOutput>(),
        _ => return None,
    })
}

/// Links a function, if it is one that is here.
pub(crate) fn link(to: &mut Link<'_>, from: &str, name: &str) -> Result<bool> {
    let Some(interface) = interface(from) else {
        return Ok(false);
    };
    let import = full_name(Some(from), name);
    match interface {
        "cli/environment" | "cli/exit" => program(to, name, import),
        "cli/stdin" | "cli/stdout" | "cli/stderr" => standard(to, name),
        "cli/terminal-stdin" | "cli/terminal-stdout" | "cli/terminal-stderr" => terminal(to, name),
        "io/error" | "io/poll" => poll(to, name),
        "io/streams" if name.starts_with("[method]input-stream.") => input(to, name, import),
        "io/streams" => output(to, name, import),
        "clocks/wall-clock" => wall_clock(to, name, import),
        "clocks/monotonic-clock" => monotonic_clock(to, name, import),
        "random/random" | "random/insecure" | "random/insecure-seed" => random(to, name, import),
        "filesystem/preopens" => preopens(to, name),
        _ => return Ok(false),
    }
    .map(|()| true)
    .or_else(|error| match error.is::<NotHere>() {
        true => Ok(false),
        false => Err(error),
    })
}

/// The function isn't one of those that are linked here.
#[derive(Debug)]
struct NotHere;

impl core::fmt::Display for NotHere {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("not here")
    }
}

impl core::error::Error for NotHere {}

fn not_here() -> Result<()> {
    Err(wasmtime::Error::new(NotHere))
}

fn program(to: &mut Link<'_>, name: &str, import: String) -> Result<()> {
    match name {
        "get-arguments" => to.func_wrap(name, move |_: Store<'_>, (): ()| {
            Ok((host::strings(&import, names::ARGS).map_err(end)?,))
        }),
        "get-environment" => to.func_wrap(name, move |_: Store<'_>, (): ()| {
            let variables = host::strings(&import, names::ENVIRON).map_err(end)?;
            let pair = |variable: &String| {
                let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
                (String::from(name), String::from(value))
            };
            Ok((variables.iter().map(pair).collect::<Vec<_>>(),))
        }),
        "initial-cwd" => to.func_wrap(name, |_: Store<'_>, (): ()| Ok((None::<String>,))),
        // They take nothing but what the component has: the call.
        "exit" => to.func_wrap(
            name,
            |_: Store<'_>, (status,): (core::result::Result<(), ()>,)| -> Result<()> {
                Err(end(Refusal::Exit(i32::from(status.is_err()))))
            },
        ),
        "exit-with-code" => to.func_wrap(name, |_: Store<'_>, (code,): (u8,)| -> Result<()> {
            Err(end(Refusal::Exit(code.into())))
        }),
        _ => not_here(),
    }
}

fn standard(to: &mut Link<'_>, name: &str) -> Result<()> {
    let output =
        |number: u32| move |_: Store<'_>, (): ()| Ok((Resource::<OutputStream>::new_own(number),));
    match name {
        "get-stdin" => to.func_wrap(name, |_: Store<'_>, (): ()| {
            Ok((Resource::<InputStream>::new_own(STDIN),))
        }),
        "get-stdout" => to.func_wrap(name, output(STDOUT)),
        "get-stderr" => to.func_wrap(name, output(STDERR)),
        _ => not_here(),
    }
}

/// No stream is a terminal.
fn terminal(to: &mut Link<'_>, name: &str) -> Result<()> {
    match name {
        "get-terminal-stdin" => to.func_wrap(name, |_: Store<'_>, (): ()| {
            Ok((None::<Resource<TerminalInput>>,))
        }),
        "get-terminal-stdout" | "get-terminal-stderr" => to
            .func_wrap(name, |_: Store<'_>, (): ()| {
                Ok((None::<Resource<TerminalOutput>>,))
            }),
        _ => not_here(),
    }
}

fn poll(to: &mut Link<'_>, name: &str) -> Result<()> {
    type One = (Resource<Pollable>,);
    match name {
        "[method]error.to-debug-string" => to
            .func_wrap(name, |_: Store<'_>, _: (Resource<IoError>,)| {
                Ok((String::from("error"),))
            }),
        "[method]pollable.ready" => to.func_wrap(name, |_: Store<'_>, _: One| Ok((true,))),
        "[method]pollable.block" => to.func_wrap(name, |_: Store<'_>, _: One| Ok(())),
        "poll" => to.func_wrap(
            name,
            |_: Store<'_>, (all,): (Vec<Resource<Pollable>>,)| match all.is_empty() {
                true => Err(end(Refusal::Interface("it polls nothing".into()))),
                false => Ok(((0..all.len() as u32).collect::<Vec<u32>>(),)),
            },
        ),
        _ => not_here(),
    }
}

fn input(to: &mut Link<'_>, name: &str, import: String) -> Result<()> {
    type Ask = (Resource<InputStream>, u64);
    let read = move |len: u64| -> Streamed<Vec<u8>> {
        if len == 0 {
            return Ok((Ok(Vec::new()),));
        }
        let bytes = host::read(&import, len.min(host::CHUNK as u64) as u32).map_err(end)?;
        Ok((match bytes.is_empty() {
            true => Err(StreamError::Closed),
            false => Ok(bytes),
        },))
    };
    match name {
        "[method]input-stream.read" | "[method]input-stream.blocking-read" => {
            to.func_wrap(name, move |_: Store<'_>, (_, len): Ask| read(len))
        }
        "[method]input-stream.skip" | "[method]input-stream.blocking-skip" => {
            to.func_wrap(name, move |_: Store<'_>, (_, len): Ask| {
                let (bytes,) = read(len)?;
                Ok((bytes.map(|bytes| bytes.len() as u64),))
            })
        }
        "[method]input-stream.subscribe" => to
            .func_wrap(name, |_: Store<'_>, _: (Resource<InputStream>,)| {
                Ok((Resource::<Pollable>::new_own(0),))
            }),
        _ => not_here(),
    }
}

fn output(to: &mut Link<'_>, name: &str, import: String) -> Result<()> {
    type Stream = (Resource<OutputStream>,);
    let write = move |stream: &Resource<OutputStream>, bytes: &[u8]| -> Streamed<()> {
        let name = match stream.rep() {
            STDOUT => names::STDOUT,
            _ => names::STDERR,
        };
        for part in bytes.chunks(host::CHUNK) {
            host::write(&import, name, part).map_err(end)?;
        }
        Ok((Ok(()),))
    };
    match name {
        "[method]output-stream.check-write" => to
            .func_wrap(name, |_: Store<'_>, _: Stream| -> Streamed<u64> {
                Ok((Ok(host::CHUNK as u64),))
            }),
        "[method]output-stream.write" | "[method]output-stream.blocking-write-and-flush" => to
            .func_wrap(
                name,
                move |_: Store<'_>, (stream, bytes): (Resource<OutputStream>, Vec<u8>)| {
                    write(&stream, &bytes)
                },
            ),
        "[method]output-stream.write-zeroes"
        | "[method]output-stream.blocking-write-zeroes-and-flush" => to.func_wrap(
            name,
            move |_: Store<'_>, (stream, len): (Resource<OutputStream>, u64)| {
                if len > host::CHUNK as u64 {
                    let why = "it writes more zeroes than `check-write` permits";
                    return Err(end(Refusal::Interface(why.into())));
                }
                write(&stream, &vec![0; len as usize])
            },
        ),
        "[method]output-stream.flush" | "[method]output-stream.blocking-flush" => to
            .func_wrap(name, |_: Store<'_>, _: Stream| -> Streamed<()> {
                Ok((Ok(()),))
            }),
        "[method]output-stream.subscribe" => to.func_wrap(name, |_: Store<'_>, _: Stream| {
            Ok((Resource::<Pollable>::new_own(0),))
        }),
        _ => not_here(),
    }
}

fn wall_clock(to: &mut Link<'_>, name: &str, import: String) -> Result<()> {
    const SECOND: u64 = 1_000_000_000;
    match name {
        "now" => to.func_wrap(name, move |_: Store<'_>, (): ()| {
            let now = host::clock(&import, host::REALTIME).map_err(end)?;
            Ok((Datetime {
                seconds: now / SECOND,
                nanoseconds: (now % SECOND) as u32,
            },))
        }),
        "resolution" => to.func_wrap(name, |_: Store<'_>, (): ()| {
            Ok((Datetime {
                seconds: 0,
                nanoseconds: 1,
            },))
        }),
        _ => not_here(),
    }
}

fn monotonic_clock(to: &mut Link<'_>, name: &str, import: String) -> Result<()> {
    match name {
        "now" => to.func_wrap(name, move |_: Store<'_>, (): ()| {
            Ok((host::clock(&import, host::MONOTONIC).map_err(end)?,))
        }),
        "resolution" => to.func_wrap(name, |_: Store<'_>, (): ()| Ok((1_u64,))),
        _ => not_here(),
    }
}

fn random(to: &mut Link<'_>, name: &str, import: String) -> Result<()> {
    fn number(import: &str) -> Result<u64> {
        let mut bytes = [0; 8];
        host::random(import, &mut bytes).map_err(end)?;
        Ok(u64::from_le_bytes(bytes))
    }
    match name {
        "get-random-bytes" | "get-insecure-random-bytes" => {
            to.func_wrap(name, move |store: Store<'_>, (len,): (u64,)| {
                // What its memories have no room for it can't be given.
                if len > store.data().memory() {
                    return Err(end(Refusal::Trap(Trap::OutOfMemory)));
                }
                let mut bytes = vec![0; len as usize];
                host::random(&import, &mut bytes).map_err(end)?;
                Ok((bytes,))
            })
        }
        "get-random-u64" | "get-insecure-random-u64" => {
            to.func_wrap(name, move |_: Store<'_>, (): ()| Ok((number(&import)?,)))
        }
        "insecure-seed" => to.func_wrap(name, move |_: Store<'_>, (): ()| {
            Ok(((number(&import)?, number(&import)?),))
        }),
        _ => not_here(),
    }
}

/// There are none.
fn preopens(to: &mut Link<'_>, name: &str) -> Result<()> {
    match name {
        "get-directories" => to.func_wrap(name, |_: Store<'_>, (): ()| {
            Ok((Vec::<(Resource<Unknown>, String)>::new(),))
        }),
        _ => not_here(),
    }
}
