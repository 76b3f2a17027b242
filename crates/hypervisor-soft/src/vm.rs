//! A virtual machine on the software processor.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use skerry_hypervisor::memory::HostWriteObserver;
use skerry_hypervisor::state::SharedTscOffset;
use skerry_hypervisor::{
    CpuidTable, CreateVcpuError, CreateVmError, DirtyLogError, Gpa, InterruptError, Irqchip,
    MapError, MemorySlot, RamRegion, StateError, Statistics, Vm, VmSpec,
};
use skerry_x86cpu::mem::{Backing, MapRefused};
use skerry_x86cpu::{Doing, Host, Machine, Tuning};

use crate::host::{SoftHost, TimerThread};
use crate::vcpu::SoftVcpu;

/// Processors that a machine can have, by the width of the sets that are kept of them.
pub(crate) const MAX_VCPUS: u32 = 64;
/// What a processor can be at, in the order of [`Doing`]: its devices' work and its waiting are both
/// outside of guest code.
const ACTIVITIES: [&str; 4] = ["outside", "interpreter", "compiler", "compiled"];

/// What all processors of a VM share.
pub(crate) struct VmShared {
    pub(crate) machine: Arc<Machine>,
    pub(crate) host: Arc<SoftHost>,
    pub(crate) irqchip: Irqchip,
    /// The TSC offset of the first processor that was given its state since the clock was set.
    pub(crate) tsc_offset: SharedTscOffset,
    /// None where there are no local APICs, whose timers they are.
    _timers: Option<TimerThread>,
}

/// A virtual machine.
pub struct SoftVm {
    shared: Arc<VmShared>,
    /// Held while a slot is mapped, so that one region never gets two backings.
    mapping: Mutex<()>,
}

/// Drops decoded code of what the host writes.
struct CodeWatch(Weak<Backing>);

impl HostWriteObserver for CodeWatch {
    fn host_wrote(&self, offset: usize, len: usize) {
        if let Some(backing) = self.0.upgrade() {
            backing.host_wrote(offset, len);
        }
    }
}

impl SoftVm {
    pub(crate) fn new(spec: &VmSpec, tuning: Tuning) -> Result<Self, CreateVmError> {
        let processors = spec.max_vcpus.clamp(1, MAX_VCPUS);
        let host = Arc::new(SoftHost::new(processors as usize));
        let timers = match spec.irqchip {
            Irqchip::Split => Some(host.start_timers()),
            Irqchip::None => None,
        };
        let timers = timers
            .transpose()
            .map_err(|source| CreateVmError::Backend {
                what: "start the timer thread",
                source: source.into(),
            })?;
        // Without interrupts it runs functions rather than a system, and there may be many of it.
        let tuning = Tuning {
            small: tuning.small || spec.irqchip == Irqchip::None,
            ..tuning
        };
        Ok(Self {
            shared: Arc::new(VmShared {
                machine: Arc::new(Machine::with_tuning(
                    host.clone(),
                    processors as usize,
                    tuning,
                )),
                host,
                irqchip: spec.irqchip,
                tsc_offset: SharedTscOffset::default(),
                _timers: timers,
            }),
            mapping: Mutex::new(()),
        })
    }

    fn machine(&self) -> &Machine {
        &self.shared.machine
    }

    fn has_apics(&self) -> Result<(), InterruptError> {
        match self.shared.irqchip {
            Irqchip::Split => Ok(()),
            Irqchip::None => Err(InterruptError::NoApic),
        }
    }

    /// The backing of a region: the one that shows it already, or a new one that watches it.
    fn backing(&self, region: &Arc<RamRegion>) -> Option<Arc<Backing>> {
        if let Some(backing) = self.machine().memory.backing_at(region.as_ptr()) {
            return Some(backing);
        }
        let backing = Backing::new(region.clone())?;
        let watch = CodeWatch(Arc::downgrade(&backing));
        region.bitmap().observe(Arc::new(watch));
        Some(backing)
    }
}

fn map_error(refused: MapRefused, len: usize) -> MapError {
    match refused {
        MapRefused::Misaligned { gpa, .. } => MapError::Misaligned { gpa: Gpa(gpa), len },
        MapRefused::Overlap { gpa, .. } => MapError::Overlap { gpa: Gpa(gpa), len },
        MapRefused::NotMapped(gpa) | MapRefused::NotLogged(gpa) => MapError::NotMapped(Gpa(gpa)),
    }
}

impl Vm for SoftVm {
    type Vcpu = SoftVcpu;

    fn map(&self, slot: MemorySlot) -> Result<(), MapError> {
        slot.check()?;
        let MemorySlot {
            gpa,
            ref region,
            offset,
            len,
            read_only,
            log_dirty,
        } = slot;
        let _mapping = self.mapping.lock().unwrap_or_else(PoisonError::into_inner);
        let backing = self
            .backing(region)
            .ok_or(MapError::Misaligned { gpa, len })?;
        self.machine()
            .map(gpa.0, len as u64, &backing, offset, read_only, log_dirty)
            .map_err(|refused| map_error(refused, len))
    }

    fn unmap(&self, gpa: Gpa) -> Result<(), MapError> {
        self.machine()
            .unmap(gpa.0)
            .map_err(|refused| map_error(refused, 0))
    }

    fn protect(&self, gpa: Gpa, read_only: bool, log_dirty: bool) -> Result<(), MapError> {
        self.machine()
            .protect(gpa.0, read_only, log_dirty)
            .map_err(|refused| map_error(refused, 0))
    }

    fn dirty_pages(&self, gpa: Gpa) -> Result<Vec<u64>, DirtyLogError> {
        self.machine()
            .take_dirty(gpa.0)
            .map_err(|_| DirtyLogError::NotLogged(gpa))
    }

    fn drain_dirty(&self, gpa: Gpa, each: &mut dyn FnMut(u64)) -> Result<(), DirtyLogError> {
        self.machine()
            .drain_dirty(gpa.0, each)
            .map_err(|_| DirtyLogError::NotLogged(gpa))
    }

    fn create_vcpu(&self, id: u32, cpuid: &CpuidTable) -> Result<SoftVcpu, CreateVcpuError> {
        SoftVcpu::new(self.shared.clone(), id, cpuid)
    }

    fn signal_msi(&self, address: u64, data: u32) -> Result<(), InterruptError> {
        self.has_apics()?;
        self.machine()
            .deliver_msi(address, data)
            .map_err(|_| InterruptError::BadMessage { address, data })
    }

    fn set_ioapic_routes(&self, messages: &[(u64, u32)]) -> Result<(), InterruptError> {
        const LEVEL: u32 = 1 << 15;
        self.has_apics()?;
        let mut vectors = [0_u32; 8];
        for (_, data) in messages.iter().filter(|(_, data)| data & LEVEL != 0) {
            let vector = (data & 0xff) as usize;
            vectors[vector / 32] |= 1 << (vector % 32);
        }
        for (word, vectors) in self.machine().eoi_exit.iter().zip(vectors) {
            word.store(vectors, Ordering::SeqCst);
        }
        Ok(())
    }

    fn inject_nmi(&self, id: u32) -> Result<(), InterruptError> {
        self.has_apics()?;
        self.machine().post_nmi(id);
        Ok(())
    }

    fn clock_ns(&self) -> Result<u64, StateError> {
        Ok(self.shared.host.clock_ns())
    }

    fn set_clock_ns(&self, ns: u64) -> Result<(), StateError> {
        self.shared.host.set_clock_ns(ns);
        self.shared.tsc_offset.forget();
        Ok(())
    }

    fn statistics(&self) -> Option<&dyn Statistics> {
        Some(self)
    }
}

impl Statistics for SoftVm {
    fn counters(&self, id: u32) -> Vec<(&'static str, u64)> {
        let cpu = self.machine().cpus.get(id as usize);
        let cpu = cpu.and_then(|cpu| cpu.get());
        cpu.map_or_else(Vec::new, |cpu| cpu.counters.values().each().collect())
    }

    fn refresh(&self) {
        let cpus = self.machine().cpus.iter();
        for cpu in cpus.filter_map(|cpu| cpu.get()) {
            // Outside it has shown all that there is, and where it waits it needn't be woken.
            if cpu.doing() != Doing::Outside {
                cpu.request_exit();
            }
        }
    }

    fn activities(&self) -> &'static [&'static str] {
        &ACTIVITIES
    }

    fn activity(&self, id: u32) -> Option<usize> {
        let cpu = self.machine().cpus.get(id as usize)?.get()?;
        Some(match cpu.doing() {
            Doing::Outside => 0,
            Doing::Interpreting => 1,
            Doing::Compiling => 2,
            Doing::Compiled => 3,
        })
    }
}
