//! The system calls that the KVM crates leave unsafe or don't have.
#![expect(
    unsafe_code,
    reason = "ioctls whose contracts (sizes, lifetimes) are kept here"
)]

use std::io;

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, Xsave, kvm_device_attr, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1, kvm_interrupt, kvm_userspace_memory_region, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use skerry_hypervisor::{PAGE_SIZE, RamRegion};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
ioctl_iow_nr!(KVM_HAS_DEVICE_ATTR, KVMIO, 0xe3, kvm_device_attr);

/// Where a slot lies and how; `len` zero removes it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlotRegion {
    pub(crate) slot: u32,
    pub(crate) flags: u32,
    pub(crate) gpa: u64,
    pub(crate) offset: usize,
    pub(crate) len: usize,
}

/// Sets one memory slot. The caller keeps `region` alive until the slot is removed or the VM gone.
pub(crate) fn set_memory_slot(vm: &VmFd, at: SlotRegion, region: &RamRegion) -> io::Result<()> {
    let end = at.offset.checked_add(at.len);
    if end.is_none_or(|end| end > region.size()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let host = region.as_ptr().wrapping_add(at.offset) as u64;
    let kernel = kvm_userspace_memory_region {
        slot: at.slot,
        flags: at.flags,
        guest_phys_addr: at.gpa,
        memory_size: at.len as u64,
        userspace_addr: host,
    };
    // SAFETY: the range was checked to lie in the region, which outlives the slot (see above);
    // guest accesses to it are what volatile, shared memory is for.
    unsafe { vm.set_user_memory_region(kernel) }.map_err(io::Error::from)
}

/// Takes and clears the log of a slot of `len` bytes (`KVM_GET_DIRTY_LOG`): a bit per page.
pub(crate) fn dirty_log(vm: &VmFd, slot: u32, len: usize, into: &mut [u64]) -> io::Result<()> {
    if into.len() < len.div_ceil(PAGE_SIZE).div_ceil(64) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let request = kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 {
            dirty_bitmap: into.as_mut_ptr().cast(),
        },
    };
    // SAFETY: the structure is the one that this call reads; it writes a bit for each of the slot's
    // pages, in whole words, for which there is room, as just seen.
    match unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Injects an external interrupt (`KVM_INTERRUPT`).
pub(crate) fn interrupt(vcpu: &VcpuFd, vector: u8) -> io::Result<()> {
    let interrupt = kvm_interrupt { irq: vector.into() };
    // SAFETY: the structure is the one that this call reads.
    match unsafe { ioctl_with_ref(vcpu, KVM_INTERRUPT(), &interrupt) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn tsc_offset_attribute(value: &u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: std::ptr::from_ref(value) as u64,
        flags: 0,
    }
}

/// Whether the offset of the guest's time-stamp counter can be set by itself.
pub(crate) fn has_tsc_offset(vcpu: &VcpuFd) -> bool {
    let attribute = tsc_offset_attribute(&0);
    // SAFETY: the structure is the one that this call reads; it does not follow the address.
    unsafe { ioctl_with_ref(vcpu, KVM_HAS_DEVICE_ATTR(), &attribute) == 0 }
}

/// Sets the difference between the guest's time-stamp counter and the host's.
pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> io::Result<()> {
    let attribute = tsc_offset_attribute(&offset);
    // SAFETY: the structure is the one that this call reads, and its address is that of a u64
    // that lives through the call.
    match unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The difference between the guest's time-stamp counter and the host's, scaled.
pub(crate) fn tsc_offset(vcpu: &VcpuFd) -> io::Result<u64> {
    let mut offset = 0;
    let attribute = kvm_device_attr {
        addr: std::ptr::from_mut(&mut offset) as u64,
        ..tsc_offset_attribute(&0)
    };
    // SAFETY: the structure is the one that this call reads, and its address is that of a u64, not
    // otherwise borrowed, that lives through the call.
    match unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) } {
        0 => Ok(offset),
        _ => Err(io::Error::last_os_error()),
    }
}

/// An XSAVE area as the kernel exchanges it, of `size` bytes (`KVM_CAP_XSAVE2`).
pub(crate) struct XsaveBuffer(Xsave);

impl XsaveBuffer {
    /// A zeroed one.
    pub(crate) fn new(size: usize) -> io::Result<Self> {
        let extra = size.saturating_sub(size_of::<kvm_xsave>()).div_ceil(4);
        Xsave::new(extra)
            .map(Self)
            .map_err(|_| io::ErrorKind::OutOfMemory.into())
    }

    /// Reads the processor's. `size` of `new` must be what the VM said.
    pub(crate) fn read(&mut self, vcpu: &VcpuFd, xsave2: bool) -> io::Result<()> {
        if xsave2 {
            // SAFETY: the buffer is as large as the kernel said, and nothing in this process asks
            // for dynamically enabled features.
            return unsafe { vcpu.get_xsave2(&mut self.0) }.map_err(io::Error::from);
        }
        let plain = vcpu.get_xsave()?;
        let words = plain.region;
        for (to, from) in fixed_part(&mut self.0).iter_mut().zip(words) {
            *to = from;
        }
        Ok(())
    }

    /// Sets the processor's.
    pub(crate) fn write(&self, vcpu: &VcpuFd) -> io::Result<()> {
        // SAFETY: the buffer is as large as the kernel said, see `read`.
        unsafe { vcpu.set_xsave2(&self.0) }.map_err(io::Error::from)
    }

    /// The first `len` bytes.
    pub(crate) fn to_bytes(&self, len: usize) -> Vec<u8> {
        let area = self.0.as_fam_struct_ref();
        let head = area.xsave.region.iter();
        let mut bytes: Vec<u8> = head
            .chain(self.0.as_slice())
            .flat_map(|word| word.to_le_bytes())
            .collect();
        bytes.resize(len, 0);
        bytes
    }

    /// One with these bytes, zeroes after them.
    pub(crate) fn from_bytes(size: usize, bytes: &[u8]) -> io::Result<Self> {
        let mut buffer = Self::new(size)?;
        let word = |at: usize| {
            let mut word = [0; 4];
            for (to, from) in word.iter_mut().zip(bytes.get(at * 4..).unwrap_or_default()) {
                *to = *from;
            }
            u32::from_le_bytes(word)
        };
        let head = fixed_part(&mut buffer.0);
        let head_words = head.len();
        for (at, to) in head.iter_mut().enumerate() {
            *to = word(at);
        }
        for (at, to) in buffer.0.as_mut_slice().iter_mut().enumerate() {
            *to = word(head_words + at);
        }
        Ok(buffer)
    }
}

fn fixed_part(xsave: &mut Xsave) -> &mut [u32; 1024] {
    // SAFETY: only the fixed part is handed out, not the length.
    unsafe { &mut xsave.as_mut_fam_struct().xsave.region }
}
