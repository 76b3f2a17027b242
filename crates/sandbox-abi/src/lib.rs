//! What the host and the guest of a function sandbox agree on.
//!
//! ```text
//!   host                          guest memory                           guest (ring 3)
//!   call("add", (1, 2)) ──▶ input area: [count][tag value]… ──▶ #[guest_fn] fn add(a, b)
//!        │                  Control: request, function, lengths              │
//!        ◀── output area: [tag value] ◀── OUT PORT, EAX = RETURN ────────────┘
//! ```
//!
//! One 4 KiB page, [`Control`], and three areas (input, output, log) lie in the guest's memory; the
//! host tells where at the guest's first instruction ([`boot`]). The guest leaves with one `OUT` to
//! [`PORT`], EAX says why ([`leave`]), and goes on at the next instruction when the host has
//! answered. Nothing else passes: no interrupt, no other port, no device.
//!
//! Both sides distrust what they read: a [`Reader`] checks every length and tag, and the host copies
//! each word of the control page once before it looks at it.
//!
//! `no_std`; used by `crates/sandbox` (host) and `guest/sandbox-rt`.

#![no_std]

extern crate alloc;

#[doc(hidden)]
pub mod __private {
    pub use alloc::string::String;
}

mod answer;
mod codec;
pub mod component;
mod describe;
mod layout;
pub mod script;
mod value;
pub mod wasm;

pub use answer::{HostError, HostReturned};
pub use codec::{DecodeError, Reader, Tag, Writer};
pub use describe::{Describe, Description, Function, Parameter};
pub use layout::{
    Control, LOG_HEADER, PORT, PORT_EXCEPTION, VERSION_MAX, VERSION_MIN, boot, frames, leave,
    log_kind, request, status,
};
pub use value::{Arguments, Bytes, Decode, Encode, Returned};
#[doc(hidden)]
pub use value::{decode_struct, encode_struct};
