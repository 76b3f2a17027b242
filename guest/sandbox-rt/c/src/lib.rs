//! The runtime library for guests in C: what `include/skerry_sandbox.h` declares.
//!
//! ```text
//!   SKERRY_EXPORT ─▶ section skerry_c_exports ─▶ register_all ─▶ skerry_sandbox_rt::register
//!   host: call ─▶ Reader ─▶ [Value; n] ─▶ the C function ─▶ Value ─▶ Writer
//! ```
//!
//! All of it is `unsafe` at heart: a guest in C is as sound as its C. What is checked is checked for the
//! host's arguments (number and types, before the C function sees them), and for values of types that
//! don't exist.

#![no_std]

extern crate alloc;

mod memory;
mod value;

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::ffi::{CStr, c_char};
use core::slice;

use skerry_sandbox_rt::abi::{Encode, Function, Parameter, Reader, Tag, Writer, status};
use skerry_sandbox_rt::{call_by_name_with, guest_init, write_log};

use value::Value;

/// `skerry_function`.
type Called = unsafe extern "C" fn(*const Value, *mut Value) -> bool;

/// `skerry_export`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Export {
    name: *const c_char,
    function: Option<Called>,
    parameters: *const u8,
    count: usize,
    returns: u64,
}

/// A pointer that many threads could read.
#[repr(transparent)]
struct Constant<T>(T);

// SAFETY: never written.
unsafe impl<T> Sync for Constant<T> {}

// The linker names the ends of a section only if something is in it.
#[used]
#[unsafe(link_section = "skerry_c_exports")]
static NO_EXPORT: Constant<Export> = Constant(Export {
    name: core::ptr::null(),
    function: None,
    parameters: core::ptr::null(),
    count: 0,
    returns: 0,
});

#[used]
#[unsafe(link_section = "skerry_c_inits")]
static NO_INIT: Constant<Option<unsafe extern "C" fn()>> = Constant(None);

unsafe extern "C" {
    static __start_skerry_c_exports: u8;
    static __stop_skerry_c_exports: u8;
    static __start_skerry_c_inits: u8;
    static __stop_skerry_c_inits: u8;
}

/// A section's values.
///
/// # Safety
/// `start` and `stop` are the linker's names for the ends of a section of values of this type.
unsafe fn section<T>(start: *const u8, stop: *const u8) -> &'static [T] {
    let (start, stop) = (start.cast::<T>(), stop.cast::<T>());
    // SAFETY: the caller's promise.
    unsafe { slice::from_raw_parts(start, stop.offset_from_unsigned(start)) }
}

/// Text of C's, as far as it is UTF-8.
///
/// # Safety
/// `text` is null or a string with a zero at its end.
unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the caller's promise.
    let bytes = unsafe { CStr::from_ptr(text) }.to_bytes();
    String::from_utf8_lossy(bytes).into_owned()
}

#[guest_init]
fn start() {
    let exports: &[Export] =
        // SAFETY: the header's macro puts values of this type there, aligned as an array's.
        unsafe { section(&raw const __start_skerry_c_exports, &raw const __stop_skerry_c_exports) };
    for export in exports.iter().filter(|export| !export.name.is_null()) {
        // SAFETY: a record of the program, which stays.
        unsafe { skerry_register(export) };
    }
    let inits: &[Option<unsafe extern "C" fn()>] =
        // SAFETY: as above.
        unsafe { section(&raw const __start_skerry_c_inits, &raw const __stop_skerry_c_inits) };
    for init in inits.iter().flatten() {
        // SAFETY: the guest's own function.
        unsafe { init() };
    }
}

fn tag(number: u64) -> Tag {
    let tag = u8::try_from(number).ok().and_then(Tag::from_byte);
    match tag {
        Some(tag) if (tag as u8) <= Tag::Bytes as u8 => tag,
        _ => panic!("{number} is none of skerry_type"),
    }
}

/// Makes a function one that the host can call.
///
/// # Safety
/// `record` is one as the header describes it, and stays.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn skerry_register(record: *const Export) {
    // SAFETY: the caller's promise.
    let (name, parameters, record) = unsafe {
        let record = *record;
        let parameters = match record.count {
            0 => &[],
            count => slice::from_raw_parts(record.parameters, count),
        };
        (text(record.name), parameters, record)
    };
    let Some(call) = record.function else {
        panic!("skerry_register without a function");
    };
    let types: Vec<Tag> = parameters.iter().map(|&n| tag(n.into())).collect();
    let returns = tag(record.returns);
    let parameters = types.iter().map(|kind| Parameter {
        name: String::new(),
        kind: kind.name().to_string(),
    });
    let signature = Function {
        name,
        parameters: parameters.collect(),
        returns: returns.name().to_string(),
    };
    skerry_sandbox_rt::register(signature, move |from, out| {
        from.arity(types.len() as u32)?;
        let mut arguments = Vec::with_capacity(types.len());
        for (index, kind) in types.iter().enumerate() {
            from.at_argument(index as u32);
            arguments.push(Value::decode(from, *kind)?);
        }
        from.end()?;
        let mut result = Value::empty(returns);
        // SAFETY: the guest's own function, called as the header says.
        let good = unsafe { call(arguments.as_ptr(), &mut result) };
        // SAFETY: what the function has put there, by its promise.
        let ended = unsafe { answer(good, &result, returns, out) };
        memory::free_waiting();
        Ok(ended)
    });
}

/// Appends a function's result, or its message.
///
/// # Safety
/// What `result` points to is there.
unsafe fn answer(good: bool, result: &Value, returns: Tag, out: &mut Writer<'_>) -> u32 {
    let found = tag(result.kind().into());
    if good {
        if found != returns {
            panic!(
                "a function that returns {} returned {}",
                returns.name(),
                found.name()
            );
        }
        // SAFETY: the caller's promise.
        unsafe { result.encode(out) };
        return status::OK;
    }
    match found {
        // SAFETY: the caller's promise.
        Tag::String => unsafe { result.encode(out) },
        _ => "it gave no reason".encode(out),
    }
    status::FAILED
}

/// Calls a function of the host's.
///
/// # Safety
/// As the header says: a string, `count` values, and room for one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn skerry_host_call(
    name: *const c_char,
    arguments: *const Value,
    count: usize,
    result: *mut Value,
) -> bool {
    // SAFETY: the caller's promise.
    let name = unsafe { text(name) };
    let arguments = match count {
        0 => &[],
        // SAFETY: the caller's promise.
        _ => unsafe { slice::from_raw_parts(arguments, count) },
    };
    let reply = call_by_name_with(&name, |out| {
        out.put(&(count as u32).to_le_bytes());
        for argument in arguments {
            tag(argument.kind().into());
            // SAFETY: the caller's promise.
            unsafe { argument.encode(out) };
        }
    });
    let (good, value) = match reply.map_err(|error| error.to_string()).and_then(returned) {
        Ok(value) => (true, value),
        Err(message) => (false, Value::owned(Tag::String, message.as_bytes())),
    };
    // SAFETY: the caller's promise.
    unsafe { result.write(value) };
    good
}

/// The host's value, in memory of its own.
fn returned(mut from: Reader<'static>) -> Result<Value, String> {
    let kind = from.peek().map_err(|error| error.to_string())?;
    if kind as u8 > Tag::Bytes as u8 {
        return Err(alloc::format!(
            "the host returned {}, which C doesn't have",
            kind.name()
        ));
    }
    let value = Value::decode(&mut from, kind).map_err(|error| error.to_string())?;
    // SAFETY: it was just decoded, and what it points to lies in the area for replies.
    Ok(unsafe { value.to_owned() })
}

/// Frees what a value of [`skerry_host_call`] points to.
///
/// # Safety
/// `value` is one of its results.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn skerry_release(value: *mut Value) {
    // SAFETY: the caller's promise.
    unsafe { (*value).release() };
}

/// A record of the host's log.
///
/// # Safety
/// Both are strings with a zero at their end.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn skerry_log_at(
    level: u32,
    file: *const c_char,
    line: u32,
    message: *const c_char,
) {
    // SAFETY: the caller's promise.
    let (file, message) = unsafe { (text(file), text(message)) };
    write_log(u8::try_from(level).unwrap_or(0), &file, line, "c", &message);
}

/// Gives up.
///
/// # Safety
/// `message` is a string with a zero at its end.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn skerry_panic(message: *const c_char) -> ! {
    // SAFETY: the caller's promise.
    let message = unsafe { text(message) };
    panic!("{message}")
}

/// Gives up.
#[unsafe(no_mangle)]
pub extern "C" fn abort() -> ! {
    panic!("abort was called")
}

/// A number that no other sandbox has.
#[unsafe(no_mangle)]
pub extern "C" fn skerry_seed() -> u64 {
    skerry_sandbox_rt::seed()
}
