//! Page tables, descriptor tables and exception stubs: the whole of what a kernel would be.
//!
//! Each exception goes to a stub of eight bytes which pushes its vector and leaves the guest by one
//! `OUT`. The processor stands in ring 0 then; the host reads the frame (Intel SDM 3A §7.14) and
//! never lets the stub go on.

use std::io;
use std::sync::Arc;

use skerry_hypervisor::state::{DescriptorTable, Segment};
use skerry_hypervisor::{BootRegisters, PAGE_SIZE, RamRegion};
use skerry_sandbox_abi::{PORT, PORT_EXCEPTION};

use crate::elf::{Program, Rights};
use crate::error::BuildError;
use crate::layout::{Area, EXCEPTION_STACK, LARGE, Layout, PAGE, SYSTEM};
use crate::region::Region;

/// Where the parts of the first page are.
const GDT: u64 = 0;
const TSS: u64 = 0x80;
const IDT: u64 = 0x200;
const STUBS: u64 = 0x400;

const USER_DATA: u16 = 0x1b;
const USER_CODE: u16 = 0x23;
const KERNEL_CODE: u16 = 0x08;
const TASK: u16 = 0x28;
/// Exceptions (Intel SDM 3A table 7-1).
const VECTORS: u64 = 32;
/// Those for which the processor pushes an error code.
const WITH_ERROR: u32 =
    1 << 8 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 17 | 1 << 21;
const STUB_LEN: u64 = 8;
/// 104 bytes, ports 0 to 127, and a byte that ends the map.
const TSS_LEN: usize = 0x68 + 17;

/// Bits of a page-table entry (Intel SDM 3A §5.5). Accessed and dirty are set from the start, so that
/// the processor writes no table.
const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE_PAGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Makes page tables in a [`Layout`]'s area for them.
pub(crate) struct Tables<'a> {
    region: &'a mut Region,
    area: Area,
    /// Tables taken.
    taken: u64,
}

fn full() -> BuildError {
    BuildError::BadProgram("its pages need more tables than there are".into())
}

impl<'a> Tables<'a> {
    pub(crate) fn new(region: &'a mut Region, area: Area) -> Result<Self, BuildError> {
        let mut tables = Self {
            region,
            area,
            taken: 0,
        };
        tables.take()?;
        Ok(tables)
    }

    fn take(&mut self) -> Result<u64, BuildError> {
        let at = self.area.at + self.taken * PAGE;
        if at >= self.area.end() {
            return Err(full());
        }
        self.taken += 1;
        Ok(at)
    }

    fn entry(&mut self, table: u64, index: u64) -> Result<&mut [u8; 8], BuildError> {
        let bytes = self.region.bytes_mut(table + index * 8, 8);
        bytes
            .and_then(|bytes| bytes.first_chunk_mut())
            .ok_or_else(full)
    }

    /// The table below entry `index` of `table`, made if need be.
    fn below(&mut self, table: u64, index: u64) -> Result<u64, BuildError> {
        let entry = u64::from_le_bytes(*self.entry(table, index)?);
        if entry & PRESENT != 0 {
            return Ok(entry & ADDRESS);
        }
        let made = self.take()?;
        // Rights are those of the last level.
        let entry = made | PRESENT | WRITE | USER | ACCESSED;
        *self.entry(table, index)? = entry.to_le_bytes();
        Ok(made)
    }

    fn map_page(&mut self, gva: u64, entry: u64, level: u32) -> Result<(), BuildError> {
        let index = |level: u32| gva >> (12 + 9 * level) & 0x1ff;
        let mut table = self.area.at;
        for above in (level + 1..4).rev() {
            table = self.below(table, index(above))?;
        }
        *self.entry(table, index(level))? = (entry | PRESENT | ACCESSED | DIRTY).to_le_bytes();
        Ok(())
    }

    /// Maps an area for the guest.
    pub(crate) fn map(
        &mut self,
        area: &Area,
        rights: Rights,
        large: bool,
    ) -> Result<(), BuildError> {
        let bits = bits(rights) | USER;
        let mut at = 0;
        while at < area.len {
            let (gva, gpa) = (area.gva + at, area.at + at);
            let whole = large && (gva | gpa).is_multiple_of(LARGE) && area.len - at >= LARGE;
            match whole {
                true => self.map_page(gva, gpa | bits | LARGE_PAGE, 1)?,
                false => self.map_page(gva, gpa | bits, 0)?,
            }
            at += if whole { LARGE } else { PAGE };
        }
        Ok(())
    }

    /// Maps a program.
    fn map_program(&mut self, program: &Program, area: &Area) -> Result<(), BuildError> {
        for (n, rights) in program.pages.iter().enumerate() {
            if let Some(rights) = rights {
                let at = n as u64 * PAGE;
                let entry = (area.at + at) | bits(*rights) | USER;
                self.map_page(area.gva + at, entry, 0)?;
            }
        }
        Ok(())
    }
}

fn bits(rights: Rights) -> u64 {
    let write = if rights.write { WRITE } else { 0 };
    let execute = if rights.execute { 0 } else { NO_EXECUTE };
    write | execute
}

/// A 64-bit task state segment (Intel SDM 3A §9.7): the exception stack, and the map of ports, of which
/// ring 3 may use the four that [`PORT`] as 32 bits takes (Intel SDM 1 §20.5.2), for where the I/O
/// privilege level is not looked at.
fn task_state() -> [u8; TSS_LEN] {
    const PORTS: usize = 0x68;
    let mut bytes = [0; TSS_LEN];
    bytes[4..12].copy_from_slice(&(SYSTEM + EXCEPTION_STACK).to_le_bytes());
    bytes[0x66..PORTS].copy_from_slice(&(PORTS as u16).to_le_bytes());
    let map = &mut bytes[PORTS..];
    map.fill(0xff);
    for port in PORT..PORT + 4 {
        map[usize::from(port / 8)] &= !(1 << (port % 8));
    }
    bytes
}

/// The descriptor table: null, ring 0 code and data, ring 3 data and code, the task (two entries).
fn descriptors() -> [u64; 7] {
    let base = SYSTEM + TSS;
    let task =
        (TSS_LEN as u64 - 1) | (base & 0xff_ffff) << 16 | 0x8b << 40 | (base >> 24 & 0xff) << 56;
    [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        task,
        base >> 32,
    ]
}

/// An interrupt gate to `address` (Intel SDM 3A §7.14.1); INT3 and INTO may come from ring 3.
fn gate(vector: u64, address: u64) -> [u8; 16] {
    let level = if matches!(vector, 3 | 4) { 3 } else { 0 };
    let low = address & 0xffff
        | u64::from(KERNEL_CODE) << 16
        | (0x8e | level << 5) << 40
        | (address >> 16 & 0xffff) << 48;
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&low.to_le_bytes());
    bytes[8..].copy_from_slice(&(address >> 32).to_le_bytes());
    bytes
}

/// Pushes a zero where the processor pushes no error code, then the vector, and leaves.
fn stub(vector: u64) -> [u8; STUB_LEN as usize] {
    const PUSH: u8 = 0x6a;
    const OUT: u8 = 0xe7;
    const NOP: u8 = 0x90;
    let vector = vector as u8;
    match WITH_ERROR >> vector & 1 {
        0 => [PUSH, 0, PUSH, vector, OUT, PORT_EXCEPTION, 0xeb, 0xfc],
        _ => [PUSH, vector, OUT, PORT_EXCEPTION, 0xeb, 0xfc, NOP, NOP],
    }
}

/// The first page.
fn system_page() -> [u8; PAGE_SIZE] {
    let mut page = [0; PAGE_SIZE];
    let mut put = |at: u64, bytes: &[u8]| {
        page[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    };
    for (n, descriptor) in descriptors().into_iter().enumerate() {
        put(GDT + 8 * n as u64, &descriptor.to_le_bytes());
    }
    put(TSS, &task_state());
    for vector in 0..VECTORS {
        let address = SYSTEM + STUBS + vector * STUB_LEN;
        put(IDT + 16 * vector, &gate(vector, address));
        put(STUBS + vector * STUB_LEN, &stub(vector));
    }
    page
}

/// Fills the region: system page, tables, program.
pub(crate) fn build(
    region: &mut Region,
    layout: &Layout,
    program: &Program,
) -> Result<(), BuildError> {
    let data = Rights {
        write: true,
        execute: false,
    };
    let code = Rights {
        write: false,
        execute: true,
    };
    let mut tables = Tables::new(region, layout.tables)?;
    // Ring 0 alone: without the bit USER. The stack's page is data, the first is read and executed.
    tables.map_page(SYSTEM, bits(code), 0)?;
    tables.map_page(SYSTEM + PAGE, PAGE | bits(data), 0)?;
    for area in [
        &layout.control,
        &layout.log,
        &layout.input,
        &layout.output,
        &layout.stack,
    ] {
        tables.map(area, data, false)?;
    }
    tables.map(&layout.heap, data, layout.heap_is_large())?;
    tables.map_program(program, &layout.image)?;
    let put = |region: &mut Region, at: u64, bytes: &[u8]| {
        let room = region.bytes_mut(at, bytes.len() as u64);
        room.map(|room| room.copy_from_slice(bytes))
            .ok_or_else(full)
    };
    put(region, 0, &system_page())?;
    put(region, layout.image.at, &program.bytes)
}

/// Ring 3, at the program's entry.
pub(crate) fn entry_registers(layout: &Layout, entry: u64) -> BootRegisters {
    const RDI: usize = 7;
    const RSP: usize = 4;
    /// Flag 1 is always set; I/O privilege level 3, by which ring 3 may leave (any port but the one that
    /// is meant ends the call). Where a KVM runs guests in ring 3 itself there is none to give, and the
    /// task's map of ports counts; QEMU's nested SVM, in turn, finds no map in a busy task.
    const FLAGS: u64 = 0x3002;
    const CODE: u16 = 0xa0fb;
    const DATA: u16 = 0xc0f3;
    /// SSE, and its exceptions (Intel SDM 3A §2.5).
    const CR4_OSFXSR: u64 = 1 << 9;
    const CR4_OSXMMEXCPT: u64 = 1 << 10;
    const CR0_MP: u64 = 1 << 1;
    const EFER_NXE: u64 = 1 << 11;
    let stack = layout.stack.gva + layout.stack.len;
    // As after a CALL (System V ABI §3.2.2).
    let mut registers = BootRegisters::long_mode(layout.tables.at, entry, stack - 8);
    registers.general.gpr[RDI] = layout.control.gva;
    registers.general.gpr[RSP] = stack - 8;
    registers.general.rflags = FLAGS;
    let system = &mut registers.system;
    let data = Segment::flat(USER_DATA, DATA);
    // FS and GS can't be used: a guest has no thread-local data.
    system.segments = [data, Segment::flat(USER_CODE, CODE), data, data, data, data];
    system.tr = Segment {
        selector: TASK,
        base: SYSTEM + TSS,
        limit: TSS_LEN as u32 - 1,
        attributes: 0x8b,
        unusable: false,
    };
    system.gdt = DescriptorTable {
        base: SYSTEM + GDT,
        limit: 55,
    };
    system.idt = DescriptorTable {
        base: SYSTEM + IDT,
        limit: (VECTORS * 16 - 1) as u16,
    };
    system.cr0 |= CR0_MP;
    system.cr4 |= CR4_OSFXSR | CR4_OSXMMEXCPT;
    system.efer |= EFER_NXE;
    registers
}

/// Page tables of a mapping.
pub(crate) struct MappingTables {
    /// Directories and tables, one after the other.
    pub(crate) region: Arc<RamRegion>,
    /// Which entries of the third-level table lead to which of them.
    pub(crate) directories: Vec<(u64, u64)>,
}

/// Tables for `pages` pages at `gpa`, seen from `gva` on, which is where a directory begins. They will be
/// at `at`.
pub(crate) fn for_mapping(
    gva: u64,
    gpa: u64,
    pages: u64,
    at: u64,
    write: bool,
) -> io::Result<MappingTables> {
    const PER_TABLE: u64 = 512;
    let rights = bits(Rights {
        write,
        execute: false,
    }) | USER
        | PRESENT
        | ACCESSED
        | DIRTY;
    let tables = pages.div_ceil(PER_TABLE);
    let directories = tables.div_ceil(PER_TABLE);
    let mut region = Region::new((directories + tables) * PAGE)?;
    let outside = || io::Error::from(io::ErrorKind::InvalidInput);
    let mut put = |table: u64, index: u64, entry: u64| {
        let room = region
            .bytes_mut(table * PAGE + index * 8, 8)
            .ok_or_else(outside)?;
        room.copy_from_slice(&entry.to_le_bytes());
        Ok::<_, io::Error>(())
    };
    for page in 0..pages {
        let table = directories + page / PER_TABLE;
        put(table, page % PER_TABLE, (gpa + page * PAGE) | rights)?;
    }
    for n in 0..tables {
        let table = at + (directories + n) * PAGE;
        put(
            n / PER_TABLE,
            n % PER_TABLE,
            table | PRESENT | WRITE | USER | ACCESSED,
        )?;
    }
    let first = gva >> 30;
    Ok(MappingTables {
        region: region.ram().clone(),
        directories: (0..directories)
            .map(|n| (first + n, at + n * PAGE))
            .collect(),
    })
}

/// The third-level table of the guest's lower half.
fn third_level(region: &Region, root: u64) -> Option<u64> {
    let entry = region
        .bytes(root, 8)?
        .first_chunk()
        .copied()
        .map(u64::from_le_bytes)?;
    (entry & PRESENT != 0).then_some(entry & ADDRESS)
}

fn set_third_level(region: &mut Region, root: u64, entry: u64, value: u64) -> Option<()> {
    let table = third_level(region, root)?;
    let room = region.bytes_mut(table.checked_add(entry.checked_mul(8)?)?, 8)?;
    room.copy_from_slice(&value.to_le_bytes());
    Some(())
}

/// Lets an entry of the third-level table lead to a directory.
pub(crate) fn link(region: &mut Region, root: u64, entry: u64, directory: u64) -> Option<()> {
    let value = directory | PRESENT | WRITE | USER | ACCESSED;
    set_third_level(region, root, entry, value)
}

/// Clears an entry of the third-level table.
pub(crate) fn unlink(region: &mut Region, root: u64, entry: u64) {
    // Where there is no table nothing is mapped.
    let _ = set_third_level(region, root, entry, 0);
}

/// An entry of a page table that ring 3 may use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    /// What it leads to.
    pub(crate) address: u64,
    pub(crate) write: bool,
    pub(crate) execute: bool,
    /// In a page directory: it is a page of 2 MiB.
    pub(crate) large: bool,
}

impl Entry {
    pub(crate) fn of(bits: u64) -> Option<Self> {
        (bits & PRESENT != 0 && bits & USER != 0).then_some(Self {
            address: bits & ADDRESS,
            write: bits & WRITE != 0,
            execute: bits & NO_EXECUTE == 0,
            large: bits & LARGE_PAGE != 0,
        })
    }
}
