//! A sandbox's memory: one mapping, read and written by the host only while the guest does not run.

#![expect(
    unsafe_code,
    reason = "the one module that maps guest memory and looks into it"
)]

use std::fs::File;
use std::io;
use std::sync::Arc;

use skerry_hypervisor::{PAGE_SIZE, RamRegion};
use skerry_sandbox_abi::Control;
use vm_memory::bitmap::Bitmap;
use vm_memory::{FileOffset, MmapRegion};

const PROTECTION: i32 = libc::PROT_READ | libc::PROT_WRITE;

fn failed(error: vm_memory::mmap::MmapRegionError) -> io::Error {
    match error {
        vm_memory::mmap::MmapRegionError::Mmap(error) => error,
        other => io::Error::other(other),
    }
}

fn map_file(file: &Arc<File>, size: u64, protection: i32, kind: i32) -> io::Result<RamRegion> {
    let file = FileOffset::from_arc(file.clone(), 0);
    let flags = kind | libc::MAP_NORESERVE;
    MmapRegion::build(Some(file), size as usize, protection, flags).map_err(failed)
}

/// What a file holds; writes stay in this mapping.
pub(crate) fn private(file: &Arc<File>, size: u64) -> io::Result<RamRegion> {
    map_file(file, size, PROTECTION, libc::MAP_PRIVATE)
}

/// A file's own pages.
pub(crate) fn shared(file: &Arc<File>, size: u64) -> io::Result<RamRegion> {
    map_file(file, size, PROTECTION, libc::MAP_SHARED)
}

/// The memory of one sandbox. There is one owner, the `Sandbox`, which also owns the processor: to
/// borrow this is to know that no guest code runs.
#[derive(Debug)]
pub(crate) struct Region {
    ram: Arc<RamRegion>,
}

impl Region {
    /// Zeroes.
    pub(crate) fn new(size: u64) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let ram = MmapRegion::build(None, size as usize, PROTECTION, flags).map_err(failed)?;
        Ok(Self { ram: Arc::new(ram) })
    }

    /// What a file holds; writes stay here.
    pub(crate) fn of(file: &Arc<File>, size: u64) -> io::Result<Self> {
        let ram = private(file, size)?;
        Ok(Self { ram: Arc::new(ram) })
    }

    /// For slots.
    pub(crate) fn ram(&self) -> &Arc<RamRegion> {
        &self.ram
    }

    /// `len` bytes at `at`; `None` outside.
    pub(crate) fn bytes(&self, at: u64, len: u64) -> Option<&[u8]> {
        let end = at.checked_add(len)?;
        if end > self.ram.size() as u64 {
            return None;
        }
        // SAFETY: inside the mapping, which lives as long as `self`; nobody writes: the guest does not
        // run, and who writes for the host borrows `self` mutably.
        Some(unsafe {
            std::slice::from_raw_parts(self.ram.as_ptr().add(at as usize), len as usize)
        })
    }

    /// `len` bytes at `at`, to write; `None` outside. For data: code that the guest may have run needs
    /// [`Region::wrote_code`] afterwards.
    pub(crate) fn bytes_mut(&mut self, at: u64, len: u64) -> Option<&mut [u8]> {
        let end = at.checked_add(len)?;
        if end > self.ram.size() as u64 {
            return None;
        }
        // SAFETY: inside the mapping, which lives as long as `self`; the guest does not run, and all
        // other access of the host borrows `self`.
        Some(unsafe {
            std::slice::from_raw_parts_mut(self.ram.as_ptr().add(at as usize), len as usize)
        })
    }

    /// Bytes to read and others to write, which must lie apart.
    pub(crate) fn two(
        &mut self,
        from: u64,
        len: u64,
        to: u64,
        room: u64,
    ) -> Option<(&[u8], &mut [u8])> {
        let (end, to_end) = (from.checked_add(len)?, to.checked_add(room)?);
        let size = self.ram.size() as u64;
        if end > size || to_end > size || (from < to_end && to < end) {
            return None;
        }
        let base = self.ram.as_ptr();
        // SAFETY: both inside the mapping, and apart; `self` is borrowed as long as they are, and the
        // guest does not run.
        Some(unsafe {
            (
                std::slice::from_raw_parts(base.add(from as usize), len as usize),
                std::slice::from_raw_parts_mut(base.add(to as usize), room as usize),
            )
        })
    }

    /// Tells the backend that bytes which the guest may have executed are others now.
    pub(crate) fn wrote_code(&self, at: u64, len: u64) {
        self.ram.bitmap().mark_dirty(at as usize, len as usize);
    }

    /// The control page at `at`.
    pub(crate) fn control(&mut self, at: u64) -> ControlPage {
        let size = size_of::<Control>() as u64;
        let inside = at
            .checked_add(size)
            .is_some_and(|end| end <= self.ram.size() as u64);
        assert!(inside && at.is_multiple_of(8), "the layout was checked");
        // SAFETY: inside the mapping, as was just checked.
        let page = unsafe { self.ram.as_ptr().add(at as usize) };
        ControlPage(page.cast())
    }

    /// Makes a page what `from` holds, or zero.
    pub(crate) fn restore_page(&mut self, page: u64, from: Option<&[u8]>) -> bool {
        let len = PAGE_SIZE as u64;
        match (self.bytes_mut(page * len, len), from) {
            (Some(to), Some(from)) if from.len() == to.len() => to.copy_from_slice(from),
            (Some(to), None) => to.fill(0),
            _ => return false,
        }
        true
    }

    /// Goes back to what `file` holds, all of it: the same address, another content.
    pub(crate) fn remap(&mut self, file: &File) -> io::Result<()> {
        use rustix::mm::{MapFlags, ProtFlags, mmap};
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let size = self.ram.size();
        // SAFETY: replaces this very mapping by one of the same size and protection; `self` is borrowed
        // mutably, so that no slice of it is alive, and the guest does not run.
        unsafe { mmap(self.ram.as_ptr().cast(), size, protection, flags, file, 0) }?;
        self.wrote_code(0, size as u64);
        Ok(())
    }
}

/// The control page. A pointer, as the guest writes it between two looks: each field is read once, as a
/// whole, and then checked. Valid while its [`Region`] is: the `Sandbox` keeps both.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ControlPage(*mut Control);

// SAFETY: it points to memory that moves with its owner, which uses it from one thread at a time.
unsafe impl Send for ControlPage {}

macro_rules! fields {
    (read { $($get:ident: $type:ty;)* } write { $($set:ident $field:ident: $other:ty;)* }) => {
        $(
            #[inline]
            pub(crate) fn $get(self) -> $type {
                // SAFETY: inside the mapping and aligned (`Region::control`).
                unsafe { (&raw const (*self.0).$get).read_volatile() }
            }
        )*
        $(
            #[inline]
            pub(crate) fn $set(self, value: $other) {
                // SAFETY: as for reading.
                unsafe { (&raw mut (*self.0).$field).write_volatile(value) }
            }
        )*
    };
}

impl ControlPage {
    fields! {
        read {
            version: u32;
            status: u32;
            detail: u32;
            output_len: u32;
            host_function: u32;
            host_args_len: u32;
            reply_at: u32;
            log_len: u32;
            log_dropped: u32;
            allocations: u64;
            allocated: u64;
            allocated_peak: u64;
        }
        write {
            set_request request: u32;
            set_function function: u32;
            set_input_len input_len: u32;
            set_host_status host_status: u32;
            set_host_detail host_detail: u32;
            set_reply_len reply_len: u32;
            set_log_len log_len: u32;
            set_seed seed: u64;
            set_image image: u64;
            set_profiled profiled: u64;
        }
    }

    /// Sets all of it.
    pub(crate) fn set_all(self, control: Control) {
        // SAFETY: as for reading.
        unsafe { self.0.write_volatile(control) }
    }
}

/// A snapshot's memory: a file without a name, and a view of it.
#[derive(Debug)]
pub(crate) struct View {
    ram: RamRegion,
}

impl View {
    pub(crate) fn of(file: &Arc<File>, size: u64) -> io::Result<Self> {
        let ram = map_file(file, size, libc::PROT_READ, libc::MAP_SHARED)?;
        Ok(Self { ram })
    }

    /// One page.
    pub(crate) fn page(&self, page: u64) -> Option<&[u8]> {
        let at = page.checked_mul(PAGE_SIZE as u64)?;
        if at.checked_add(PAGE_SIZE as u64)? > self.ram.size() as u64 {
            return None;
        }
        // SAFETY: inside the mapping. The file is sealed against writing: its pages never change.
        Some(unsafe { std::slice::from_raw_parts(self.ram.as_ptr().add(at as usize), PAGE_SIZE) })
    }
}
