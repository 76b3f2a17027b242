//! What an exception of the guest's means.

use std::fmt;

use skerry_hypervisor::state::SystemRegisters;
use thiserror::Error;

use crate::layout::{EXCEPTION_STACK, GUARD, Layout, PAGE};
use crate::region::Region;

/// What the guest tried to do with an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read it.
    Read,
    /// Write it.
    Write,
    /// Execute it.
    Execute,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Execute => "execute",
        })
    }
}

/// The guest did what its memory or its rights don't allow.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Fault {
    /// The stack is full.
    #[error(
        "The guest's stack of {size} bytes overflowed at {rip:#x}; build the sandbox with a larger one"
    )]
    StackOverflow {
        /// The stack's size.
        size: u64,
        /// The instruction.
        rip: u64,
    },
    /// An address that isn't mapped, or not for this.
    #[error("The guest tried to {access} {address:#x} at {rip:#x}: {}", if *.mapped { "it may not" } else { "nothing is there" })]
    AccessViolation {
        /// The address.
        address: u64,
        /// What it tried.
        access: Access,
        /// Whether something is mapped there.
        mapped: bool,
        /// The instruction.
        rip: u64,
    },
    /// Another exception.
    #[error("The guest raised {name} (vector {vector}, error code {error:#x}) at {rip:#x}")]
    Exception {
        /// Its vector (Intel SDM 3A table 7-1).
        vector: u8,
        /// Its name.
        name: &'static str,
        /// Its error code; 0 where there is none.
        error: u32,
        /// The instruction.
        rip: u64,
    },
}

impl Fault {
    /// The address of the instruction.
    pub fn rip(&self) -> u64 {
        match self {
            Self::StackOverflow { rip, .. }
            | Self::AccessViolation { rip, .. }
            | Self::Exception { rip, .. } => *rip,
        }
    }
}

fn name(vector: u8) -> &'static str {
    match vector {
        0 => "a division error",
        1 => "a debug exception",
        2 => "a non-maskable interrupt",
        3 => "a breakpoint",
        4 => "an overflow",
        5 => "a bound range exception",
        6 => "an invalid opcode",
        7 => "a missing device",
        8 => "a double fault",
        10 => "an invalid task state",
        11 => "a missing segment",
        12 => "a stack segment fault",
        13 => "a general protection fault",
        14 => "a page fault",
        16 => "an x87 floating-point error",
        17 => "an alignment check",
        18 => "a machine check",
        19 => "a SIMD floating-point exception",
        _ => "a reserved exception",
    }
}

/// Whether a processor stands in ring 0, which is the stubs (the level of CS: Intel SDM 3A §6.5).
pub(crate) fn in_stub(system: &SystemRegisters) -> bool {
    const CS: usize = 1;
    system.segments[CS].attributes >> 5 & 3 == 0
}

/// An interrupted guest, as the stub's stack has it. Ring 3 can't write there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) vector: u8,
    pub(crate) error: u32,
    pub(crate) rip: u64,
    pub(crate) rflags: u64,
    pub(crate) rsp: u64,
}

impl Frame {
    /// The frame of the stub that has just left.
    pub(crate) fn read(region: &Region) -> Option<Self> {
        let word = |n: u64| {
            let bytes = region.bytes(EXCEPTION_STACK - n * 8, 8)?;
            bytes.first_chunk().copied().map(u64::from_le_bytes)
        };
        Some(Self {
            rsp: word(2)?,
            rflags: word(3)?,
            rip: word(5)?,
            error: word(6)? as u32,
            vector: word(7)? as u8,
        })
    }

    /// What it means; `address` is CR2.
    pub(crate) fn fault(&self, address: u64, layout: &Layout) -> Fault {
        const PAGE_FAULT: u8 = 14;
        const PROTECTION: u32 = 1;
        const WRITE: u32 = 1 << 1;
        const FETCH: u32 = 1 << 4;
        let &Self {
            vector, error, rip, ..
        } = self;
        if vector != PAGE_FAULT {
            return Fault::Exception {
                vector,
                name: name(vector),
                error,
                rip,
            };
        }
        let access = match error {
            _ if error & FETCH != 0 => Access::Execute,
            _ if error & WRITE != 0 => Access::Write,
            _ => Access::Read,
        };
        // A call or push at the stack's end, a frame that reaches past it, or one that is probed.
        let below = layout.stack.gva - GUARD;
        if access != Access::Execute && (below..layout.stack.gva).contains(&address) {
            return Fault::StackOverflow {
                size: layout.stack.len,
                rip,
            };
        }
        let mapped = error & PROTECTION != 0 && address >= PAGE;
        Fault::AccessViolation {
            address,
            access,
            mapped,
            rip,
        }
    }
}
