//! A virtual machine on KVM.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::{
    KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_IRQ_ROUTING_MSI,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, KvmIrqRouting,
    kvm_clock_data, kvm_enable_cap, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi, kvm_msi,
};
use kvm_ioctls::{Kvm as KvmDevice, VmFd};
use skerry_hypervisor::state::SharedTscOffset;
use skerry_hypervisor::{
    CpuidTable, CreateVcpuError, CreateVmError, DirtyLogError, Gpa, InterruptError, Irqchip,
    MapError, MemorySlot, StateError, Vm, VmSpec,
};

use crate::probe::{HostFacts, VmFacts};
use crate::slots::Slots;
use crate::vcpu::KvmVcpu;

/// Pins of the machine's I/O APIC: KVM looks for level-triggered vectors in that many routes.
const IOAPIC_PINS: u64 = 24;
/// Where Intel hosts keep a task state segment and page table of their own for guests in real
/// mode (three pages and one, below the firmware's place and above RAM below 4 GiB).
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// What all processors of a VM share. The VM's file descriptor is closed before the memory of
/// its slots is let go (fields drop in order).
pub(crate) struct VmShared {
    pub(crate) fd: VmFd,
    pub(crate) irqchip: Irqchip,
    pub(crate) host: Arc<HostFacts>,
    pub(crate) facts: VmFacts,
    pub(crate) tsc_offset: SharedTscOffset,
    max_vcpus: u32,
    created: AtomicU64,
    slots: Slots,
}

/// A virtual machine.
pub struct KvmVm {
    shared: Arc<VmShared>,
}

fn backend(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> CreateVmError {
    move |source| CreateVmError::Backend {
        what,
        source: Box::new(source),
    }
}

fn enable(fd: &VmFd, cap: u32, argument: u64) -> Result<(), kvm_ioctls::Error> {
    let mut request = kvm_enable_cap {
        cap,
        ..Default::default()
    };
    request.args[0] = argument;
    fd.enable_cap(&request)
}

impl KvmVm {
    pub(crate) fn new(
        device: &KvmDevice,
        host: Arc<HostFacts>,
        spec: &VmSpec,
    ) -> Result<Self, CreateVmError> {
        let fd = device
            .create_vm()
            .map_err(backend("make the kernel's part"))?;
        let facts = match spec.irqchip {
            Irqchip::None => *host.vm.get_or_init(|| VmFacts::ask(&fd)),
            Irqchip::Split => VmFacts::ask(&fd),
        };
        if !facts.immediate_exit {
            return Err(CreateVmError::Unsupported(
                "way to cancel without races (KVM_CAP_IMMEDIATE_EXIT; Linux 4.12 has it)",
            ));
        }
        if !facts.readonly_memory {
            return Err(CreateVmError::Unsupported("read-only memory"));
        }
        if spec.irqchip == Irqchip::Split {
            // This is where the kernel has it by default (kernel's Documentation/virt/kvm/api.rst,
            // KVM_SET_IDENTITY_MAP_ADDR).
            fd.set_identity_map_address(IDENTITY_MAP_ADDRESS)
                .map_err(backend("place the identity map"))?;
        }
        fd.set_tss_address(TSS_ADDRESS)
            .map_err(backend("place the task state segment"))?;
        enable(&fd, KVM_CAP_EXCEPTION_PAYLOAD, 1).map_err(backend("enable exception payloads"))?;
        if spec.irqchip == Irqchip::Split {
            enable(&fd, KVM_CAP_SPLIT_IRQCHIP, IOAPIC_PINS)
                .map_err(backend("enable the split interrupt controller"))?;
            let x2apic = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
            enable(&fd, KVM_CAP_X2APIC_API, x2apic.into()).map_err(backend("enable x2APIC ids"))?;
        }
        Ok(Self {
            shared: Arc::new(VmShared {
                fd,
                irqchip: spec.irqchip,
                host,
                facts,
                tsc_offset: SharedTscOffset::default(),
                max_vcpus: spec.max_vcpus.max(1),
                created: AtomicU64::new(0),
                slots: Slots::default(),
            }),
        })
    }

    fn has_apics(&self) -> Result<(), InterruptError> {
        match self.shared.irqchip {
            Irqchip::Split => Ok(()),
            Irqchip::None => Err(InterruptError::NoApic),
        }
    }
}

impl Vm for KvmVm {
    type Vcpu = KvmVcpu;

    fn map(&self, slot: MemorySlot) -> Result<(), MapError> {
        self.shared.slots.map(&self.shared.fd, slot)
    }

    fn unmap(&self, gpa: Gpa) -> Result<(), MapError> {
        self.shared.slots.unmap(&self.shared.fd, gpa)
    }

    fn protect(&self, gpa: Gpa, read_only: bool, log_dirty: bool) -> Result<(), MapError> {
        self.shared
            .slots
            .protect(&self.shared.fd, gpa, read_only, log_dirty)
    }

    fn dirty_pages(&self, gpa: Gpa) -> Result<Vec<u64>, DirtyLogError> {
        self.shared.slots.dirty_pages(&self.shared.fd, gpa)
    }

    fn drain_dirty(&self, gpa: Gpa, each: &mut dyn FnMut(u64)) -> Result<(), DirtyLogError> {
        self.shared.slots.drain_dirty(&self.shared.fd, gpa, each)
    }

    fn create_vcpu(&self, id: u32, cpuid: &CpuidTable) -> Result<KvmVcpu, CreateVcpuError> {
        let bad = |reason| CreateVcpuError::BadId { id, reason };
        if id >= self.shared.max_vcpus || id >= u64::BITS {
            return Err(bad("the virtual machine was not made for so many"));
        }
        if self.shared.created.fetch_or(1 << id, Ordering::AcqRel) & (1 << id) != 0 {
            return Err(bad("there is one with this id"));
        }
        let made = KvmVcpu::new(self.shared.clone(), id, cpuid);
        if made.is_err() {
            self.shared.created.fetch_and(!(1 << id), Ordering::AcqRel);
        }
        made
    }

    fn signal_msi(&self, address: u64, data: u32) -> Result<(), InterruptError> {
        self.has_apics()?;
        if address & 0xfff0_0000 != 0xfee0_0000 {
            return Err(InterruptError::BadMessage { address, data });
        }
        let message = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..Default::default()
        };
        // Zero means that no processor took it (a disabled APIC, say): as on a bus, it is lost.
        self.shared
            .fd
            .signal_msi(message)
            .map(|_| ())
            .map_err(|source| InterruptError::Backend(Box::new(source)))
    }

    fn set_ioapic_routes(&self, messages: &[(u64, u32)]) -> Result<(), InterruptError> {
        self.has_apics()?;
        let entries: Vec<_> = messages
            .iter()
            .take(IOAPIC_PINS as usize)
            .zip(0..)
            .map(|(&(address, data), gsi)| kvm_irq_routing_entry {
                gsi,
                type_: KVM_IRQ_ROUTING_MSI,
                u: kvm_irq_routing_entry__bindgen_ty_1 {
                    msi: kvm_irq_routing_msi {
                        address_lo: address as u32,
                        address_hi: (address >> 32) as u32,
                        data,
                        ..Default::default()
                    },
                },
                ..Default::default()
            })
            .collect();
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| InterruptError::Backend("too many routes".into()))?;
        self.shared
            .fd
            .set_gsi_routing(&routing)
            .map_err(|source| InterruptError::Backend(Box::new(source)))
    }

    fn inject_nmi(&self, id: u32) -> Result<(), InterruptError> {
        // As a message: the ioctl for it would wait until the processor leaves the guest.
        const DELIVERY_NMI: u32 = 4 << 8;
        let low = u64::from(id & 0xff) << 12;
        let high = u64::from(id >> 8) << 40;
        self.signal_msi(0xfee0_0000 | low | high, DELIVERY_NMI)
    }

    fn clock_ns(&self) -> Result<u64, StateError> {
        let clock = self
            .shared
            .fd
            .get_clock()
            .map_err(|source| StateError::Backend {
                id: 0,
                what: "read the clock",
                source: Box::new(source),
            })?;
        Ok(clock.clock)
    }

    fn set_clock_ns(&self, ns: u64) -> Result<(), StateError> {
        let clock = kvm_clock_data {
            clock: ns,
            ..Default::default()
        };
        self.shared.tsc_offset.forget();
        self.shared
            .fd
            .set_clock(&clock)
            .map_err(|source| StateError::Backend {
                id: 0,
                what: "set the clock",
                source: Box::new(source),
            })
    }
}
