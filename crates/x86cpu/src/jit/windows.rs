//! Which memory accesses of a trace may share one look into the TLB.
//!
//! Accesses whose addresses differ by a constant that the compiler knows, and not by much, are most
//! often in the same page: those relative to the stack pointer, or to the same pointer to a
//! structure. They are found by giving each register a value of which only the origin is known, and
//! what has been added to it since. The first access of such a window looks for the whole of it; the
//! others have their pointer.

use std::mem::take;

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::classify::Align;
use super::ready::Ready;
use super::trace::Step;
use crate::mem::area::WINDOWS;

/// Bytes that a window spans at most: more of them make it likelier that it crosses into another
/// page.
const SPAN: i64 = 1024;

/// What the address of a window may change by in a turn of a loop at most: it is to stay in a page
/// for some of them.
const STRIDE: u64 = 1024;

/// Windows that are carried through a loop, at most.
const CARRIED: usize = 8;

/// Distances from an origin that are further are left alone: sums of two of these fit an instruction.
const FAR: u64 = 1 << 30;

/// A register's value: where it comes from, and what was added.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Value {
    origin: u32,
    added: i64,
}

/// What the addresses of a window have in common.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Key {
    segment: Register,
    base: Option<u32>,
    index: Option<(u32, u32)>,
}

/// Origin of the address of the code's page.
const RIP: u32 = u32::MAX;

/// One access, as the compiler will make it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub memory: Memory,
    pub size: usize,
    pub write: bool,
    /// What it must be aligned to.
    pub align: Align,
}

/// What an access is relative to.
#[derive(Clone, Copy, Debug)]
pub(super) enum Memory {
    /// The operand of the instruction.
    Operand,
    /// A register and a constant.
    Register(u8, i32),
}

/// What the first access of a window looks for: the bytes from `low` up to `high`, relative to its own
/// address, of which the first is to be aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Opening {
    pub low: i32,
    pub high: i32,
    pub align: Align,
}

/// The part of a window in one access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    /// Which window.
    pub window: usize,
    /// The first of it: what it has to look for.
    pub opens: Option<Opening>,
    /// Distance from where the window's pointer points, without the index register.
    pub distance: i32,
    /// What has been added to the base register since the window's origin.
    pub added: i32,
    /// The window's pointer has no part of the base register, which is another in each turn.
    pub moves: bool,
}

/// Where the base of an address comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Base {
    /// The code's page.
    Page,
    Register(u8),
}

/// A window that is looked up before a loop, and good for several turns of it: its address changes
/// by a constant in each, or not at all.
#[derive(Clone, Copy, Debug)]
pub(super) struct Carried {
    pub window: usize,
    pub write: bool,
    pub segment: Register,
    pub base: Option<Base>,
    /// Register, and log2 of its scale.
    pub index: Option<(u8, u8)>,
    /// The first byte and what is past the last one, relative to the address in the first turn.
    pub low: i32,
    pub high: i32,
    /// What the address changes by in a turn.
    pub stride: i32,
    /// See [`Share::moves`].
    pub moves: bool,
    /// A distance from the address that must be aligned, and to what.
    pub align: (i32, Align),
}

/// What is known of a trace's accesses.
pub(super) struct Found {
    /// By step and access.
    pub shares: Vec<[Option<Share>; 2]>,
    pub carried: Vec<Carried>,
}

struct Window {
    key: Key,
    write: bool,
    /// Distances from the origin of the first and past the last byte.
    low: i64,
    high: i64,
    /// Where it is opened, and at which distance.
    first: (usize, usize, i64),
    members: usize,
    /// It is carried through a loop: by what the base and the address change in a turn.
    strides: Option<(i64, i64)>,
    /// A distance that must be aligned, and to what.
    align: (i64, Align),
    /// Where in the frame its pointer is, if it is one that is kept.
    slot: Option<usize>,
}

/// An access in a window: its distance from the origin, and what of that is the base register's.
#[derive(Clone, Copy)]
struct Place {
    window: u32,
    at: i32,
    added: i32,
}

impl Place {
    fn new(window: usize, at: i64, added: i64) -> Self {
        Self {
            window: window as u32,
            // Neither is far.
            at: at as i32,
            added: added as i32,
        }
    }
}

/// Memory that is kept from one trace to the next.
#[derive(Default)]
pub(super) struct Kept {
    open: Vec<usize>,
    windows: Vec<Window>,
    places: Vec<[Option<Place>; 2]>,
    pub shares: Vec<[Option<Share>; 2]>,
}

/// Finds windows. For each step and access: its share, if it has one.
pub(super) struct Windows {
    values: [Value; 16],
    next: u32,
    open: Vec<usize>,
    windows: Vec<Window>,
    places: Vec<[Option<Place>; 2]>,
    /// What is in the registers at the end, of a trace that is a loop.
    ends: Option<[Value; 16]>,
}

impl Windows {
    /// `plain` are offsets of instructions that must not open one. `again` says that the trace is a
    /// loop of which nothing is the interpreter's.
    pub(super) fn find(
        steps: &[Step],
        ready: &[Ready],
        plain: &[u16],
        again: bool,
        kept: &mut Kept,
    ) -> Found {
        let mut found = Self {
            values: origins(),
            next: 16,
            open: take(&mut kept.open),
            windows: take(&mut kept.windows),
            places: take(&mut kept.places),
            ends: None,
        };
        found.places.resize(steps.len(), [None; 2]);
        if again {
            for (step, ready) in steps.iter().zip(ready) {
                found.follow(&step.instruction, ready.changed());
            }
            found.ends = Some(std::mem::replace(&mut found.values, origins()));
        }
        for (n, (step, ready)) in steps.iter().zip(ready).enumerate() {
            for (which, wanted) in ready.accesses().into_iter().enumerate() {
                if let Some(wanted) = wanted {
                    found.access(n, which, &step.instruction, wanted);
                }
            }
            if ready.is_interpreted() {
                found.forget();
            } else {
                found.follow(&step.instruction, ready.changed());
            }
        }
        found.shared(|n| plain.contains(&steps[n].at), kept)
    }

    /// What an origin changes by in a turn of the loop, if that is known.
    fn stride(&self, origin: u32) -> Option<i64> {
        if origin == RIP {
            return Some(0);
        }
        let end = self.ends?.get(origin as usize).copied()?;
        (end.origin == origin).then_some(end.added)
    }

    /// By what a base and a whole address change in a turn, if it is known and not by too much.
    fn strides(&self, key: &Key) -> Option<(i64, i64)> {
        self.ends?;
        let base = key.base.map_or(Some(0), |origin| self.stride(origin))?;
        let index = match key.index {
            Some((origin, scale)) => self.stride(origin)?.checked_mul(i64::from(scale))?,
            None => 0,
        };
        let whole = base.checked_add(index)?;
        let near = base.unsigned_abs() <= FAR && whole.unsigned_abs() <= STRIDE;
        near.then_some((base, whole))
    }

    fn value(&self, register: u8) -> Value {
        self.values[usize::from(register & 15)]
    }

    fn fresh(&mut self, register: u8) {
        self.values[usize::from(register & 15)] = Value {
            origin: self.next,
            added: 0,
        };
        self.next += 1;
    }

    /// The interpreter may have changed anything.
    fn forget(&mut self) {
        for register in 0..16 {
            self.fresh(register);
        }
        self.open.clear();
    }

    /// What the address of an access is relative to, the distance from there, and what of that is
    /// the base register's.
    fn place(&self, i: &Instruction, memory: Memory) -> Option<(Key, i64, i64)> {
        if let Memory::Register(register, disp) = memory {
            let value = self.value(register);
            let key = Key {
                segment: Register::None,
                base: Some(value.origin),
                index: None,
            };
            let at = value.added.checked_add(i64::from(disp))?;
            return Some((key, at, value.added));
        }
        let base = match i.memory_base() {
            Register::RIP => Some(Value {
                origin: RIP,
                added: 0,
            }),
            Register::None => None,
            register if register.is_gpr64() => Some(self.value(register.number() as u8)),
            _ => return None,
        };
        let scale = i64::from(i.memory_index_scale());
        let index = match i.memory_index() {
            Register::None => None,
            register if register.is_gpr64() => Some(self.value(register.number() as u8)),
            _ => return None,
        };
        let segment = match i.memory_segment() {
            segment @ (Register::FS | Register::GS) => segment,
            _ => Register::None,
        };
        let key = Key {
            segment,
            base: base.map(|value| value.origin),
            index: index.map(|value| (value.origin, scale as u32)),
        };
        let added = base.map_or(0, |value| value.added);
        let disp = i.memory_displacement64() as i64;
        // The distance that goes into an instruction, beside the index register.
        if added.checked_add(disp)?.unsigned_abs() > FAR {
            return None;
        }
        let index = index.map_or(Some(0), |value| value.added.checked_mul(scale));
        let at = (added + disp).checked_add(index?)?;
        Some((key, at, added))
    }

    fn access(&mut self, n: usize, which: usize, i: &Instruction, wanted: Wanted) {
        let Some((key, at, added)) = self.place(i, wanted.memory) else {
            return;
        };
        if at.unsigned_abs() > FAR || added.unsigned_abs() > FAR {
            return;
        }
        if let Some(strides) = self.strides(&key)
            && let Some(window) = self.carried(&key, at, strides, wanted)
        {
            self.places[n][which] = Some(Place::new(window, at, added));
            return;
        }
        let end = at + wanted.size as i64;
        let align = wanted.align;
        // One that may be written is as good for reads. What is aligned here need not be where others
        // were opened: code looks at pointers, and goes another way.
        let fits = |window: &Window| {
            window.key == key
                && (window.write || !wanted.write)
                && (align == Align::None
                    || window.align.1 != Align::None && window.aligns(at, align))
                && end.max(window.high) - at.min(window.low) <= SPAN
        };
        let known = self.open.iter().copied().find(|&w| fits(&self.windows[w]));
        let window = known.unwrap_or_else(|| {
            self.windows.push(Window {
                key,
                write: wanted.write,
                low: at,
                high: end,
                first: (n, which, at),
                members: 0,
                strides: None,
                align: (at, align),
                slot: None,
            });
            self.open.push(self.windows.len() - 1);
            self.windows.len() - 1
        });
        self.windows[window].take(at, end);
        self.places[n][which] = Some(Place::new(window, at, added));
    }

    /// The window of an access that is carried through the loop.
    fn carried(
        &mut self,
        key: &Key,
        at: i64,
        strides: (i64, i64),
        wanted: Wanted,
    ) -> Option<usize> {
        let end = at + wanted.size as i64;
        let align = wanted.align;
        if strides.1 % i64::from(align.bytes()) != 0 {
            return None;
        }
        let fits = |window: &Window| {
            window.strides.is_some()
                && window.key == *key
                && window.aligns(at, align)
                && end.max(window.high) - at.min(window.low) <= SPAN
        };
        let window = match self.windows.iter().position(fits) {
            Some(window) => window,
            None => {
                let count = self.windows.iter().filter(|w| w.strides.is_some()).count();
                if count >= CARRIED {
                    return None;
                }
                self.windows.push(Window {
                    key: *key,
                    write: false,
                    low: at,
                    high: end,
                    first: (usize::MAX, 0, 0),
                    members: 0,
                    strides: Some(strides),
                    align: (at, Align::None),
                    slot: None,
                });
                self.windows.len() - 1
            }
        };
        let window_ = &mut self.windows[window];
        window_.take(at, end);
        window_.write |= wanted.write;
        if window_.align.1 == Align::None {
            window_.align = (at, align);
        }
        Some(window)
    }

    /// What an instruction does to the registers, of which it may change those of `changed`.
    fn follow(&mut self, i: &Instruction, changed: u16) {
        let rsp = 4;
        let wide = |n: u32| i.op_kind(n) == OpKind::Register && i.op_register(n).is_gpr64();
        let number = |n: u32| i.op_register(n).number() as u8;
        let constant = match i.op_count() {
            2 if wide(0) => match i.op_kind(1) {
                OpKind::Immediate8to64 => Some(i.immediate8to64()),
                OpKind::Immediate32to64 => Some(i.immediate32to64()),
                _ => None,
            },
            _ => None,
        };
        match i.mnemonic() {
            Mnemonic::Mov if wide(0) && i.op_count() == 2 && wide(1) => {
                self.values[usize::from(number(0) & 15)] = self.value(number(1));
            }
            Mnemonic::Add if let Some(by) = constant => self.add(number(0), by),
            Mnemonic::Sub if let Some(by) = constant => self.add(number(0), -by),
            Mnemonic::Inc if wide(0) => self.add(number(0), 1),
            Mnemonic::Dec if wide(0) => self.add(number(0), -1),
            Mnemonic::Lea
                if wide(0) && i.memory_base().is_gpr64() && i.memory_index() == Register::None =>
            {
                let base = self.value(i.memory_base().number() as u8);
                self.values[usize::from(number(0) & 15)] = base;
                self.add(number(0), i.memory_displacement64() as i64);
            }
            Mnemonic::Push | Mnemonic::Pushfq => self.add(rsp, -8),
            Mnemonic::Call => self.add(rsp, -8),
            Mnemonic::Pop => {
                self.add(rsp, 8);
                self.fresh(number(0));
            }
            Mnemonic::Leave => {
                self.values[4] = self.value(5);
                self.add(rsp, 8);
                self.fresh(5);
            }
            _ => {
                let mut changed = changed;
                while changed != 0 {
                    self.fresh(changed.trailing_zeros() as u8);
                    changed &= changed - 1;
                }
            }
        }
    }

    fn add(&mut self, register: u8, by: i64) {
        let value = &mut self.values[usize::from(register & 15)];
        match value.added.checked_add(by) {
            Some(added) => value.added = added,
            None => self.fresh(register),
        }
    }

    /// Windows of one access are none, if they aren't carried, and only so many have room in the
    /// frame.
    fn shared(mut self, plain: impl Fn(usize) -> bool, kept: &mut Kept) -> Found {
        let mut slots = 0;
        for window in &mut self.windows {
            let wanted = window.strides.is_some() || window.members > 1 && !plain(window.first.0);
            let keep = wanted && slots < WINDOWS;
            slots += usize::from(keep);
            window.slot = keep.then(|| slots - 1);
        }
        let share = |n: usize, which: usize, place: Place| {
            let window = &self.windows[place.window as usize];
            let (first_step, first_which, first_at) = window.first;
            let opens = (first_step, first_which) == (n, which);
            Some(Share {
                window: window.slot?,
                opens: opens.then(|| window.opening(first_at)),
                distance: place.at,
                added: place.added,
                moves: window.moves(),
            })
        };
        let mut shares = take(&mut kept.shares);
        shares.clear();
        shares.extend(self.places.iter().enumerate().map(|(n, accesses)| {
            std::array::from_fn(|which| accesses[which].and_then(|found| share(n, which, found)))
        }));
        let carried = self.windows.iter();
        let carried = carried.filter_map(|window| window.carried(window.slot?));
        let found = Found {
            shares,
            carried: carried.collect(),
        };
        self.open.clear();
        self.windows.clear();
        self.places.clear();
        (kept.open, kept.windows, kept.places) = (self.open, self.windows, self.places);
        found
    }
}

impl Window {
    /// Takes an access in.
    fn take(&mut self, at: i64, end: i64) {
        self.low = self.low.min(at);
        self.high = self.high.max(end);
        self.members += 1;
    }

    /// Whether an access is aligned if the window's own place is.
    fn aligns(&self, at: i64, align: Align) -> bool {
        let (place, to) = self.align;
        let known = to != Align::None && align != Align::None;
        !known || to == align && (at - place) % i64::from(align.bytes()) == 0
    }

    /// What its first access has to look for. A window that is aligned begins and ends so: that leads
    /// into no other page.
    fn opening(&self, first: i64) -> Opening {
        let (place, align) = self.align;
        let step = i64::from(align.bytes());
        let low = self.low - (self.low - place).rem_euclid(step);
        let high = self.high + (place - self.high).rem_euclid(step);
        Opening {
            low: (low - first) as i32,
            high: (high - first) as i32,
            align,
        }
    }

    fn moves(&self) -> bool {
        self.strides.is_some_and(|(base, _)| base != 0)
    }

    fn carried(&self, window: usize) -> Option<Carried> {
        let (_, stride) = self.strides?;
        let base = self.key.base.map(|origin| match origin {
            RIP => Base::Page,
            // What is carried comes from a register as it was at first.
            register => Base::Register(register as u8),
        });
        let index = self.key.index;
        Some(Carried {
            window,
            write: self.write,
            segment: self.key.segment,
            base,
            index: index.map(|(origin, scale)| (origin as u8, scale.trailing_zeros() as u8)),
            low: self.low as i32,
            high: self.high as i32,
            stride: stride as i32,
            moves: self.moves(),
            align: (self.align.0 as i32, self.align.1),
        })
    }
}

/// What is in the registers when a trace begins.
fn origins() -> [Value; 16] {
    std::array::from_fn(|n| Value {
        origin: n as u32,
        added: 0,
    })
}
