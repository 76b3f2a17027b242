//! How an instruction that can't complete says so.

/// The error of every handler: the reason is in [`crate::Cpu::trap`]. Zero-sized, so that
/// `Result<(), Trap>` travels in one register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trap;

/// Exception vectors (Intel SDM 3A table 6-1).
pub mod vector {
    #![expect(missing_docs, reason = "the names are the manual's")]
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const MC: u8 = 18;
    pub const XM: u8 = 19;
}

/// Why an op did not complete.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TrapKind {
    /// Nothing is pending.
    #[default]
    None,
    /// A fault of this instruction (RIP stays on it). Page faults have CR2 in `TrapState::address`.
    Fault {
        /// Vector.
        vector: u8,
        /// Error code, for the vectors that push one.
        error_code: Option<u32>,
    },
    /// The instruction needs the world outside; it is run again from its start when the answer is
    /// there (see `Cpu::device_read`). RIP stays on it.
    Exit(crate::exit::CpuExit),
    /// The op has set RIP (and any state) itself: look up the next block from there. What ends a
    /// block early: state changes, `rep` interrupted between pages, a store into the running block.
    Resume,
}

/// The pending trap.
#[derive(Clone, Copy, Debug, Default)]
pub struct TrapState {
    /// What it is.
    pub kind: TrapKind,
    /// The faulting linear address, for page faults.
    pub address: u64,
}

impl crate::Cpu {
    /// Raises an exception with an error code: `return Err(cpu.fault(vector::GP, 0))`.
    #[cold]
    pub fn fault(&mut self, vector: u8, error_code: u32) -> Trap {
        self.trap.kind = TrapKind::Fault {
            vector,
            error_code: Some(error_code),
        };
        Trap
    }

    /// Raises an exception that has no error code.
    #[cold]
    pub fn fault_plain(&mut self, vector: u8) -> Trap {
        self.trap.kind = TrapKind::Fault {
            vector,
            error_code: None,
        };
        Trap
    }

    /// General-protection fault with error code 0.
    #[cold]
    pub fn gp0(&mut self) -> Trap {
        self.fault(vector::GP, 0)
    }

    /// Invalid-opcode fault.
    #[cold]
    pub fn ud(&mut self) -> Trap {
        self.fault_plain(vector::UD)
    }

    /// Ends the block here with RIP as the op has set it.
    #[cold]
    pub fn resume(&mut self) -> Trap {
        self.trap.kind = TrapKind::Resume;
        Trap
    }
}
