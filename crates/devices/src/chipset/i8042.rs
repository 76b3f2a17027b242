//! The i8042 keyboard controller, as far as a machine without a keyboard needs it.
//!
//! Operating systems reset the machine through it and probe it at boot. It answers its own commands
//! truthfully and behaves as a controller with nothing plugged into either port: bytes for a device
//! time out at once instead of leaving the driver to wait.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::bus::PortDevice;
use crate::events::{MachineEvent, MachineEvents, ResetSource};
use crate::irq::IrqLine;
use crate::state::{StateError, require};

const DATA: u16 = 0;
const STATUS_COMMAND: u16 = 4;

const STATUS_OUTPUT_FULL: u8 = 0x01;
const STATUS_SYSTEM: u8 = 0x04;
const STATUS_COMMAND_LAST: u8 = 0x08;
const STATUS_UNLOCKED: u8 = 0x10;
const STATUS_AUX_DATA: u8 = 0x20;
const STATUS_TIMEOUT: u8 = 0x40;

const CONFIG_KEYBOARD_IRQ: u8 = 0x01;
const CONFIG_AUX_IRQ: u8 = 0x02;
const CONFIG_SYSTEM: u8 = 0x04;
const CONFIG_KEYBOARD_OFF: u8 = 0x10;
const CONFIG_AUX_OFF: u8 = 0x20;

/// What a device that isn't there answers: "resend", with the time-out status.
const NO_DEVICE: u8 = 0xfe;
/// A20 open, no reset asserted.
const OUTPUT_PORT: u8 = 0x03;
const OUTPUT_PORT_NOT_RESET: u8 = 0x01;

/// One byte for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Output {
    value: u8,
    aux: bool,
    timeout: bool,
}

/// Everything that changes in an [`I8042`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {
    config: u8,
    /// The controller's internal RAM, byte 0 aside, which is `config`.
    ram: [u8; 32],
    output_port: u8,
    /// The command whose data byte is awaited.
    awaiting: Option<u8>,
    command_last: bool,
    output: VecDeque<Output>,
}

/// The queue never holds more: a reply is one byte, and a guest that doesn't read loses the oldest.
const MAX_OUTPUT: usize = 16;

impl I8042State {
    const fn new() -> Self {
        Self {
            config: CONFIG_SYSTEM | CONFIG_KEYBOARD_OFF | CONFIG_AUX_OFF,
            ram: [0; 32],
            output_port: OUTPUT_PORT,
            awaiting: None,
            command_last: true,
            output: VecDeque::new(),
        }
    }

    fn reply(&mut self, value: u8) {
        self.push(Output {
            value,
            aux: false,
            timeout: false,
        });
    }

    fn push(&mut self, output: Output) {
        if self.output.len() == MAX_OUTPUT {
            self.output.pop_front();
        }
        self.output.push_back(output);
    }

    fn status(&self) -> u8 {
        let mut status = STATUS_UNLOCKED | STATUS_SYSTEM & self.config;
        if self.command_last {
            status |= STATUS_COMMAND_LAST;
        }
        if let Some(next) = self.output.front() {
            status |= STATUS_OUTPUT_FULL;
            if next.aux {
                status |= STATUS_AUX_DATA;
            }
            if next.timeout {
                status |= STATUS_TIMEOUT;
            }
        }
        status
    }

    /// Returns whether the guest asked for a reset.
    fn command(&mut self, command: u8) -> bool {
        self.command_last = true;
        self.awaiting = None;
        match command {
            0x20 => self.reply(self.config),
            0x21..=0x3f => self.reply(self.ram[usize::from(command & 0x1f)]),
            0x60..=0x7f | 0xd1..=0xd4 => self.awaiting = Some(command),
            0xa7 => self.config |= CONFIG_AUX_OFF,
            0xa8 => self.config &= !CONFIG_AUX_OFF,
            // Interface tests pass: the ports work, only nothing is plugged in.
            0xa9 | 0xab => self.reply(0x00),
            0xaa => {
                self.output.clear();
                self.reply(0x55);
            }
            0xad => self.config |= CONFIG_KEYBOARD_OFF,
            0xae => self.config &= !CONFIG_KEYBOARD_OFF,
            0xc0 => self.reply(0x80),
            0xd0 => self.reply(self.output_port),
            // 0xF0-0xFF pulse the output port's low bits that are 0; bit 0 is the reset line.
            0xf0..=0xff => return command & 1 == 0,
            _ => {}
        }
        false
    }

    fn data(&mut self, value: u8) -> bool {
        self.command_last = false;
        match self.awaiting.take() {
            Some(0x60) => self.config = value,
            Some(command @ 0x61..=0x7f) => self.ram[usize::from(command & 0x1f)] = value,
            Some(0xd1) => {
                self.output_port = value | 0x02;
                return value & OUTPUT_PORT_NOT_RESET == 0;
            }
            // Loop-back of a byte as if a device had sent it.
            Some(0xd2) => self.reply(value),
            Some(0xd3) => self.push(Output {
                value,
                aux: true,
                timeout: false,
            }),
            Some(0xd4) => self.push(Output {
                value: NO_DEVICE,
                aux: true,
                timeout: true,
            }),
            _ => {
                self.config &= !CONFIG_KEYBOARD_OFF;
                self.push(Output {
                    value: NO_DEVICE,
                    aux: false,
                    timeout: true,
                });
            }
        }
        false
    }
}

/// The controller at ports 0x60 and 0x64, on IRQ 1 and IRQ 12.
pub struct I8042 {
    keyboard_irq: IrqLine,
    aux_irq: IrqLine,
    events: Arc<dyn MachineEvents>,
    state: Mutex<I8042State>,
}

impl I8042 {
    /// The data port; add one port here and one at [`Self::COMMAND_PORT`].
    pub const DATA_PORT: u16 = 0x60;
    /// The status and command port.
    pub const COMMAND_PORT: u16 = 0x64;

    /// A controller after its power-on self-test.
    pub fn new(
        keyboard_irq: IrqLine,
        aux_irq: IrqLine,
        events: Arc<dyn MachineEvents>,
    ) -> Arc<Self> {
        Arc::new(Self {
            keyboard_irq,
            aux_irq,
            events,
            state: Mutex::new(I8042State::new()),
        })
    }

    fn sync(&self, state: &I8042State) {
        let next = state.output.front();
        let wants = |aux: bool, enable: u8| {
            state.config & enable != 0 && next.is_some_and(|output| output.aux == aux)
        };
        self.keyboard_irq.set(wants(false, CONFIG_KEYBOARD_IRQ));
        self.aux_irq.set(wants(true, CONFIG_AUX_IRQ));
    }

    fn read_byte(&self, port: u16) -> u8 {
        let mut state = self.state.lock();
        if port == STATUS_COMMAND {
            return state.status();
        }
        let value = state.output.pop_front().map_or(0, |output| output.value);
        // A further byte is a new edge.
        self.keyboard_irq.set(false);
        self.aux_irq.set(false);
        self.sync(&state);
        value
    }

    fn write_byte(&self, port: u16, value: u8) {
        let mut state = self.state.lock();
        let reset = if port == STATUS_COMMAND {
            state.command(value)
        } else {
            state.data(value)
        };
        self.sync(&state);
        drop(state);
        if reset {
            self.events
                .notify(MachineEvent::Reset(ResetSource::KeyboardController));
        }
    }

    /// Goes back to power-on.
    pub fn reset(&self) {
        let mut state = self.state.lock();
        *state = I8042State::new();
        self.sync(&state);
    }

    /// The state for a snapshot.
    pub fn save(&self) -> I8042State {
        self.state.lock().clone()
    }

    /// Puts a saved state back.
    pub fn restore(&self, saved: I8042State) -> Result<(), StateError> {
        let I8042State {
            config: _,
            ram: _,
            output_port: _,
            awaiting: _,
            command_last: _,
            output,
        } = &saved;
        require(
            output.len() <= MAX_OUTPUT,
            "i8042",
            "the output queue is too long",
        )?;
        let mut state = self.state.lock();
        *state = saved;
        self.sync(&state);
        Ok(())
    }

    /// The device of port 0x60.
    pub fn data_port(self: &Arc<Self>) -> Arc<dyn PortDevice> {
        Arc::new(Port {
            controller: self.clone(),
            port: DATA,
        })
    }

    /// The device of port 0x64.
    pub fn command_port(self: &Arc<Self>) -> Arc<dyn PortDevice> {
        Arc::new(Port {
            controller: self.clone(),
            port: STATUS_COMMAND,
        })
    }
}

impl std::fmt::Debug for I8042 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("I8042")
            .field("state", &*self.state.lock())
            .finish()
    }
}

struct Port {
    controller: Arc<I8042>,
    port: u16,
}

impl PortDevice for Port {
    fn read(&self, _offset: u16, data: &mut [u8]) {
        if let Some(byte) = data.first_mut() {
            *byte = self.controller.read_byte(self.port);
        }
    }

    fn write(&self, _offset: u16, data: &[u8]) {
        if let Some(byte) = data.first() {
            self.controller.write_byte(self.port, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::testing::EventLog;
    use crate::irq::testing::LineProbe;

    struct Rig {
        log: Arc<EventLog>,
        keyboard: Arc<LineProbe>,
        data: Arc<dyn PortDevice>,
        command: Arc<dyn PortDevice>,
        controller: Arc<I8042>,
    }

    fn rig() -> Rig {
        let log = Arc::new(EventLog::default());
        let (keyboard, irq) = LineProbe::new();
        let controller = I8042::new(irq, IrqLine::unconnected(), log.clone());
        Rig {
            log,
            keyboard,
            data: controller.data_port(),
            command: controller.command_port(),
            controller,
        }
    }

    fn read(port: &Arc<dyn PortDevice>) -> u8 {
        let mut data = [0];
        port.read(0, &mut data);
        data[0]
    }

    #[test]
    fn reset_commands_reach_the_machine() {
        let r = rig();
        r.command.write(0, &[0xfe]);
        r.command.write(0, &[0xff]);
        r.command.write(0, &[0xd1]);
        r.data.write(0, &[0xfe]);
        let reset = MachineEvent::Reset(ResetSource::KeyboardController);
        assert_eq!(*r.log.0.lock(), [reset, reset]);
    }

    #[test]
    fn self_test_and_configuration() {
        let r = rig();
        r.command.write(0, &[0xaa]);
        assert_eq!(read(&r.command) & STATUS_OUTPUT_FULL, STATUS_OUTPUT_FULL);
        assert_eq!(read(&r.data), 0x55);
        assert_eq!(read(&r.command) & STATUS_OUTPUT_FULL, 0);
        r.command.write(0, &[0x60]);
        r.data.write(0, &[0x47]);
        r.command.write(0, &[0x20]);
        assert_eq!(read(&r.data), 0x47);
        assert_eq!(r.keyboard.edges(), 1, "replies interrupt once enabled");
    }

    #[test]
    fn absent_devices_time_out() {
        let r = rig();
        r.data.write(0, &[0xf2]);
        assert_eq!(read(&r.command) & 0x41, 0x41);
        assert_eq!(read(&r.data), NO_DEVICE);
        r.command.write(0, &[0xd4]);
        r.data.write(0, &[0xff]);
        assert_eq!(read(&r.command) & 0x61, 0x61);
        assert_eq!(read(&r.data), NO_DEVICE);
    }

    #[test]
    fn output_is_bounded_and_restorable() {
        let r = rig();
        for _ in 0..100 {
            r.command.write(0, &[0xab]);
        }
        let saved = r.controller.save();
        assert_eq!(saved.output.len(), MAX_OUTPUT);
        r.controller.reset();
        r.controller.restore(saved.clone()).unwrap();
        assert_eq!(r.controller.save(), saved);
    }
}
