//! The memory behind guest RAM: private to this process, taken from the host page by page as it is
//! touched, in huge pages where the host has them (a software processor's guest lives on the host's
//! TLB, and a fault for 2 MiB costs little more than one for 4 KiB).
#![expect(
    unsafe_code,
    reason = "advising the kernel about a mapping takes its address"
)]

use std::io;
use std::sync::Arc;

use rustix::mm::{Advice, madvise};
use skerry_boot::MemoryMap;
use skerry_hypervisor::{Gpa, GuestRam, MemorySlot, RamRegion};
use vm_memory::{GuestAddress, GuestRegionMmap};

/// Guest RAM and the slots that a backend maps.
#[derive(Debug)]
pub(crate) struct Ram {
    pub(crate) memory: GuestRam,
    pub(crate) slots: Vec<MemorySlot>,
}

/// Reserves address space for all of `map`.
pub(crate) fn allocate(map: &MemoryMap) -> io::Result<Ram> {
    let mut regions = Vec::new();
    let mut slots = Vec::new();
    for range in map.ram() {
        let len = usize::try_from(range.len()).map_err(io::Error::other)?;
        let region = Arc::new(reserve(len)?);
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
    }
    let memory = GuestRam::from_regions(regions).map_err(io::Error::other)?;
    Ok(Ram { memory, slots })
}

fn reserve(len: usize) -> io::Result<RamRegion> {
    // Private, anonymous and without a reservation of swap.
    let region = RamRegion::new(len).map_err(io::Error::other)?;
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
