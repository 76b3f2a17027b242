//! The memory behind guest RAM: one memory file, mapped once per range.

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::mm::{MapFlags, ProtFlags};
use skerry_boot::MemoryMap;
use skerry_hypervisor::{Gpa, GuestRam, MemorySlot, PageTracker, RamRegion};
use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap};

/// Guest RAM and the slots that a backend maps.
#[derive(Debug)]
pub(crate) struct Ram {
    pub(crate) memory: GuestRam,
    pub(crate) slots: Vec<MemorySlot>,
}

/// Reserves address space for all of `map`; pages are taken from the host when they are touched.
pub(crate) fn allocate(map: &MemoryMap) -> io::Result<Ram> {
    let file = File::from(memfd_create("guest-ram", MemfdFlags::CLOEXEC)?);
    file.set_len(map.size())?;
    let mut offset = 0;
    let mut regions = Vec::new();
    let mut slots = Vec::new();
    for range in map.ram() {
        let len = usize::try_from(range.len()).map_err(io::Error::other)?;
        let backing = FileOffset::new(file.try_clone()?, offset);
        let region: RamRegion = MmapRegionBuilder::new_with_bitmap(len, PageTracker::with_len(len))
            .with_file_offset(backing)
            .with_mmap_prot((ProtFlags::READ | ProtFlags::WRITE).bits() as i32)
            .with_mmap_flags((MapFlags::SHARED | MapFlags::NORESERVE).bits() as i32)
            .build()
            .map_err(io::Error::other)?;
        let region = Arc::new(region);
        let base = GuestAddress(range.start);
        let mapped = GuestRegionMmap::with_arc(region.clone(), base);
        regions.push(mapped.ok_or_else(|| io::Error::other("The range wraps round"))?);
        slots.push(MemorySlot {
            gpa: Gpa(range.start),
            region,
            offset: 0,
            len,
            read_only: false,
            log_dirty: false,
        });
        offset += range.len();
    }
    let memory = GuestRam::from_regions(regions).map_err(io::Error::other)?;
    Ok(Ram { memory, slots })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend};

    #[test]
    fn eight_gib_are_reserved_and_not_taken() {
        let ram = allocate(&MemoryMap::new(8 << 30).unwrap()).unwrap();
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
