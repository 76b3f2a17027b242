//! The software TLBs: a direct-mapped first level per kind of access, one second level behind.
#![expect(
    unsafe_code,
    reason = "the first level is reached through a pointer in the processor's hot part"
)]

use std::ptr::NonNull;
use std::sync::OnceLock;

use crate::mem::area::{Area, GLOBAL as GLOBAL_PAGE, OwnArea, SIZE as AREA_SIZE};
use crate::mem::home::{Home, Table as Entries};
use crate::mem::jumps::{JumpKeys, Jumps};
use crate::mem::{PAGE_MASK, PAGE_SHIFT};

/// Entries of the second level; of a processor that begins small.
const SECOND: usize = 4096;
const FEW_SECOND: usize = 256;
/// Matches no address: there is no address space 0. A table of zeros has none.
const NEVER: u64 = 0;
/// Numbers of address spaces: 1 to this.
pub(super) const LAST_ASID: u16 = 0xffe;
/// Address spaces that have first-level TLBs of their own.
const SPACES: usize = 6;

/// What the fast path needs: the area of the current address space and privilege.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct TlbView {
    area: NonNull<Area>,
}

// SAFETY: the pointer is to an area that the same `Cpu` owns and moves with it; nobody else has it.
unsafe impl Send for TlbView {}

impl TlbView {
    /// Translates a read of `size` bytes that stays within one page of RAM.
    #[inline(always)]
    pub(crate) fn read(&self, linear: u64, size: usize) -> Option<usize> {
        // SAFETY: the area lives as long as the processor, and is written between accesses only.
        let area = unsafe { self.area.as_ref() };
        let n = area.index(linear);
        Self::hit(area.read[n], linear, size).then(|| linear.wrapping_add(area.addend[n]) as usize)
    }

    /// The same for a write.
    #[inline(always)]
    pub(crate) fn write(&self, linear: u64, size: usize) -> Option<usize> {
        // SAFETY: as in `read`.
        let area = unsafe { self.area.as_ref() };
        let n = area.index(linear);
        Self::hit(area.write[n], linear, size).then(|| linear.wrapping_add(area.addend[n]) as usize)
    }

    /// Whether the access's last byte is in the tag's page. The entry is that of its first byte: an
    /// access that crosses into the next page finds the one of the page before, and misses.
    #[inline(always)]
    fn hit(tag: u64, linear: u64, size: usize) -> bool {
        linear.wrapping_add(size as u64 - 1).wrapping_add(tag) <= PAGE_MASK
    }

    /// The code that jumps to a linear address go to.
    #[inline]
    pub(crate) fn jump(&self, linear: u64) -> Option<u64> {
        // SAFETY: as in `read`.
        let area = unsafe { self.area.as_ref() };
        let n = area.jump_index(linear);
        (area.jump_tag[n].wrapping_add(linear) == 0).then(|| area.jump_code[n])
    }

    /// The area itself.
    #[inline(always)]
    pub(crate) fn area(&self) -> NonNull<Area> {
        self.area
    }
}

/// Which first-level table serves an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Table {
    /// Supervisor; user pages are out of bounds under SMAP.
    Supervisor = 0,
    /// User.
    User = 1,
    /// Supervisor with RFLAGS.AC set.
    SupervisorAc = 2,
    /// Stays empty: every access takes the slow path.
    Slow = 3,
}

/// The areas of one address space.
#[derive(Default)]
struct Space {
    /// 0: nobody's.
    asid: u16,
    /// When it was last switched to.
    used: u64,
    areas: [Option<OwnArea>; 3],
}

/// The first level: areas by address space and kind of access. Those of address spaces that have not
/// been used for longest are taken for new ones.
pub(super) struct FirstLevel {
    spaces: [Space; SPACES],
    current: usize,
    switches: u64,
    /// The first area that is asked for.
    spare: Option<OwnArea>,
    /// The second level of their jump caches.
    pub(super) jumps: Jumps,
}

/// The area of [`Table::Slow`], of which nothing ever hits: one for all processors.
fn slow() -> NonNull<Area> {
    struct Shared(OwnArea);
    // SAFETY: nobody writes it once it is made.
    unsafe impl Sync for Shared {}
    static SLOW: OnceLock<Shared> = OnceLock::new();
    SLOW.get_or_init(|| Shared(OwnArea::new())).0.pointer()
}

impl FirstLevel {
    /// Bytes of a home for what is small here.
    pub(super) const HOME: usize = AREA_SIZE + Jumps::FEW_BYTES;

    pub(super) fn new(mut home: Option<&mut Home>) -> Self {
        Self {
            spaces: Default::default(),
            current: 0,
            switches: 0,
            spare: home.as_deref_mut().map(OwnArea::small),
            jumps: Jumps::new(home),
        }
    }

    /// Makes `asid` the current address space.
    fn switch(&mut self, asid: u16) {
        if self.spaces[self.current].asid == asid {
            return;
        }
        self.switches += 1;
        let known = self.spaces.iter().position(|space| space.asid == asid);
        let oldest = || (0..SPACES).min_by_key(|&n| self.spaces[n].used);
        let before = self.current;
        self.current = known.or_else(oldest).unwrap_or(0);
        if known.is_none() {
            self.start(before, asid);
        }
        self.spaces[self.current].used = self.switches;
    }

    /// Makes the current space one for a new address space. What the kernel's pages are in all address
    /// spaces is known from the one before.
    fn start(&mut self, before: usize, asid: u16) {
        const KERNEL: usize = Table::Supervisor as usize;
        let from = self.spaces[before].areas[KERNEL]
            .as_ref()
            .map(OwnArea::pointer)
            .filter(|_| before != self.current && self.spaces[before].asid != 0);
        let space = &mut self.spaces[self.current];
        space.asid = asid;
        for (table, area) in space.areas.iter_mut().enumerate() {
            if table == KERNEL && from.is_some() {
                area.get_or_insert_with(OwnArea::new);
            }
            let Some(area) = area else { continue };
            let area = area.get();
            area.drop_jumps();
            match from {
                // SAFETY: an area of another space, which nothing changes meanwhile.
                Some(from) if table == KERNEL => area.take_global(unsafe { from.as_ref() }),
                _ => area.drop_all(),
            }
        }
    }

    /// The address space is of no use any more.
    pub(super) fn retire(&mut self, asid: u16) {
        if let Some(space) = self.spaces.iter_mut().find(|space| space.asid == asid) {
            space.used = 0;
        }
    }

    /// The area of a table in the current address space; none for [`Table::Slow`].
    fn own(&mut self, table: Table) -> Option<&mut OwnArea> {
        let spare = &mut self.spare;
        let area = self.spaces[self.current].areas.get_mut(table as usize)?;
        Some(area.get_or_insert_with(|| spare.take().unwrap_or_else(OwnArea::new)))
    }

    pub(super) fn view(&mut self, table: Table, asid: u16) -> TlbView {
        self.switch(asid);
        let own = self.own(table).map(|area| area.pointer());
        TlbView {
            area: own.unwrap_or_else(slow),
        }
    }

    /// A view through which nothing hits.
    pub(super) fn no_view() -> TlbView {
        TlbView { area: slow() }
    }

    /// Enters a page for reading, and for writing if `write`.
    pub(super) fn fill(
        &mut self,
        table: Table,
        asid: u16,
        linear: u64,
        host: usize,
        mapping: &Mapping,
        write: bool,
    ) {
        self.switch(asid);
        if let Some(area) = self.own(table) {
            let gpa = mapping.gpa | if mapping.global { GLOBAL_PAGE } else { 0 };
            area.get().fill(linear, host, gpa, write);
        }
    }

    fn all(&mut self) -> impl Iterator<Item = &mut OwnArea> {
        self.spaces
            .iter_mut()
            .flat_map(|space| space.areas.iter_mut().flatten())
    }

    /// Drops a linear page, whatever its address space.
    pub(super) fn drop_page(&mut self, linear: u64) {
        for area in self.all() {
            area.get().drop_page(linear);
        }
    }

    /// Drops everything.
    pub(super) fn clear(&mut self) {
        for space in &mut self.spaces {
            space.used = 0;
            if std::mem::take(&mut space.asid) != 0 {
                for area in space.areas.iter_mut().flatten() {
                    area.get().drop_all();
                    area.get().drop_jumps();
                }
            }
        }
    }

    /// Makes every write take the slow path once more.
    pub(super) fn drop_writes(&mut self) {
        for area in self.all() {
            area.get().drop_writes();
        }
    }

    /// Makes writes to one guest-physical page take the slow path.
    pub(super) fn drop_writes_to(&mut self, gpa: u64) {
        for area in self.all() {
            area.get().drop_writes_to(gpa);
        }
    }

    /// Has jumps to a linear address go to `code`, so far from where the code starts, in one area and in
    /// the second level; see [`Jumps::enter`].
    pub(super) fn enter_jump(
        &mut self,
        view: TlbView,
        linear: u64,
        code: Target,
        keys: JumpKeys,
        everywhere: bool,
    ) {
        if let Some(area) = self.all().find(|area| area.pointer() == view.area) {
            area.get()
                .enter_jump(linear, code.base + u64::from(code.offset));
        }
        self.jumps.enter(linear, keys, everywhere, code.offset);
    }

    /// Forgets all jumps.
    pub(super) fn drop_jumps(&mut self) {
        for area in self.all() {
            area.get().drop_jumps();
        }
        self.jumps.clear();
    }

    /// Has room for as many jumps as there can be; there are none after that.
    pub(super) fn grow_jumps(&mut self) {
        self.drop_jumps();
        for area in self.all() {
            area.get().grow_jumps();
        }
        if let Some(area) = &mut self.spare {
            area.get().grow_jumps();
        }
        self.jumps.give_back();
    }

    /// Gives the memory back to the host that is not needed until guest code runs again.
    pub(super) fn give_back(&mut self) {
        let current = self.current;
        for (n, space) in self.spaces.iter_mut().enumerate() {
            if n != current {
                *space = Space::default();
            }
        }
        self.jumps.give_back();
    }
}

/// Where compiled code is: where all of it starts, and how far from there.
#[derive(Clone, Copy)]
pub(crate) struct Target {
    pub base: u64,
    pub offset: u32,
}

/// What a page walk found out about a 4 KiB page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    /// Guest-physical address of the page.
    pub gpa: u64,
    /// All levels allow writes.
    pub writable: bool,
    /// All levels allow user accesses.
    pub user: bool,
    /// No level forbids execution.
    pub executable: bool,
    /// The dirty bit is set (or there is none).
    pub dirty: bool,
    /// Survives a change of address space.
    pub global: bool,
}

const WRITABLE: u64 = 1 << 0;
const USER: u64 = 1 << 1;
const EXECUTABLE: u64 = 1 << 2;
const DIRTY: u64 = 1 << 3;
const GLOBAL: u64 = 1 << 4;

/// The second level: the outcome of walks, for all kinds of access.
pub(super) struct SecondLevel {
    entries: Entries<(u64, u64)>,
    /// Which groups of entries may have any.
    used: u64,
}

/// Groups of entries.
const GROUPS: usize = 64;

impl SecondLevel {
    /// Bytes in a home.
    pub(super) const HOME: usize = FEW_SECOND * size_of::<(u64, u64)>();

    pub(super) fn new(home: Option<&mut Home>) -> Self {
        let entries = if home.is_some() { FEW_SECOND } else { SECOND };
        Self {
            entries: Entries::new(home, entries),
            used: 0,
        }
    }

    fn slot(&self, linear: u64, asid: u16) -> usize {
        let page = linear >> PAGE_SHIFT;
        // User and kernel stacks and text tend to agree in their low bits, and so do the pages of
        // several processes.
        (page ^ (page >> 12) ^ (u64::from(asid) * 0x9e5)) as usize & self.entries.mask()
    }

    /// Entries of a group.
    fn group(&self) -> usize {
        (self.entries.mask() + 1) / GROUPS
    }

    fn value(&self, linear: u64, asid: u16) -> Option<u64> {
        let (tag, value) = *self.entries.at(self.slot(linear, asid));
        (tag == (linear & !PAGE_MASK) | u64::from(asid)).then_some(value)
    }

    /// Finds a page in address space `asid` or among the global ones, which are under `global`.
    pub(super) fn find(&self, linear: u64, asid: u16, global: u16) -> Option<Mapping> {
        let value = self
            .value(linear, asid)
            .or_else(|| self.value(linear, global))?;
        Some(Mapping {
            gpa: value & !PAGE_MASK,
            writable: value & WRITABLE != 0,
            user: value & USER != 0,
            executable: value & EXECUTABLE != 0,
            dirty: value & DIRTY != 0,
            global: value & GLOBAL != 0,
        })
    }

    /// Enters a page.
    pub(super) fn fill(&mut self, linear: u64, asid: u16, mapping: &Mapping) {
        let pick = |on: bool, bit: u64| if on { bit } else { 0 };
        let value = mapping.gpa
            | pick(mapping.writable, WRITABLE)
            | pick(mapping.user, USER)
            | pick(mapping.executable, EXECUTABLE)
            | pick(mapping.dirty, DIRTY)
            | pick(mapping.global, GLOBAL);
        let slot = self.slot(linear, asid);
        self.used |= 1 << (slot / self.group());
        *self.entries.at_mut(slot) = ((linear & !PAGE_MASK) | u64::from(asid), value);
    }

    /// Drops a linear page of an address space.
    pub(super) fn drop_page(&mut self, linear: u64, asid: u16) {
        let slot = self.slot(linear, asid);
        let entry = self.entries.at_mut(slot);
        if entry.0 == (linear & !PAGE_MASK) | u64::from(asid) {
            entry.0 = NEVER;
        }
    }

    /// Drops everything.
    pub(super) fn clear(&mut self) {
        let group = self.group();
        let groups = self.entries.all_mut().chunks_exact_mut(group);
        for (n, group) in groups.enumerate() {
            if self.used >> n & 1 != 0 {
                group.fill((NEVER, 0));
            }
        }
        self.used = 0;
    }
}
