//! Where things are in guest-physical memory.
//!
//! ```text
//!  0x0000_0400  BIOS data area          0x0000_0500  GDT
//!  0x0000_7000  zero page (Linux)       0x0000_9000  page tables, 6 pages
//!  0x0002_0000  command line (Linux)    0x0009_fc00  EBDA, 1 KiB
//!  0x000a_0000  video hole              0x000e_0000  ACPI tables, then MP table at 0xf_0000
//!  0x000f_f000  VM generation id
//!  0x0010_0000  RAM up to 3 GiB         0xc000_0000  hole for devices
//!  0x1_0000_0000  the rest of RAM
//! ```

/// Where conventional memory ends and the extended BIOS data area starts.
pub const EBDA_START: u64 = 0x9_fc00;
/// Where conventional memory ends for all.
pub const VIDEO_START: u64 = 0xa_0000;
/// Where the ACPI tables start; a guest looks for the RSDP from here to 1 MiB (ACPI §5.2.5.1).
pub const ACPI_START: u64 = 0xe_0000;
/// Where the MP floating pointer is; a guest looks for it from here to 1 MiB (MP spec 1.4 §4).
pub const MP_TABLE_START: u64 = 0xf_0000;
/// The page of the VM generation id, which nothing else shares: in memory that the guest does not use,
/// and at one place in every machine, so that a restored one finds it.
pub const GENERATION_ID: u64 = 0xf_f000;
/// Where extended memory starts.
pub const HIGH_MEMORY_START: u64 = 0x10_0000;
/// Where RAM below 4 GiB ends at the latest.
pub const HOLE_START: u64 = 0xc000_0000;
/// Where the hole ends and the rest of RAM starts.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// BIOS data area.
pub(crate) const BDA: u64 = 0x400;
/// Global descriptor table for the entry.
pub(crate) const GDT: u64 = 0x500;
/// First address that a loaded kernel may use.
pub(crate) const FIRST_FREE: u64 = 0x1000;
/// `struct boot_params`.
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// Page tables of the 64-bit entry: PML4, PDPT, four page directories.
pub(crate) const PAGE_TABLES: u64 = 0x9000;
/// Linux's command line.
pub(crate) const COMMAND_LINE: u64 = 0x2_0000;
/// Bytes that the command line can have there.
pub(crate) const COMMAND_LINE_ROOM: usize = 0x1_0000;

/// A range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
}

impl Range {
    /// Bytes in the range.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether there is nothing in the range.
    pub fn is_empty(&self) -> bool {
        self.end <= self.start
    }

    /// Whether both have an address in common.
    pub fn overlaps(&self, other: &Range) -> bool {
        self.start < other.end && other.start < self.end
    }
}

/// What an entry of the e820 map says of its range (ACPI §15, table 15.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryKind {
    /// RAM for the guest to use.
    Ram = 1,
    /// Not for use.
    Reserved = 2,
}

/// One entry of the e820 map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// The addresses.
    pub range: Range,
    /// What is there.
    pub kind: MemoryKind,
}

/// How a machine's RAM lies in guest-physical addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryMap {
    size: u64,
}

impl MemoryMap {
    /// The least memory that a machine can have.
    pub const MIN_SIZE: u64 = 2 << 20;

    /// The map for `size` bytes of RAM, a multiple of 4 KiB of at least [`Self::MIN_SIZE`] bytes;
    /// `None` if it is not, or if it can't be addressed with 52 bits.
    pub fn new(size: u64) -> Option<Self> {
        let fits = (Self::MIN_SIZE..=1 << 51).contains(&size);
        (fits && size.is_multiple_of(4096)).then_some(Self { size })
    }

    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where RAM below 4 GiB ends.
    pub fn low_end(&self) -> u64 {
        self.size.min(HOLE_START)
    }

    /// The ranges to back with memory, ascending: one, or two if there is RAM above 4 GiB.
    pub fn ram(&self) -> Vec<Range> {
        let mut ranges = vec![Range {
            start: 0,
            end: self.low_end(),
        }];
        if self.size > HOLE_START {
            ranges.push(Range {
                start: HOLE_END,
                end: HOLE_END + (self.size - HOLE_START),
            });
        }
        ranges
    }

    /// What the guest is told: the BIOS areas below 1 MiB are backed, and not for use.
    pub fn e820(&self) -> Vec<MapEntry> {
        let ram = |start, end| MapEntry {
            range: Range { start, end },
            kind: MemoryKind::Ram,
        };
        let reserved = |start, end| MapEntry {
            range: Range { start, end },
            kind: MemoryKind::Reserved,
        };
        let mut map = vec![
            ram(0, EBDA_START),
            reserved(EBDA_START, VIDEO_START),
            reserved(ACPI_START, HIGH_MEMORY_START),
            ram(HIGH_MEMORY_START, self.low_end()),
        ];
        map.extend(self.ram().iter().skip(1).map(|r| ram(r.start, r.end)));
        map
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn eight_gib_lie_around_the_hole() {
        let map = MemoryMap::new(8 << 30).unwrap();
        let ram = map.ram();
        assert_eq!(ram.len(), 2);
        assert_eq!((ram[0].start, ram[0].end), (0, 0xc000_0000));
        assert_eq!((ram[1].start, ram[1].end), (1 << 32, 0x2_4000_0000));
        assert_eq!(ram.iter().map(Range::len).sum::<u64>(), 8 << 30);
    }

    #[test]
    fn three_gib_need_no_high_range() {
        assert_eq!(MemoryMap::new(3 << 30).unwrap().ram().len(), 1);
        assert_eq!(MemoryMap::new((3 << 30) + 4096).unwrap().ram().len(), 2);
    }

    #[test]
    fn odd_sizes_are_refused() {
        for size in [0, 4096, (2 << 20) - 4096, (2 << 20) + 1, u64::MAX, 1 << 52] {
            assert_eq!(MemoryMap::new(size), None, "{size:#x}");
        }
    }

    proptest! {
        #[test]
        fn e820_is_sorted_disjoint_and_inside_ram(pages in 512_u64..1 << 26) {
            let map = MemoryMap::new(pages * 4096).unwrap();
            let e820 = map.e820();
            for pair in e820.windows(2) {
                prop_assert!(pair[0].range.end <= pair[1].range.start);
            }
            for entry in &e820 {
                prop_assert!(!entry.range.is_empty());
                let inside = |r: &Range| r.start <= entry.range.start && entry.range.end <= r.end;
                prop_assert!(map.ram().iter().any(inside));
            }
            let usable: u64 = e820
                .iter()
                .filter(|e| e.kind == MemoryKind::Ram)
                .map(|e| e.range.len())
                .sum();
            prop_assert_eq!(usable, map.size() - (HIGH_MEMORY_START - EBDA_START));
        }
    }
}
