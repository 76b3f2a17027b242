//! The I/O APIC (Intel 82093AA data sheet, order 290566; the EOI register is that of version 0x20).

use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::bus::MmioDevice;
use crate::irq::{MsiMessage, MsiSink};
use crate::state::{StateError, require};

/// Pins of the one I/O APIC.
pub const IOAPIC_PINS: usize = 24;

const VERSION: u32 = 0x20;

const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;
const EOI: u64 = 0x40;

const REG_ID: u8 = 0x00;
const REG_VERSION: u8 = 0x01;
const REG_ARBITRATION: u8 = 0x02;
const REG_REDIRECTION: u8 = 0x10;

const RTE_REMOTE_IRR: u64 = 1 << 14;
const RTE_LEVEL: u64 = 1 << 15;
const RTE_MASKED: u64 = 1 << 16;
const RTE_DELIVERY_STATUS: u64 = 1 << 12;
/// What software may write: vector, delivery mode, destination mode, polarity, trigger, mask, and the
/// destination field.
const RTE_WRITABLE: u64 = 0xff00_0000_0001_afff;

const DELIVERY_LOWEST_PRIORITY: u64 = 1;
const DELIVERY_EXTINT: u64 = 7;

/// A redirection table entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Redirection(u64);

impl Redirection {
    const fn vector(self) -> u8 {
        self.0 as u8
    }
    const fn delivery_mode(self) -> u64 {
        (self.0 >> 8) & 7
    }
    const fn is_logical(self) -> bool {
        self.0 & (1 << 11) != 0
    }
    const fn is_level(self) -> bool {
        self.0 & RTE_LEVEL != 0
    }
    const fn is_masked(self) -> bool {
        self.0 & RTE_MASKED != 0
    }
    const fn remote_irr(self) -> bool {
        self.0 & RTE_REMOTE_IRR != 0
    }
    const fn destination(self) -> u64 {
        self.0 >> 56
    }

    /// The message this entry sends, in the format of Intel SDM vol. 3, 11.11.
    fn message(self) -> Option<MsiMessage> {
        // The PIC's INTR goes to vCPU 0 directly; an ExtINT entry must not deliver it twice.
        if self.is_masked() || self.delivery_mode() == DELIVERY_EXTINT {
            return None;
        }
        let mut address = 0xfee0_0000 | self.destination() << 12;
        if self.is_logical() {
            address |= 1 << 2;
        }
        if self.delivery_mode() == DELIVERY_LOWEST_PRIORITY {
            address |= 1 << 3;
        }
        let mut data = u32::from(self.vector()) | (self.delivery_mode() as u32) << 8;
        if self.is_level() {
            data |= 1 << 15 | 1 << 14;
        }
        Some(MsiMessage { address, data })
    }
}

/// Everything that changes in an [`IoApic`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    id: u8,
    select: u8,
    /// The pins as they stand, one bit each.
    pins: u32,
    redirections: [Redirection; IOAPIC_PINS],
}

impl IoApicState {
    fn new(id: u8) -> Self {
        Self {
            id,
            select: 0,
            pins: 0,
            redirections: [Redirection(RTE_MASKED); IOAPIC_PINS],
        }
    }

    fn read_register(&self, register: u8) -> u32 {
        match register {
            REG_ID | REG_ARBITRATION => u32::from(self.id) << 24,
            REG_VERSION => VERSION | (IOAPIC_PINS as u32 - 1) << 16,
            _ => self
                .redirections
                .get(usize::from(register.wrapping_sub(REG_REDIRECTION) / 2))
                .filter(|_| register >= REG_REDIRECTION)
                .map_or(0, |entry| (entry.0 >> (32 * (register & 1))) as u32),
        }
    }
}

/// 24 interrupt inputs, each with a redirection entry that says which message it becomes.
pub struct IoApic {
    sink: Arc<dyn MsiSink>,
    state: Mutex<IoApicState>,
}

impl IoApic {
    /// Bytes of address space the registers take.
    pub const MMIO_LEN: u64 = 0x1000;

    /// An I/O APIC as at power-on, all entries masked.
    pub fn new(id: u8, sink: Arc<dyn MsiSink>) -> Arc<Self> {
        Arc::new(Self {
            sink,
            state: Mutex::new(IoApicState::new(id)),
        })
    }

    /// Sends the pin's message if its state calls for one.
    fn deliver(&self, state: &mut IoApicState, pin: usize, edge: bool) {
        let Some(entry) = state.redirections.get_mut(pin) else {
            return;
        };
        if entry.is_level() {
            if state.pins & (1 << pin) == 0 || entry.remote_irr() {
                return;
            }
        } else if !edge {
            return;
        }
        let Some(message) = entry.message() else {
            return;
        };
        if entry.is_level() {
            entry.0 |= RTE_REMOTE_IRR;
        }
        self.sink.send(message.address, message.data);
    }

    /// Drives an input pin. An edge on a masked pin is lost, as the data sheet has it.
    pub fn set_pin(&self, pin: u32, asserted: bool) {
        if pin as usize >= IOAPIC_PINS {
            return;
        }
        let mut state = self.state.lock();
        let bit = 1 << pin;
        let was = state.pins & bit != 0;
        if asserted {
            state.pins |= bit;
            self.deliver(&mut state, pin as usize, !was);
        } else {
            state.pins &= !bit;
        }
    }

    /// A local APIC broadcast the end of a level-triggered interrupt with this vector.
    pub fn eoi(&self, vector: u8) {
        let mut state = self.state.lock();
        for pin in 0..IOAPIC_PINS {
            let entry = &mut state.redirections[pin];
            if entry.is_level() && entry.remote_irr() && entry.vector() == vector {
                entry.0 &= !RTE_REMOTE_IRR;
                self.deliver(&mut state, pin, false);
            }
        }
    }

    /// The vectors of level-triggered interrupts that were sent and whose end was not heard of yet.
    pub fn unfinished(&self) -> Vec<u8> {
        let state = self.state.lock();
        let entries = state.redirections.iter();
        let waiting = entries.filter(|entry| entry.is_level() && entry.remote_irr());
        waiting.map(|entry| entry.vector()).collect()
    }

    /// Reads an indirect register.
    pub fn read_register(&self, register: u8) -> u32 {
        self.state.lock().read_register(register)
    }

    /// Writes an indirect register.
    pub fn write_register(&self, register: u8, value: u32) {
        let mut state = self.state.lock();
        if register == REG_ID {
            state.id = (value >> 24) as u8 & 0x0f;
            return;
        }
        let pin = usize::from(register.wrapping_sub(REG_REDIRECTION) / 2);
        if register < REG_REDIRECTION || pin >= IOAPIC_PINS {
            return;
        }
        let entry = &mut state.redirections[pin];
        let old = *entry;
        let shift = 32 * (register & 1);
        let written = u64::from(value) << shift;
        let writable = RTE_WRITABLE & (u64::from(u32::MAX) << shift);
        entry.0 = (entry.0 & !writable) | (written & writable);
        if !entry.is_level() {
            // Switching to edge and back is how software clears a stuck remote IRR.
            entry.0 &= !RTE_REMOTE_IRR;
        }
        let new = *entry;
        if old.message() != new.message() {
            self.sink.route_changed(pin as u32, new.message());
        }
        self.deliver(&mut state, pin, false);
    }

    /// Goes back to power-on; the pins keep their levels.
    pub fn reset(&self) {
        let mut state = self.state.lock();
        let mut fresh = IoApicState::new(state.id);
        fresh.pins = state.pins;
        *state = fresh;
        for pin in 0..IOAPIC_PINS as u32 {
            self.sink.route_changed(pin, None);
        }
    }

    /// The state for a snapshot.
    pub fn save(&self) -> IoApicState {
        self.state.lock().clone()
    }

    /// Puts a saved state back and announces its routes.
    pub fn restore(&self, saved: IoApicState) -> Result<(), StateError> {
        let IoApicState {
            id,
            select: _,
            pins,
            redirections,
        } = &saved;
        require(*id < 16, "ioapic", "the identifier has more than four bits")?;
        require(
            *pins >> IOAPIC_PINS == 0,
            "ioapic",
            "a pin beyond the last is asserted",
        )?;
        let known = RTE_WRITABLE | RTE_REMOTE_IRR | RTE_DELIVERY_STATUS;
        let fits = redirections.iter().all(|entry| entry.0 & !known == 0);
        require(fits, "ioapic", "a redirection entry has reserved bits set")?;
        let mut state = self.state.lock();
        *state = saved;
        for (pin, entry) in state.redirections.iter().enumerate() {
            self.sink.route_changed(pin as u32, entry.message());
        }
        Ok(())
    }
}

impl MmioDevice for IoApic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset & !3 {
            IOREGSEL => u32::from(self.state.lock().select),
            IOWIN => {
                let state = self.state.lock();
                state.read_register(state.select)
            }
            _ => 0,
        };
        let bytes = value.to_le_bytes();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get((offset & 3) as usize + i).copied().unwrap_or(0);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // The registers take 32-bit accesses; a shorter write of the low byte is common for the
        // select register and is taken as zero-extended.
        let mut bytes = [0; 4];
        let len = data.len().min(4);
        bytes[..len].copy_from_slice(&data[..len]);
        let value = u32::from_le_bytes(bytes);
        match offset {
            IOREGSEL => self.state.lock().select = value as u8,
            IOWIN => {
                let select = self.state.lock().select;
                self.write_register(select, value);
            }
            EOI => self.eoi(value as u8),
            _ => {}
        }
    }
}

impl std::fmt::Debug for IoApic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IoApic")
            .field("state", &*self.state.lock())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::testing::MsiLog;

    fn rig() -> (Arc<MsiLog>, Arc<IoApic>) {
        let log = Arc::new(MsiLog::default());
        (log.clone(), IoApic::new(1, log))
    }

    fn window(io: &IoApic, register: u8) -> u32 {
        let mut data = [0; 4];
        io.write(IOREGSEL, &[register, 0, 0, 0]);
        MmioDevice::read(io, IOWIN, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn identity_registers() {
        let (_, io) = rig();
        assert_eq!(window(&io, 0), 1 << 24);
        assert_eq!(window(&io, 1), 0x0017_0020);
        assert_eq!(window(&io, 0x10), RTE_MASKED as u32);
        assert_eq!(window(&io, 0x40), 0);
        io.write(IOREGSEL, &[0]);
        io.write(IOWIN, &0xff00_0000u32.to_le_bytes());
        assert_eq!(window(&io, 0), 0x0f00_0000);
    }

    #[test]
    fn edge_sends_once_per_edge_and_is_lost_when_masked() {
        let (log, io) = rig();
        io.set_pin(3, true);
        io.set_pin(3, false);
        io.write_register(0x17, 0x0200_0000);
        io.write_register(0x16, 0x0931);
        assert!(log.0.lock().is_empty());
        io.set_pin(3, true);
        io.set_pin(3, true);
        let expected = MsiMessage {
            address: 0xfee0_200c,
            data: 0x131,
        };
        assert_eq!(*log.0.lock(), [expected]);
        io.set_pin(3, false);
        io.set_pin(3, true);
        assert_eq!(log.0.lock().len(), 2);
    }

    #[test]
    fn level_holds_remote_irr_until_eoi() {
        let (log, io) = rig();
        io.set_pin(20, true);
        io.write_register(0x10 + 40, 0x8045);
        assert_eq!(
            *log.0.lock(),
            [MsiMessage {
                address: 0xfee0_0000,
                data: 0xc045
            }]
        );
        assert_eq!(io.read_register(0x10 + 40), 0xc045);
        io.set_pin(20, false);
        io.set_pin(20, true);
        assert_eq!(log.0.lock().len(), 1);
        io.write(EOI, &[0x45, 0, 0, 0]);
        assert_eq!(log.0.lock().len(), 2, "still asserted");
        io.set_pin(20, false);
        io.eoi(0x46);
        assert_ne!(
            io.read_register(0x10 + 40) & RTE_REMOTE_IRR as u32,
            0,
            "other vector"
        );
        io.eoi(0x45);
        assert_eq!(io.read_register(0x10 + 40) & RTE_REMOTE_IRR as u32, 0);
        assert_eq!(log.0.lock().len(), 2);
    }

    #[test]
    fn switching_to_edge_clears_remote_irr_and_guest_cannot_set_it() {
        let (_, io) = rig();
        io.write_register(0x10, 0xc045);
        assert_eq!(io.read_register(0x10), 0x8045);
        io.set_pin(0, true);
        assert_eq!(io.read_register(0x10), 0xc045);
        io.write_register(0x10, 0x1_0045);
        assert_eq!(io.read_register(0x10), 0x1_0045);
    }

    #[test]
    fn state_round_trip_and_refusal() {
        let (_, io) = rig();
        io.write_register(0x10 + 40, 0x8045);
        io.set_pin(20, true);
        let saved = io.save();
        let (log, other) = rig();
        other.restore(saved.clone()).unwrap();
        // The device drives its line again after a restore: not a new interrupt.
        other.set_pin(20, true);
        assert!(log.0.lock().is_empty());
        assert_eq!(other.save(), saved);
        let mut bad = saved;
        bad.redirections[3] = Redirection(1 << 40);
        assert!(other.restore(bad).is_err());
    }
}
