//! WASI preview 1, as much of it as a program without files needs. Each capability is a function of the
//! host's; what is here is the layout of structures in the module's memory
//! (WASI/legacy/preview1/docs.md).
//!
//! There are three descriptors, 0 to 2, which are streams, and no pre-opened folder. Functions on files,
//! sockets and events aren't here: they are linked like any import, to a host function of their name.

use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use skerry_sandbox_rt::abi::wasm::{Refusal, wasi as names};
use skerry_sandbox_rt::wasm::{self as host, CHUNK};
use wasmi::errors::LinkerError;
use wasmi::{Caller, Error, Extern, Linker, StoreLimits};

use crate::imports::end;

/// The functions that [`link`] links.
pub(crate) const NAMES: [&str; 16] = [
    "args_get",
    "args_sizes_get",
    "clock_res_get",
    "clock_time_get",
    "environ_get",
    "environ_sizes_get",
    "fd_close",
    "fd_fdstat_get",
    "fd_fdstat_set_flags",
    "fd_prestat_dir_name",
    "fd_prestat_get",
    "fd_read",
    "fd_seek",
    "fd_write",
    "proc_exit",
    "random_get",
];

type Context<'a> = Caller<'a, StoreLimits>;
/// An `errno`, or the end of the call.
type Errno = Result<i32, Error>;

const SUCCESS: i32 = 0;
const BADF: i32 = 8;
const FAULT: i32 = 21;
const INVAL: i32 = 28;
const SPIPE: i32 = 70;

/// The whole name of one of them.
fn import(function: &str) -> String {
    alloc::format!("{}.{function}", names::MODULE)
}

/// The module's memory.
fn memory<'a>(caller: &'a mut Context<'_>) -> Option<&'a mut [u8]> {
    match caller.get_export("memory")? {
        Extern::Memory(memory) => Some(memory.data_mut(caller)),
        _ => None,
    }
}

fn room<'a>(caller: &'a mut Context<'_>, at: i32, len: usize) -> Option<&'a mut [u8]> {
    let at = at as u32 as usize;
    memory(caller)?.get_mut(at..at.checked_add(len)?)
}

fn put(caller: &mut Context<'_>, at: i32, bytes: &[u8]) -> i32 {
    match room(caller, at, bytes.len()) {
        Some(room) => {
            room.copy_from_slice(bytes);
            SUCCESS
        }
        None => FAULT,
    }
}

fn word(caller: &mut Context<'_>, at: i32) -> Option<u32> {
    let bytes = room(caller, at, 4)?;
    bytes.first_chunk().copied().map(u32::from_le_bytes)
}

/// The ranges of an array of `count` `iovec`s, cut where they are more than [`CHUNK`] together.
fn vectors(caller: &mut Context<'_>, at: i32, count: i32) -> Option<Vec<(i32, usize)>> {
    const SIZE: u32 = 8;
    let mut left = CHUNK;
    let mut found = Vec::new();
    for n in 0..count as u32 {
        if left == 0 {
            break;
        }
        let at = (at as u32).checked_add(n.checked_mul(SIZE)?)?;
        let start = word(caller, at as i32)?;
        let len = word(caller, at.checked_add(4)? as i32)? as usize;
        // What is empty takes nothing of the chunk: without this a count that lies would be a long list.
        if len == 0 {
            continue;
        }
        let len = len.min(left);
        left -= len;
        found.push((start as i32, len));
    }
    Some(found)
}

fn fd_write(mut caller: Context<'_>, fd: i32, at: i32, count: i32, written: i32) -> Errno {
    let name = match fd {
        1 => names::STDOUT,
        2 => names::STDERR,
        _ => return Ok(BADF),
    };
    let Some(vectors) = vectors(&mut caller, at, count) else {
        return Ok(FAULT);
    };
    let mut bytes = Vec::new();
    for (start, len) in vectors {
        match room(&mut caller, start, len) {
            Some(range) => bytes.extend_from_slice(range),
            None => return Ok(FAULT),
        }
    }
    host::write(&import("fd_write"), name, &bytes).map_err(end)?;
    Ok(put(
        &mut caller,
        written,
        &(bytes.len() as u32).to_le_bytes(),
    ))
}

fn fd_read(mut caller: Context<'_>, fd: i32, at: i32, count: i32, read: i32) -> Errno {
    if fd != 0 {
        return Ok(BADF);
    }
    let Some(vectors) = vectors(&mut caller, at, count) else {
        return Ok(FAULT);
    };
    let wanted: usize = vectors.iter().map(|(_, len)| len).sum();
    let bytes = host::read(&import("fd_read"), wanted as u32).map_err(end)?;
    let mut rest = bytes.as_slice();
    for (start, len) in vectors {
        let (now, later) = rest.split_at(len.min(rest.len()));
        if put(&mut caller, start, now) != SUCCESS {
            return Ok(FAULT);
        }
        rest = later;
    }
    Ok(put(&mut caller, read, &(bytes.len() as u32).to_le_bytes()))
}

fn fd_fdstat_get(mut caller: Context<'_>, fd: i32, at: i32) -> Errno {
    const CHARACTER_DEVICE: u8 = 2;
    const RIGHT_READ: u64 = 1 << 1;
    const RIGHT_WRITE: u64 = 1 << 6;
    let rights = match fd {
        0 => RIGHT_READ,
        1 | 2 => RIGHT_WRITE,
        _ => return Ok(BADF),
    };
    // filetype, flags, base rights, inheriting rights.
    let mut stat = [0; 24];
    stat[0] = CHARACTER_DEVICE;
    stat[8..16].copy_from_slice(&rights.to_le_bytes());
    Ok(put(&mut caller, at, &stat))
}

fn stream(fd: i32, otherwise: i32) -> Errno {
    Ok(match fd {
        0..=2 => otherwise,
        _ => BADF,
    })
}

fn clock_time_get(mut caller: Context<'_>, clock: i32, _precision: i64, at: i32) -> Errno {
    if !(0..4).contains(&clock) {
        return Ok(INVAL);
    }
    let now = host::clock(&import("clock_time_get"), clock as u32).map_err(end)?;
    Ok(put(&mut caller, at, &now.to_le_bytes()))
}

fn random_get(mut caller: Context<'_>, at: i32, len: i32) -> Errno {
    match room(&mut caller, at, len as u32 as usize) {
        Some(room) => {
            host::random(&import("random_get"), room).map_err(end)?;
            Ok(SUCCESS)
        }
        None => Ok(FAULT),
    }
}

/// Strings as C has them: each with a zero at its end.
fn strings(function: &str, name: &str) -> Result<Vec<Vec<u8>>, Error> {
    let strings = host::strings(&import(function), name).map_err(end)?;
    let terminated = strings.into_iter().map(|string| {
        let mut bytes = string.into_bytes();
        bytes.push(0);
        bytes
    });
    Ok(terminated.collect())
}

fn sizes(caller: &mut Context<'_>, strings: &[Vec<u8>], count_at: i32, size_at: i32) -> i32 {
    let size: usize = strings.iter().map(Vec::len).sum();
    match put(caller, count_at, &(strings.len() as u32).to_le_bytes()) {
        SUCCESS => put(caller, size_at, &(size as u32).to_le_bytes()),
        errno => errno,
    }
}

fn fill(caller: &mut Context<'_>, strings: &[Vec<u8>], pointers: i32, buffer: i32) -> i32 {
    let mut table = vec![];
    let mut text = vec![];
    for string in strings {
        let address = (buffer as u32).wrapping_add(text.len() as u32);
        table.extend_from_slice(&address.to_le_bytes());
        text.extend_from_slice(string);
    }
    match put(caller, pointers, &table) {
        SUCCESS => put(caller, buffer, &text),
        errno => errno,
    }
}

/// Links all of them.
pub(crate) fn link(linker: &mut Linker<StoreLimits>) -> Result<(), LinkerError> {
    const MODULE: &str = names::MODULE;
    linker.func_wrap(MODULE, "fd_write", fd_write)?;
    linker.func_wrap(MODULE, "fd_read", fd_read)?;
    linker.func_wrap(MODULE, "fd_fdstat_get", fd_fdstat_get)?;
    linker.func_wrap(MODULE, "fd_fdstat_set_flags", |fd: i32, _: i32| {
        stream(fd, SUCCESS)
    })?;
    linker.func_wrap(MODULE, "fd_close", |fd: i32| stream(fd, SUCCESS))?;
    linker.func_wrap(MODULE, "fd_seek", |fd: i32, _: i64, _: i32, _: i32| {
        stream(fd, SPIPE)
    })?;
    // No folder is pre-opened: a program asks until the first BADF.
    linker.func_wrap(MODULE, "fd_prestat_get", |_: i32, _: i32| -> Errno {
        Ok(BADF)
    })?;
    linker.func_wrap(
        MODULE,
        "fd_prestat_dir_name",
        |_: i32, _: i32, _: i32| -> Errno { Ok(BADF) },
    )?;
    linker.func_wrap(MODULE, "clock_time_get", clock_time_get)?;
    linker.func_wrap(
        MODULE,
        "clock_res_get",
        |mut caller: Context<'_>, clock: i32, at: i32| -> Errno {
            match (0..4).contains(&clock) {
                true => Ok(put(&mut caller, at, &1_u64.to_le_bytes())),
                false => Ok(INVAL),
            }
        },
    )?;
    linker.func_wrap(MODULE, "random_get", random_get)?;
    // It takes nothing but what the module has: the call.
    linker.func_wrap(MODULE, "proc_exit", |code: i32| -> Result<(), Error> {
        Err(end(Refusal::Exit(code)))
    })?;
    link_strings(linker, "args", names::ARGS)?;
    link_strings(linker, "environ", names::ENVIRON)
}

/// Links `*_sizes_get` and `*_get`.
fn link_strings(
    linker: &mut Linker<StoreLimits>,
    what: &'static str,
    name: &'static str,
) -> Result<(), LinkerError> {
    let sizes_get = alloc::format!("{what}_sizes_get");
    let get = alloc::format!("{what}_get");
    let (sizes_name, get_name) = (sizes_get.clone(), get.clone());
    linker.func_wrap(
        names::MODULE,
        &sizes_name,
        move |mut caller: Context<'_>, count: i32, size: i32| -> Errno {
            let strings = strings(&sizes_get, name)?;
            Ok(sizes(&mut caller, &strings, count, size))
        },
    )?;
    linker.func_wrap(
        names::MODULE,
        &get_name,
        move |mut caller: Context<'_>, pointers: i32, buffer: i32| -> Errno {
            let strings = strings(&get, name)?;
            Ok(fill(&mut caller, &strings, pointers, buffer))
        },
    )?;
    Ok(())
}
