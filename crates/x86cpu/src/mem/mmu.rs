//! Translation as a whole: address spaces, flushes, and what happens on a miss.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::cpu::Cpu;
use crate::flags::rflags;
use crate::mem::PAGE_MASK;
use crate::mem::area::Area;
use crate::mem::home::{Home, Table as Entries};
use crate::mem::jumps::JumpKeys;
use crate::mem::memory::SlotTable;
use crate::mem::tlb::{FirstLevel, LAST_ASID, Mapping, SecondLevel, Table, Target, TlbView};
use crate::mem::walk::{self, Levels, Paging, Wants};
use crate::shared::request;
use crate::sys::state::{cr0, cr4, efer};
use crate::trap::{Trap, TrapKind, vector};
use crate::tuning::Counters;

/// PCIDs that there are.
const PCIDS: usize = 4096;
/// Words of the filter of large pages: wide enough that the 2 MiB pages of a kernel's map of 8 GiB
/// leave most of it empty.
const LARGE_WORDS: usize = 4096;
/// After so many writes to pages that have lost their code, one becomes plain data again.
const IDLE_WRITES: u32 = 16;
/// Numbers of the first address space and of what all have; and the last that is taken.
const FIRST_ASIDS: (u16, u16, u16) = (1, 2, 2);

/// One processor's memory-management unit.
pub struct Mmu {
    first: FirstLevel,
    second: SecondLevel,
    slots: Arc<SlotTable>,
    /// The generation of [`crate::mem::Memory`] that the TLBs are up to date with.
    generation: u64,
    paging: Paging,
    pdptes: [u64; 4],
    physical_bits: u8,
    table: Table,
    /// Address space of PCID 0, which most have to do with only, and of all others; 0 for none yet.
    first_asid: u16,
    asids: Entries<u16>,
    /// One beyond the last of them that there may be.
    pcids: usize,
    /// Of the current PCID.
    asid: u16,
    /// Under which the second level keeps global pages.
    global: u16,
    last_asid: u16,
    /// Hashes of 2 MiB (and 1 GiB) regions that large pages have been entered for.
    large: Entries<u64>,
    /// There may be some.
    any_large: bool,
    /// [`SlotTable::table_writes`] when all translations were dropped last.
    table_writes: u64,
    /// Writes that found no code left in a page that had some.
    idle_writes: u32,
    /// The processor has begun to run code. Before that no access has a fast path, and none needs an area
    /// of its own.
    started: bool,
}

/// How an access is made, for [`Cpu::load_lin`] and its kin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// With the current privilege.
    Current,
    /// By the processor itself (descriptor tables, TSS): supervisor, whatever RFLAGS.AC says.
    Supervisor,
    /// As code at privilege level 0 to 2 would, under the current RFLAGS.AC.
    Kernel,
    /// As code at privilege level 3 would.
    User,
}

/// A page of RAM or of something else.
#[derive(Clone, Copy)]
pub(crate) enum Place {
    /// Host address of the very byte; the page can be accessed as asked.
    Ram(usize),
    /// RAM that holds code, to be written (with [`Cpu::wrote_code`] after it): host address and
    /// guest-physical address.
    Code(usize, u64),
    /// No RAM, or a write to read-only RAM: a guest-physical address.
    Device(u64),
}

impl Mmu {
    /// Bytes of a home for what is small here.
    pub(crate) const HOME: usize = FirstLevel::HOME
        + SecondLevel::HOME
        + PCIDS * size_of::<u16>()
        + LARGE_WORDS * size_of::<u64>();

    /// Tables are in the processor's home, if it has one.
    pub(crate) fn new(slots: Arc<SlotTable>, mut home: Option<&mut Home>) -> Self {
        let (asid, global, last_asid) = FIRST_ASIDS;
        Self {
            // It has a guard, and comes first.
            first: FirstLevel::new(home.as_deref_mut()),
            second: SecondLevel::new(home.as_deref_mut()),
            slots,
            generation: 0,
            paging: Paging::default(),
            pdptes: [0; 4],
            physical_bits: 36,
            table: Table::Supervisor,
            first_asid: 0,
            asids: Entries::new(home.as_deref_mut(), PCIDS),
            pcids: 0,
            asid,
            global,
            last_asid,
            large: Entries::new(home, LARGE_WORDS),
            any_large: false,
            table_writes: 0,
            idle_writes: 0,
            started: false,
        }
    }

    pub(crate) fn set_physical_bits(&mut self, bits: u32) {
        self.physical_bits = bits.clamp(32, 52) as u8;
    }

    pub(crate) fn view(&mut self) -> TlbView {
        if !self.started {
            return FirstLevel::no_view();
        }
        self.first.view(self.table, self.asid)
    }

    /// Has jumps of the current address space and privilege to a linear address go to `code`.
    pub(crate) fn enter_jump(&mut self, linear: u64, code: Target) {
        let view = self.view();
        let keys = self.jumps().1;
        let known = self.second.find(linear, self.asid, self.global);
        let everywhere = known.is_some_and(|page| page.global);
        self.first.enter_jump(view, linear, code, keys, everywhere);
    }

    /// What the second level of the jump cache is looked up with: where it is, and the keys.
    pub(crate) fn jumps(&self) -> (u64, JumpKeys) {
        let user = self.table == Table::User;
        let jumps = &self.first.jumps;
        (jumps.base(), jumps.keys(self.asid, user))
    }

    /// Where code is, in the second level of the jump cache.
    pub(crate) fn jump(&self, linear: u64) -> Option<u32> {
        self.first.jumps.find(linear, self.jumps().1)
    }

    /// Takes the memory for the table of all jumps.
    pub(crate) fn take_jumps(&mut self) {
        self.first.jumps.populate();
    }

    /// Forgets all of [`Mmu::enter_jump`].
    pub(crate) fn drop_jumps(&mut self) {
        self.first.drop_jumps();
    }

    /// What must agree for code to be what it was at a linear address; never 0. It changes with
    /// [`Mmu::drop_jumps`].
    pub(crate) fn code_key(&self) -> u64 {
        self.first.jumps.key(self.asid, self.table == Table::User)
    }

    /// Gives memory back to the host.
    pub(crate) fn give_back(&mut self) {
        self.first.give_back();
    }

    /// Whether accesses of instructions may take the fast path.
    pub(crate) fn is_fast(&self) -> bool {
        self.table != Table::Slow && self.started
    }

    /// What an index into the second level of the jump cache is cut down to.
    pub(crate) fn jumps_mask(&self) -> u64 {
        self.first.jumps.mask().into()
    }

    /// Has room for as many jumps as there can be; there are none after that.
    pub(crate) fn grow_jumps(&mut self) {
        self.first.grow_jumps();
    }

    fn asid_of(&self, pcid: usize) -> u16 {
        match pcid {
            0 => self.first_asid,
            _ => *self.asids.at(pcid),
        }
    }

    fn set_asid(&mut self, pcid: usize, asid: u16) {
        if pcid == 0 {
            self.first_asid = asid;
        } else {
            *self.asids.at_mut(pcid) = asid;
            self.pcids = self.pcids.max(pcid % PCIDS + 1);
        }
    }

    /// The area of the same address space and privilege for when RFLAGS.AC is the other way, if under
    /// SMAP that is all there is to it.
    pub(crate) fn other_under_smap(&mut self) -> Option<NonNull<Area>> {
        let other = match self.table {
            Table::Supervisor if self.paging.smap => Table::SupervisorAc,
            Table::SupervisorAc => Table::Supervisor,
            _ => return None,
        };
        Some(self.first.view(other, self.asid).area())
    }

    pub(crate) fn slots(&self) -> &Arc<SlotTable> {
        &self.slots
    }

    /// A number that no address space has had; `None` if there is no more.
    fn new_asid(&mut self) -> Option<u16> {
        (self.last_asid < LAST_ASID).then(|| {
            self.last_asid += 1;
            self.last_asid
        })
    }

    /// Numbers of address spaces start over: what is known of code under them has to go as well.
    fn flush_all(&mut self) {
        self.first.clear();
        self.second.clear();
        if std::mem::take(&mut self.any_large) {
            self.large.all_mut().fill(0);
        }
        self.first_asid = 0;
        let pcids = std::mem::take(&mut self.pcids);
        self.asids.all_mut()[..pcids].fill(0);
        (self.asid, self.global, self.last_asid) = FIRST_ASIDS;
    }

    fn large_key(linear: u64, shift: u32) -> (usize, u64) {
        let hash =
            ((linear >> shift) ^ (u64::from(shift) << 40)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (
            (hash >> 52) as usize & (LARGE_WORDS - 1),
            1 << ((hash >> 46) & 63),
        )
    }

    fn note_large(&mut self, linear: u64, shift: u32) {
        let shift = if shift == 30 { 30 } else { 21 };
        let (word, bit) = Self::large_key(linear, shift);
        self.any_large = true;
        *self.large.at_mut(word) |= bit;
    }

    fn may_be_large(&self, linear: u64) -> bool {
        // A 4 MiB page has entries under both of its halves.
        [(linear, 21), (linear ^ (1 << 21), 21), (linear, 30)]
            .into_iter()
            .any(|(linear, shift)| {
                let (word, bit) = Self::large_key(linear, shift);
                self.large.at(word) & bit != 0
            })
    }
}

impl Cpu {
    /// Brings translation up to date with CR0, CR4, EFER, RFLAGS and the privilege level. What
    /// changes how tables are read also flushes.
    pub(crate) fn update_mmu_mode(&mut self) {
        let sys = &self.sys;
        let levels = if sys.cr0 & cr0::PG == 0 {
            Levels::None
        } else if sys.efer & efer::LMA != 0 {
            Levels::Four
        } else if sys.cr4 & cr4::PAE != 0 {
            Levels::Pae
        } else {
            Levels::Legacy
        };
        let on = levels != Levels::None;
        let paging = Paging {
            levels,
            write_protect: sys.cr0 & cr0::WP != 0,
            no_execute: sys.efer & efer::NXE != 0 && matches!(levels, Levels::Four | Levels::Pae),
            smep: on && sys.cr4 & cr4::SMEP != 0,
            smap: on && sys.cr4 & cr4::SMAP != 0,
            global: sys.cr4 & cr4::PGE != 0,
            pse: sys.cr4 & cr4::PSE != 0,
            pcid: sys.cr4 & cr4::PCIDE != 0,
            gigabyte: self.mmu.paging.gigabyte,
            physical_bits: self.mmu.physical_bits,
        };
        let slow = self.alignment_checked() || sys.dr7 & 0xff != 0;
        self.mmu.table = if slow {
            Table::Slow
        } else if self.cpl == 3 {
            Table::User
        } else if paging.smap && self.rflags & rflags::AC != 0 {
            Table::SupervisorAc
        } else {
            Table::Supervisor
        };
        if paging != self.mmu.paging {
            self.mmu.paging = Paging {
                gigabyte: self.cpuid.extended_feature_edx() & (1 << 26) != 0,
                ..paging
            };
            self.tlb_flush_all();
        } else {
            self.view_changed();
        }
    }

    /// Number of the current address space.
    pub(crate) fn asid(&self) -> u16 {
        self.mmu.asid
    }

    fn view_changed(&mut self) {
        self.view = self.mmu.view();
        self.code_context_changed();
    }

    /// Drops every translation, global ones too.
    pub fn tlb_flush_all(&mut self) {
        self.mmu.table_writes = self.mmu.slots.table_writes();
        self.mmu.flush_all();
        let pcid = self.pcid(self.sys.cr3);
        self.mmu.set_asid(pcid, self.mmu.asid);
        self.code_mappings_changed();
        self.view_changed();
    }

    /// Whether the host has written to page tables since all translations were dropped last.
    pub(crate) fn tables_were_written(&self) -> bool {
        self.mmu.table_writes != self.mmu.slots.table_writes()
    }

    /// The local APIC's page has moved, or is there no more.
    pub(crate) fn apic_page_moved(&mut self) {
        self.tlb_flush_all();
    }

    /// Drops the translations of the current PCID but for global ones.
    pub fn tlb_flush_non_global(&mut self) {
        self.switch_address_space(self.sys.cr3, true);
    }

    /// After a write of CR3: the address space is the one that `new` names; `noflush` is bit 63 of
    /// the value written under CR4.PCIDE.
    pub fn tlb_load_cr3(&mut self, _old: u64, new: u64, noflush: bool) {
        self.switch_address_space(new, !noflush);
    }

    fn pcid(&self, cr3: u64) -> usize {
        if self.mmu.paging.pcid {
            cr3 as usize & (PCIDS - 1)
        } else {
            0
        }
    }

    fn switch_address_space(&mut self, cr3: u64, flush: bool) {
        let pcid = self.pcid(cr3);
        let known = self.mmu.asid_of(pcid);
        self.mmu.asid = if flush || known == 0 {
            let Some(asid) = self.mmu.new_asid() else {
                return self.tlb_flush_all();
            };
            self.mmu.set_asid(pcid, asid);
            asid
        } else {
            known
        };
        self.view_changed();
        if known != self.mmu.asid {
            self.mmu.first.retire(known);
        }
    }

    /// INVLPG: drops a page in the current address space, and global ones.
    pub fn tlb_flush_page(&mut self, linear: u64) {
        if self.mmu.may_be_large(linear) {
            self.tlb_flush_all();
            return;
        }
        self.mmu.first.drop_page(linear);
        let (asid, global) = (self.mmu.asid, self.mmu.global);
        self.mmu.second.drop_page(linear, asid);
        self.mmu.second.drop_page(linear, global);
        self.code_page_unmapped(linear);
    }

    /// INVPCID type 1: drops all pages of a PCID but for global ones.
    pub fn tlb_flush_pcid(&mut self, pcid: u16) {
        if self.pcid(self.sys.cr3) == usize::from(pcid) {
            self.tlb_flush_non_global();
        } else {
            self.mmu.set_asid(usize::from(pcid), 0);
        }
    }

    /// INVPCID type 0: drops a page of a PCID.
    pub fn tlb_flush_page_pcid(&mut self, linear: u64, pcid: u16) {
        if self.mmu.may_be_large(linear) {
            self.tlb_flush_pcid(pcid);
        } else {
            let asid = self.mmu.asid_of(usize::from(pcid));
            self.mmu.second.drop_page(linear, asid);
            self.tlb_flush_page(linear);
        }
    }

    /// Loads the PAE page-directory-pointer registers from where CR3 points; #GP if one is bad.
    /// Does nothing outside of PAE paging.
    pub fn load_pdptes(&mut self) -> Result<(), Trap> {
        let sys = &self.sys;
        let pae = sys.cr0 & cr0::PG != 0 && sys.cr4 & cr4::PAE != 0 && sys.efer & efer::LMA == 0;
        if !pae {
            return Ok(());
        }
        let mmu = &mut *self.mmu;
        let paging = Paging {
            physical_bits: mmu.physical_bits,
            ..mmu.paging
        };
        match walk::load_pdptes(&mmu.slots, &paging, sys.cr3) {
            Some(pdptes) => {
                mmu.pdptes = pdptes;
                Ok(())
            }
            None => Err(self.gp0()),
        }
    }

    /// The PAE page-directory-pointer registers, for state that is saved.
    pub fn pdptes(&self) -> [u64; 4] {
        self.mmu.pdptes
    }

    /// Sets the PAE page-directory-pointer registers.
    pub fn set_pdptes(&mut self, pdptes: [u64; 4]) {
        self.mmu.pdptes = pdptes;
    }

    /// Takes note of changes of the memory map and of pages that became code elsewhere. To be
    /// called between instructions only.
    pub(crate) fn catch_up_with_memory(&mut self) {
        if !self.mmu.started {
            self.mmu.started = true;
            self.view_changed();
        }
        loop {
            let generation = self.machine.memory.generation();
            if generation != self.mmu.generation {
                self.mmu.generation = generation;
                let slots = self.machine.memory.slots();
                if Arc::ptr_eq(&slots, &self.mmu.slots) {
                    self.mmu.first.drop_writes();
                } else {
                    self.clear_code();
                    self.mmu.slots = slots;
                    self.tlb_flush_all();
                }
            }
            self.shared.memory_seen.store(generation, Ordering::SeqCst);
            // A change that came before the store may have found this processor not running.
            if self.machine.memory.generation() == generation {
                return;
            }
        }
    }

    /// Declares that no guest code runs here until [`Cpu::catch_up_with_memory`].
    pub(crate) fn leave_memory(&self) {
        self.shared.memory_seen.store(u64::MAX, Ordering::SeqCst);
    }

    fn table_of(&self, access: Access) -> Table {
        let ac = self.rflags & rflags::AC != 0 && self.mmu.paging.smap;
        match access {
            Access::Current if self.cpl == 3 => Table::User,
            Access::User => Table::User,
            Access::Current | Access::Kernel if ac => Table::SupervisorAc,
            Access::Current | Access::Kernel | Access::Supervisor => Table::Supervisor,
        }
    }

    /// The view for an access that isn't made with the current privilege.
    #[inline]
    pub(super) fn view_of(&mut self, access: Access) -> TlbView {
        if access == Access::Current {
            self.view
        } else {
            let table = self.table_of(access);
            self.mmu.first.view(table, self.mmu.asid)
        }
    }

    fn wants(&self, access: Access, write: bool) -> Wants {
        let table = self.table_of(access);
        Wants {
            write,
            fetch: false,
            user: table == Table::User,
            through_smap: table == Table::SupervisorAc,
        }
    }

    #[cold]
    fn page_fault(&mut self, linear: u64, code: u32) -> Trap {
        self.trap.address = linear;
        self.trap.kind = TrapKind::Fault {
            vector: vector::PF,
            error_code: Some(code),
        };
        Trap
    }

    pub(super) fn is_canonical(&self, linear: u64) -> bool {
        self.mmu.paging.levels != Levels::Four || ((linear << 16) as i64 >> 16) as u64 == linear
    }

    /// What is mapped at a canonical address, if the access may be made.
    fn mapping(&mut self, linear: u64, wants: Wants) -> Result<Mapping, Trap> {
        let mmu = &mut *self.mmu;
        if let Some(found) = mmu.second.find(linear, mmu.asid, mmu.global)
            && mmu.paging.allows(&found, wants)
            && (found.dirty || !wants.write)
        {
            Counters::add(&self.shared.counters.tlb_second_hits, 1);
            return Ok(found);
        }
        Counters::add(&self.shared.counters.tlb_walks, 1);
        let cr3 = self.sys.cr3;
        match walk::walk(&mmu.slots, &mmu.paging, cr3, &mmu.pdptes, linear, wants) {
            Ok(walked) => {
                let mapping = walked.mapping;
                let asid = if mapping.global { mmu.global } else { mmu.asid };
                mmu.second.fill(linear, asid, &mapping);
                if walked.shift != 12 {
                    mmu.note_large(linear, walked.shift);
                }
                Ok(mapping)
            }
            Err(code) => Err(self.page_fault(linear, code)),
        }
    }

    /// Translates one byte's address for an access that stays within its page, and enters the page
    /// into the first level where later accesses may go ahead.
    pub(super) fn translate(
        &mut self,
        linear: u64,
        access: Access,
        write: bool,
        stack: bool,
    ) -> Result<Place, Trap> {
        if !self.is_canonical(linear) {
            let vector = if stack { vector::SS } else { vector::GP };
            return Err(self.fault(vector, 0));
        }
        let wants = self.wants(access, write);
        let mapping = self.mapping(linear, wants)?;
        let gpa = mapping.gpa | (linear & PAGE_MASK);
        if self.apic.page_address() == Some(mapping.gpa) {
            return Ok(Place::Device(gpa));
        }
        let table = self.table_of(access);
        let mmu = &mut *self.mmu;
        let Some(page) = mmu.slots.page(mapping.gpa) else {
            return Ok(Place::Device(gpa));
        };
        let page_host = page.host;
        let host = page_host + (linear & PAGE_MASK) as usize;
        if write {
            if page.read_only {
                return Ok(Place::Device(gpa));
            }
            page.log_write();
            if !page.state.add_writer(self.id) {
                mmu.idle_writes += u32::from(page.state.has_no_code());
                if mmu.idle_writes < IDLE_WRITES || !page.state.has_no_code() {
                    return Ok(Place::Code(host, gpa));
                }
                mmu.idle_writes = 0;
                // Code may have come since.
                self.code_to_data(gpa);
            }
        }
        let mmu = &mut *self.mmu;
        mmu.first
            .fill(table, mmu.asid, linear, page_host, &mapping, write);
        Ok(Place::Ram(host))
    }

    /// Has the first level take the page of an address, for accesses with the current privilege.
    /// `false`, without an exception, if they must not go ahead there.
    pub(crate) fn fill_tlb(&mut self, linear: u64, write: bool) -> bool {
        let place = self.quietly(|cpu| cpu.translate(linear, Access::Current, write, false));
        matches!(place, Some(Place::Ram(_)))
    }

    /// Does what may raise an exception, without one.
    pub(crate) fn quietly<T>(
        &mut self,
        act: impl FnOnce(&mut Self) -> Result<T, Trap>,
    ) -> Option<T> {
        let address = self.trap.address;
        let done = act(self);
        if done.is_err() {
            self.trap.kind = TrapKind::None;
            self.trap.address = address;
        }
        done.ok()
    }

    /// Translates an address that instructions are fetched from.
    pub(crate) fn translate_fetch(&mut self, linear: u64) -> Result<u64, Trap> {
        self.fetch_from(linear).map(|(gpa, _)| gpa)
    }

    /// The same, and whether all address spaces have the page.
    pub(crate) fn fetch_from(&mut self, linear: u64) -> Result<(u64, bool), Trap> {
        if !self.is_canonical(linear) {
            return Err(self.gp0());
        }
        let wants = Wants {
            write: false,
            fetch: true,
            user: self.cpl == 3,
            through_smap: false,
        };
        let mapping = self.mapping(linear, wants)?;
        Ok((mapping.gpa | (linear & PAGE_MASK), mapping.global))
    }

    /// Translates without faults, limits of privilege or changes of accessed bits that matter, as a
    /// debugger does.
    pub fn peek_translate(&self, linear: u64) -> Option<u64> {
        if !self.is_canonical(linear) {
            return None;
        }
        let wants = Wants {
            write: false,
            fetch: false,
            user: false,
            through_smap: true,
        };
        let mmu = &*self.mmu;
        walk::walk(
            &mmu.slots,
            &mmu.paging,
            self.sys.cr3,
            &mmu.pdptes,
            linear,
            wants,
        )
        .ok()
        .map(|walked| walked.mapping.gpa | (linear & PAGE_MASK))
    }

    /// After a write of `len` bytes at `gpa`, in a page that holds code. Ends the running block if
    /// any decoded code was dropped: it may be the block's own.
    pub(super) fn wrote_code(&mut self, gpa: u64, len: usize) {
        let dropped = match self.mmu.slots.page(gpa) {
            Some(page) => page.state.wrote((gpa & PAGE_MASK) as usize, len),
            None => false,
        };
        if dropped {
            self.code_changed();
        }
    }

    /// Ends the running block, and has the other processors look for code that is stale.
    fn code_changed(&mut self) {
        self.end_block_early();
        for (id, cpu) in self.machine.cpus.iter().enumerate() {
            if id != self.id as usize
                && let Some(cpu) = cpu.get()
            {
                cpu.request(request::CODE);
            }
        }
    }

    /// Makes a page that holds code writable like any other, dropping its code.
    pub(super) fn code_to_data(&mut self, gpa: u64) {
        let id = self.id;
        let dropped = match self.mmu.slots.page(gpa & !PAGE_MASK) {
            Some(page) => page.state.make_data(id),
            None => false,
        };
        if dropped {
            self.code_changed();
        }
    }

    /// Makes the page at `gpa` hold code: no processor writes it unseen from here on.
    pub(crate) fn claim_code_page(&mut self, gpa: u64) {
        let page = self.mmu.slots.page(gpa);
        if page.is_none_or(|page| page.state.is_claimed()) {
            return;
        }
        let machine = self.machine.clone();
        let slots = self.mmu.slots.clone();
        let Some(page) = slots.page(gpa) else {
            return;
        };
        let id = self.id;
        let drop_own = machine.make_code(page.state, id, &mut || self.catch_up_with_memory());
        if drop_own {
            self.mmu.first.drop_writes_to(gpa & !PAGE_MASK);
        }
    }
}
