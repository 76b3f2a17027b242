//! The guest's program: a freestanding ELF file (System V ABI, AMD64 supplement 1.0 §5.1).

use object::LittleEndian;
use object::elf::{
    EM_X86_64, ET_DYN, ET_EXEC, FileHeader64, PF_W, PF_X, PT_DYNAMIC, PT_INTERP, PT_LOAD, PT_TLS,
    ProgramHeader64, R_X86_64_NONE, R_X86_64_RELATIVE,
};
use object::read::elf::{Dyn as _, FileHeader as _, ProgramHeader as _, Rela as _};

use crate::error::BuildError;
use crate::layout::{IMAGE_BASE, IMAGE_END, LOWEST, PAGE};

const ENDIAN: LittleEndian = LittleEndian;
type Header = FileHeader64<LittleEndian>;
type Segment = ProgramHeader64<LittleEndian>;

/// What the guest may do with a page, besides reading it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rights {
    pub(crate) write: bool,
    pub(crate) execute: bool,
}

/// A program, placed.
#[derive(Debug)]
pub(crate) struct Program {
    /// Address of its first page.
    pub(crate) base: u64,
    /// Its bytes from there on.
    pub(crate) bytes: Vec<u8>,
    /// What each page may be used for; `None` where nothing of it is.
    pub(crate) pages: Vec<Option<Rights>>,
    /// Address of its first instruction.
    pub(crate) entry: u64,
}

fn bad(why: impl Into<String>) -> BuildError {
    BuildError::BadProgram(why.into())
}

/// How far a program without addresses of its own is moved.
fn displacement(header: &Header) -> Result<u64, BuildError> {
    match header.e_type(ENDIAN) {
        ET_EXEC => Ok(0),
        ET_DYN => Ok(IMAGE_BASE),
        _ => Err(bad("it is an ELF file, but not an executable one")),
    }
}

/// The first and the last address, of whole pages.
fn extent(segments: &[&Segment], moved: u64) -> Result<(u64, u64), BuildError> {
    let (mut first, mut end) = (u64::MAX, 0);
    for segment in segments {
        let start = segment.p_vaddr(ENDIAN).checked_add(moved);
        let stop = start.and_then(|start| start.checked_add(segment.p_memsz(ENDIAN)));
        let (Some(start), Some(stop)) = (start, stop) else {
            return Err(bad("a segment lies outside of the address space"));
        };
        if start < LOWEST || stop > IMAGE_END {
            return Err(bad(format!(
                "a segment is at {start:#x} to {stop:#x}; programs lie between {LOWEST:#x} and {IMAGE_END:#x}"
            )));
        }
        first = first.min(start / PAGE * PAGE);
        end = end.max(stop.next_multiple_of(PAGE));
    }
    match first < end {
        true => Ok((first, end)),
        false => Err(bad("it has nothing to load")),
    }
}

impl Program {
    /// Reads a program.
    pub(crate) fn parse(file: &[u8]) -> Result<Self, BuildError> {
        let header = Header::parse(file).map_err(|_| {
            bad("it is not a 64-bit ELF file; build it as `docs/src/sandbox.md` says")
        })?;
        if !header.is_little_endian() || header.e_machine(ENDIAN) != EM_X86_64 {
            return Err(bad("it is for another processor than x86-64"));
        }
        let moved = displacement(header)?;
        let segments = header
            .program_headers(ENDIAN, file)
            .map_err(|error| bad(error.to_string()))?;
        if segments.iter().any(|s| s.p_type(ENDIAN) == PT_INTERP) {
            return Err(bad(
                "it is dynamically linked; link it with -nostdlib -static",
            ));
        }
        if segments
            .iter()
            .any(|s| s.p_type(ENDIAN) == PT_TLS && s.p_memsz(ENDIAN) != 0)
        {
            return Err(bad(
                "it has thread-local data, which a sandbox doesn't provide",
            ));
        }
        let loads: Vec<_> = segments
            .iter()
            .filter(|s| s.p_type(ENDIAN) == PT_LOAD && s.p_memsz(ENDIAN) != 0)
            .collect();
        let (base, end) = extent(&loads, moved)?;
        let mut program = Self {
            base,
            bytes: vec![0; (end - base) as usize],
            pages: vec![None; ((end - base) / PAGE) as usize],
            entry: header.e_entry(ENDIAN).wrapping_add(moved),
        };
        for segment in loads {
            program.load(segment, file, moved)?;
        }
        if moved != 0 {
            program.relocate(segments, moved)?;
        }
        let rights = program.rights(program.entry);
        if !rights.is_some_and(|rights| rights.execute) {
            return Err(bad(format!(
                "its entry point {:#x} is no code",
                program.entry
            )));
        }
        Ok(program)
    }

    /// The rights of the page at `address`.
    fn rights(&self, address: u64) -> Option<Rights> {
        let page = address.checked_sub(self.base)? / PAGE;
        *self.pages.get(usize::try_from(page).ok()?)?
    }

    fn load(&mut self, segment: &Segment, file: &[u8], moved: u64) -> Result<(), BuildError> {
        let flags = segment.p_flags(ENDIAN);
        let rights = Rights {
            write: flags & PF_W != 0,
            execute: flags & PF_X != 0,
        };
        if rights.write && rights.execute {
            return Err(bad("a segment is both writable and executable"));
        }
        let data = segment
            .data(ENDIAN, file)
            .map_err(|()| bad("a segment lies outside of the file"))?;
        // Checked by `extent`.
        let start = (segment.p_vaddr(ENDIAN) + moved - self.base) as usize;
        let len = segment.p_memsz(ENDIAN) as usize;
        let room = self.bytes.get_mut(start..start + len);
        let room = room.and_then(|room| room.get_mut(..data.len()));
        room.ok_or_else(|| bad("a segment has more bytes in the file than in memory"))?
            .copy_from_slice(data);
        let pages = start / PAGE as usize..(start + len).div_ceil(PAGE as usize);
        for page in self.pages.get_mut(pages).unwrap_or_default() {
            let joined = match *page {
                None => rights,
                Some(other) => Rights {
                    write: rights.write || other.write,
                    execute: rights.execute || other.execute,
                },
            };
            if joined.write && joined.execute {
                return Err(bad(
                    "a page belongs to a writable and to an executable segment",
                ));
            }
            *page = Some(joined);
        }
        Ok(())
    }

    /// Applies the relocations of a program that can be anywhere (System V ABI §4.4.1).
    fn relocate(&mut self, segments: &[Segment], moved: u64) -> Result<(), BuildError> {
        const ENTRY: u64 = size_of::<object::elf::Rela64<LittleEndian>>() as u64;
        const DT_RELA: i64 = object::elf::DT_RELA as i64;
        const DT_RELASZ: i64 = object::elf::DT_RELASZ as i64;
        let Some(dynamic) = segments.iter().find(|s| s.p_type(ENDIAN) == PT_DYNAMIC) else {
            return Ok(());
        };
        let (at, len) = (
            dynamic.p_vaddr(ENDIAN).wrapping_add(moved),
            dynamic.p_memsz(ENDIAN),
        );
        let (mut table, mut size) = (None, 0);
        for entry in self.read(at, len)?.chunks_exact(16) {
            let entry = object::pod::from_bytes::<object::elf::Dyn64<LittleEndian>>(entry)
                .map_err(|()| bad("its dynamic section is damaged"))?
                .0;
            match entry.d_tag.get(ENDIAN) as i64 {
                0 => break,
                DT_RELA => table = Some(entry.d_val(ENDIAN)),
                DT_RELASZ => size = entry.d_val(ENDIAN),
                _ => {}
            }
        }
        let Some(table) = table else {
            return Ok(());
        };
        let table = self
            .read(table.wrapping_add(moved), size / ENTRY * ENTRY)?
            .to_vec();
        for entry in table.chunks_exact(ENTRY as usize) {
            let entry = object::pod::from_bytes::<object::elf::Rela64<LittleEndian>>(entry)
                .map_err(|()| bad("its relocations are damaged"))?
                .0;
            match entry.r_type(ENDIAN, false) {
                R_X86_64_NONE => {}
                R_X86_64_RELATIVE => {
                    let value = (entry.r_addend(ENDIAN) as u64).wrapping_add(moved);
                    self.write(entry.r_offset(ENDIAN).wrapping_add(moved), value)?;
                }
                other => {
                    return Err(bad(format!(
                        "it has a relocation of type {other}; link it with -static"
                    )));
                }
            }
        }
        Ok(())
    }

    fn range(&self, address: u64, len: u64) -> Result<std::ops::Range<usize>, BuildError> {
        let start = address.checked_sub(self.base);
        let end = start.and_then(|start| start.checked_add(len));
        match (start, end) {
            (Some(start), Some(end)) if end <= self.bytes.len() as u64 => {
                Ok(start as usize..end as usize)
            }
            _ => Err(bad("a relocation lies outside of its segments")),
        }
    }

    fn read(&self, address: u64, len: u64) -> Result<&[u8], BuildError> {
        let range = self.range(address, len)?;
        self.bytes
            .get(range)
            .ok_or_else(|| bad("a table lies outside of its segments"))
    }

    fn write(&mut self, address: u64, value: u64) -> Result<(), BuildError> {
        let range = self.range(address, 8)?;
        let room = self.bytes.get_mut(range);
        room.ok_or_else(|| bad("a relocation lies outside of its segments"))?
            .copy_from_slice(&value.to_le_bytes());
        Ok(())
    }
}
