//! The pages that a processor shares with the kernel (`struct kvm_run`).
#![expect(
    unsafe_code,
    reason = "a structure of unions that the kernel fills in, in shared memory"
)]

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU8;

use kvm_bindings::*;

/// What the kernel reported, its unions taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RawExit {
    Port(PortAccess),
    MmioRead {
        gpa: u64,
        size: u8,
    },
    MmioWrite {
        gpa: u64,
        size: u8,
        data: u64,
    },
    Halt,
    IrqWindow,
    IoapicEoi {
        vector: u8,
    },
    Shutdown,
    Debug,
    Interrupted,
    SetTpr,
    InternalError {
        suberror: u32,
        bytes: [u8; 15],
        len: u8,
    },
    FailEntry {
        reason: u64,
    },
    Other(u32),
}

/// A port access of one or (string instructions) several elements; their data lies in the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PortAccess {
    pub(crate) port: u16,
    pub(crate) size: u8,
    pub(crate) input: bool,
    pub(crate) count: u32,
    offset: usize,
}

/// Our mapping of a processor's pages.
#[derive(Debug)]
pub(crate) struct RunPage {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to this value; nothing in it is tied to a thread.
unsafe impl Send for RunPage {}

impl RunPage {
    /// Maps the `len` bytes that the kernel shares for the processor behind `fd`.
    pub(crate) fn map(fd: &impl AsRawFd, len: usize) -> io::Result<Self> {
        if len < size_of::<kvm_run>() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { base, len })
    }

    fn run(&self) -> *mut kvm_run {
        self.base.as_ptr().cast()
    }

    /// The flag that makes `KVM_RUN` return before it enters the guest.
    pub(crate) fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: inside the mapping, which lives as long as `self`; only ever accessed atomically
        // or by the kernel.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.run()).immediate_exit) }
    }

    pub(crate) fn ready_for_interrupt(&self) -> bool {
        // SAFETY: inside the mapping.
        unsafe { (&raw const (*self.run()).ready_for_interrupt_injection).read_volatile() != 0 }
    }

    pub(crate) fn request_interrupt_window(&mut self, wanted: bool) {
        // SAFETY: inside the mapping.
        unsafe {
            (&raw mut (*self.run()).request_interrupt_window).write_volatile(u8::from(wanted));
        }
    }

    /// The task priority that a VM without local APICs is entered with.
    pub(crate) fn set_cr8(&mut self, cr8: u64) {
        // SAFETY: inside the mapping.
        unsafe { (&raw mut (*self.run()).cr8).write_volatile(cr8) }
    }

    /// The exit that the last `KVM_RUN` reported.
    pub(crate) fn exit(&self) -> RawExit {
        let run = self.run();
        // SAFETY: inside the mapping; the kernel writes only during KVM_RUN.
        let reason = unsafe { (&raw const (*run).exit_reason).read_volatile() };
        // SAFETY: the structure is inside the mapping; the union is read in the member that the
        // exit reason names, and every bit pattern of these members is valid.
        let detail = unsafe { &(*run).__bindgen_anon_1 };
        match reason {
            KVM_EXIT_IO => {
                // SAFETY: see above.
                let io = unsafe { detail.io };
                RawExit::Port(PortAccess {
                    port: io.port,
                    size: io.size,
                    input: u32::from(io.direction) == KVM_EXIT_IO_IN,
                    count: io.count,
                    offset: io.data_offset as usize,
                })
            }
            KVM_EXIT_MMIO => {
                // SAFETY: see above.
                let mmio = unsafe { detail.mmio };
                let size = mmio.len.min(8) as u8;
                if mmio.is_write == 0 {
                    return RawExit::MmioRead {
                        gpa: mmio.phys_addr,
                        size,
                    };
                }
                let mut data = [0; 8];
                data[..usize::from(size)].copy_from_slice(&mmio.data[..usize::from(size)]);
                RawExit::MmioWrite {
                    gpa: mmio.phys_addr,
                    size,
                    data: u64::from_le_bytes(data),
                }
            }
            KVM_EXIT_HLT => RawExit::Halt,
            KVM_EXIT_IRQ_WINDOW_OPEN => RawExit::IrqWindow,
            KVM_EXIT_IOAPIC_EOI => {
                // SAFETY: see above.
                let eoi = unsafe { detail.eoi };
                RawExit::IoapicEoi { vector: eoi.vector }
            }
            KVM_EXIT_SHUTDOWN | KVM_EXIT_SYSTEM_EVENT => RawExit::Shutdown,
            KVM_EXIT_DEBUG => RawExit::Debug,
            KVM_EXIT_INTR => RawExit::Interrupted,
            KVM_EXIT_SET_TPR => RawExit::SetTpr,
            KVM_EXIT_INTERNAL_ERROR => {
                // SAFETY: see above; `emulation_failure` has the layout of `internal` at its start.
                let failure = unsafe { detail.emulation_failure };
                // SAFETY: plain bytes.
                let insn = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
                let known = failure.suberror == KVM_INTERNAL_ERROR_EMULATION
                    && failure.ndata >= 3
                    && failure.flags
                        & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES)
                        != 0;
                RawExit::InternalError {
                    suberror: failure.suberror,
                    bytes: insn.insn_bytes,
                    len: if known { insn.insn_size.min(15) } else { 0 },
                }
            }
            KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: see above.
                let failure = unsafe { detail.fail_entry };
                RawExit::FailEntry {
                    reason: failure.hardware_entry_failure_reason,
                }
            }
            other => RawExit::Other(other),
        }
    }

    /// The address of element `index` of a port access, if it lies in the mapping.
    fn element(&self, access: &PortAccess, index: u32) -> Option<NonNull<u8>> {
        let size = usize::from(access.size);
        let start = access
            .offset
            .checked_add((index as usize).checked_mul(size)?)?;
        if index >= access.count || size > 4 || start.checked_add(size)? > self.len {
            return None;
        }
        // SAFETY: checked to lie inside the mapping.
        Some(unsafe { self.base.add(start) })
    }

    /// Element `index` of an output.
    pub(crate) fn port_data(&self, access: &PortAccess, index: u32) -> u32 {
        let mut data = [0; 4];
        if let Some(at) = self.element(access, index) {
            // SAFETY: `element` checked that `size` (at most 4) bytes lie inside the mapping.
            unsafe {
                ptr::copy_nonoverlapping(at.as_ptr(), data.as_mut_ptr(), access.size.into());
            }
        }
        u32::from_le_bytes(data)
    }

    /// Answers element `index` of an input.
    pub(crate) fn set_port_data(&mut self, access: &PortAccess, index: u32, value: u64) {
        if let Some(at) = self.element(access, index) {
            let data = value.to_le_bytes();
            // SAFETY: as in `port_data`.
            unsafe { ptr::copy_nonoverlapping(data.as_ptr(), at.as_ptr(), access.size.into()) }
        }
    }

    /// Answers a memory read.
    pub(crate) fn set_mmio_data(&mut self, value: u64) {
        // SAFETY: inside the mapping; called after an exit that used this member of the union.
        unsafe { (*self.run()).__bindgen_anon_1.mmio.data = value.to_le_bytes() }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: our mapping, and nothing refers to it any more.
        unsafe {
            libc::munmap(self.base.as_ptr().cast(), self.len);
        }
    }
}
