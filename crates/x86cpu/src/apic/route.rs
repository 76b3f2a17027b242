//! Messages between processors and from devices: ICR writes, MSIs, destinations (Intel SDM 3A
//! §§12.6, 12.11). Any thread may send; the target's thread picks up from its mailboxes.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{LocalApic, delivery, error, lvt, mode};
use crate::cpu::Cpu;
use crate::shared::{CpuShared, Machine, request};

/// A message-signalled interrupt that no local APIC can understand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidMessage {
    /// Not an address of local APICs.
    #[error("Address {0:#x} is not one for interrupt messages: those are 0xfee00000 to 0xfeefffff")]
    Address(u64),
    /// Vectors 0 to 15 are the processor's own.
    #[error("Interrupt message carries vector {0}: give one from 16 to 255")]
    Vector(u8),
    /// Reserved delivery mode.
    #[error("Interrupt message has delivery mode {0}, which is reserved: give 0, 1, 2, 4, 5 or 7")]
    Mode(u8),
}

/// Whom a message is for.
#[derive(Clone, Copy, Debug)]
struct Destination {
    id: u32,
    logical: bool,
    /// All ones in the sender's width.
    broadcast: bool,
}

impl Destination {
    /// Whether a processor is meant; each matches by its own mode.
    fn matches(&self, cpu: &CpuShared) -> bool {
        let mode = cpu.apic_mode.load(Ordering::SeqCst);
        if mode & mode::ENABLED == 0 {
            return false;
        }
        if self.broadcast {
            return true;
        }
        if !self.logical {
            return cpu.apic_id.load(Ordering::SeqCst) == self.id;
        }
        let ldr = cpu.apic_ldr.load(Ordering::SeqCst);
        if mode & mode::X2APIC != 0 {
            return ldr >> 16 == self.id >> 16 && ldr & self.id & 0xffff != 0;
        }
        let (ldr, id) = (ldr >> 24, self.id);
        if id > 0xff {
            return false;
        }
        if cpu.apic_dfr.load(Ordering::SeqCst) >> 28 == 0 {
            // Cluster model.
            ldr >> 4 == id >> 4 && ldr & id & 15 != 0
        } else {
            ldr & id != 0
        }
    }
}

/// What arrives at a processor.
#[derive(Clone, Copy, Debug)]
struct Message {
    mode: u32,
    vector: u8,
    level: bool,
}

impl Machine {
    fn cpus(&self) -> impl Iterator<Item = (u32, &Arc<CpuShared>)> {
        self.cpus
            .iter()
            .enumerate()
            .filter_map(|(i, slot)| Some((i as u32, slot.get()?)))
    }

    /// Posts a fixed interrupt to a processor's APIC, from any thread.
    pub fn post(&self, cpu: u32, vector: u8, level: bool) {
        let Some(shared) = self.cpus.get(cpu as usize).and_then(|slot| slot.get()) else {
            return;
        };
        let word = usize::from(vector >> 5);
        let bit = 1 << (vector & 31);
        // The trigger mode must be there when the target sees the vector.
        if level {
            shared.posted_level[word].fetch_or(bit, Ordering::SeqCst);
        } else {
            shared.posted_level[word].fetch_and(!bit, Ordering::SeqCst);
        }
        shared.posted[word].fetch_or(bit, Ordering::SeqCst);
        self.signal(cpu, shared);
    }

    /// Posts a non-maskable interrupt, from any thread.
    pub fn post_nmi(&self, cpu: u32) {
        if let Some(shared) = self.cpus.get(cpu as usize).and_then(|slot| slot.get()) {
            shared.nmi.fetch_add(1, Ordering::SeqCst);
            self.signal(cpu, shared);
        }
    }

    fn signal(&self, cpu: u32, shared: &CpuShared) {
        shared.request(request::INTERRUPT);
        self.host.wake(cpu);
    }

    /// Delivers a message-signalled interrupt, from any thread.
    pub fn deliver_msi(&self, address: u64, data: u32) -> Result<(), InvalidMessage> {
        if address >> 20 != 0xfee {
            return Err(InvalidMessage::Address(address));
        }
        let id = ((address >> 12) & 0xff) as u32;
        let destination = Destination {
            id,
            logical: address & 4 != 0,
            broadcast: id == 0xff,
        };
        let message = Message {
            mode: (data >> 8) & 7,
            vector: data as u8,
            level: data & (1 << 15) != 0,
        };
        match message.mode {
            delivery::FIXED | delivery::LOWEST if message.vector < 16 => {
                Err(InvalidMessage::Vector(message.vector))
            }
            3 | delivery::STARTUP => Err(InvalidMessage::Mode(message.mode as u8)),
            _ => {
                self.route(message, |_, shared| destination.matches(shared));
                Ok(())
            }
        }
    }

    /// Sends to every processor that `wanted` picks, or to one of them for lowest priority.
    fn route(&self, message: Message, wanted: impl Fn(u32, &CpuShared) -> bool) {
        if message.mode == delivery::LOWEST {
            let able: Vec<u32> = self
                .cpus()
                .filter(|(i, s)| {
                    let mode = s.apic_mode.load(Ordering::SeqCst);
                    mode & mode::SOFTWARE_ENABLED != 0 && wanted(*i, s)
                })
                .map(|(i, _)| i)
                .collect();
            // Arbitration is model-specific; spreading by vector keeps one source on one processor.
            if !able.is_empty() {
                let chosen = able[usize::from(message.vector) % able.len()];
                self.post(chosen, message.vector, message.level);
            }
            return;
        }
        for (i, shared) in self.cpus().filter(|(i, s)| wanted(*i, s)) {
            self.send(i, shared, message);
        }
    }

    fn send(&self, cpu: u32, shared: &CpuShared, message: Message) {
        match message.mode {
            delivery::FIXED
                if shared.apic_mode.load(Ordering::SeqCst) & mode::SOFTWARE_ENABLED != 0 =>
            {
                self.post(cpu, message.vector, message.level);
            }
            delivery::NMI => self.post_nmi(cpu),
            delivery::INIT => {
                // An INIT makes an earlier SIPI void.
                shared.sipi.store(0, Ordering::SeqCst);
                shared.init.store(true, Ordering::SeqCst);
                self.signal(cpu, shared);
            }
            delivery::STARTUP => {
                shared
                    .sipi
                    .store(0x100 | u32::from(message.vector), Ordering::SeqCst);
                self.signal(cpu, shared);
            }
            // A disabled APIC takes no vectors; there is no system management mode; ExtINT comes
            // by `inject_extint`.
            _ => {}
        }
    }
}

impl LocalApic {
    fn icr_destination(&self, icr: u64) -> Destination {
        let logical = icr & (1 << 11) != 0;
        if self.x2apic() {
            let id = (icr >> 32) as u32;
            Destination {
                id,
                logical,
                broadcast: id == u32::MAX,
            }
        } else {
            let id = (icr >> 56) as u32;
            Destination {
                id,
                logical,
                broadcast: id == 0xff,
            }
        }
    }
}

impl Cpu {
    /// Sends what the interrupt command register says.
    pub(super) fn apic_send_ipi(&mut self, icr: u64) {
        let message = Message {
            mode: ((icr >> 8) & 7) as u32,
            vector: icr as u8,
            level: false,
        };
        let deassert = icr & (1 << 14) == 0 && icr & (1 << 15) != 0;
        if message.mode == delivery::INIT && deassert {
            // INIT level de-assert: for arbitration ids of old processors only.
            return;
        }
        if matches!(message.mode, delivery::FIXED | delivery::LOWEST) && message.vector < 16 {
            self.apic.raise_error(error::SEND_ILLEGAL_VECTOR);
            return;
        }
        let me = self.id;
        let machine = Arc::clone(&self.machine);
        match (icr >> 18) & 3 {
            0 => {
                let destination = self.apic.icr_destination(icr);
                machine.route(message, |_, shared| destination.matches(shared));
            }
            1 => {
                if message.mode == delivery::FIXED {
                    self.apic.accept(message.vector, false);
                }
            }
            2 => machine.route(message, |_, _| true),
            _ => machine.route(message, |i, _| i != me),
        }
    }

    /// Sends the interrupt that `icr` describes (fixed or NMI) to the processors whose ids are
    /// `first` plus a bit of `set`; returns how many there are.
    pub(crate) fn apic_send_to_set(&mut self, set: u128, first: u32, icr: u64) -> u32 {
        let message = Message {
            mode: ((icr >> 8) & 7) as u32,
            vector: icr as u8,
            level: false,
        };
        let fixed = message.mode == delivery::FIXED && message.vector >= 16;
        if !fixed && message.mode != delivery::NMI {
            return 0;
        }
        let mut sent = 0;
        for (i, shared) in self.machine.cpus() {
            let id = shared.apic_id.load(Ordering::SeqCst);
            let bit = id.checked_sub(first).filter(|bit| *bit < 128);
            if bit.is_some_and(|bit| set & (1 << bit) != 0) {
                self.machine.send(i, shared, message);
                sent += 1;
            }
        }
        sent
    }

    /// Moves what other threads posted into the APIC.
    pub(crate) fn collect_interrupts(&mut self) {
        for word in 0..8usize {
            if self.shared.posted[word].load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut posted = self.shared.posted[word].swap(0, Ordering::SeqCst);
            let level = self.shared.posted_level[word].load(Ordering::SeqCst);
            while posted != 0 {
                let bit = posted.trailing_zeros();
                posted &= posted - 1;
                let vector = (word as u8) * 32 + bit as u8;
                self.apic.accept(vector, level & (1 << bit) != 0);
            }
        }
        if self.shared.nmi.load(Ordering::Relaxed) != 0 {
            // One is taken at once unless masked, and one more is latched (SDM 3A §7.7.1).
            let events = &mut self.sys.events;
            let limit = if events.nmi_masked { 1 } else { 2 };
            let posted = self.shared.nmi.swap(0, Ordering::SeqCst).min(limit) as u8;
            events.nmis_pending = (events.nmis_pending + posted).min(limit as u8);
        }
    }

    /// Whether LINT1 is wired for NMIs (the chipset's NMI line).
    pub fn lint1_is_nmi(&self) -> bool {
        let entry = self.apic.lvt[lvt::LINT1];
        entry & lvt::MASKED == 0 && (entry >> 8) & 7 == delivery::NMI
    }
}
