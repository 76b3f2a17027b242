//! Where compiled code has the guest's registers, and addresses made of them.

use std::mem::offset_of;

use iced_x86::{Instruction, Register};

use super::asm::{Mem, R10, R15, RAX, RDX, Reg};
use crate::mem::area::Frame;

/// The host register of each guest register; guest registers without one are in the frame.
pub(super) const HOST: [Option<Reg>; 16] = [
    Some(RAX),
    Some(R10),
    Some(RDX),
    Some(3),
    Some(R15),
    Some(5),
    Some(6),
    Some(7),
    Some(8),
    Some(9),
    None,
    None,
    Some(12),
    Some(13),
    Some(14),
    None,
];

/// The guest registers that have a host register, with it.
pub(super) fn pinned() -> impl Iterator<Item = (usize, Reg)> {
    HOST.into_iter()
        .enumerate()
        .filter_map(|(guest, host)| Some((guest, host?)))
}

/// Guest registers that are in the frame, and where.
pub(super) const SPILLED: [(usize, usize); 3] = [
    (10, offset_of!(Frame, r10)),
    (11, offset_of!(Frame, r11)),
    (15, offset_of!(Frame, r15)),
];

/// Host register of the guest's RCX, and of its RSP.
pub(super) const GUEST_RCX: Reg = R10;
pub(super) const GUEST_RSP: Reg = R15;

pub(super) fn slot(guest: u8) -> Mem {
    let offset = match guest {
        10 => offset_of!(Frame, r10),
        11 => offset_of!(Frame, r11),
        _ => offset_of!(Frame, r15),
    };
    Mem::frame(offset)
}

/// Where a part of an address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Host(Reg),
    Frame(Mem),
}

/// A guest address in the making: `base + index << scale + disp`, in a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) segment: Option<Mem>,
    pub(super) base: Option<Part>,
    pub(super) index: Option<(Part, u8)>,
    pub(super) disp: i32,
}

/// Where a guest register is.
pub(super) fn held_in(guest: u8) -> Option<Part> {
    let host = HOST.get(usize::from(guest))?;
    Some(host.map_or(Part::Frame(slot(guest)), Part::Host))
}

pub(super) fn part(register: Register) -> Option<Part> {
    if !register.is_gpr64() {
        return None;
    }
    let guest = register.number() as u8;
    Some(match HOST.get(usize::from(guest)).copied().flatten() {
        Some(host) => Part::Host(host),
        None => Part::Frame(slot(guest)),
    })
}

impl Address {
    pub(super) fn new(i: &Instruction) -> Option<Self> {
        let segment = Self::segment(i.memory_segment());
        let base = match i.memory_base() {
            Register::None => None,
            Register::EIP => return None,
            Register::RIP => Some(Part::Frame(Mem::frame(offset_of!(Frame, rip_page)))),
            register => Some(part(register)?),
        };
        let index = match i.memory_index() {
            Register::None => None,
            register => Some((
                part(register)?,
                i.memory_index_scale().trailing_zeros() as u8,
            )),
        };
        let disp = i32::try_from(i.memory_displacement64() as i64).ok()?;
        // Room for what is added to reach the last byte.
        (disp.unsigned_abs() < i32::MAX as u32 - 4096).then_some(Self {
            segment,
            base,
            index,
            disp,
        })
    }

    /// Where the base of a segment is that has one.
    pub(super) fn segment(segment: Register) -> Option<Mem> {
        match segment {
            Register::FS => Some(Mem::frame(offset_of!(Frame, fs_base))),
            Register::GS => Some(Mem::frame(offset_of!(Frame, gs_base))),
            _ => None,
        }
    }

    /// A host register plus a constant.
    pub(super) fn of(base: Reg, disp: i32) -> Self {
        Self {
            segment: None,
            base: Some(Part::Host(base)),
            index: None,
            disp,
        }
    }

    /// The same operand for an instruction of the host, if all parts are in registers.
    pub(super) fn plain(&self) -> Option<Mem> {
        let base = match self.base {
            Some(Part::Host(base)) => Some(base),
            Some(Part::Frame(_)) => return None,
            None => None,
        };
        let index = match self.index {
            Some((Part::Host(index), scale)) => Some((index, scale)),
            Some((Part::Frame(_), _)) => return None,
            None => None,
        };
        Some(Mem {
            base,
            index,
            disp: self.disp,
        })
    }
}
