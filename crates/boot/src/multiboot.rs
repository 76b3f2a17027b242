//! Multiboot 1 (Multiboot Specification 0.6.96).

use crate::bytes::{align_up, u32_at};
use crate::elf::Segment;
use crate::entry::Entry;
use crate::layout::{self, Range};
use crate::load::{BootInputs, LowMemory};
use crate::{FormatError, LoadError, elf};

const HEADER_MAGIC: u32 = 0x1bad_b002;
/// The header lies wholly in this much of the file (§3.1).
const SEARCH: usize = 8192;
const FLAG_ADDRESSES: u32 = 1 << 16;
/// Flags 0–15 must be understood; we do: aligned modules, memory information, and video mode,
/// which may be left unset in the information.
const UNDERSTOOD: u32 = 0b111;
const LOADER_NAME: &[u8] = b"Skerry\0";
const COMMAND_LINE_MAX: usize = 4095;

const INFO_MEMORY: u32 = 1;
const INFO_COMMAND_LINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;
const INFO_SIZE: usize = 120;
const MAP_ENTRY_SIZE: usize = 24;
const MODULE_SIZE: usize = 16;

/// A multiboot kernel as it is to be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Multiboot {
    /// What goes where.
    pub segments: Vec<Segment>,
    /// First instruction.
    pub entry: u32,
}

/// Finds the header; `None` where the file has none. Returns its offset and flags.
fn find_header(bytes: &[u8]) -> Option<(usize, u32)> {
    let end = bytes.len().min(SEARCH);
    (0..end.saturating_sub(11)).step_by(4).find_map(|at| {
        let flags = u32_at(bytes, at + 4)?;
        let checksum = u32_at(bytes, at + 8)?;
        let magic = u32_at(bytes, at)?;
        let sum = magic.wrapping_add(flags).wrapping_add(checksum);
        (magic == HEADER_MAGIC && sum == 0).then_some((at, flags))
    })
}

/// Parses a multiboot kernel; `Ok(None)` if the file has no header.
pub fn parse(bytes: &[u8]) -> Result<Option<Multiboot>, FormatError> {
    let Some((at, flags)) = find_header(bytes) else {
        return Ok(None);
    };
    let unknown = flags & 0xffff & !UNDERSTOOD;
    if unknown != 0 {
        return Err(FormatError::MultibootDemands(unknown));
    }
    if flags & FLAG_ADDRESSES != 0 {
        return from_addresses(bytes, at).map(Some);
    }
    let elf = elf::parse(bytes)?;
    let entry = elf.physical_entry.unwrap_or(elf.entry);
    let entry = u32::try_from(entry).map_err(|_| FormatError::BadField {
        field: "entry address",
        value: entry,
        why: "is above 4 GiB",
    })?;
    Ok(Some(Multiboot {
        segments: elf.segments,
        entry,
    }))
}

/// The image as the header's own address fields describe it (§3.1.3).
fn from_addresses(bytes: &[u8], at: usize) -> Result<Multiboot, FormatError> {
    let field =
        |n: usize| u32_at(bytes, at + 12 + n * 4).ok_or(FormatError::Truncated("multiboot header"));
    let (header_addr, load_addr, load_end, bss_end, entry) =
        (field(0)?, field(1)?, field(2)?, field(3)?, field(4)?);
    let bad = |name, value: u32, why| FormatError::BadField {
        field: name,
        value: value.into(),
        why,
    };
    let offset = header_addr
        .checked_sub(load_addr)
        .and_then(|before| at.checked_sub(before as usize))
        .ok_or_else(|| bad("load_addr", load_addr, "lies before the start of the file"))?;
    let in_file = (bytes.len() - offset) as u64;
    let file_size = match load_end {
        0 => in_file,
        end => end
            .checked_sub(load_addr)
            .map(u64::from)
            .ok_or_else(|| bad("load_end_addr", end, "is below load_addr"))?,
    };
    if file_size > in_file {
        return Err(FormatError::Truncated("loaded part"));
    }
    let start = u64::from(load_addr);
    let loaded_end = start + file_size;
    let end = match bss_end {
        0 => loaded_end,
        end => u64::from(end),
    };
    if end < loaded_end {
        return Err(bad(
            "bss_end_addr",
            bss_end,
            "is below the end of what is loaded",
        ));
    }
    if end == start {
        return Err(FormatError::NoSegments);
    }
    Ok(Multiboot {
        segments: vec![Segment {
            target: Range { start, end },
            offset: offset as u64,
            file_size,
        }],
        entry,
    })
}

/// Loads the kernel `file` with its module and its information structure.
pub(crate) fn load(
    inputs: &BootInputs<'_>,
    name: &str,
    file: &[u8],
    kernel: &Multiboot,
) -> Result<Entry, LoadError> {
    inputs.load_segments(name, file, &kernel.segments)?;
    let command_line = command_line(inputs, name)?;
    let module = load_module(inputs, &kernel.segments)?;
    let module_name: Vec<u8> = inputs
        .initrd
        .map(|m| m.name.bytes().filter(|b| *b != 0).chain([0]).collect())
        .unwrap_or_default();
    let map = inputs.map.e820();
    let map_size = map.len() * MAP_ENTRY_SIZE;
    let strings = command_line.len() + module_name.len() + LOADER_NAME.len();
    let size = INFO_SIZE + MODULE_SIZE + map_size + strings;
    let place = LowMemory::new(&kernel.segments).place(size);
    let at = place.ok_or(LoadError::TablesTooLarge {
        what: "multiboot information and command line",
        size,
        limit: layout::EBDA_START as usize,
    })? as u32;
    let modules_at = at + INFO_SIZE as u32;
    let map_at = modules_at + MODULE_SIZE as u32;
    let line_at = map_at + map_size as u32;
    let module_name_at = line_at + command_line.len() as u32;
    let loader_at = module_name_at + module_name.len() as u32;

    let mut fields = [0_u32; INFO_SIZE / 4];
    fields[0] = INFO_MEMORY | INFO_COMMAND_LINE | INFO_MAP | INFO_LOADER_NAME;
    fields[1] = (layout::EBDA_START / 1024) as u32;
    fields[2] = ((inputs.map.low_end() - layout::HIGH_MEMORY_START) / 1024) as u32;
    fields[4] = line_at;
    if module.is_some() {
        fields[0] |= INFO_MODULES;
        fields[5] = 1;
        fields[6] = modules_at;
    }
    fields[11] = map_size as u32;
    fields[12] = map_at;
    fields[16] = loader_at;
    let mut info: Vec<u8> = fields.iter().flat_map(|f| f.to_le_bytes()).collect();
    let module = module.map_or([0; 4], |m| {
        [m.start as u32, m.end as u32, module_name_at, 0]
    });
    info.extend(module.iter().flat_map(|f| f.to_le_bytes()));
    for entry in &map {
        info.extend_from_slice(&(MAP_ENTRY_SIZE as u32 - 4).to_le_bytes());
        info.extend_from_slice(&entry.range.start.to_le_bytes());
        info.extend_from_slice(&entry.range.len().to_le_bytes());
        info.extend_from_slice(&(entry.kind as u32).to_le_bytes());
    }
    info.extend_from_slice(&command_line);
    info.extend_from_slice(&module_name);
    info.extend_from_slice(LOADER_NAME);
    inputs.write("multiboot information", at.into(), &info)?;
    let entry = Entry::Multiboot {
        eip: kernel.entry,
        info: at,
    };
    inputs.write_common(&entry)?;
    Ok(entry)
}

/// The kernel's name as one word, then its arguments: what boot loaders give and kernels skip.
fn command_line(inputs: &BootInputs<'_>, name: &str) -> Result<Vec<u8>, LoadError> {
    let arguments = inputs.command_line(name, COMMAND_LINE_MAX)?;
    let word = |byte: u8| match byte {
        0 | b' ' | b'\t'..=b'\r' => b'_',
        other => other,
    };
    let mut line: Vec<u8> = name.bytes().take(COMMAND_LINE_MAX).map(word).collect();
    if arguments.len() > 1 {
        line.push(b' ');
    }
    line.extend(arguments);
    Ok(line)
}

/// Puts the module on the first page after the kernel: small kernels map little more than that.
fn load_module(inputs: &BootInputs<'_>, segments: &[Segment]) -> Result<Option<Range>, LoadError> {
    let Some(module) = inputs.initrd else {
        return Ok(None);
    };
    let size = module.bytes.len() as u64;
    let kernel_end = segments.iter().map(|s| s.target.end).max().unwrap_or(0);
    let start = align_up(kernel_end.max(layout::HIGH_MEMORY_START), 4096);
    let range = start
        .and_then(|start| {
            Some(Range {
                start,
                end: start.checked_add(size)?,
            })
        })
        .filter(|range| range.end <= inputs.map.low_end())
        .ok_or_else(|| LoadError::InitrdDoesNotFit {
            name: module.name.to_owned(),
            size,
            memory: inputs.memory_mib(),
        })?;
    inputs.write("module", range.start, module.bytes)?;
    Ok(Some(range))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::NamedBytes;
    use crate::load::tests::memory;
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    /// A flat kernel with address fields, its header 16 bytes into the file.
    fn sample() -> Vec<u8> {
        let mut file = vec![0; 16];
        let flags = FLAG_ADDRESSES | 3;
        let checksum = 0_u32.wrapping_sub(HEADER_MAGIC).wrapping_sub(flags);
        let words = [
            HEADER_MAGIC,
            flags,
            checksum,
            0x10_0010,
            0x10_0000,
            0,
            0x10_1000,
            0x10_0030,
        ];
        file.extend(words.iter().flat_map(|w| w.to_le_bytes()));
        file.extend([0xf4; 16]);
        file
    }

    #[test]
    fn address_fields_describe_the_image() {
        let kernel = parse(&sample()).unwrap().unwrap();
        assert_eq!(kernel.entry, 0x10_0030);
        let segment = &kernel.segments[0];
        assert_eq!(
            (segment.target.start, segment.target.end),
            (0x10_0000, 0x10_1000)
        );
        assert_eq!((segment.offset, segment.file_size), (0, 64));
    }

    #[test]
    fn an_elf_kernel_uses_its_segments() {
        let mut body = vec![0xf4; 64];
        let checksum = 0_u32.wrapping_sub(HEADER_MAGIC);
        for (n, word) in [HEADER_MAGIC, 0, checksum].iter().enumerate() {
            body[n * 4..n * 4 + 4].copy_from_slice(&word.to_le_bytes());
        }
        let file = elf::tests::sample(0x10_0000, &body, 0, None);
        let kernel = parse(&file).unwrap().unwrap();
        assert_eq!(kernel.entry, 0x10_0000);
        assert_eq!(kernel.segments.len(), 1);
    }

    #[test]
    fn no_header_and_unknown_demands() {
        assert_eq!(parse(&[0; 9000]).unwrap(), None);
        let mut file = sample();
        let flags = FLAG_ADDRESSES | 0x8000;
        file[20..24].copy_from_slice(&flags.to_le_bytes());
        let checksum = 0_u32.wrapping_sub(HEADER_MAGIC).wrapping_sub(flags);
        file[24..28].copy_from_slice(&checksum.to_le_bytes());
        assert!(matches!(
            parse(&file),
            Err(FormatError::MultibootDemands(0x8000))
        ));
    }

    #[test]
    fn the_information_names_everything() {
        let (ram, map) = memory(8 << 20);
        let inputs = BootInputs {
            ram: &ram,
            map: &map,
            command_line: "arg",
            initrd: Some(NamedBytes {
                name: "env",
                bytes: b"NR_CPUS=1",
            }),
            rsdp: None,
        };
        let file = sample();
        let kernel = parse(&file).unwrap().unwrap();
        let entry = load(&inputs, "my k", &file, &kernel).unwrap();
        let Entry::Multiboot { info, .. } = entry else {
            panic!("{entry:?}");
        };
        let word = |at: u32| ram.read_obj::<u32>(GuestAddress(at.into())).unwrap();
        assert_eq!(word(info), 0x24d);
        assert_eq!((word(info + 4), word(info + 8)), (639, 7 << 10));
        assert_eq!((word(info + 20), word(info + 44)), (1, 4 * 24));
        let module = word(info + 24);
        assert_eq!((word(module), word(module + 4)), (0x10_1000, 0x10_1009));
        let text = |at: u32| ram.read_obj::<[u8; 4]>(GuestAddress(at.into())).unwrap();
        assert_eq!(text(word(module + 8)), *b"env\0");
        let line = GuestAddress(word(info + 16).into());
        assert_eq!(ram.read_obj::<[u8; 9]>(line).unwrap(), *b"my_k arg\0");
        assert_eq!(text(word(info + 64)), *b"Sker");
        assert_eq!(word(word(info + 48)), 20);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(changes in proptest::collection::vec((28_usize..48, any::<u8>()), 0..8), cut in 0_usize..=64) {
            let mut file = sample();
            for (at, value) in changes {
                file[at] = value;
            }
            if let Ok(Some(kernel)) = parse(&file[..cut]) {
                for s in &kernel.segments {
                    prop_assert!(s.offset + s.file_size <= cut as u64);
                    prop_assert!(s.target.len() >= s.file_size);
                }
            }
        }
    }
}
