//! The parts of ELF (System V gABI ch. 4 and 5) that a kernel loader needs.

use crate::FormatError;
use crate::bytes::{align_up, slice_at, u16_at, u32_at, u64_at};
use crate::layout::Range;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const MAX_SEGMENTS: u16 = 64;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: the 32-bit entry of the PVH protocol.
const NOTE_PHYS32_ENTRY: u32 = 18;

/// One `PT_LOAD` segment, checked against the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it goes in guest-physical memory.
    pub target: Range,
    /// Where its bytes start in the file.
    pub offset: u64,
    /// Bytes in the file; the rest of `target` is zeros.
    pub file_size: u64,
}

/// A parsed ELF file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elf {
    /// 64-bit class.
    pub is_64: bool,
    /// `e_entry`.
    pub entry: u64,
    /// Where virtual addresses differ: `e_entry` as a physical address, if a segment holds it.
    pub physical_entry: Option<u64>,
    /// What is to be loaded, in file order, empty segments left out.
    pub segments: Vec<Segment>,
    /// The PVH entry, if there is a note that names it.
    pub pvh_entry: Option<u32>,
}

impl Elf {
    /// From the lowest to the highest address that is loaded.
    pub fn extent(&self) -> Range {
        Range {
            start: self
                .segments
                .iter()
                .map(|s| s.target.start)
                .min()
                .unwrap_or(0),
            end: self
                .segments
                .iter()
                .map(|s| s.target.end)
                .max()
                .unwrap_or(0),
        }
    }
}

/// Whether the bytes start as an ELF file does.
pub fn is_elf(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x7fELF")
}

struct ProgramHeader {
    kind: u32,
    offset: u64,
    vaddr: u64,
    paddr: u64,
    file_size: u64,
    memory_size: u64,
    align: u64,
}

fn program_header(bytes: &[u8], at: usize, is_64: bool) -> Option<ProgramHeader> {
    let word = |offset: usize| u32_at(bytes, at.checked_add(offset)?).map(u64::from);
    let long = |offset: usize| u64_at(bytes, at.checked_add(offset)?);
    let kind = u32_at(bytes, at)?;
    Some(if is_64 {
        ProgramHeader {
            kind,
            offset: long(8)?,
            vaddr: long(16)?,
            paddr: long(24)?,
            file_size: long(32)?,
            memory_size: long(40)?,
            align: long(48)?,
        }
    } else {
        ProgramHeader {
            kind,
            offset: word(4)?,
            vaddr: word(8)?,
            paddr: word(12)?,
            file_size: word(16)?,
            memory_size: word(20)?,
            align: word(28)?,
        }
    })
}

/// Parses an executable for x86, 32-bit or 64-bit. Anything after its last segment is ignored.
pub fn parse(bytes: &[u8]) -> Result<Elf, FormatError> {
    let header = FormatError::Truncated("ELF header");
    if !is_elf(bytes) {
        return Err(FormatError::Unknown);
    }
    let (Some(&[class, data]), Some(machine)) = (
        bytes.get(4..6).and_then(|b| b.first_chunk::<2>()),
        u16_at(bytes, 18),
    ) else {
        return Err(header);
    };
    let is_64 = class == 2;
    if !matches!(class, 1 | 2) || data != 1 || !matches!(machine, EM_386 | EM_X86_64) {
        return Err(FormatError::BadField {
            field: "ELF machine",
            value: machine.into(),
            why: "is not x86",
        });
    }
    let fields = if is_64 {
        (
            u64_at(bytes, 24),
            u64_at(bytes, 32),
            u16_at(bytes, 54),
            u16_at(bytes, 56),
        )
    } else {
        let long = |at| u32_at(bytes, at).map(u64::from);
        (long(24), long(28), u16_at(bytes, 42), u16_at(bytes, 44))
    };
    let (Some(entry), Some(table), Some(entry_size), Some(count)) = fields else {
        return Err(header);
    };
    if count > MAX_SEGMENTS {
        return Err(FormatError::BadField {
            field: "number of program headers",
            value: count.into(),
            why: "is more than any kernel has",
        });
    }
    let mut elf = Elf {
        is_64,
        entry,
        physical_entry: None,
        segments: Vec::new(),
        pvh_entry: None,
    };
    for index in 0..u64::from(count) {
        let at = table
            .checked_add(index * u64::from(entry_size))
            .and_then(|at| usize::try_from(at).ok());
        let segment = at
            .and_then(|at| program_header(bytes, at, is_64))
            .ok_or(FormatError::Truncated("ELF program header table"))?;
        add_segment(&mut elf, bytes, &segment)?;
    }
    if elf.segments.is_empty() {
        return Err(FormatError::NoSegments);
    }
    Ok(elf)
}

fn add_segment(elf: &mut Elf, bytes: &[u8], header: &ProgramHeader) -> Result<(), FormatError> {
    match header.kind {
        PT_LOAD if header.memory_size > 0 => {
            if header.memory_size < header.file_size {
                return Err(FormatError::BadField {
                    field: "ELF segment's memory size",
                    value: header.memory_size,
                    why: "is less than its file size",
                });
            }
            slice_at(bytes, header.offset, header.file_size)
                .ok_or(FormatError::Truncated("ELF segment"))?;
            let end = header.paddr.checked_add(header.memory_size);
            let end = end.ok_or(FormatError::BadField {
                field: "ELF segment's physical address",
                value: header.paddr,
                why: "wraps round the address space",
            })?;
            let target = Range {
                start: header.paddr,
                end,
            };
            if let Some(into) = elf.entry.checked_sub(header.vaddr)
                && into < header.memory_size
            {
                elf.physical_entry.get_or_insert(target.start + into);
            }
            elf.segments.push(Segment {
                target,
                offset: header.offset,
                file_size: header.file_size,
            });
        }
        PT_NOTE => {
            let notes = slice_at(bytes, header.offset, header.file_size)
                .ok_or(FormatError::Truncated("ELF note"))?;
            let align = if header.align == 8 { 8 } else { 4 };
            elf.pvh_entry = elf.pvh_entry.or_else(|| pvh_entry(notes, align));
        }
        _ => {}
    }
    Ok(())
}

/// Looks for Xen's note of the 32-bit physical entry.
fn pvh_entry(notes: &[u8], align: u64) -> Option<u32> {
    let mut at = 0_u64;
    loop {
        let header = slice_at(notes, at, 12)?;
        let name_size = u64::from(u32_at(header, 0)?);
        let value_size = u64::from(u32_at(header, 4)?);
        let kind = u32_at(header, 8)?;
        let name = slice_at(notes, at + 12, name_size)?;
        let value_at = align_up(at + 12 + name_size, align)?;
        let value = slice_at(notes, value_at, value_size)?;
        if kind == NOTE_PHYS32_ENTRY && name.starts_with(b"Xen") {
            return u32_at(value, 0);
        }
        at = align_up(value_at + value_size, align)?;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A 64-bit ELF with one segment of `body` at `paddr`, `bss` more bytes, and a note.
    pub(crate) fn sample(paddr: u64, body: &[u8], bss: u64, note: Option<u32>) -> Vec<u8> {
        let mut out = vec![0; 64 + 2 * 56];
        out[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let mut put = |at: usize, value: &[u8]| out[at..at + value.len()].copy_from_slice(value);
        put(16, &2_u16.to_le_bytes());
        put(18, &62_u16.to_le_bytes());
        put(24, &paddr.to_le_bytes());
        put(32, &64_u64.to_le_bytes());
        put(54, &56_u16.to_le_bytes());
        put(56, &(1 + u16::from(note.is_some())).to_le_bytes());
        let mut segment = |at: usize, kind: u32, offset: u64, paddr: u64, file: u64, mem: u64| {
            put(at, &kind.to_le_bytes());
            for (i, value) in [offset, paddr, paddr, file, mem, 4].into_iter().enumerate() {
                put(at + 8 + i * 8, &value.to_le_bytes());
            }
        };
        let len = body.len() as u64;
        segment(64, PT_LOAD, 64 + 112, paddr, len, len + bss);
        segment(64 + 56, PT_NOTE, 64 + 112 + len, 0, 20, 20);
        out.extend_from_slice(body);
        if let Some(entry) = note {
            for word in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), entry] {
                out.extend_from_slice(&word.to_le_bytes());
            }
        }
        out
    }

    #[test]
    fn segments_and_pvh_note_are_found() {
        let elf = parse(&sample(0x10_0000, &[0x90; 100], 28, Some(0x10_0040))).unwrap();
        assert!(elf.is_64);
        assert_eq!(elf.pvh_entry, Some(0x10_0040));
        assert_eq!(elf.physical_entry, Some(0x10_0000));
        assert_eq!(elf.segments.len(), 1);
        assert_eq!(
            (elf.extent().start, elf.extent().end),
            (0x10_0000, 0x10_0080)
        );
    }

    #[test]
    fn a_cut_file_is_refused() {
        let whole = sample(0x10_0000, &[0x90; 100], 28, None);
        for len in 0..whole.len() {
            assert!(parse(&whole[..len]).is_err(), "{len}");
        }
    }

    #[test]
    fn other_machines_are_refused() {
        let mut file = sample(0x10_0000, &[0x90; 100], 28, None);
        file[18] = 183;
        assert!(matches!(
            parse(&file),
            Err(FormatError::BadField { value: 183, .. })
        ));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = parse(&bytes);
            for (at, value) in b"\x7fELF\x02\x01".iter().enumerate() {
                if let Some(byte) = bytes.get_mut(at) { *byte = *value; }
            }
            let _ = parse(&bytes);
        }

        #[test]
        fn a_changed_file_parses_within_bounds(at in 0_usize..196, value: u8) {
            let mut file = sample(0x10_0000, &[0x90; 100], 28, Some(1));
            file[at] = value;
            if let Ok(elf) = parse(&file) {
                for s in &elf.segments {
                    prop_assert!(s.offset + s.file_size <= file.len() as u64);
                    prop_assert!(s.target.len() >= s.file_size);
                }
            }
        }
    }
}
