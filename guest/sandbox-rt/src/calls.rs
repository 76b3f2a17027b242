//! Requests of the host, and calls to it.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;
use core::cell::UnsafeCell;
use core::slice;

use skerry_sandbox_abi::{
    Control, Decode, DecodeError, Describe, Encode, Function, HostError, Reader, Writer, leave,
    request, status,
};

use crate::entry::Host;

/// A function that the host can call; made by `#[guest_fn]`.
#[repr(C)]
#[derive(Debug)]
pub struct Export {
    /// Takes arguments, appends the result, says how it ended ([`status`]).
    pub call: fn(&mut Reader<'_>, &mut Writer<'_>) -> Result<u32, DecodeError>,
    /// Its signature.
    pub signature: Signature,
}

/// Names and types of a function.
#[repr(C)]
#[derive(Debug)]
pub struct Signature {
    /// Its name.
    pub name: &'static str,
    /// Its parameters.
    pub parameters: &'static [Named],
    /// Appends the type of what it returns.
    pub returns: fn(&mut String),
}

/// A parameter.
#[repr(C)]
#[derive(Debug)]
pub struct Named {
    /// Its name.
    pub name: &'static str,
    /// Appends its type.
    pub kind: fn(&mut String),
}

impl Signature {
    /// Of a function that is none.
    const NONE: Self = Self {
        name: "",
        parameters: &[],
        returns: |_| {},
    };

    fn describe(&self, out: &mut Describe<'_, '_>) {
        out.function(self.name, self.parameters.len() as u8);
        for parameter in self.parameters {
            out.parameter(parameter.name, parameter.kind);
        }
        out.kind(self.returns);
    }
}

/// A function of the host's; made by `#[host_fn]`.
#[repr(C)]
#[derive(Debug)]
pub struct Import {
    /// Its signature.
    pub signature: Signature,
}

/// What runs before the first call; made by `#[guest_init]`.
#[repr(C)]
#[derive(Debug)]
pub struct Init {
    /// The function.
    pub call: fn(),
}

// The linker joins all statics of a section and names its ends. It knows a section only if something
// is in it: the first static of each is empty.
fn no_call(_: &mut Reader<'_>, _: &mut Writer<'_>) -> Result<u32, DecodeError> {
    Ok(status::NO_FUNCTION)
}

fn no_init() {}

#[used]
#[unsafe(link_section = "skerry_exports")]
static NO_EXPORT: Export = Export {
    call: no_call,
    signature: Signature::NONE,
};

#[used]
#[unsafe(link_section = "skerry_imports")]
static NO_IMPORT: Import = Import {
    signature: Signature::NONE,
};

#[used]
#[unsafe(link_section = "skerry_inits")]
static NO_INIT: Init = Init { call: no_init };

macro_rules! section {
    ($get:ident: $type:ty, $start:ident, $stop:ident) => {
        #[inline]
        fn $get() -> &'static [$type] {
            unsafe extern "C" {
                static $start: u8;
                static $stop: u8;
            }
            let start = (&raw const $start).cast::<$type>();
            let stop = (&raw const $stop).cast::<$type>();
            // SAFETY: the linker's names for the ends of the section, which holds values of this type
            // only, each as long as an array's.
            unsafe { slice::from_raw_parts(start, stop.offset_from_unsigned(start)) }
        }
    };
}

section!(exports: Export, __start_skerry_exports, __stop_skerry_exports);
section!(imports: Import, __start_skerry_imports, __stop_skerry_imports);
section!(inits: Init, __start_skerry_inits, __stop_skerry_inits);

/// Takes arguments, appends the result, says how it ended ([`status`]).
type Call = dyn Fn(&mut Reader<'_>, &mut Writer<'_>) -> Result<u32, DecodeError>;

/// Functions that were registered when the guest ran, behind those of the section, and whether there
/// can be no more.
struct Late {
    functions: Vec<(Function, Box<Call>)>,
    closed: bool,
}

struct Registered(UnsafeCell<Late>);

// SAFETY: there is one thread, and no interrupt returns to guest code.
unsafe impl Sync for Registered {}

static REGISTERED: Registered = Registered(UnsafeCell::new(Late {
    functions: Vec::new(),
    closed: false,
}));

fn registered() -> &'static [(Function, Box<Call>)] {
    // SAFETY: written by `register` only, which refuses to once a request was served; before that
    // nobody asks.
    unsafe { &(*REGISTERED.0.get()).functions }
}

/// Makes a function one that the host can call, whose types are known only now: for interpreters and
/// other languages. It gets the arguments as they come, their number first.
///
/// # Panics
/// After the guest's initialisation (`#[guest_init]`): the host has been told the functions by then.
pub fn register(
    signature: Function,
    call: impl Fn(&mut Reader<'_>, &mut Writer<'_>) -> Result<u32, DecodeError> + 'static,
) {
    // SAFETY: one thread, and no reference to it is alive: those of `registered` begin when `closed`.
    let late = unsafe { &mut *REGISTERED.0.get() };
    if late.closed {
        panic!("functions are registered before the first call");
    }
    late.functions.push((signature, Box::new(call)));
}

pub(crate) fn run_inits() {
    for init in inits() {
        (init.call)();
    }
    // SAFETY: one thread, and no reference to it is alive.
    unsafe { (*REGISTERED.0.get()).closed = true };
}

/// A number that the host has given to no other sandbox, for hash seeds and the like. It is a new one
/// after each restore; not for keys.
pub fn seed() -> u64 {
    Host::get().seed()
}

fn describe(out: &mut Writer<'_>) {
    let runtime = concat!("skerry-sandbox-rt ", env!("CARGO_PKG_VERSION"));
    let mut out = Describe::new(out, runtime);
    out.count(exports().len() + registered().len());
    for export in exports() {
        export.signature.describe(&mut out);
    }
    for (signature, _) in registered() {
        out.whole(signature);
    }
    out.count(imports().len());
    for import in imports() {
        import.signature.describe(&mut out);
    }
}

/// The output area. One borrow at a time: of the request that is being answered, or of a host call
/// while its function waits.
fn output(host: Host) -> &'static mut [u8] {
    // SAFETY: the area is mapped, and nobody else has it: a request's writer is used after the
    // function has returned, and a host call's writer ends before the guest leaves.
    unsafe { slice::from_raw_parts_mut(host.output() as *mut u8, host.output_size() as usize) }
}

/// Answers one request.
#[inline]
pub(crate) fn serve(host: Host) {
    let len = (host.input_len() as usize).min(host.input_size() as usize);
    // SAFETY: the area is mapped; the host writes replies behind the arguments only.
    let arguments = unsafe { slice::from_raw_parts(host.input() as *const u8, len) };
    let mut out = Writer::new(output(host));
    let ended = match host.request() {
        request::CALL => match exports().get(host.function() as usize) {
            Some(export) => (export.call)(&mut Reader::new(arguments), &mut out),
            None => late(host.function(), &mut Reader::new(arguments), &mut out),
        },
        request::DESCRIBE => {
            describe(&mut out);
            Ok(status::OK)
        }
        _ => Err(DecodeError::Malformed("no such request")),
    };
    let status = match ended {
        Ok(status) => status,
        Err(error) => refuse(host, error, &mut out),
    };
    finish(host, status, out);
}

/// Calls a function that was registered when the guest ran.
#[inline(never)]
fn late(index: u32, from: &mut Reader<'_>, out: &mut Writer<'_>) -> Result<u32, DecodeError> {
    let index = (index as usize).wrapping_sub(exports().len());
    match registered().get(index) {
        Some((_, call)) => call(from, out),
        None => Ok(status::NO_FUNCTION),
    }
}

#[inline]
fn finish(host: Host, status: u32, out: Writer<'_>) {
    match out.finish() {
        Ok(len) => {
            host.set_output_len(len as u32);
            host.set_status(status);
        }
        Err(wanted) => {
            host.set_detail(u32::try_from(wanted).unwrap_or(u32::MAX));
            host.set_output_len(0);
            host.set_status(status::TOO_LARGE);
        }
    }
}

/// Tells the host what is wrong with its arguments.
#[cold]
fn refuse(host: Host, error: DecodeError, out: &mut Writer<'_>) -> u32 {
    out.restart();
    match error {
        DecodeError::Arity { expected, .. } => {
            host.set_detail(expected);
            status::ARITY
        }
        DecodeError::Type {
            index,
            expected,
            found,
        } => {
            host.set_detail(index);
            expected.encode(out);
            found.encode(out);
            status::TYPE
        }
        DecodeError::Malformed(why) => {
            why.encode(out);
            status::MALFORMED
        }
    }
}

/// Calls a function of the host's. The answer lies in the input area, behind the arguments of the
/// request, until the next call.
#[inline]
pub fn host_call(
    import: &'static Import,
    arguments: impl FnOnce(&mut Writer<'_>),
) -> Result<Reader<'static>, HostError> {
    let first = imports().as_ptr();
    let place = (&raw const *import).addr() - first.addr();
    let index = place / size_of::<Import>();
    call_host(index as u32, arguments)
}

/// Calls a function of the host's by name, with arguments that were encoded elsewhere: their number
/// as `u32`, then the values. For interpreters, which have no declarations.
pub fn call_by_name(name: &str, arguments: &[u8]) -> Result<Vec<u8>, HostError> {
    call_by_name_with(name, |out| out.put(arguments)).map(|from| from.rest().to_vec())
}

/// As [`call_by_name`], with arguments that are encoded in place. The answer is there until the next
/// call.
pub fn call_by_name_with(
    name: &str,
    arguments: impl FnOnce(&mut Writer<'_>),
) -> Result<Reader<'static>, HostError> {
    call_host(Control::BY_NAME, |out| {
        name.encode(out);
        arguments(out);
    })
}

#[inline]
fn call_host(
    function: u32,
    arguments: impl FnOnce(&mut Writer<'_>),
) -> Result<Reader<'static>, HostError> {
    /// Where a reply begins: a cache line's distance keeps large values aligned as in any area.
    const ALIGN: u32 = 64;
    let host = Host::get();
    let mut out = Writer::new(output(host));
    arguments(&mut out);
    let len = out
        .finish()
        .map_err(|wanted| HostError::TooLarge(u32::try_from(wanted).unwrap_or(u32::MAX)))?;
    let reply_at = host.input_len().next_multiple_of(ALIGN);
    host.set_host_function(function);
    host.set_host_args_len(len as u32);
    host.set_reply_at(reply_at);
    host.leave(leave::HOST_CALL);
    let size = host.input_size() as usize;
    let at = (reply_at as usize).min(size);
    let len = (host.reply_len() as usize).min(size - at);
    // SAFETY: within the input area, behind the arguments that may be borrowed. The slice is read
    // before the next call to the host writes there: callers decode to owned values.
    let reply = unsafe { slice::from_raw_parts((host.input() as *const u8).add(at), len) };
    match host.host_status() {
        status::OK => Ok(Reader::new(reply)),
        other => Err(host_error(host, other, reply)),
    }
}

#[cold]
fn host_error(host: Host, status: u32, reply: &[u8]) -> HostError {
    let message = || String::decode(&mut Reader::new(reply)).unwrap_or_default();
    match status {
        status::NO_FUNCTION => HostError::NoFunction,
        status::TOO_LARGE => HostError::TooLarge(host.host_detail()),
        status::FAILED => HostError::Failed(message()),
        _ => HostError::Mismatch(message()),
    }
}

/// Where the control page is: for tests of what a host makes of a spoiled one.
pub fn control_address() -> u64 {
    Host::get().address()
}
