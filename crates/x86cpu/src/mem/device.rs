//! Accesses that only the world outside can answer: memory where there is no RAM, and ports.
//!
//! An instruction that makes one ends with an exit and is run again from its start when the answer
//! is there. The answers so far are kept: the n-th device access of the instruction takes the n-th
//! answer, and the first without one is the next exit. An instruction changes nothing before its
//! last device access, so running it again is harmless.

use crate::cpu::Cpu;
use crate::exit::CpuExit;
use crate::mem::PAGE_MASK;
use crate::trap::{Trap, TrapKind};

/// Device accesses that one instruction can make: the longest are saves of the FPU state.
const LIMIT: usize = 2048;

/// See the module's text.
#[derive(Debug, Default)]
pub(crate) struct DeviceReplay {
    answers: Vec<u64>,
    next: usize,
    pending: Option<Pending>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pending {
    Read { size: u8 },
    Write,
}

fn low_bytes(value: u64, size: u8) -> u64 {
    value & (u64::MAX >> (64 - 8 * u32::from(size.clamp(1, 8))))
}

impl DeviceReplay {
    /// Whether an instruction waits to be run again.
    pub(crate) fn is_active(&self) -> bool {
        !self.answers.is_empty() || self.pending.is_some()
    }

    /// Whether a read waits for its value.
    pub(crate) fn wants_value(&self) -> bool {
        matches!(self.pending, Some(Pending::Read { .. }))
    }

    /// The instruction starts again: what was pending was done by the caller.
    pub(crate) fn restart(&mut self) {
        if let Some(Pending::Write) = self.pending.take() {
            self.answers.push(0);
        }
        self.next = 0;
    }

    /// The instruction, or one committed step of it, is complete.
    pub(crate) fn clear(&mut self) {
        self.answers.clear();
        self.next = 0;
        self.pending = None;
    }

    fn answer(&mut self) -> Option<u64> {
        let answer = self.answers.get(self.next).copied()?;
        self.next += 1;
        Some(answer)
    }

    fn complete(&mut self, value: u64) {
        if let Some(Pending::Read { size }) = self.pending {
            self.pending = None;
            if self.answers.len() < LIMIT {
                self.answers.push(low_bytes(value, size));
            }
        }
    }
}

impl Cpu {
    /// Gives the value of the read that the last run returned as its exit.
    pub fn complete_read(&mut self, value: u64) {
        self.devices.complete(value);
    }

    /// Declares what the current instruction did so far done for good: the steps of a repeated
    /// string instruction. Its next device access is an exit of its own.
    #[inline]
    pub fn commit_devices(&mut self) {
        if self.devices.is_active() {
            self.devices.clear();
        }
    }

    /// Whether the current instruction, before it is done, waits for or has had device answers.
    pub fn inside_instruction(&self) -> bool {
        self.devices.is_active()
    }

    /// Drops what is left of an instruction that made device accesses.
    pub fn forget_devices(&mut self) {
        self.devices.clear();
    }

    fn exit(&mut self, exit: CpuExit, pending: Pending) -> Trap {
        self.devices.pending = Some(pending);
        self.trap.kind = TrapKind::Exit(exit);
        Trap
    }

    fn is_apic(&self, gpa: u64) -> bool {
        self.apic.page_address() == Some(gpa & !PAGE_MASK)
    }

    /// Reads `size` bytes (1 to 8) at a guest-physical address that isn't RAM.
    pub fn device_read(&mut self, gpa: u64, size: u8) -> Result<u64, Trap> {
        if self.is_apic(gpa) {
            return Ok(self.apic_mmio_read(gpa & PAGE_MASK, size));
        }
        match self.devices.answer() {
            Some(value) => Ok(value),
            None => Err(self.exit(CpuExit::MmioRead { gpa, size }, Pending::Read { size })),
        }
    }

    /// Writes `size` bytes (1 to 8) at a guest-physical address that isn't writable RAM.
    pub fn device_write(&mut self, gpa: u64, size: u8, data: u64) -> Result<(), Trap> {
        if self.is_apic(gpa) {
            self.apic_mmio_write(gpa & PAGE_MASK, size, data);
            return Ok(());
        }
        if self.devices.answer().is_some() {
            return Ok(());
        }
        let data = low_bytes(data, size);
        Err(self.exit(CpuExit::MmioWrite { gpa, size, data }, Pending::Write))
    }

    /// Reads bytes, eight at a time.
    pub(super) fn device_read_bytes(&mut self, gpa: u64, into: &mut [u8]) -> Result<(), Trap> {
        let mut gpa = gpa;
        for chunk in into.chunks_mut(8) {
            let value = self.device_read(gpa, chunk.len() as u8)?;
            chunk.copy_from_slice(&value.to_le_bytes()[..chunk.len()]);
            gpa += chunk.len() as u64;
        }
        Ok(())
    }

    /// Writes bytes, eight at a time.
    pub(super) fn device_write_bytes(&mut self, gpa: u64, from: &[u8]) -> Result<(), Trap> {
        let mut gpa = gpa;
        for chunk in from.chunks(8) {
            let mut bytes = [0; 8];
            bytes[..chunk.len()].copy_from_slice(chunk);
            self.device_write(gpa, chunk.len() as u8, u64::from_le_bytes(bytes))?;
            gpa += chunk.len() as u64;
        }
        Ok(())
    }

    /// IN: reads `size` bytes (1, 2 or 4) from a port.
    pub fn port_read(&mut self, port: u16, size: u8) -> Result<u32, Trap> {
        match self.devices.answer() {
            Some(value) => Ok(value as u32),
            None => Err(self.exit(CpuExit::PortIn { port, size }, Pending::Read { size })),
        }
    }

    /// OUT: writes `size` bytes (1, 2 or 4) to a port.
    pub fn port_write(&mut self, port: u16, size: u8, data: u32) -> Result<(), Trap> {
        if self.devices.answer().is_some() {
            return Ok(());
        }
        let data = low_bytes(u64::from(data), size) as u32;
        Err(self.exit(CpuExit::PortOut { port, size, data }, Pending::Write))
    }
}
