//! A processor's architectural state as one value, and its way in and out.
//!
//! The fields mirror the contract's neutral state one to one, so that the backend only copies.
//! Loading checks everything before it changes anything: the state may come from an edited file.

use crate::apic::{InvalidPage, LocalApic, check_base};
use crate::cpu::{Cpu, reg, seg};
use crate::flags::rflags;
use crate::sys::control::valid_xcr0;
use crate::sys::descriptor::canonical;
use crate::sys::msr::{self, index};
use crate::sys::state::{
    Activity, DescriptorTable, EventState, Msrs, PendingException, Segment, SystemState, attr, cr0,
    cr4, efer,
};
use crate::time::{TimeState, kvm_msr};

/// Segments, tables and control registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SystemRegisters {
    /// ES, CS, SS, DS, FS, GS.
    pub segments: [Segment; 6],
    /// Task register.
    pub tr: Segment,
    /// Local descriptor table register.
    pub ldt: Segment,
    /// GDTR.
    pub gdt: DescriptorTable,
    /// IDTR.
    pub idt: DescriptorTable,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// CR8.
    pub cr8: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// IA32_APIC_BASE.
    pub apic_base: u64,
}

/// General registers, RIP and RFLAGS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GeneralRegisters {
    /// In encoding order.
    pub gpr: [u64; 16],
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
}

/// Activity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MpState {
    /// Executes instructions.
    #[default]
    Runnable,
    /// Waits for INIT.
    Uninitialized,
    /// Waits for SIPI.
    InitReceived,
    /// In HLT.
    Halted,
    /// SIPI with this vector received.
    SipiReceived(u8),
}

/// Events between instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Events {
    /// Exception on its way.
    pub exception: Option<PendingException>,
    /// Interrupt accepted: vector, and whether from INT n.
    pub interrupt: Option<(u8, bool)>,
    /// STI shadow.
    pub sti_shadow: bool,
    /// MOV SS shadow.
    pub mov_ss_shadow: bool,
    /// NMI accepted and not yet delivered.
    pub nmi_injected: bool,
    /// NMI waiting.
    pub nmi_pending: bool,
    /// NMIs masked until IRET.
    pub nmi_masked: bool,
}

/// Everything that a processor is between two instructions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuState {
    /// General registers.
    pub general: GeneralRegisters,
    /// System registers.
    pub system: SystemRegisters,
    /// DR0–DR3.
    pub debug_address: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// XCR0.
    pub xcr0: u64,
    /// XSAVE area in standard format.
    pub xsave: Vec<u8>,
    /// MSRs by index, ascending.
    pub msrs: Vec<(u32, u64)>,
    /// Local APIC page.
    pub lapic: Vec<u32>,
    /// IA32_TSC_DEADLINE.
    pub tsc_deadline: u64,
    /// Activity state.
    pub mp_state: MpState,
    /// Events.
    pub events: Events,
    /// Time-stamp counter.
    pub tsc: u64,
    /// The guest clock at that moment.
    pub clock_ns: u64,
}

/// Why a state can't be loaded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidState {
    /// A control register holds reserved bits or an impossible combination.
    #[error("{name} can't be {value:#x} in this mode or on this CPU model")]
    Control {
        /// Which.
        name: &'static str,
        /// Its value.
        value: u64,
    },
    /// An address that must be canonical isn't.
    #[error("{name} holds {value:#x}, which is not a canonical address")]
    NotCanonical {
        /// Which register.
        name: &'static str,
        /// Its value.
        value: u64,
    },
    /// A segment register that no processor can have.
    #[error("Segment register {name} has attributes {attributes:#x} that don't fit it")]
    Segment {
        /// Which.
        name: &'static str,
        /// Its attributes.
        attributes: u16,
    },
    /// An MSR that the CPU model hasn't, or a value that it can't hold.
    #[error("MSR {index:#x} can't be set to {value:#x} on this CPU model")]
    Msr {
        /// Index.
        index: u32,
        /// Value.
        value: u64,
    },
    /// The XSAVE area is of no use.
    #[error("The XSAVE area does not fit this CPU model: take it from the same model")]
    Xsave,
    /// An event that there isn't.
    #[error("Event with vector {0} can't be pending")]
    Event(u8),
    /// The local APIC's page is wrong.
    #[error(transparent)]
    Apic(#[from] InvalidPage),
}

const SEGMENT_NAMES: [&str; 6] = ["ES", "CS", "SS", "DS", "FS", "GS"];

/// Bits that RFLAGS can hold.
const RFLAGS_KNOWN: u64 = 0x003f_7fd7;

impl Cpu {
    /// Everything, between two instructions.
    pub fn save_state(&mut self) -> CpuState {
        self.collect_interrupts();
        let clock_ns = self.machine.host.clock_ns();
        let xsave = self.xsave_image();
        let mut general = GeneralRegisters {
            rip: self.rip,
            rflags: self.rflags_full(),
            ..GeneralRegisters::default()
        };
        general.gpr.copy_from_slice(&self.gpr[..16]);
        let events = self.sys.events;
        CpuState {
            general,
            system: self.system_registers(),
            debug_address: self.sys.dr,
            dr6: self.sys.dr6,
            dr7: self.sys.dr7,
            xcr0: self.sys.xcr0,
            xsave,
            msrs: self.save_msrs(),
            lapic: self.apic.page(clock_ns),
            tsc_deadline: self.apic_tsc_deadline(),
            mp_state: match self.sys.activity {
                Activity::Running | Activity::Shutdown => MpState::Runnable,
                Activity::Halted => MpState::Halted,
                Activity::WaitForInit => MpState::Uninitialized,
                Activity::WaitForSipi => MpState::InitReceived,
            },
            events: self.saved_events(&events),
            tsc: self.sys.time.tsc_at(clock_ns),
            clock_ns,
        }
    }

    fn saved_events(&self, events: &EventState) -> Events {
        // Shadows of an instruction that waits for a device are in its step.
        let (sti, mov_ss) = events.step.map_or((false, false), |s| s.shadows());
        let shadowed = |on: bool| on && self.rip == events.shadow_rip;
        let trap = (events.pending_debug != 0).then_some(PendingException {
            vector: crate::trap::vector::DB,
            error_code: None,
            payload: Some(events.pending_debug),
        });
        Events {
            exception: events.exception.or(trap),
            interrupt: events.external.map(|vector| (vector, false)),
            sti_shadow: sti || shadowed(events.sti_shadow),
            mov_ss_shadow: mov_ss || shadowed(events.mov_ss_shadow),
            nmi_injected: false,
            nmi_pending: events.nmis_pending != 0,
            nmi_masked: events.nmi_masked,
        }
    }

    /// Segments, tables and control registers.
    pub fn system_registers(&self) -> SystemRegisters {
        let sys = &self.sys;
        SystemRegisters {
            segments: sys.segments,
            tr: sys.tr,
            ldt: sys.ldt,
            gdt: sys.gdt,
            idt: sys.idt,
            cr0: sys.cr0,
            cr2: sys.cr2,
            cr3: sys.cr3,
            cr4: sys.cr4,
            cr8: self.apic.cr8(),
            efer: sys.efer,
            apic_base: self.apic.base(),
        }
    }

    fn save_msrs(&mut self) -> Vec<(u32, u64)> {
        let mut list: Vec<(u32, u64)> = Vec::new();
        let time = [
            index::TSC_ADJUST,
            index::SPEC_CTRL,
            index::VIRT_SPEC_CTRL,
            index::ARCH_CAPABILITIES,
            index::DEBUGCTL,
            index::XSS,
            kvm_msr::WALL_CLOCK_NEW,
            kvm_msr::SYSTEM_TIME_NEW,
        ];
        for index in msr::STORED.iter().chain(&time) {
            if let Ok(value) = self.read_msr(*index) {
                list.push((*index, value));
            }
        }
        self.trap.kind = crate::trap::TrapKind::None;
        list.sort_unstable_by_key(|(index, _)| *index);
        list
    }

    /// Sets everything; nothing if anything is wrong.
    pub fn load_state(&mut self, state: &CpuState) -> Result<(), InvalidState> {
        let mut sys = self.checked_system(&state.system)?;
        check_general(&state.general, &sys)?;
        if state.dr6 >> 32 != 0 || state.dr7 >> 32 != 0 {
            let name = if state.dr6 >> 32 != 0 { "DR6" } else { "DR7" };
            let value = state.dr6.max(state.dr7);
            return Err(InvalidState::Control { name, value });
        }
        sys.dr = state.debug_address;
        sys.dr6 = (state.dr6 & 0xe00f) | 0xffff_0ff0;
        sys.dr7 = (state.dr7 & 0xffff_2bff) | 0x400;
        if !valid_xcr0(state.xcr0, self.cpuid.xcr0_mask()) {
            return Err(InvalidState::Control {
                name: "XCR0",
                value: state.xcr0,
            });
        }
        sys.xcr0 = state.xcr0;
        (sys.msr, sys.time) = self.checked_msrs(&state.msrs)?;
        sys.events = checked_events(&state.events)?;
        sys.events.shadow_rip = state.general.rip;
        sys.activity = match state.mp_state {
            MpState::Runnable => Activity::Running,
            MpState::Uninitialized => Activity::WaitForInit,
            MpState::InitReceived | MpState::SipiReceived(_) => Activity::WaitForSipi,
            MpState::Halted => Activity::Halted,
        };
        let apic = self.checked_apic(state)?;
        // The last check is the one that sets, or does nothing.
        self.set_xsave_image(&state.xsave)
            .map_err(|_| InvalidState::Xsave)?;
        let before = self.translation();
        self.sys = sys;
        self.apic = apic;
        self.drop_posted();
        self.set_general(&state.general);
        self.restore_tsc(state.tsc, self.moment_of(state));
        self.commit_loaded(before);
        self.publish_system_time();
        if let MpState::SipiReceived(vector) = state.mp_state {
            use std::sync::atomic::Ordering;
            let posted = 0x100 | u32::from(vector);
            self.shared.sipi.store(posted, Ordering::SeqCst);
            self.shared.request(crate::shared::request::INTERRUPT);
        }
        Ok(())
    }

    /// The reading of this machine's clock at which the state was that of the processor. The clock goes
    /// on from the saved one; where it was not set and stands before it, that is now.
    fn moment_of(&self, state: &CpuState) -> u64 {
        self.machine.host.clock_ns().min(state.clock_ns)
    }

    /// What was posted to the processor that this state replaces.
    fn drop_posted(&mut self) {
        use std::sync::atomic::Ordering;
        let shared = &self.shared;
        for word in shared.posted.iter().chain(&shared.posted_level) {
            word.store(0, Ordering::SeqCst);
        }
        shared.nmi.store(0, Ordering::SeqCst);
        shared.init.store(false, Ordering::SeqCst);
        shared.sipi.store(0, Ordering::SeqCst);
    }

    /// Sets the registers of a boot protocol; the rest stays as it is.
    pub fn set_boot_registers(
        &mut self,
        general: &GeneralRegisters,
        system: &SystemRegisters,
    ) -> Result<(), InvalidState> {
        let sys = self.checked_system(system)?;
        check_general(general, &sys)?;
        let mut apic = self.apic.clone();
        if system.apic_base != 0 {
            check_base(system.apic_base, self.cpuid.physical_address_bits())?;
            apic.set_base(system.apic_base);
        }
        apic.set_cr8(system.cr8);
        let before = self.translation();
        self.sys = sys;
        self.sys.activity = Activity::Running;
        self.sys.events = EventState::default();
        self.apic = apic;
        self.set_general(general);
        self.commit_loaded(before);
        Ok(())
    }

    /// General registers, RIP and RFLAGS.
    pub fn general_registers(&self) -> GeneralRegisters {
        let mut general = GeneralRegisters {
            rip: self.rip,
            rflags: self.rflags_full(),
            ..GeneralRegisters::default()
        };
        general.gpr.copy_from_slice(&self.gpr[..16]);
        general
    }

    fn set_general(&mut self, general: &GeneralRegisters) {
        self.gpr[..16].copy_from_slice(&general.gpr);
        self.rip = general.rip;
        self.flags.set_bits(general.rflags & rflags::ARITHMETIC);
        self.rflags = (general.rflags & !rflags::ARITHMETIC) | rflags::FIXED;
    }

    /// What linear addresses and their rights follow from, beside the tables themselves.
    fn translation(&self) -> [u64; 5] {
        let sys = &self.sys;
        [sys.cr0, sys.cr3, sys.cr4, sys.efer, self.apic.base()]
    }

    /// Brings everything that is derived up to date with registers set from outside. Translations stay if
    /// what they follow from is what it was `before`, and the host hasn't written to page tables; in PAE
    /// paging they follow from registers besides.
    fn commit_loaded(&mut self, before: [u64; 5]) {
        let same = before == self.translation()
            && self.sys.efer & efer::LMA != 0
            && !self.tables_were_written();
        for index in 0..6u8 {
            let segment = self.sys.segments[usize::from(index)];
            self.set_segment(index, segment);
        }
        self.forget_devices();
        self.update_mode();
        if self.sys.cr0 & cr0::PG != 0
            && self.sys.cr4 & cr4::PAE != 0
            && self.sys.efer & efer::LMA == 0
            && self.load_pdptes().is_err()
        {
            // The table changed under the state: the entries read as not present.
            self.trap.kind = crate::trap::TrapKind::None;
        }
        if !same {
            self.tlb_flush_all();
        }
        self.apic.publish(&self.shared);
        self.apic_arm_timer();
        self.want_events();
    }

    fn checked_system(&self, s: &SystemRegisters) -> Result<SystemState, InvalidState> {
        let control = |name, value, ok: bool| {
            if ok {
                Ok(())
            } else {
                Err(InvalidState::Control { name, value })
            }
        };
        let (paging, protected) = (s.cr0 & cr0::PG != 0, s.cr0 & cr0::PE != 0);
        let lma = s.efer & efer::LMA != 0;
        let lme = s.efer & efer::LME != 0;
        let cr0_ok = s.cr0 & !(cr0::WRITABLE | cr0::ET) == 0
            && (!paging || protected)
            && (s.cr0 & cr0::NW == 0 || s.cr0 & cr0::CD != 0);
        control("CR0", s.cr0, cr0_ok)?;
        let efer_ok = s.efer & !(self.efer_mask() | efer::LMA) == 0 && lma == (lme && paging);
        control("IA32_EFER", s.efer, efer_ok)?;
        let cr4_ok = s.cr4 & !self.cr4_mask() == 0
            && (!lma || s.cr4 & cr4::PAE != 0)
            && (s.cr4 & cr4::PCIDE == 0 || lma);
        control("CR4", s.cr4, cr4_ok)?;
        let physical = self.cpuid.physical_address_bits();
        control("CR3", s.cr3, s.cr3 >> physical == 0)?;
        control("CR8", s.cr8, s.cr8 < 16)?;
        for (name, value) in [("GDTR", s.gdt.base), ("IDTR", s.idt.base)] {
            check_canonical(name, value)?;
        }
        check_segments(s, lma)?;
        Ok(SystemState {
            segments: s.segments,
            ldt: s.ldt,
            tr: s.tr,
            gdt: s.gdt,
            idt: s.idt,
            cr0: s.cr0 | cr0::ET,
            cr2: s.cr2,
            cr3: s.cr3,
            cr4: s.cr4,
            efer: s.efer,
            ..self.sys.clone()
        })
    }

    fn checked_msrs(&self, list: &[(u32, u64)]) -> Result<(Msrs, TimeState), InvalidState> {
        let mut msrs = self.sys.msr;
        let mut time = self.sys.time;
        for &(index, value) in list {
            let bad = InvalidState::Msr { index, value };
            if !self.msr_offered(index) {
                return Err(bad);
            }
            match index {
                index::TSC_ADJUST => time.tsc_adjust = value,
                kvm_msr::WALL_CLOCK | kvm_msr::WALL_CLOCK_NEW => time.kvm_wall_clock = value,
                kvm_msr::SYSTEM_TIME | kvm_msr::SYSTEM_TIME_NEW => time.kvm_system_time = value,
                // These have fields of their own, which rule.
                index::TSC
                | index::APIC_BASE
                | index::EFER
                | index::FS_BASE
                | index::GS_BASE
                | index::TSC_DEADLINE => {}
                _ if msr::is_constant(index) => {}
                _ => {
                    if msrs.set(index, value) != Some(true) {
                        return Err(bad);
                    }
                }
            }
        }
        Ok((msrs, time))
    }

    fn checked_apic(&self, state: &CpuState) -> Result<LocalApic, InvalidState> {
        let base = state.system.apic_base;
        let bits = self.cpuid.physical_address_bits();
        let now = self.moment_of(state);
        if state.lapic.is_empty() {
            check_base(base, bits)?;
            let mut apic = self.apic.clone();
            apic.set_base(base);
            apic.set_cr8(state.system.cr8);
            return Ok(apic);
        }
        let apic = self
            .apic
            .with_page(base, bits, &state.lapic, state.tsc_deadline, now)?;
        Ok(apic)
    }
}

fn check_canonical(name: &'static str, value: u64) -> Result<(), InvalidState> {
    if canonical(value) {
        Ok(())
    } else {
        Err(InvalidState::NotCanonical { name, value })
    }
}

fn check_general(general: &GeneralRegisters, sys: &SystemState) -> Result<(), InvalidState> {
    let flags = general.rflags;
    let v86 = flags & rflags::VM != 0;
    let v86_ok = !v86 || sys.protected() && !sys.long_mode();
    if flags & !RFLAGS_KNOWN != 0 || !v86_ok {
        return Err(InvalidState::Control {
            name: "RFLAGS",
            value: flags,
        });
    }
    let code64 = sys.long_mode() && sys.segments[usize::from(seg::CS)].long();
    if code64 {
        check_canonical("RIP", general.rip)
    } else if general.rip >> 32 != 0 {
        Err(InvalidState::Control {
            name: "RIP",
            value: general.rip,
        })
    } else {
        Ok(())
    }
}

/// Segments as some program could have loaded them, as far as privilege and modes rest on them.
fn check_segments(s: &SystemRegisters, lma: bool) -> Result<(), InvalidState> {
    let all = s
        .segments
        .iter()
        .zip(SEGMENT_NAMES)
        .chain([(&s.tr, "TR"), (&s.ldt, "LDTR")]);
    for (segment, name) in all {
        if segment.attributes & !attr::ALL != 0 {
            return Err(InvalidState::Segment {
                name,
                attributes: segment.attributes,
            });
        }
        if lma {
            check_canonical(name, segment.base)?;
        } else if segment.base >> 32 != 0 {
            return Err(InvalidState::NotCanonical {
                name,
                value: segment.base,
            });
        }
    }
    if s.cr0 & cr0::PE == 0 {
        return Ok(());
    }
    let cs = &s.segments[usize::from(seg::CS)];
    let both = attr::L | attr::DB;
    let cs_ok = !cs.unusable && cs.present() && (!lma || cs.attributes & both != both);
    // Right after CR0.PE is set, CS is still the data-like segment of real-address mode.
    let tss = s.tr.kind();
    let tr_ok = s.tr.unusable || !s.tr.present() || matches!(tss, 3 | 11);
    let ldt_ok = s.ldt.unusable || !s.ldt.present() || s.ldt.kind() == 2;
    for (ok, name, segment) in [
        (cs_ok, "CS", cs),
        (tr_ok, "TR", &s.tr),
        (ldt_ok, "LDTR", &s.ldt),
    ] {
        if !ok {
            return Err(InvalidState::Segment {
                name,
                attributes: segment.attributes,
            });
        }
    }
    Ok(())
}

fn checked_events(events: &Events) -> Result<EventState, InvalidState> {
    let mut state = EventState {
        sti_shadow: events.sti_shadow,
        mov_ss_shadow: events.mov_ss_shadow,
        nmi_masked: events.nmi_masked && !events.nmi_injected,
        nmis_pending: u8::from(events.nmi_pending || events.nmi_injected),
        ..EventState::default()
    };
    if let Some(exception) = events.exception {
        if exception.vector > 31 || exception.vector == 2 {
            return Err(InvalidState::Event(exception.vector));
        }
        state.exception = Some(exception);
    }
    // A software interrupt whose delivery was broken off stands before its instruction, which
    // raises it again.
    if let Some((vector, false)) = events.interrupt {
        state.external = Some(vector);
    }
    Ok(state)
}

const _: () = assert!(reg::RSP == 4);
