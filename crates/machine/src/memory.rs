//! The memory behind guest RAM: private to this process, taken from the host page by page as it is
//! touched, in huge pages where the host has them (a software processor's guest lives on the host's
//! TLB, and a fault for 2 MiB costs little more than one for 4 KiB).
//!
//! A restored machine's memory is the saved file, mapped copy-on-write where it holds pages; nothing
//! of it is read before the guest does.
#![expect(
    unsafe_code,
    reason = "mapping a file over guest memory and advising the kernel about it take addresses"
)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap};
use skerry_boot::MemoryMap;
use skerry_devices::virtio::balloon::MemorySink;
use skerry_hypervisor::{Gpa, GuestRam, MemorySlot, PAGE_SIZE, PageTracker, RamRegion};
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
};

use crate::MachineError;

pub(crate) type Region = GuestRegionMmap<PageTracker>;

/// Consecutive pages of guest memory that lie together in a file. The guest's memory is counted
/// without the holes in its address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedRun {
    /// Where they belong in the guest's memory, a multiple of a page.
    pub at: u64,
    /// Bytes, a multiple of a page.
    pub len: u64,
    /// Where they are in the file, a multiple of a page.
    pub offset: u64,
}

/// Guest memory in files: later ones lie over earlier ones, and what none has is zero.
#[derive(Debug, Default)]
pub struct SavedMemory {
    /// The files and what they hold.
    pub layers: Vec<(File, Vec<SavedRun>)>,
}

impl SavedMemory {
    /// Refuses runs that a machine of `size` bytes has no memory for, or that their files don't have:
    /// what is mapped and isn't there ends the process that touches it.
    pub(crate) fn check(&self, size: u64) -> Result<(), MachineError> {
        let whole = |n: u64| n.is_multiple_of(PAGE_SIZE as u64);
        let within = |at: u64, len: u64, end: u64| at.checked_add(len).is_some_and(|to| to <= end);
        for (file, runs) in &self.layers {
            let metadata = file.metadata().map_err(|source| MachineError::Resource {
                what: "saved memory",
                source,
            })?;
            let len = if metadata.is_file() {
                metadata.len()
            } else {
                0
            };
            for &SavedRun {
                at,
                len: run,
                offset,
            } in runs
            {
                let problem = if !(whole(at) && whole(run) && whole(offset)) {
                    "it isn't made of whole pages"
                } else if !within(at, run, size) {
                    "the machine has no memory there"
                } else if !within(offset, run, len) {
                    "its file is too short"
                } else {
                    continue;
                };
                return Err(MachineError::SavedMemory { at, problem });
            }
        }
        Ok(())
    }
}

/// Guest RAM and the slots that a backend maps.
#[derive(Debug)]
pub(crate) struct Ram {
    pub(crate) memory: GuestRam,
    pub(crate) slots: Vec<MemorySlot>,
}

/// Reserves address space for all of `map`, and maps what was saved. `log_dirty`: the backend logs
/// the guest's writes from the start.
pub(crate) fn allocate(
    map: &MemoryMap,
    saved: Option<&SavedMemory>,
    log_dirty: bool,
) -> io::Result<Ram> {
    let mut regions = Vec::new();
    let mut slots = Vec::new();
    for range in map.ram() {
        let len = usize::try_from(range.len()).map_err(io::Error::other)?;
        let region = Arc::new(reserve(len, saved.is_none())?);
        let base = GuestAddress(range.start);
        let mapped = GuestRegionMmap::with_arc(region.clone(), base);
        regions.push(mapped.ok_or_else(|| io::Error::other("The range wraps round"))?);
        slots.push(MemorySlot {
            gpa: Gpa(range.start),
            region,
            offset: 0,
            len,
            read_only: false,
            log_dirty,
        });
    }
    let memory = GuestRam::from_regions(regions).map_err(io::Error::other)?;
    for (file, runs) in saved.iter().flat_map(|saved| &saved.layers) {
        for run in runs {
            map_saved(&memory, file, run)?;
        }
    }
    Ok(Ram { memory, slots })
}

/// Maps `run` over the memory that was reserved for it.
pub(crate) fn map_saved(memory: &GuestRam, file: &File, run: &SavedRun) -> io::Result<()> {
    let page = PAGE_SIZE as u64;
    let aligned = [run.at, run.len, run.offset]
        .iter()
        .all(|n| n.is_multiple_of(page));
    let mut left = run.len;
    if aligned {
        let mut base = 0;
        for region in memory.iter() {
            let start = run.at.max(base);
            let end = run.at.saturating_add(run.len).min(base + region.len());
            if start < end {
                let offset = run.offset.saturating_add(start - run.at);
                map_file(region, start - base, end - start, file, offset)?;
                left -= end - start;
            }
            base += region.len();
        }
    }
    if left == 0 {
        return Ok(());
    }
    let text = format!("saved memory at {:#x} is none that the machine has", run.at);
    Err(io::Error::new(io::ErrorKind::InvalidData, text))
}

/// Maps `len` bytes of `file` over `region` from `at` on, which lie within it.
fn map_file(region: &Region, at: u64, len: u64, file: &File, offset: u64) -> io::Result<()> {
    let slice = region
        .get_slice(MemoryRegionAddress(at), len as usize)
        .map_err(io::Error::other)?;
    // SAFETY: the range was just found to lie within the region's mapping, which is ours and which
    // nothing holds a reference into, only addresses that stay; the new mapping is private and of the same size and protection.
    let mapped = unsafe {
        mmap(
            slice.ptr_guard_mut().as_ptr().cast(),
            len as usize,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
            file,
            offset,
        )
    };
    mapped.map(drop).map_err(io::Error::from)
}

/// Gives the private pages of `range` of `region` back to the host: what is read there next is the
/// file that is mapped there, or zero.
pub(crate) fn discard(region: &Region, range: Range<u64>) -> io::Result<()> {
    let len = (range.end - range.start) as usize;
    let slice = region
        .get_slice(MemoryRegionAddress(range.start), len)
        .map_err(io::Error::other)?;
    // SAFETY: the range was just found to lie within the region's mapping, which is private memory
    // of the guest's that nothing holds a reference into; its content may change as by a write.
    unsafe {
        madvise(
            slice.ptr_guard_mut().as_ptr().cast(),
            len,
            Advice::LinuxDontNeed,
        )?;
    }
    region
        .get_mmap()
        .bitmap()
        .mark_dirty(range.start as usize, len);
    Ok(())
}

/// Where the guest's free memory goes.
#[derive(Debug)]
pub(crate) struct FreeMemory(pub(crate) GuestRam);

impl MemorySink for FreeMemory {
    /// The pages are as if written by the host, with what they are read as from now on: their content
    /// in the base, or zero. So the log of writes, diffs and decoded code know of it as of any write.
    fn give_back(&self, address: u64, len: u64) {
        let end = address.saturating_add(len);
        for region in self.0.iter() {
            let base = region.start_addr().0;
            let (start, end) = (address.max(base), end.min(base + region.len()));
            if start < end
                && let Err(error) = discard(region, start - base..end - base)
            {
                // The host keeps the memory, and the guest may use it again all the same.
                tracing::debug!(%error, "free memory stays with the guest");
            }
        }
    }
}

fn reserve(len: usize, huge: bool) -> io::Result<RamRegion> {
    // Private, anonymous and without a reservation of swap.
    let region = RamRegion::new(len).map_err(io::Error::other)?;
    if !huge {
        // A clone shares what it can and takes little of its own.
        return Ok(region);
    }
    // SAFETY: the mapping is `region`'s own, of `len` bytes; the advice changes how it is backed
    // and nothing that can be read from it.
    let advised = unsafe { madvise(region.as_ptr().cast(), len, Advice::LinuxHugepage) };
    if let Err(error) = advised {
        tracing::debug!(%error, "guest memory without huge pages");
    }
    Ok(region)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend};

    #[test]
    fn eight_gib_are_reserved_and_not_taken() {
        let ram = allocate(&MemoryMap::new(8 << 30).unwrap(), None, false).unwrap();
        assert_eq!(ram.slots.len(), 2);
        assert_eq!(ram.memory.last_addr().0, 0x2_3fff_ffff);
        let last = GuestAddress(0x2_3fff_fff8);
        ram.memory.write_obj(5_u64, last).unwrap();
        assert_eq!(ram.memory.read_obj::<u64>(last).unwrap(), 5);
        assert!(
            ram.memory
                .read_obj::<u64>(GuestAddress(0xc000_0000))
                .is_err()
        );
    }
}
