//! Core dumps as ELF files (System V ABI §5; the notes are those of Linux, `include/uapi/linux/elfcore.h` and
//! `fs/binfmt_elf.c`): what `gdb GUEST CORE` opens.
//!
//! The file is sparse: pages of zeroes take no room on the disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use gdbstub::common::Signal;
use object::elf::{
    ELFCLASS64, ELFDATA2LSB, ELFMAG, EM_X86_64, ET_CORE, EV_CURRENT, FileHeader64, Ident, NT_AUXV,
    NT_FPREGSET, NT_PRPSINFO, NT_PRSTATUS, PF_R, PF_W, PF_X, PT_LOAD, PT_NOTE, ProgramHeader64,
};
use object::{LittleEndian, U16, U32, U64};
use skerry_hypervisor::CpuState;

use super::DebugError;
use super::context::{Context, of_error};
use super::memory::Range;
use super::registers;
use crate::error::CallError;
use crate::layout::PAGE;
use crate::sandbox::{Sandbox, Status};

const ENDIAN: LittleEndian = LittleEndian;
type Header = FileHeader64<LittleEndian>;
type Segment = ProgramHeader64<LittleEndian>;
/// There is one process, and it has this number.
const PROCESS: u32 = 1;
/// Bytes that are read at once.
const CHUNK: u64 = 16 * PAGE;

/// Linux's number of a signal of gdb's (`arch/x86/include/uapi/asm/signal.h`).
fn number(signal: Option<Signal>) -> u32 {
    match signal {
        None => 0,
        Some(Signal::SIGBUS) => 7,
        Some(Signal::SIGSYS) => 31,
        // The others that occur have the same.
        Some(other) => other.0.into(),
    }
}

/// One note: name, type and content, each padded to four bytes.
fn note(notes: &mut Vec<u8>, kind: u32, content: &[u8]) {
    const NAME: &[u8; 8] = b"CORE\0\0\0\0";
    for word in [5, content.len() as u32, kind] {
        notes.extend_from_slice(&word.to_le_bytes());
    }
    notes.extend_from_slice(NAME);
    notes.extend_from_slice(content);
    notes.resize(notes.len().next_multiple_of(4), 0);
}

/// `struct elf_prstatus`: the signal and the registers.
fn status(state: &CpuState, signal: u32) -> [u8; 336] {
    /// `struct user_regs_struct`, by encoding: R15 to R8's neighbours are not in order.
    const FIRST: [usize; 10] = [15, 14, 13, 12, 5, 3, 11, 10, 9, 8];
    const SECOND: [usize; 5] = [0, 1, 2, 6, 7];
    let general = &state.general;
    let segment = |n: usize| &state.system.segments[n];
    let selector = |n: usize| u64::from(segment(n).selector);
    let mut registers = Vec::new();
    registers.extend(FIRST.map(|n| general.gpr[n]));
    registers.extend(SECOND.map(|n| general.gpr[n]));
    // No system call: ORIG_RAX.
    registers.push(u64::MAX);
    registers.extend([
        general.rip,
        selector(1),
        general.rflags,
        general.gpr[4],
        selector(2),
        segment(4).base,
        segment(5).base,
        selector(3),
        selector(0),
        selector(4),
        selector(5),
    ]);
    let mut bytes = [0; 336];
    bytes[..4].copy_from_slice(&signal.to_le_bytes());
    bytes[12..14].copy_from_slice(&(signal as u16).to_le_bytes());
    bytes[32..36].copy_from_slice(&PROCESS.to_le_bytes());
    for (to, value) in bytes[112..328].chunks_exact_mut(8).zip(registers) {
        to.copy_from_slice(&value.to_le_bytes());
    }
    // The floating-point registers follow.
    bytes[328] = 1;
    bytes
}

/// `struct elf_prpsinfo`: what it was.
fn information() -> [u8; 136] {
    const NAME: &[u8] = b"sandbox";
    let mut bytes = [0; 136];
    bytes[1] = b'R';
    bytes[24..28].copy_from_slice(&PROCESS.to_le_bytes());
    bytes[40..40 + NAME.len()].copy_from_slice(NAME);
    bytes[56..56 + NAME.len()].copy_from_slice(NAME);
    bytes
}

fn header(segments: u16) -> Header {
    let size = |bytes: usize| U16::new(ENDIAN, bytes as u16);
    FileHeader64 {
        e_ident: Ident {
            magic: ELFMAG,
            class: ELFCLASS64,
            data: ELFDATA2LSB,
            version: EV_CURRENT,
            os_abi: 0,
            abi_version: 0,
            padding: [0; 7],
        },
        e_type: U16::new(ENDIAN, ET_CORE),
        e_machine: U16::new(ENDIAN, EM_X86_64),
        e_version: U32::new(ENDIAN, EV_CURRENT.into()),
        e_entry: U64::new(ENDIAN, 0),
        e_phoff: U64::new(ENDIAN, size_of::<Header>() as u64),
        e_shoff: U64::new(ENDIAN, 0),
        e_flags: U32::new(ENDIAN, 0),
        e_ehsize: size(size_of::<Header>()),
        e_phentsize: size(size_of::<Segment>()),
        e_phnum: U16::new(ENDIAN, segments),
        e_shentsize: size(0),
        e_shnum: size(0),
        e_shstrndx: size(0),
    }
}

fn segment(kind: u32, flags: u32, offset: u64, address: u64, size: u64, align: u64) -> Segment {
    ProgramHeader64 {
        p_type: U32::new(ENDIAN, kind),
        p_flags: U32::new(ENDIAN, flags),
        p_offset: U64::new(ENDIAN, offset),
        p_vaddr: U64::new(ENDIAN, address),
        p_paddr: U64::new(ENDIAN, 0),
        p_filesz: U64::new(ENDIAN, size),
        // Notes are in no memory.
        p_memsz: U64::new(ENDIAN, if kind == PT_NOTE { 0 } else { size }),
        p_align: U64::new(ENDIAN, align),
    }
}

impl Sandbox {
    /// Writes all of the guest's memory and registers to a new file, as a core dump that
    /// `gdb GUEST FILE` opens. Changes nothing; also of a sandbox that a failed call has poisoned.
    pub fn core_dump(&mut self, path: impl AsRef<Path>) -> Result<(), DebugError> {
        if let Status::Unrecoverable(why) = &self.status {
            return Err(DebugError::Unrecoverable(why.clone()));
        }
        let context = self.context();
        let context = context.map_err(|error| DebugError::State(Box::new(error)))?;
        let signal = self.crash(&context);
        let path = path.as_ref();
        let written = self.write_core(path, &context, number(signal));
        written.map_err(|source| DebugError::File {
            path: path.into(),
            source,
        })
    }

    /// Writes a core dump of each crash from now on into this folder; none if there is no folder.
    /// As [`Builder::core_dumps`](crate::Builder::core_dumps).
    pub fn set_core_dumps(&mut self, folder: Option<PathBuf>) {
        self.aids.core_dumps = folder;
    }

    /// The core dump of the last crash that one was written of.
    pub fn last_core_dump(&self) -> Option<&Path> {
        self.aids.last_core_dump.as_deref()
    }

    /// Writes a core dump if crashes are to be dumped and this is one.
    #[cold]
    pub(crate) fn dump_crash(&mut self, error: &CallError) {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let crashed = matches!(
            error,
            CallError::Fault(_)
                | CallError::Panicked(_)
                | CallError::OutOfMemory { .. }
                | CallError::Misbehaved(_)
                | CallError::TimedOut(_)
                | CallError::CpuTime(_)
                | CallError::BudgetSpent(_)
        );
        let Some(folder) = self.aids.core_dumps.as_ref().filter(|_| crashed) else {
            return;
        };
        let n = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!("core.{}.{n}", std::process::id()));
        let written = self.context().map(|context| {
            let exception = context.exception.and_then(|_| self.crash(&context));
            let signal = exception.unwrap_or_else(|| of_error(error));
            self.write_core(&path, &context, number(Some(signal)))
        });
        match written {
            Ok(Ok(())) => {
                tracing::info!("The core dump of a crashed guest is in {path:?}");
                self.aids.last_core_dump = Some(path);
            }
            Ok(Err(error)) => tracing::warn!("Can't write the core dump {path:?}: {error}"),
            Err(error) => tracing::warn!("Can't write the core dump {path:?}: {error}"),
        }
    }

    fn write_core(&self, path: &Path, context: &Context, signal: u32) -> io::Result<()> {
        let mut notes = Vec::new();
        note(&mut notes, NT_PRSTATUS, &status(&context.state, signal));
        note(&mut notes, NT_PRPSINFO, &information());
        note(&mut notes, NT_FPREGSET, &registers::legacy(&context.state));
        note(&mut notes, NT_AUXV, &self.auxv());
        let mut ranges = self.ranges();
        // As many as the header can count; a guest has a dozen, and a few per mapping.
        ranges.truncate(0xfff0);
        let count = ranges.len() as u16 + 1;
        let notes_at = size_of::<Header>() as u64 + u64::from(count) * size_of::<Segment>() as u64;
        let mut at = (notes_at + notes.len() as u64).next_multiple_of(PAGE);
        let mut start = object::pod::bytes_of(&header(count)).to_vec();
        let of_notes = segment(PT_NOTE, PF_R, notes_at, 0, notes.len() as u64, 4);
        start.extend_from_slice(object::pod::bytes_of(&of_notes));
        let mut places = Vec::new();
        for range in ranges {
            let write = if range.write { PF_W } else { 0 };
            let execute = if range.execute { PF_X } else { 0 };
            let flags = PF_R | write | execute;
            let load = segment(PT_LOAD, flags, at, range.gva, range.len, PAGE);
            start.extend_from_slice(object::pod::bytes_of(&load));
            places.push((at, range));
            at += range.len;
        }
        start.extend_from_slice(&notes);
        // What is in a guest's memory is not everybody's to read, and no other file is overwritten.
        let mut options = OpenOptions::new();
        let file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        file.write_all_at(&start, 0)?;
        for (at, range) in places {
            self.write_range(&file, at, range)?;
        }
        file.set_len(at)
    }

    /// Writes what is not zero of a range.
    fn write_range(&self, file: &File, at: u64, range: Range) -> io::Result<()> {
        let mut chunk = vec![0; CHUNK as usize];
        let mut done = 0;
        while done < range.len {
            let len = CHUNK.min(range.len - done) as usize;
            let read = self.read_guest(range.gva + done, &mut chunk[..len]);
            for (n, page) in chunk[..read].chunks(PAGE as usize).enumerate() {
                if page.iter().any(|byte| *byte != 0) {
                    file.write_all_at(page, at + done + n as u64 * PAGE)?;
                }
            }
            done += len as u64;
        }
        Ok(())
    }
}
