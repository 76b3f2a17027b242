//! Linux's 64-bit boot protocol (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol", and
//! zero-page.rst for the offsets).

use crate::LoadError;
use crate::bytes::put;
use crate::bzimage::{HEADER_OFFSET, SetupHeader};
use crate::elf::Elf;
use crate::entry::Entry;
use crate::layout::{self, MapEntry, Range};
use crate::load::BootInputs;

const ACPI_RSDP_ADDR: usize = 0x070;
const EXT_RAMDISK_IMAGE: usize = 0x0c0;
const E820_ENTRIES: usize = 0x1e8;
const TYPE_OF_LOADER: usize = 0x210;
const LOADFLAGS: usize = 0x211;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const HEAP_END_PTR: usize = 0x224;
const CMD_LINE_PTR: usize = 0x228;
const E820_TABLE: usize = 0x2d0;
const E820_MAX: usize = 128;
/// "Unknown boot loader" without an assigned id.
const LOADER_UNDEFINED: u8 = 0xff;
const CAN_USE_HEAP: u8 = 0x80;

/// Loads the kernel `file`, parsed as `elf`, and everything that the protocol gives it.
pub(crate) fn load(
    inputs: &BootInputs<'_>,
    name: &str,
    file: &[u8],
    elf: &Elf,
    header: &SetupHeader,
) -> Result<Entry, LoadError> {
    let extent = elf.extent();
    let needed = Range {
        start: extent.start,
        end: extent
            .end
            .max(extent.start.saturating_add(header.init_size)),
    };
    inputs.check_place(name, needed)?;
    if extent.start < layout::HIGH_MEMORY_START {
        return Err(LoadError::KernelTooLow {
            name: name.to_owned(),
            start: extent.start,
        });
    }
    inputs.load_segments(name, file, &elf.segments)?;
    let command_line = inputs.command_line(name, header.command_line_max)?;
    inputs.write("command line", layout::COMMAND_LINE, &command_line)?;
    let initrd = match inputs.initrd {
        Some(initrd) => {
            let limit = header.initrd_max.saturating_add(1);
            Some(inputs.load_initrd(initrd, needed.end, limit)?)
        }
        None => None,
    };
    let page = zero_page(header, initrd, &inputs.map.e820(), inputs.rsdp);
    inputs.write("zero page", layout::ZERO_PAGE, &page)?;
    inputs.write("page tables", layout::PAGE_TABLES, &identity_map())?;
    let in_kernel = |address: &u64| elf.segments.iter().any(|s| contains(&s.target, *address));
    let entry = Entry::Linux64 {
        rip: Some(elf.entry)
            .filter(in_kernel)
            .or(elf.physical_entry)
            .unwrap_or(elf.entry),
        zero_page: layout::ZERO_PAGE,
    };
    inputs.write_common(&entry)?;
    Ok(entry)
}

fn contains(range: &Range, address: u64) -> bool {
    (range.start..range.end).contains(&address)
}

/// Fills `struct boot_params`.
fn zero_page(
    header: &SetupHeader,
    initrd: Option<Range>,
    e820: &[MapEntry],
    rsdp: Option<u64>,
) -> Vec<u8> {
    let mut page = vec![0_u8; 4096];
    let raw = &header.raw[..header.raw.len().min(E820_TABLE - HEADER_OFFSET)];
    put(&mut page, HEADER_OFFSET, raw);
    put(&mut page, TYPE_OF_LOADER, &[LOADER_UNDEFINED]);
    page[LOADFLAGS] |= CAN_USE_HEAP;
    put(&mut page, HEAP_END_PTR, &0xfe00_u16.to_le_bytes());
    put(
        &mut page,
        CMD_LINE_PTR,
        &(layout::COMMAND_LINE as u32).to_le_bytes(),
    );
    if let Some(initrd) = initrd {
        // Below 4 GiB by construction, so that the high halves at EXT_RAMDISK_IMAGE stay zero.
        put(
            &mut page,
            RAMDISK_IMAGE,
            &(initrd.start as u32).to_le_bytes(),
        );
        put(
            &mut page,
            RAMDISK_SIZE,
            &(initrd.len() as u32).to_le_bytes(),
        );
    }
    put(&mut page, EXT_RAMDISK_IMAGE, &[0; 8]);
    put(&mut page, ACPI_RSDP_ADDR, &rsdp.unwrap_or(0).to_le_bytes());
    let entries = &e820[..e820.len().min(E820_MAX)];
    page[E820_ENTRIES] = entries.len() as u8;
    for (n, entry) in entries.iter().enumerate() {
        let at = E820_TABLE + n * 20;
        put(&mut page, at, &entry.range.start.to_le_bytes());
        put(&mut page, at + 8, &entry.range.len().to_le_bytes());
        put(&mut page, at + 16, &(entry.kind as u32).to_le_bytes());
    }
    page
}

/// Page tables that map the first 4 GiB onto themselves with 2 MiB pages.
fn identity_map() -> Vec<u8> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let mut tables = vec![0_u64; 6 * 512];
    tables[0] = (layout::PAGE_TABLES + 0x1000) | PRESENT_WRITABLE;
    for gib in 0..4 {
        tables[512 + gib] = (layout::PAGE_TABLES + 0x2000 + gib as u64 * 0x1000) | PRESENT_WRITABLE;
    }
    for (page, entry) in tables[1024..].iter_mut().enumerate() {
        *entry = (page as u64) << 21 | LARGE | PRESENT_WRITABLE;
    }
    tables
        .iter()
        .flat_map(|entry| entry.to_le_bytes())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::{u32_at, u64_at};
    use crate::elf;
    use crate::load::NamedBytes;
    use crate::load::tests::memory;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn the_zero_page_tells_all() {
        let (ram, map) = memory(64 << 20);
        let inputs = BootInputs {
            ram: &ram,
            map: &map,
            command_line: "console=ttyS0",
            initrd: Some(NamedBytes {
                name: "initrd",
                bytes: &[1; 4097],
            }),
            rsdp: Some(0xe_0000),
        };
        let file = elf::tests::sample(0x100_0000, &[0x90; 64], 64, None);
        let elf = elf::parse(&file).unwrap();
        let header = SetupHeader::for_vmlinux(0x100_0000, 0x10_0000);
        let entry = load(&inputs, "k", &file, &elf, &header).unwrap();
        assert_eq!(entry.rip(), 0x100_0000);
        let mut page = [0; 4096];
        ram.read_slice(&mut page, GuestAddress(layout::ZERO_PAGE))
            .unwrap();
        assert_eq!(&page[0x202..0x206], b"HdrS");
        assert_eq!(page[TYPE_OF_LOADER], 0xff);
        assert_eq!(u64_at(&page, ACPI_RSDP_ADDR), Some(0xe_0000));
        assert_eq!(u32_at(&page, RAMDISK_IMAGE), Some((64 << 20) - 8192));
        assert_eq!(u32_at(&page, RAMDISK_SIZE), Some(4097));
        assert_eq!(page[E820_ENTRIES], 4);
        assert_eq!(u64_at(&page, E820_TABLE + 3 * 20), Some(0x10_0000));
        assert_eq!(u64_at(&page, E820_TABLE + 3 * 20 + 8), Some(63 << 20));
        let mut line = [0; 14];
        ram.read_slice(&mut line, GuestAddress(layout::COMMAND_LINE))
            .unwrap();
        assert_eq!(&line, b"console=ttyS0\0");
    }

    #[test]
    fn memory_that_the_kernel_needs_is_asked_for() {
        let (ram, map) = memory(16 << 20);
        let inputs = BootInputs {
            ram: &ram,
            map: &map,
            command_line: "",
            initrd: None,
            rsdp: None,
        };
        let file = elf::tests::sample(0x80_0000, &[0x90; 64], 64, None);
        let elf = elf::parse(&file).unwrap();
        let header = SetupHeader::for_vmlinux(0x80_0000, 0x80_0001);
        let result = load(&inputs, "k", &file, &elf, &header);
        assert!(matches!(
            result,
            Err(LoadError::KernelDoesNotFit {
                end: 0x100_0001,
                ..
            })
        ));
    }

    #[test]
    fn the_identity_map_is_one() {
        let tables = identity_map();
        assert_eq!(tables.len(), 6 * 4096);
        let last = u64_at(&tables, tables.len() - 8).unwrap();
        assert_eq!(last, 0xffe0_0083);
    }
}
