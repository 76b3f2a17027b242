//! Opening `/dev/kvm`, and finding out whether it truly runs guests.

use std::io;
use std::sync::{Arc, OnceLock};

use kvm_bindings::KVM_CAP_ENFORCE_PV_FEATURE_CPUID;
use kvm_ioctls::{Cap, Kvm as KvmDevice, VcpuFd, VmFd};
use skerry_hypervisor::probe::{self, GuestSpeed};
use skerry_hypervisor::{Capabilities, CpuidTable, CreateVmError, Hypervisor, Unusable, VmSpec};

use crate::vm::KvmVm;
use crate::{convert, sys};

const DEVICE: &str = "/dev/kvm";
/// The version that every kernel since 2.6.22 has, and that the interface is frozen at.
const API_VERSION: i32 = 12;
/// CPUID leaves to make room for; the kernel has at most 256.
const MAX_LEAVES: usize = 256;

/// Memory type range registers, variable and fixed, and their default: older kernels have them and
/// don't list them.
const MTRRS: [u32; 28] = [
    0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x209, 0x20a, 0x20b, 0x20c,
    0x20d, 0x20e, 0x20f, 0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e,
    0x26f, 0x2ff,
];

/// What the host has, for its virtual machines.
pub(crate) struct HostFacts {
    pub(crate) supported_cpuid: CpuidTable,
    /// Registers that belong to a processor's state.
    pub(crate) msr_indices: Vec<u32>,
    /// Whether a guest's time-stamp counter can have another frequency than the host's. Without, the
    /// kernel would accept a higher one and have the counter stand and jump.
    pub(crate) tsc_scaling: bool,
    /// What the first VM without interrupt controllers was told. Those are made often and live shortly;
    /// others ask for themselves.
    pub(crate) vm: OnceLock<VmFacts>,
    /// What its processor was told.
    pub(crate) vcpu: OnceLock<VcpuFacts>,
}

/// What the kernel says of a VM; the same for every one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VmFacts {
    pub(crate) immediate_exit: bool,
    pub(crate) readonly_memory: bool,
    /// Bytes of the XSAVE area; 0 if the kernel has only the old calls for it.
    pub(crate) xsave2_size: usize,
    /// Whether paravirtual features that CPUID does not show can be refused (Linux 5.8).
    pub(crate) enforces_features: bool,
}

impl VmFacts {
    pub(crate) fn ask(vm: &VmFd) -> Self {
        let enforces = vm.check_extension_raw(KVM_CAP_ENFORCE_PV_FEATURE_CPUID.into());
        Self {
            immediate_exit: vm.check_extension(Cap::ImmediateExit),
            readonly_memory: vm.check_extension(Cap::ReadonlyMem),
            xsave2_size: usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0),
            enforces_features: enforces > 0,
        }
    }
}

/// What the kernel says of a processor that was just made; the same for every one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VcpuFacts {
    /// Frequency of its time-stamp counter, in kHz.
    pub(crate) tsc_khz: u32,
    /// Whether the counter's offset can be set by itself.
    pub(crate) tsc_offset: bool,
}

impl VcpuFacts {
    pub(crate) fn ask(vcpu: &VcpuFd) -> Self {
        Self {
            tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
            tsc_offset: sys::has_tsc_offset(vcpu),
        }
    }
}

/// The KVM of this host.
pub struct Kvm {
    device: KvmDevice,
    facts: Arc<HostFacts>,
}

fn unusable(reason: impl Into<String>, remedy: impl Into<String>) -> Unusable {
    Unusable {
        reason: reason.into(),
        remedy: remedy.into(),
        measured_mips: None,
    }
}

fn open_error(error: kvm_ioctls::Error) -> Unusable {
    match error.errno() {
        libc::ENOENT => unusable(
            format!("{DEVICE} does not exist"),
            "Load the kvm_amd or kvm_intel module on a machine whose firmware enables \
             virtualisation, pass the device into this container, or run with --hypervisor soft",
        ),
        libc::EACCES | libc::EPERM => unusable(
            format!("{DEVICE} may not be opened by this user"),
            "Add the user to the group that owns it, usually with `usermod -aG kvm USER`, and log \
             in again; or run with --hypervisor soft",
        ),
        libc::ENODEV | libc::ENXIO => unusable(
            format!("{DEVICE} exists, but no KVM module stands behind it"),
            "Load the kvm_amd or kvm_intel module, or run with --hypervisor soft",
        ),
        errno => unusable(
            format!(
                "{DEVICE} can't be opened: {}",
                io::Error::from_raw_os_error(errno)
            ),
            "Run with --hypervisor soft",
        ),
    }
}

/// Every CPUID bit that the kernel can show to a guest.
fn supported_cpuid(device: &KvmDevice) -> Result<CpuidTable, kvm_ioctls::Error> {
    // The kernel leaves it to us to say what its local APICs add, and that there is a hypervisor:
    // without that bit no guest looks for the paravirtual clock.
    const X2APIC: u32 = 1 << 21;
    const TSC_DEADLINE: u32 = 1 << 24;
    const HYPERVISOR: u32 = 1 << 31;
    let supported = device.get_supported_cpuid(MAX_LEAVES)?;
    let mut table = convert::cpuid_from(supported.as_slice());
    let deadline = device.check_extension(Cap::TscDeadlineTimer);
    for entry in table.entries.iter_mut().filter(|entry| entry.leaf == 1) {
        entry.result.ecx |= X2APIC | HYPERVISOR;
        if deadline {
            entry.result.ecx |= TSC_DEADLINE;
        }
    }
    Ok(table)
}

impl Kvm {
    /// Frequency of the host's time-stamp counter as guests see it, in kHz.
    pub fn tsc_khz(&self) -> std::io::Result<u32> {
        let vm = self.device.create_vm()?;
        Ok(vm.create_vcpu(0)?.get_tsc_khz()?)
    }

    fn measure(&self) -> Result<Capabilities, Unusable> {
        let failed = |what: &str, error: &dyn std::error::Error| {
            unusable(
                format!("{DEVICE} opens, but {what} fails: {}", probe::chain(error)),
                "Update the host's kernel, or run with --hypervisor soft",
            )
        };
        let GuestSpeed { mips, sse } =
            probe::measure_guest(self, &self.facts.supported_cpuid, probe::DEVICE_TIME_LIMIT)
                .map_err(|e| failed("running a guest", &e))?;
        if let Some(unusable) = probe::judge(DEVICE, mips, sse.as_deref()) {
            return Err(unusable);
        }
        let tsc_khz = self
            .tsc_khz()
            .map_err(|e| failed("reading the time-stamp counter's frequency", &e))?;
        let HostFacts {
            supported_cpuid,
            tsc_scaling,
            ..
        } = &*self.facts;
        let physical_address_bits = supported_cpuid
            .get(0x8000_0008, 0)
            .map_or(36, |leaf| (leaf.eax & 0xff) as u8);
        Ok(Capabilities {
            name: "kvm",
            description: format!("{DEVICE}, API version {API_VERSION}"),
            measured_mips: Some(mips),
            max_vcpus: u32::try_from(self.device.get_max_vcpus())
                .unwrap_or(1)
                .min(64),
            supported_cpuid: supported_cpuid.clone(),
            accepted_cpuid: supported_cpuid.clone(),
            tsc_khz,
            tsc_scaling: *tsc_scaling,
            native: true,
            physical_address_bits,
        })
    }
}

impl Hypervisor for Kvm {
    type Vm = KvmVm;

    fn probe() -> Result<Capabilities, Unusable> {
        Self::open()?.measure()
    }

    fn open() -> Result<Self, Unusable> {
        let device = KvmDevice::new().map_err(open_error)?;
        let version = device.get_api_version();
        if version != API_VERSION {
            return Err(unusable(
                format!("{DEVICE} speaks version {version} of KVM's interface, not {API_VERSION}"),
                "Update the host's kernel, or run with --hypervisor soft",
            ));
        }
        let silent = |e: kvm_ioctls::Error| {
            unusable(
                format!("{DEVICE} does not say what it can do: {e}"),
                "Update the host's kernel, or run with --hypervisor soft",
            )
        };
        let list = device.get_msr_index_list().map_err(silent)?;
        let supported_cpuid = supported_cpuid(&device).map_err(silent)?;
        let mut msr_indices = list.as_slice().to_vec();
        msr_indices.extend(
            MTRRS
                .iter()
                .filter(|index| !list.as_slice().contains(index)),
        );
        let facts = HostFacts {
            supported_cpuid,
            msr_indices,
            tsc_scaling: device.check_extension(Cap::TscControl),
            vm: OnceLock::new(),
            vcpu: OnceLock::new(),
        };
        Ok(Self {
            device,
            facts: Arc::new(facts),
        })
    }

    fn supported_cpuid(&self) -> &CpuidTable {
        &self.facts.supported_cpuid
    }

    fn create_vm(&self, spec: &VmSpec) -> Result<KvmVm, CreateVmError> {
        KvmVm::new(&self.device, self.facts.clone(), spec)
    }
}
