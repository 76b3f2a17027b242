//! Writing into guest memory, and what every boot protocol needs there.

use skerry_hypervisor::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use crate::LoadError;
use crate::bytes::{put, slice_at};
use crate::elf::Segment;
use crate::entry::{Entry, gdt};
use crate::layout::{self, MemoryMap, Range};

/// A file that was read: its name is for messages and for the guest.
#[derive(Clone, Copy, Debug)]
pub struct NamedBytes<'a> {
    /// How a message calls it.
    pub name: &'a str,
    /// What it holds.
    pub bytes: &'a [u8],
}

/// What a kernel is given besides itself.
#[derive(Clone, Copy, Debug)]
pub struct BootInputs<'a> {
    /// Guest memory; [`MemoryMap::ram`] of `map` is mapped.
    pub ram: &'a GuestRam,
    /// How it lies.
    pub map: &'a MemoryMap,
    /// Kernel command line.
    pub command_line: &'a str,
    /// Initial RAM disk, or the module of a multiboot kernel.
    pub initrd: Option<NamedBytes<'a>>,
    /// Where the ACPI root pointer is.
    pub rsdp: Option<u64>,
}

impl BootInputs<'_> {
    pub(crate) fn memory_mib(&self) -> u64 {
        self.map.size() >> 20
    }

    pub(crate) fn write(
        &self,
        what: &'static str,
        address: u64,
        bytes: &[u8],
    ) -> Result<(), LoadError> {
        self.ram
            .write_slice(bytes, GuestAddress(address))
            .map_err(|source| LoadError::Write {
                what,
                address,
                source,
            })
    }

    fn zero(&self, what: &'static str, range: Range) -> Result<(), LoadError> {
        static ZEROS: [u8; 0x1_0000] = [0; 0x1_0000];
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(ZEROS.len() as u64) as usize;
            self.write(what, at, &ZEROS[..len])?;
            at += len as u64;
        }
        Ok(())
    }

    /// Refuses a part of the kernel that is outside RAM or where our own tables are.
    pub(crate) fn check_place(&self, kernel: &str, range: Range) -> Result<(), LoadError> {
        let fits = |ram: &Range| ram.start <= range.start && range.end <= ram.end;
        if !self.map.ram().iter().any(fits) {
            return Err(LoadError::KernelDoesNotFit {
                name: kernel.to_owned(),
                start: range.start,
                end: range.end,
                memory: self.memory_mib(),
            });
        }
        let bios = Range {
            start: layout::EBDA_START,
            end: layout::HIGH_MEMORY_START,
        };
        if range.start < layout::FIRST_FREE || range.overlaps(&bios) {
            return Err(LoadError::KernelTooLow {
                name: kernel.to_owned(),
                start: range.start,
            });
        }
        Ok(())
    }

    /// Copies the segments and clears the rest of each.
    pub(crate) fn load_segments(
        &self,
        kernel: &str,
        file: &[u8],
        segments: &[Segment],
    ) -> Result<(), LoadError> {
        for segment in segments {
            self.check_place(kernel, segment.target)?;
            // The parser has checked that the bytes are there.
            let bytes = slice_at(file, segment.offset, segment.file_size).unwrap_or_default();
            self.write("kernel", segment.target.start, bytes)?;
            let rest = Range {
                start: segment.target.start + bytes.len() as u64,
                end: segment.target.end,
            };
            self.zero("kernel", rest)?;
        }
        Ok(())
    }

    /// Finds room for the initrd as high as possible, above `above` and below `limit`, and
    /// copies it there.
    pub(crate) fn load_initrd(
        &self,
        initrd: NamedBytes<'_>,
        above: u64,
        limit: u64,
    ) -> Result<Range, LoadError> {
        let size = initrd.bytes.len() as u64;
        let start = limit
            .min(self.map.low_end())
            .checked_sub(size)
            .map(|start| start & !0xfff)
            .filter(|start| *start >= above);
        let start = start.ok_or_else(|| LoadError::InitrdDoesNotFit {
            name: initrd.name.to_owned(),
            size,
            memory: self.memory_mib(),
        })?;
        self.write("initrd", start, initrd.bytes)?;
        Ok(Range {
            start,
            end: start + size,
        })
    }

    /// Checks the command line against the kernel's limit and returns it with its NUL.
    pub(crate) fn command_line(&self, kernel: &str, limit: usize) -> Result<Vec<u8>, LoadError> {
        let limit = limit.min(layout::COMMAND_LINE_ROOM - 1);
        if self.command_line.len() > limit {
            return Err(LoadError::CommandLineTooLong {
                name: kernel.to_owned(),
                len: self.command_line.len(),
                limit,
            });
        }
        if self.command_line.contains('\0') {
            return Err(LoadError::CommandLineHasNul);
        }
        let mut line = self.command_line.as_bytes().to_vec();
        line.push(0);
        Ok(line)
    }

    /// What a BIOS leaves behind and kernels look at, and the descriptor table of the entry.
    pub(crate) fn write_common(&self, entry: &Entry) -> Result<(), LoadError> {
        // IBM PC BIOS data area: COM ports at 0x400, EBDA segment at 0x40e, KiB at 0x413.
        let mut bda = [0_u8; 0x100];
        for (n, port) in [0x3f8_u16, 0x2f8, 0x3e8, 0x2e8].into_iter().enumerate() {
            put(&mut bda, n * 2, &port.to_le_bytes());
        }
        put(&mut bda, 0x0e, &0x9fc0_u16.to_le_bytes());
        put(&mut bda, 0x13, &639_u16.to_le_bytes());
        self.write("BIOS data area", layout::BDA, &bda)?;
        self.write("EBDA", layout::EBDA_START, &[1, 0])?;
        let table: Vec<u8> = gdt(entry).iter().flat_map(|d| d.to_le_bytes()).collect();
        self.write("descriptor table", layout::GDT, &table)
    }
}

/// Finds room for structures of ours in conventional memory beside a kernel that may be there.
#[derive(Debug)]
pub(crate) struct LowMemory {
    taken: Vec<Range>,
}

impl LowMemory {
    pub(crate) fn new(kernel: &[Segment]) -> Self {
        Self {
            taken: kernel.iter().map(|s| s.target).collect(),
        }
    }

    /// The lowest free place for `len` bytes; `None` where there is no room.
    pub(crate) fn place(&mut self, len: usize) -> Option<u64> {
        let len = len as u64;
        let mut start = layout::FIRST_FREE;
        loop {
            let range = Range {
                start,
                end: start.checked_add(len)?,
            };
            if range.end > layout::EBDA_START {
                return None;
            }
            match self.taken.iter().find(|t| t.overlaps(&range)) {
                Some(taken) => start = taken.end.checked_add(15)? & !15,
                None => {
                    self.taken.push(range);
                    return Some(start);
                }
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// RAM of `size` bytes and its map.
    pub(crate) fn memory(size: u64) -> (GuestRam, MemoryMap) {
        let map = MemoryMap::new(size).unwrap();
        let ranges: Vec<_> = map
            .ram()
            .iter()
            .map(|r| (GuestAddress(r.start), r.len() as usize))
            .collect();
        (GuestRam::from_ranges(&ranges).unwrap(), map)
    }

    #[test]
    fn low_memory_goes_round_the_kernel() {
        let segment = Segment {
            target: Range {
                start: 0x1800,
                end: 0x9_0001,
            },
            offset: 0,
            file_size: 0,
        };
        let mut low = LowMemory::new(&[segment]);
        assert_eq!(low.place(0x800), Some(0x1000));
        assert_eq!(low.place(0x10), Some(0x9_0010));
        assert_eq!(low.place(0x1_0000), None);
    }

    #[test]
    fn the_initrd_lies_high_and_page_aligned() {
        let (ram, map) = memory(8 << 20);
        let inputs = BootInputs {
            ram: &ram,
            map: &map,
            command_line: "",
            initrd: None,
            rsdp: None,
        };
        let initrd = NamedBytes {
            name: "i",
            bytes: &[7; 5000],
        };
        let at = inputs.load_initrd(initrd, 0x20_0000, u64::MAX).unwrap();
        assert_eq!(at.start, (8 << 20) - 8192);
        assert_eq!(ram.read_obj::<u8>(GuestAddress(at.end - 1)).unwrap(), 7);
        let error = inputs.load_initrd(initrd, at.start + 1, u64::MAX);
        assert!(matches!(
            error,
            Err(LoadError::InitrdDoesNotFit {
                size: 5000,
                memory: 8,
                ..
            })
        ));
    }

    #[test]
    fn a_kernel_may_not_lie_on_the_tables() {
        let (ram, map) = memory(4 << 20);
        let inputs = BootInputs {
            ram: &ram,
            map: &map,
            command_line: "",
            initrd: None,
            rsdp: None,
        };
        let check = |start, end| inputs.check_place("k", Range { start, end });
        assert!(check(0x10_0000, 4 << 20).is_ok());
        assert!(check(0x1000, 0x9_0000).is_ok());
        assert!(matches!(
            check(0x400, 0x2000),
            Err(LoadError::KernelTooLow { .. })
        ));
        assert!(matches!(
            check(0x8_0000, 0x11_0000),
            Err(LoadError::KernelTooLow { .. })
        ));
        assert!(matches!(
            check(0x10_0000, (4 << 20) + 1),
            Err(LoadError::KernelDoesNotFit { .. })
        ));
    }
}
