//! The two cascaded 8259A interrupt controllers of a PC (Intel 8259A data sheet, order 231468),
//! with the edge/level control registers of the PIIX (ports 0x4D0 and 0x4D1).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::bus::PortDevice;
use crate::irq::ExtIntSink;
use crate::state::{StateError, require};

/// Inputs whose trigger mode is fixed to edge: timer, keyboard, cascade on the master.
const MASTER_EDGE_ONLY: u8 = 0b0000_0111;
/// RTC and FPU error on the slave.
const SLAVE_EDGE_ONLY: u8 = 0b0010_0001;
/// The master's input that the slave drives.
const CASCADE: u8 = 2;

/// Which command word the data port expects next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
enum Init {
    #[default]
    Done,
    Icw2,
    Icw3,
    Icw4,
}

/// One 8259A.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
struct Chip {
    /// Interrupt request register: latched edges and live levels.
    irr: u8,
    /// In-service register.
    isr: u8,
    /// Interrupt mask register.
    imr: u8,
    /// The input pins as they stand.
    pins: u8,
    /// Edge/level control: a set bit makes the input level triggered.
    elcr: u8,
    /// ICW2: the vector of input 0.
    base: u8,
    /// The input with the lowest priority.
    lowest: u8,
    init: Init,
    /// ICW1 announced an ICW4.
    expects_icw4: bool,
    /// ICW1 said that there is no cascade, hence no ICW3.
    single: bool,
    auto_eoi: bool,
    rotate_on_aeoi: bool,
    special_fully_nested: bool,
    special_mask: bool,
    read_isr: bool,
    poll: bool,
}

impl Chip {
    fn new() -> Self {
        Self {
            lowest: 7,
            ..Self::default()
        }
    }

    /// 0 is the highest priority.
    fn priority(&self, input: u8) -> u8 {
        input.wrapping_sub(self.lowest + 1) & 7
    }

    fn highest(&self, set: u8) -> Option<u8> {
        (0..8)
            .filter(|n| set & (1 << n) != 0)
            .min_by_key(|n| self.priority(*n))
    }

    /// The input that INTR stands for, if any.
    fn pending(&self, master: bool) -> Option<u8> {
        let request = self.highest(self.irr & !self.imr)?;
        let mut blocking = self.isr;
        if self.special_mask {
            blocking &= !self.imr;
        }
        if self.special_fully_nested && master {
            // A higher request of the slave may interrupt a lower one of the slave.
            blocking &= !(1 << CASCADE);
        }
        match self.highest(blocking) {
            Some(busy) if self.priority(busy) <= self.priority(request) => None,
            _ => Some(request),
        }
    }

    fn set_pin(&mut self, input: u8, asserted: bool) {
        let bit = 1 << input;
        let was = self.pins & bit != 0;
        if asserted {
            self.pins |= bit;
        } else {
            self.pins &= !bit;
        }
        if self.elcr & bit != 0 {
            self.irr = (self.irr & !bit) | (self.pins & bit);
        } else if asserted && !was {
            // A pulse stays latched although the data sheet wants the pin high until the acknowledge:
            // a virtual device's edges are often shorter than the guest's way to its handler.
            self.irr |= bit;
        }
    }

    /// Puts `input` into service as the INTA cycle does.
    fn begin_service(&mut self, input: u8) {
        let bit = 1 << input;
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
        if self.auto_eoi {
            if self.rotate_on_aeoi {
                self.lowest = input;
            }
        } else {
            self.isr |= bit;
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            self.write_icw1(value);
        } else if value & 0x08 != 0 {
            self.write_ocw3(value);
        } else {
            self.write_ocw2(value);
        }
    }

    fn write_icw1(&mut self, value: u8) {
        // The edge sense circuit is reset, so a pin must rise anew; level inputs show through.
        self.irr = self.pins & self.elcr;
        self.isr = 0;
        self.imr = 0;
        self.lowest = 7;
        self.special_mask = false;
        self.read_isr = false;
        self.poll = false;
        self.single = value & 0x02 != 0;
        self.expects_icw4 = value & 0x01 != 0;
        if !self.expects_icw4 {
            self.write_icw4(0);
        }
        self.init = Init::Icw2;
    }

    fn write_icw4(&mut self, value: u8) {
        self.auto_eoi = value & 0x02 != 0;
        self.special_fully_nested = value & 0x10 != 0;
        if !self.auto_eoi {
            self.rotate_on_aeoi = false;
        }
    }

    fn write_ocw2(&mut self, value: u8) {
        let level = value & 7;
        let rotate = value & 0x80 != 0;
        let specific = value & 0x40 != 0;
        let eoi = value & 0x20 != 0;
        let in_service = if self.special_mask {
            self.isr & !self.imr
        } else {
            self.isr
        };
        let target = if specific {
            Some(level)
        } else {
            self.highest(in_service)
        };
        match (eoi, rotate, specific) {
            (true, _, _) => {
                if let Some(input) = target {
                    self.isr &= !(1 << input);
                    if rotate {
                        self.lowest = input;
                    }
                }
            }
            (false, true, true) => self.lowest = level,
            (false, _, false) => self.rotate_on_aeoi = rotate,
            (false, false, true) => {}
        }
    }

    fn write_ocw3(&mut self, value: u8) {
        if value & 0x40 != 0 {
            self.special_mask = value & 0x20 != 0;
        }
        if value & 0x04 != 0 {
            self.poll = true;
        } else if value & 0x02 != 0 {
            self.read_isr = value & 0x01 != 0;
        }
    }

    fn write_data(&mut self, value: u8) {
        match self.init {
            Init::Done => self.imr = value,
            Init::Icw2 => {
                self.base = value & 0xf8;
                self.init = match (self.single, self.expects_icw4) {
                    (false, _) => Init::Icw3,
                    (true, true) => Init::Icw4,
                    (true, false) => Init::Done,
                };
            }
            // The cascade wiring of a PC is fixed: what the guest says of it changes nothing.
            Init::Icw3 => {
                self.init = if self.expects_icw4 {
                    Init::Icw4
                } else {
                    Init::Done
                };
            }
            Init::Icw4 => {
                self.write_icw4(value);
                self.init = Init::Done;
            }
        }
    }
}

/// Everything that changes in a [`DualPic`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PicState {
    master: Chip,
    slave: Chip,
}

impl PicState {
    fn pending(&mut self) -> Option<u8> {
        let slave = self.slave.pending(false).is_some();
        // The slave's INTR output is a level as far as the master's request register is concerned.
        let bit = 1 << CASCADE;
        self.master.irr = (self.master.irr & !bit) | if slave { bit } else { 0 };
        self.master.pending(true)
    }

    fn acknowledge(&mut self) -> u8 {
        let Some(input) = self.pending() else {
            // No request left when the CPU asks: input 7's vector, without entering service.
            return self.master.base | 7;
        };
        self.master.begin_service(input);
        if input != CASCADE {
            return self.master.base | input;
        }
        match self.slave.pending(false) {
            Some(input) => {
                self.slave.begin_service(input);
                self.slave.base | input
            }
            None => self.slave.base | 7,
        }
    }

    fn chip(&mut self, master: bool) -> &mut Chip {
        if master {
            &mut self.master
        } else {
            &mut self.slave
        }
    }

    /// The poll command stands in for the INTA cycle.
    fn poll(&mut self, master: bool) -> u8 {
        self.pending();
        let chip = self.chip(master);
        chip.poll = false;
        match chip.pending(master) {
            Some(input) => {
                chip.begin_service(input);
                0x80 | input
            }
            None => 0,
        }
    }
}

/// The PIC pair: 15 inputs, one INTR output to vCPU 0.
pub struct DualPic {
    output: Arc<dyn ExtIntSink>,
    /// INTR as it stands, readable without the lock.
    intr: AtomicBool,
    state: Mutex<PicState>,
}

impl DualPic {
    /// First port of the master.
    pub const MASTER_PORT: u16 = 0x20;
    /// First port of the slave.
    pub const SLAVE_PORT: u16 = 0xa0;
    /// First of the two edge/level control registers.
    pub const ELCR_PORT: u16 = 0x4d0;

    /// A PIC pair as at power-on: nothing initialised, everything masked.
    pub fn new(output: Arc<dyn ExtIntSink>) -> Arc<Self> {
        Arc::new(Self {
            output,
            intr: AtomicBool::new(false),
            state: Mutex::new(Self::power_on()),
        })
    }

    fn power_on() -> PicState {
        let mut state = PicState {
            master: Chip::new(),
            slave: Chip::new(),
        };
        // Masked until initialised: ICW1 clears the masks.
        state.master.imr = 0xff;
        state.slave.imr = 0xff;
        state
    }

    fn change<T>(&self, act: impl FnOnce(&mut PicState) -> T) -> T {
        let mut state = self.state.lock();
        let result = act(&mut state);
        let intr = state.pending().is_some();
        let was = self.intr.swap(intr, Ordering::SeqCst);
        drop(state);
        if intr != was {
            self.output.intr_changed();
        }
        result
    }

    /// Drives ISA interrupt `irq` (0–15). IRQ 2 is the cascade and has no pin.
    pub fn set_irq(&self, irq: u8, asserted: bool) {
        if irq < 16 && irq != CASCADE {
            self.change(|state| state.chip(irq < 8).set_pin(irq & 7, asserted));
        }
    }

    /// Whether INTR is asserted.
    pub fn intr_pending(&self) -> bool {
        self.intr.load(Ordering::SeqCst)
    }

    /// Runs the INTA cycle and returns the vector.
    pub fn ack(&self) -> u8 {
        self.change(PicState::acknowledge)
    }

    /// Goes back to power-on; the input pins keep their levels.
    pub fn reset(&self) {
        self.change(|state| {
            let (master, slave) = (state.master.pins, state.slave.pins);
            *state = Self::power_on();
            state.master.pins = master;
            state.slave.pins = slave;
        });
    }

    /// The state for a snapshot.
    pub fn save(&self) -> PicState {
        self.state.lock().clone()
    }

    /// Puts a saved state back.
    pub fn restore(&self, saved: PicState) -> Result<(), StateError> {
        let PicState { master, slave } = &saved;
        for chip in [master, slave] {
            require(
                chip.lowest < 8,
                "pic",
                "the lowest-priority input is not one of eight",
            )?;
            require(
                chip.base & 7 == 0,
                "pic",
                "the vector base is not a multiple of eight",
            )?;
        }
        self.change(|state| *state = saved);
        Ok(())
    }

    /// The port device of one chip's two ports.
    pub fn ports(self: &Arc<Self>, chip: PicChip) -> Arc<dyn PortDevice> {
        Arc::new(PicPorts {
            pic: self.clone(),
            chip,
        })
    }
}

impl std::fmt::Debug for DualPic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DualPic")
            .field("state", &*self.state.lock())
            .finish()
    }
}

/// Which ports of a [`DualPic`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PicChip {
    /// Command and data port of the master.
    Master,
    /// Command and data port of the slave.
    Slave,
    /// The two edge/level control registers.
    EdgeLevel,
}

struct PicPorts {
    pic: Arc<DualPic>,
    chip: PicChip,
}

impl PicPorts {
    fn read_byte(&self, offset: u16) -> u8 {
        let master = self.chip == PicChip::Master;
        if self.chip == PicChip::EdgeLevel {
            return self.pic.state.lock().chip(offset == 0).elcr;
        }
        self.pic.change(|state| {
            if state.chip(master).poll {
                return state.poll(master);
            }
            state.pending();
            let chip = state.chip(master);
            match (offset, chip.read_isr) {
                (0, false) => chip.irr,
                (0, true) => chip.isr,
                _ => chip.imr,
            }
        })
    }

    fn write_byte(&self, offset: u16, value: u8) {
        self.pic.change(|state| match (self.chip, offset) {
            (PicChip::EdgeLevel, 0) => set_elcr(&mut state.master, value & !MASTER_EDGE_ONLY),
            (PicChip::EdgeLevel, _) => set_elcr(&mut state.slave, value & !SLAVE_EDGE_ONLY),
            (chip, 0) => state.chip(chip == PicChip::Master).write_command(value),
            (chip, _) => state.chip(chip == PicChip::Master).write_data(value),
        });
    }
}

fn set_elcr(chip: &mut Chip, value: u8) {
    let to_level = value & !chip.elcr;
    let to_edge = chip.elcr & !value;
    chip.elcr = value;
    chip.irr = (chip.irr & !to_edge & !to_level) | (chip.pins & to_level);
}

impl PortDevice for PicPorts {
    fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.read_byte(offset + i as u16);
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            self.write_byte(offset + i as u16, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::testing::NoExtInt;

    struct Rig {
        pic: Arc<DualPic>,
        master: Arc<dyn PortDevice>,
        slave: Arc<dyn PortDevice>,
        elcr: Arc<dyn PortDevice>,
    }

    fn rig() -> Rig {
        let pic = DualPic::new(Arc::new(NoExtInt));
        let rig = Rig {
            master: pic.ports(PicChip::Master),
            slave: pic.ports(PicChip::Slave),
            elcr: pic.ports(PicChip::EdgeLevel),
            pic,
        };
        rig.init(0x01);
        rig
    }

    impl Rig {
        fn init(&self, icw4: u8) {
            for (port, base, icw3) in [(&self.master, 0x20, 4), (&self.slave, 0x28, 2)] {
                port.write(0, &[0x11]);
                port.write(1, &[base]);
                port.write(1, &[icw3]);
                port.write(1, &[icw4]);
                port.write(1, &[0]);
            }
        }
        fn read(&self, port: &Arc<dyn PortDevice>, offset: u16) -> u8 {
            let mut data = [0];
            port.read(offset, &mut data);
            data[0]
        }
    }

    #[test]
    fn power_on_is_silent() {
        let pic = DualPic::new(Arc::new(NoExtInt));
        pic.set_irq(3, true);
        assert!(!pic.intr_pending());
    }

    #[test]
    fn edge_priority_and_eoi() {
        let r = rig();
        r.pic.set_irq(4, true);
        r.pic.set_irq(1, true);
        assert_eq!(r.pic.ack(), 0x21);
        // IRQ 4 waits for the end of IRQ 1.
        assert!(!r.pic.intr_pending());
        r.master.write(0, &[0x20]);
        assert_eq!(r.pic.ack(), 0x24);
        r.master.write(0, &[0x64]);
        // Still high: no new edge.
        assert!(!r.pic.intr_pending());
        r.pic.set_irq(4, false);
        r.pic.set_irq(4, true);
        assert!(r.pic.intr_pending());
    }

    #[test]
    fn cascade_and_spurious() {
        let r = rig();
        r.pic.set_irq(12, true);
        assert!(r.pic.intr_pending());
        assert_eq!(r.pic.ack(), 0x2c);
        r.slave.write(0, &[0x0b]);
        assert_eq!(r.read(&r.slave, 0), 0x10);
        r.master.write(0, &[0x0b]);
        assert_eq!(r.read(&r.master, 0), 0x04);
        // A higher slave input waits in normal nesting because the cascade input is in service.
        r.pic.set_irq(8, true);
        assert!(!r.pic.intr_pending());
        r.slave.write(0, &[0x20]);
        r.master.write(0, &[0x20]);
        assert_eq!(r.pic.ack(), 0x28);
        r.slave.write(0, &[0x20]);
        r.master.write(0, &[0x20]);
        assert_eq!(r.pic.ack(), 0x27, "spurious");
        assert_eq!(
            r.read(&r.master, 0),
            0,
            "a spurious interrupt is not in service"
        );
    }

    #[test]
    fn level_input_follows_its_pin() {
        let r = rig();
        r.elcr.write(0, &[0xff]);
        assert_eq!(
            r.read(&r.elcr, 0),
            0xf8,
            "timer, keyboard and cascade stay edge"
        );
        r.elcr.write(0, &[1 << 5]);
        r.pic.set_irq(5, true);
        assert_eq!(r.pic.ack(), 0x25);
        r.master.write(0, &[0x20]);
        assert!(r.pic.intr_pending(), "still asserted after EOI");
        r.pic.set_irq(5, false);
        assert!(!r.pic.intr_pending());
        assert_eq!(r.pic.ack(), 0x27);
    }

    #[test]
    fn mask_special_mask_and_poll() {
        let r = rig();
        r.pic.set_irq(3, true);
        assert_eq!(r.pic.ack(), 0x23);
        r.pic.set_irq(6, true);
        assert!(!r.pic.intr_pending());
        r.master.write(1, &[1 << 3]);
        r.master.write(0, &[0x68]);
        assert!(
            r.pic.intr_pending(),
            "special mask lets a lower input through"
        );
        r.master.write(0, &[0x0c]);
        assert_eq!(r.read(&r.master, 0), 0x86);
        assert_eq!(r.read(&r.master, 1), 1 << 3);
    }

    #[test]
    fn rotation_and_auto_eoi() {
        let r = rig();
        r.pic.set_irq(0, true);
        assert_eq!(r.pic.ack(), 0x20);
        r.master.write(0, &[0xa0]);
        r.pic.set_irq(0, false);
        r.pic.set_irq(0, true);
        r.pic.set_irq(1, true);
        assert_eq!(r.pic.ack(), 0x21, "input 0 now has the lowest priority");
        r.init(0x03);
        r.pic.set_irq(5, true);
        assert_eq!(r.pic.ack(), 0x25);
        r.master.write(0, &[0x0b]);
        assert_eq!(
            r.read(&r.master, 0),
            0,
            "auto EOI leaves nothing in service"
        );
    }

    #[test]
    fn state_round_trip_and_refusal() {
        let r = rig();
        r.pic.set_irq(4, true);
        let saved = r.pic.save();
        let other = DualPic::new(Arc::new(NoExtInt));
        other.restore(saved.clone()).unwrap();
        assert_eq!(other.save(), saved);
        assert!(other.intr_pending());
        let mut bad = saved;
        bad.slave.lowest = 9;
        assert!(other.restore(bad).is_err());
    }
}
