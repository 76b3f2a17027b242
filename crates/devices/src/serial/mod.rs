//! The 16550A serial port (National Semiconductor PC16550D data sheet), COM1 to COM4.
//!
//! ```text
//! guest OUT ──> transmitter FIFO ──> OutputPump thread ──> sink (any `Write`)
//! guest IN  <── receiver FIFO    <── SerialInput::push / write_all (host thread, back-pressured)
//! ```
//! The line has no speed: a byte written leaves at once unless the sink is slower than the guest, in
//! which case the transmitter stays full, as it would on a slow line. Input that waits in the FIFO is
//! reported at once whatever the trigger level: four character times are over before the guest looks.

mod output;
mod spec;

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};

use crate::bus::PortDevice;
use crate::irq::IrqLine;
use crate::state::{StateError, require};
use output::OutputPump;
use spec::*;

/// First port and ISA interrupt of COM1 to COM4.
pub const COM_PORTS: [(u16, u32); 4] = [(0x3f8, 4), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];

/// A guest that reads the line status this often, though it could send, waits for input.
const LISTENING_POLLS: u8 = 64;

/// Everything that changes in a [`Uart`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UartState {
    divisor: u16,
    ier: u8,
    fifos_on: bool,
    /// Receiver trigger level: 1, 4, 8 or 14.
    trigger: u8,
    lcr: u8,
    mcr: u8,
    /// The error bits of the line status that have not been read.
    errors: u8,
    /// The delta bits of the modem status that have not been read.
    modem_deltas: u8,
    scr: u8,
    received: VecDeque<u8>,
    /// Bytes the sink has had no room for yet.
    transmit: VecDeque<u8>,
    /// The THR-empty interrupt is pending: set when the THR empties or the enable bit rises while it is
    /// empty, cleared by reading it from the IIR or by a write to the THR.
    thr_interrupt: bool,
    /// Reads of the line status since the guest last sent something or could not, up to [`LISTENING_POLLS`].
    idle_polls: u8,
}

impl UartState {
    fn new() -> Self {
        Self {
            divisor: 12,
            ier: 0,
            fifos_on: false,
            trigger: 1,
            lcr: 0,
            mcr: 0,
            errors: 0,
            modem_deltas: 0,
            scr: 0,
            received: VecDeque::new(),
            transmit: VecDeque::new(),
            thr_interrupt: false,
            idle_polls: 0,
        }
    }

    /// Whether the guest takes input: its interrupt is on, or it polls for some. A driver empties the
    /// receiver when it starts, and what came before would be lost. On a PC the interrupt needs OUT2,
    /// which tells a driver that listens from one that tries which bits it can set.
    fn listens(&self) -> bool {
        let interrupt = self.ier & IER_RECEIVED != 0 && self.mcr & MCR_OUT2 != 0;
        !self.looped() && (interrupt || self.idle_polls >= LISTENING_POLLS)
    }

    fn capacity(&self) -> usize {
        if self.fifos_on { FIFO_LEN } else { 1 }
    }

    fn dlab(&self) -> bool {
        self.lcr & LCR_DLAB != 0
    }

    fn looped(&self) -> bool {
        self.mcr & MCR_LOOP != 0
    }

    fn line_status(&self) -> u8 {
        let mut lsr = self.errors;
        if !self.received.is_empty() {
            lsr |= LSR_DATA_READY;
        }
        if self.transmit.is_empty() {
            lsr |= LSR_THR_EMPTY | LSR_TRANSMITTER_EMPTY;
        }
        lsr
    }

    /// The modem inputs: a cable to a ready terminal, or the outputs in loop-back.
    fn modem_inputs(&self) -> u8 {
        if !self.looped() {
            return MSR_CTS | MSR_DSR | MSR_DCD;
        }
        [
            (MCR_RTS, MSR_CTS),
            (MCR_DTR, MSR_DSR),
            (MCR_OUT1, MSR_RI),
            (MCR_OUT2, MSR_DCD),
        ]
        .iter()
        .filter(|(output, _)| self.mcr & output != 0)
        .fold(0, |inputs, (_, input)| inputs | input)
    }

    /// The pending interrupt of the highest priority (data sheet, table IV).
    fn interrupt(&self) -> u8 {
        if self.ier & IER_LINE_STATUS != 0 && self.errors & LSR_ERRORS != 0 {
            IIR_LINE_STATUS
        } else if self.ier & IER_RECEIVED != 0 && !self.received.is_empty() {
            if self.received.len() >= usize::from(self.trigger) || !self.fifos_on {
                IIR_RECEIVED
            } else {
                IIR_TIMEOUT
            }
        } else if self.ier & IER_THR_EMPTY != 0 && self.thr_interrupt {
            IIR_THR_EMPTY
        } else if self.ier & IER_MODEM_STATUS != 0 && self.modem_deltas != 0 {
            IIR_MODEM_STATUS
        } else {
            IIR_NONE
        }
    }

    fn receive(&mut self, byte: u8) {
        if self.received.len() < self.capacity() {
            self.received.push_back(byte);
        } else {
            self.errors |= LSR_OVERRUN;
            // Without FIFOs the new byte replaces the unread one; with them it is lost.
            if !self.fifos_on {
                self.received.clear();
                self.received.push_back(byte);
            }
        }
    }

    fn write_ier(&mut self, value: u8) {
        let rises = value & !self.ier & IER_THR_EMPTY != 0;
        self.ier = value & 0x0f;
        if rises && self.transmit.is_empty() {
            self.thr_interrupt = true;
        }
    }

    fn write_fcr(&mut self, value: u8) {
        self.idle_polls = 0;
        let on = value & FCR_ENABLE != 0;
        // Switching the FIFOs off empties both. Switching them on would, too, but drivers enable the
        // interrupt first: the byte that came in between is kept, as no line is quick enough to lose it.
        let off = self.fifos_on && !on;
        if off || value & FCR_CLEAR_RECEIVER != 0 {
            self.received.clear();
        }
        if (on != self.fifos_on || value & FCR_CLEAR_TRANSMITTER != 0) && !self.transmit.is_empty()
        {
            self.transmit.clear();
            self.thr_interrupt = true;
        }
        self.fifos_on = on;
        self.trigger = match (on, value >> 6) {
            (false, _) | (true, 0) => 1,
            (true, 1) => 4,
            (true, 2) => 8,
            (true, _) => 14,
        };
    }

    fn write_mcr(&mut self, value: u8) {
        let before = self.modem_inputs();
        self.mcr = value & 0x1f;
        let after = self.modem_inputs();
        // CTS, DSR and DCD note any change, RI only its end.
        let changed = (before ^ after) & (MSR_CTS | MSR_DSR | MSR_DCD);
        self.modem_deltas |= (changed | before & !after & MSR_RI) >> 4;
    }
}

struct Shared {
    irq: IrqLine,
    state: Mutex<UartState>,
    /// Tells input threads that the receiver has room.
    room: Condvar,
    pump: Option<OutputPump>,
}

impl Shared {
    /// Moves waiting bytes to the sink, then drives the interrupt line.
    fn sync(&self, state: &mut UartState) {
        if !state.transmit.is_empty() {
            while let Some(byte) = state.transmit.front() {
                if !self.pump.as_ref().is_none_or(|pump| pump.push(*byte)) {
                    break;
                }
                state.transmit.pop_front();
            }
            if state.transmit.is_empty() {
                state.thr_interrupt = true;
            }
        }
        // On a PC, OUT2 gates the interrupt; in loop-back its pin is inactive.
        let gate = state.mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2;
        self.irq.set(gate && state.interrupt() != IIR_NONE);
        if state.listens() && state.received.len() < state.capacity() {
            self.room.notify_all();
        }
    }

    fn transmit(&self, state: &mut UartState, byte: u8) {
        state.thr_interrupt = false;
        state.idle_polls = 0;
        if state.looped() {
            state.receive(byte);
            state.thr_interrupt = true;
        } else {
            if state.transmit.len() >= state.capacity() {
                // Writing to a full transmitter overwrites what is in it.
                state.transmit.pop_back();
            }
            state.transmit.push_back(byte);
        }
    }

    fn read_register(&self, register: u16) -> u8 {
        let mut state = self.state.lock();
        let value = match register {
            DATA if state.dlab() => return state.divisor as u8,
            DATA => state.received.pop_front().unwrap_or(0),
            IER if state.dlab() => return (state.divisor >> 8) as u8,
            IER => return state.ier,
            IIR_FCR => {
                let interrupt = state.interrupt();
                if interrupt == IIR_THR_EMPTY {
                    state.thr_interrupt = false;
                }
                interrupt | if state.fifos_on { IIR_FIFOS_ON } else { 0 }
            }
            LCR => return state.lcr,
            MCR => return state.mcr,
            LSR => {
                let value = state.line_status();
                if value & LSR_THR_EMPTY == 0 {
                    // It waits for the transmitter.
                    state.idle_polls = 0;
                } else if state.idle_polls < LISTENING_POLLS {
                    state.idle_polls += 1;
                } else if state.errors == 0 {
                    return value;
                }
                state.errors = 0;
                value
            }
            MSR => std::mem::take(&mut state.modem_deltas) | state.modem_inputs(),
            SCR => return state.scr,
            _ => return 0xff,
        };
        self.sync(&mut state);
        value
    }

    fn write_register(&self, register: u16, value: u8) {
        let mut state = self.state.lock();
        match register {
            DATA if state.dlab() => state.divisor = state.divisor & 0xff00 | u16::from(value),
            DATA => self.transmit(&mut state, value),
            IER if state.dlab() => {
                state.divisor = state.divisor & 0x00ff | u16::from(value) << 8;
            }
            IER => state.write_ier(value),
            IIR_FCR => state.write_fcr(value),
            LCR => {
                if state.looped() && value & !state.lcr & LCR_BREAK != 0 {
                    state.receive(0);
                    state.errors |= LSR_BREAK;
                }
                state.lcr = value;
            }
            MCR => state.write_mcr(value),
            SCR => state.scr = value,
            // Line and modem status are read-only outside factory tests.
            _ => {}
        }
        self.sync(&mut state);
    }
}

/// One serial port.
pub struct Uart {
    shared: Arc<Shared>,
}

impl Uart {
    /// Ports the device takes.
    pub const LEN: u16 = 8;

    /// A port at power-on. `sink` gets what the guest sends (`None`: it is dropped), on a thread of its
    /// own; `irq` is the port's ISA interrupt.
    pub fn new(irq: IrqLine, sink: Option<Box<dyn Write + Send>>) -> std::io::Result<Arc<Self>> {
        let mut failed = None;
        let shared = Arc::new_cyclic(|this: &Weak<Shared>| {
            let this = this.clone();
            let on_room = Box::new(move || {
                if let Some(shared) = this.upgrade() {
                    shared.sync(&mut shared.state.lock());
                }
            });
            let pump = sink.and_then(|sink| {
                OutputPump::new(sink, on_room)
                    .map_err(|error| failed = Some(error))
                    .ok()
            });
            Shared {
                irq,
                state: Mutex::new(UartState::new()),
                room: Condvar::new(),
                pump,
            }
        });
        match failed {
            Some(error) => Err(error),
            None => Ok(Arc::new(Self { shared })),
        }
    }

    /// The host's end of the receiver.
    pub fn input(&self) -> SerialInput {
        SerialInput {
            shared: self.shared.clone(),
        }
    }

    /// Waits until the sink has everything the guest sent.
    pub fn flush(&self) {
        if let Some(pump) = &self.shared.pump {
            pump.flush();
        }
    }

    /// Goes back to power-on. What was sent still reaches the sink.
    pub fn reset(&self) {
        let mut state = self.shared.state.lock();
        let transmit = std::mem::take(&mut state.transmit);
        *state = UartState {
            transmit,
            ..UartState::new()
        };
        self.shared.sync(&mut state);
        state.thr_interrupt = false;
    }

    /// The state for a snapshot. Output that is on its way to the sink is delivered first.
    pub fn save(&self) -> UartState {
        self.flush();
        self.shared.state.lock().clone()
    }

    /// Puts a saved state back.
    pub fn restore(&self, saved: UartState) -> Result<(), StateError> {
        let UartState {
            divisor: _,
            ier,
            fifos_on: _,
            trigger,
            lcr: _,
            mcr,
            errors: _,
            modem_deltas,
            scr: _,
            received,
            transmit,
            thr_interrupt: _,
            idle_polls: _,
        } = &saved;
        require(
            matches!(trigger, 1 | 4 | 8 | 14),
            "uart",
            "the trigger level does not exist",
        )?;
        require(
            *ier < 0x10 && *mcr < 0x20,
            "uart",
            "reserved register bits are set",
        )?;
        require(
            *modem_deltas < 0x10,
            "uart",
            "reserved modem status bits are set",
        )?;
        let capacity = saved.capacity();
        let fits = received.len() <= capacity && transmit.len() <= capacity;
        require(fits, "uart", "a FIFO holds more than it can")?;
        let mut state = self.shared.state.lock();
        *state = saved;
        self.shared.sync(&mut state);
        Ok(())
    }
}

impl PortDevice for Uart {
    fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.shared.read_register(offset + i as u16);
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            self.shared.write_register(offset + i as u16, *byte);
        }
    }
}

impl std::fmt::Debug for Uart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uart")
            .field("state", &*self.shared.state.lock())
            .finish()
    }
}

/// Feeds a serial port's receiver from the host.
#[derive(Clone)]
pub struct SerialInput {
    shared: Arc<Shared>,
}

impl SerialInput {
    /// Gives the receiver as much of `bytes` as it has room for and returns how many that were: none
    /// before the guest listens.
    pub fn push(&self, bytes: &[u8]) -> usize {
        let mut state = self.shared.state.lock();
        self.push_locked(&mut state, bytes)
    }

    fn push_locked(&self, state: &mut UartState, bytes: &[u8]) -> usize {
        // In loop-back the receiver is cut off from the line.
        if !state.listens() {
            return 0;
        }
        let room = state.capacity().saturating_sub(state.received.len());
        let count = room.min(bytes.len());
        state.received.extend(bytes[..count].iter().copied());
        if count > 0 {
            self.shared.sync(state);
        }
        count
    }

    /// Gives the receiver all of `bytes`, waiting for the guest to read, at most `patience` long
    /// altogether. Returns how many bytes it took.
    pub fn push_all(&self, bytes: &[u8], patience: Duration) -> usize {
        let deadline = Instant::now() + patience;
        let mut state = self.shared.state.lock();
        let mut taken = 0;
        loop {
            taken += self.push_locked(&mut state, &bytes[taken..]);
            if taken == bytes.len()
                || self
                    .shared
                    .room
                    .wait_until(&mut state, deadline)
                    .timed_out()
            {
                return taken;
            }
        }
    }

    /// Reports a break condition on the line.
    pub fn send_break(&self) {
        let mut state = self.shared.state.lock();
        if !state.looped() {
            state.receive(0);
            state.errors |= LSR_BREAK;
            self.shared.sync(&mut state);
        }
    }
}

impl std::fmt::Debug for SerialInput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SerialInput").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
