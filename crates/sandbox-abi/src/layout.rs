//! The control page, and the numbers that the two sides pass.

/// The port that the guest writes to leave; EAX is one of [`leave`].
pub const PORT: u8 = 0x5c;
/// The port of the host's own exception stubs, which run in ring 0. Not one of the four that the guest
/// may use.
pub const PORT_EXCEPTION: u8 = 0x60;

/// The oldest version of this interface that the host still speaks.
pub const VERSION_MIN: u32 = 1;
/// The newest version of this interface.
pub const VERSION_MAX: u32 = 1;

/// Registers at the guest's entry point. The others are zero; RSP is the top of the stack less 8, as if
/// the entry had been called (System V ABI §3.4.1 alignment).
pub mod boot {
    /// Address of the control page.
    pub const CONTROL: &str = "RDI";
}

/// Why the guest leaves: EAX at `OUT PORT`.
pub mod leave {
    /// Ready for a call: the guest is initialised, or the request is done. Result in the output area.
    pub const RETURN: u32 = 1;
    /// The guest asks for a host function.
    pub const HOST_CALL: u32 = 2;
    /// The guest gives up; the output area has its message (UTF-8), `status` is of [`super::status`].
    pub const ABORT: u32 = 3;
    /// The log area is full; the host empties it.
    pub const FLUSH_LOG: u32 = 4;
    /// The guest speaks no version that the host offers.
    pub const NO_VERSION: u32 = 5;
}

/// What the host asks: [`Control::request`].
pub mod request {
    /// To describe itself: [`super::super::Description`] comes back.
    pub const DESCRIBE: u32 = 1;
    /// To call function [`super::Control::function`] with the arguments of the input area.
    pub const CALL: u32 = 2;
}

/// How a request ended ([`Control::status`]), or a host call ([`Control::host_status`]).
pub mod status {
    /// A value in the output (input) area.
    pub const OK: u32 = 0;
    /// An error of the function's own: its message.
    pub const FAILED: u32 = 1;
    /// There is no such function.
    pub const NO_FUNCTION: u32 = 2;
    /// Another number of arguments: `detail` is the one that is wanted.
    pub const ARITY: u32 = 3;
    /// An argument of another type: `detail` is its index; the type that is wanted as text.
    pub const TYPE: u32 = 4;
    /// The result does not fit its area: `detail` bytes are wanted.
    pub const TOO_LARGE: u32 = 5;
    /// The frame is not what the interface says.
    pub const MALFORMED: u32 = 6;
    /// With [`super::leave::ABORT`]: a panic.
    pub const PANIC: u32 = 7;
    /// With [`super::leave::ABORT`]: no memory for an allocation of `detail` bytes.
    pub const OUT_OF_MEMORY: u32 = 8;
}

/// What a log record is: its first byte.
pub mod log_kind {
    /// A message: level, line, target, file, text.
    pub const EVENT: u8 = 1;
    /// A span begins: level, line, id, target, file, name, fields as text.
    pub const SPAN_NEW: u8 = 2;
    /// A span is entered: id.
    pub const SPAN_ENTER: u8 = 3;
    /// A span is left: id.
    pub const SPAN_EXIT: u8 = 4;
    /// A span has ended: id.
    pub const SPAN_CLOSE: u8 = 5;
    /// A span has more fields: id, fields as text.
    pub const SPAN_RECORD: u8 = 6;
    /// An allocation: how its callers were found ([`super::frames`]), their number, bytes, their return
    /// addresses from the innermost on.
    pub const ALLOCATION: u8 = 7;
}

/// How return addresses were found: the second byte of a [`log_kind::ALLOCATION`].
pub mod frames {
    /// By frame pointers, all the way to the guest's entry.
    pub const CHAIN: u8 = 0;
    /// By what on the stack lies in the program: some may be of calls that have ended.
    pub const SCAN: u8 = 1;
}

/// Bytes in front of each log record: its length, without these, as a little-endian `u32`.
pub const LOG_HEADER: usize = 4;

/// The control page. Each field is written by one side only, while the other does not run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Control {
    /// Host: oldest version it speaks.
    pub version_min: u32,
    /// Host: newest version it speaks.
    pub version_max: u32,
    /// Guest: the version it chose, before its first [`leave::RETURN`].
    pub version: u32,
    /// Host: what is asked ([`request`]).
    pub request: u32,
    /// Host: which function.
    pub function: u32,
    /// Host: bytes of arguments in the input area.
    pub input_len: u32,
    /// Guest: how the request ended ([`status`]).
    pub status: u32,
    /// Guest: more about a status.
    pub detail: u32,
    /// Guest: bytes in the output area.
    pub output_len: u32,
    /// Guest: which imported function is called; [`Control::BY_NAME`] if its name stands first.
    pub host_function: u32,
    /// Guest: bytes of the host function's arguments in the output area.
    pub host_args_len: u32,
    /// Guest: where in the input area the reply goes.
    pub reply_at: u32,
    /// Host: how the host call ended ([`status`]).
    pub host_status: u32,
    /// Host: more about it.
    pub host_detail: u32,
    /// Host: bytes of the reply.
    pub reply_len: u32,
    /// Guest: bytes in the log area; the host sets it to 0 when it has read them.
    pub log_len: u32,
    /// Host: the least severe level that is wanted: 0 none, 1 error … 5 trace.
    pub log_level: u32,
    /// Guest: records that were dropped because they are larger than the log area.
    pub log_dropped: u32,
    /// Host: address of the input area.
    pub input: u64,
    /// Host: its size.
    pub input_size: u64,
    /// Host: address of the output area.
    pub output: u64,
    /// Host: its size.
    pub output_size: u64,
    /// Host: address of the log area.
    pub log: u64,
    /// Host: its size.
    pub log_size: u64,
    /// Host: address of the heap.
    pub heap: u64,
    /// Host: its size.
    pub heap_size: u64,
    /// Guest: allocations since it began.
    pub allocations: u64,
    /// Guest: bytes that are allocated.
    pub allocated: u64,
    /// Guest: the most that was.
    pub allocated_peak: u64,
    /// Host: a number that no other sandbox has, new after each restore.
    pub seed: u64,
    /// Host: address of the program.
    pub image: u64,
    /// Host: its size; other than 0 while it wants a record of each allocation. A guest that doesn't know
    /// this field makes none.
    pub profiled: u64,
}

impl Control {
    /// [`Control::host_function`] of a call by name.
    pub const BY_NAME: u32 = u32::MAX;
}

const _: () = assert!(core::mem::size_of::<Control>() == 72 + 14 * 8);
