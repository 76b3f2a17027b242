//! A virtual processor on KVM: its run loop.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvm_bindings::{
    CpuId, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
    kvm_cpuid_entry2, kvm_enable_cap,
};
use kvm_ioctls::VcpuFd;
use skerry_hypervisor::cancel::CallWord;
use skerry_hypervisor::portability::same_frequency;
use skerry_hypervisor::state::DebugRegisters;
use skerry_hypervisor::validate::StateLimits;
use skerry_hypervisor::{
    BootRegisters, BudgetError, CallId, Canceller, CpuState, CpuidTable, CreateVcpuError, Exit,
    Gpa, InterruptError, Irqchip, RunError, StateError, Vcpu,
};

use crate::kick::ThreadKick;
use crate::probe::VcpuFacts;
use crate::run_page::{PortAccess, RawExit, RunPage};
use crate::sys;
use crate::vm::VmShared;

/// What is left of the access whose exit was returned last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pending {
    /// Nothing: the processor stands between two instructions.
    None,
    /// The kernel finishes the instruction at the next entry.
    Finish,
    /// Element `index` of a port access was handed out.
    Port {
        access: PortAccess,
        index: u32,
        answered: bool,
    },
    /// A memory read was handed out.
    Read { answered: bool },
}

/// A virtual processor.
pub struct KvmVcpu {
    // Before `vm`: closed first.
    pub(crate) fd: VcpuFd,
    pub(crate) page: RunPage,
    pub(crate) id: u32,
    pub(crate) limits: StateLimits,
    /// Frequency of this guest's time-stamp counter, in kHz.
    pub(crate) tsc_khz: u32,
    /// Whether its offset can be set.
    pub(crate) tsc_offset: bool,
    /// XCR0 as it was set last, if that is known. Only ring 0 of a guest can change it.
    pub(crate) xcr0: Option<u64>,
    /// The debug registers, while they are known: until the guest runs.
    pub(crate) debug: Option<DebugRegisters>,
    word: Arc<CallWord>,
    kick: Arc<ThreadKick>,
    pending: Pending,
    /// An exit that came up while an access was being finished.
    queued: Option<RawExit>,
    pub(crate) vm: Arc<VmShared>,
}

/// Has the kernel refuse the guest paravirtual features that its table does not show: what they do to
/// guest memory would not travel. Kernels before 5.8 can't.
fn enforce_features(fd: &VcpuFd, possible: bool) -> Result<(), kvm_ioctls::Error> {
    if !possible {
        return Ok(());
    }
    let mut request = kvm_enable_cap {
        cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
        ..Default::default()
    };
    request.args[0] = 1;
    fd.enable_cap(&request)
}

/// Gives a new processor the time-stamp counter that its table tells, and says its frequency in kHz.
fn set_frequency(
    fd: &VcpuFd,
    id: u32,
    cpuid: &CpuidTable,
    here: u32,
    scaling: bool,
) -> Result<u32, CreateVcpuError> {
    let asked = cpuid.tsc_khz().unwrap_or(here);
    if same_frequency(here, asked) {
        return Ok(asked);
    }
    let unsupported = || CreateVcpuError::Unsupported {
        id,
        feature: format!(
            "a time-stamp counter of {asked} kHz: the host's runs at {here} kHz and can't be scaled"
        ),
    };
    if !scaling {
        return Err(unsupported());
    }
    fd.set_tsc_khz(asked).map_err(|_| unsupported())?;
    Ok(asked)
}

impl KvmVcpu {
    pub(crate) fn new(
        vm: Arc<VmShared>,
        id: u32,
        cpuid: &CpuidTable,
    ) -> Result<Self, CreateVcpuError> {
        let backend = |what, source: Box<dyn std::error::Error + Send + Sync>| {
            CreateVcpuError::Backend { id, what, source }
        };
        let missing = cpuid.missing_from(&vm.host.supported_cpuid);
        if let Some(feature) = missing.into_iter().next() {
            return Err(CreateVcpuError::Unsupported { id, feature });
        }
        crate::kick::install().map_err(|e| backend("install the signal handler", e.into()))?;
        let fd = vm
            .fd
            .create_vcpu(id.into())
            .map_err(|e| backend("make the kernel's part", e.into()))?;
        let page = RunPage::map(&fd, vm.fd.run_size())
            .map_err(|e| backend("map the shared page", e.into()))?;
        let entries: Vec<_> = cpuid
            .entries
            .iter()
            .map(|entry| kvm_cpuid_entry2 {
                function: entry.leaf,
                index: entry.subleaf.unwrap_or(0),
                flags: match entry.subleaf {
                    Some(_) => KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                    None => 0,
                },
                eax: entry.result.eax,
                ebx: entry.result.ebx,
                ecx: entry.result.ecx,
                edx: entry.result.edx,
                ..Default::default()
            })
            .collect();
        let table = CpuId::from_entries(&entries).map_err(|_| CreateVcpuError::Unsupported {
            id,
            feature: format!("{} CPUID leaves", entries.len()),
        })?;
        fd.set_cpuid2(&table)
            .map_err(|e| backend("set the CPUID table", e.into()))?;
        enforce_features(&fd, vm.facts.enforces_features)
            .map_err(|e| backend("restrict the paravirtual features", e.into()))?;
        let facts = match vm.irqchip {
            Irqchip::None => *vm.host.vcpu.get_or_init(|| VcpuFacts::ask(&fd)),
            Irqchip::Split => VcpuFacts::ask(&fd),
        };
        let tsc_khz = set_frequency(&fd, id, cpuid, facts.tsc_khz, vm.host.tsc_scaling)?;
        let limits = StateLimits::of(cpuid, vm.irqchip == Irqchip::Split);
        Ok(Self {
            fd,
            page,
            id,
            limits,
            tsc_khz,
            tsc_offset: facts.tsc_offset,
            // After reset (Intel SDM 3A §10.1.1).
            xcr0: Some(1),
            debug: Some(DebugRegisters {
                address: [0; 4],
                dr6: 0xffff_0ff0,
                dr7: 0x400,
            }),
            word: Arc::default(),
            kick: Arc::default(),
            pending: Pending::None,
            queued: None,
            vm,
        })
    }

    fn port_exit(&mut self, access: PortAccess, index: u32) -> Exit {
        self.pending = Pending::Port {
            access,
            index,
            answered: !access.input,
        };
        let PortAccess {
            port, size, input, ..
        } = access;
        if input {
            Exit::PortIn { port, size }
        } else {
            Exit::PortOut {
                port,
                size,
                data: self.page.port_data(&access, index),
            }
        }
    }

    /// What the contract calls `raw`; `None` if there is nothing to tell.
    fn translate(&mut self, raw: RawExit) -> Result<Option<Exit>, RunError> {
        Ok(Some(match raw {
            RawExit::Port(access) => self.port_exit(access, 0),
            RawExit::MmioRead { gpa, size } => {
                self.pending = Pending::Read { answered: false };
                Exit::MmioRead {
                    gpa: Gpa(gpa),
                    size,
                }
            }
            RawExit::MmioWrite { gpa, size, data } => {
                self.pending = Pending::Finish;
                Exit::MmioWrite {
                    gpa: Gpa(gpa),
                    size,
                    data,
                }
            }
            RawExit::Halt => Exit::Halt,
            RawExit::IrqWindow => {
                self.page.request_interrupt_window(false);
                Exit::InterruptWindow
            }
            RawExit::IoapicEoi { vector } => Exit::IoapicEoi { vector },
            RawExit::Shutdown => Exit::Shutdown,
            RawExit::Debug => Exit::Debug,
            RawExit::Interrupted | RawExit::SetTpr => return Ok(None),
            RawExit::InternalError {
                suberror,
                bytes,
                len,
            } => {
                let bytes = bytes.get(..usize::from(len)).unwrap_or_default();
                return Err(self.stuck(internal_reason(suberror, bytes)));
            }
            RawExit::FailEntry { reason } => {
                return Err(self.stuck(format!(
                    "the processor refused to enter the guest ({reason:#x})"
                )));
            }
            RawExit::Other(reason) => {
                return Err(self.stuck(format!(
                    "the kernel gave exit reason {reason}, which Skerry doesn't know"
                )));
            }
        }))
    }

    fn stuck(&self, reason: String) -> RunError {
        let rip = self.fd.get_regs().map(|regs| regs.rip).unwrap_or(0);
        RunError::Internal {
            id: self.id,
            rip,
            reason,
        }
    }

    /// The next element of a string access, or that the answer is missing.
    fn next_element(&mut self) -> Result<Option<Exit>, RunError> {
        match self.pending {
            Pending::Port {
                answered: false, ..
            }
            | Pending::Read { answered: false } => Err(RunError::ReadNotCompleted { id: self.id }),
            Pending::Port { access, index, .. } if index + 1 < access.count => {
                Ok(Some(self.port_exit(access, index + 1)))
            }
            _ => Ok(None),
        }
    }

    /// Lets the kernel finish an instruction that exited, so that the state is one between two
    /// instructions. `Ok(false)` if the instruction has more accesses to make.
    pub(crate) fn finish_instruction(&mut self) -> Result<bool, RunError> {
        match self.pending {
            Pending::None => return Ok(self.queued.is_none()),
            Pending::Port {
                answered: false, ..
            }
            | Pending::Read { answered: false } => {
                return Ok(false);
            }
            Pending::Port { access, index, .. } if index + 1 < access.count => return Ok(false),
            _ => {}
        }
        self.page.immediate_exit().store(1, Ordering::SeqCst);
        // A step over the instruction leaves its mark.
        self.debug = None;
        let raw = enter(&mut self.fd, &self.page, self.id);
        self.page.immediate_exit().store(0, Ordering::SeqCst);
        self.pending = Pending::None;
        match raw? {
            RawExit::Interrupted => Ok(true),
            raw => {
                self.queued = Some(raw);
                Ok(false)
            }
        }
    }

    /// Gets rid of an access that is under way, whatever it would have done.
    pub(crate) fn abandon_instruction(&mut self) -> Result<(), RunError> {
        // Page-crossing AVX accesses make the most exits: a handful.
        for _ in 0..64 {
            if self.pending == Pending::None && self.queued.is_none() {
                return Ok(());
            }
            match self.queued.take() {
                Some(RawExit::Port(access)) => {
                    self.pending = Pending::Port {
                        access,
                        index: access.count,
                        answered: true,
                    };
                }
                Some(RawExit::MmioRead { .. } | RawExit::MmioWrite { .. }) => {
                    self.pending = Pending::Finish;
                }
                Some(_) => self.pending = Pending::None,
                None => {}
            }
            if let Pending::Port { access, .. } = self.pending {
                self.pending = Pending::Port {
                    access,
                    index: access.count,
                    answered: true,
                };
            } else if self.pending != Pending::None {
                self.pending = Pending::Finish;
            }
            self.finish_instruction()?;
        }
        Err(self.stuck("an instruction never ends".into()))
    }
}

fn internal_reason(suberror: u32, bytes: &[u8]) -> String {
    match suberror {
        KVM_INTERNAL_ERROR_EMULATION if bytes.is_empty() => {
            "KVM can't emulate the instruction there".into()
        }
        KVM_INTERNAL_ERROR_EMULATION => {
            format!("KVM can't emulate the instruction there (bytes {bytes:02x?})")
        }
        KVM_INTERNAL_ERROR_SIMUL_EX => "KVM met an exception while it delivered another".into(),
        KVM_INTERNAL_ERROR_DELIVERY_EV => "KVM could not deliver an event".into(),
        other => format!("KVM gave internal error {other}"),
    }
}

/// Enters the guest once; `Interrupted` for a signal or `immediate_exit`.
fn enter(fd: &mut VcpuFd, page: &RunPage, id: u32) -> Result<RawExit, RunError> {
    match fd.run() {
        Ok(_) => Ok(page.exit()),
        Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => Ok(RawExit::Interrupted),
        Err(e) => Err(RunError::Backend {
            id,
            source: Box::new(e),
        }),
    }
}

impl Vcpu for KvmVcpu {
    fn id(&self) -> u32 {
        self.id
    }

    fn canceller(&self) -> Canceller {
        Canceller::new(self.word.clone(), self.kick.clone())
    }

    fn begin_call(&mut self) -> CallId {
        self.word.begin()
    }

    fn end_call(&mut self) {
        self.word.end();
    }

    fn run(&mut self) -> Result<Exit, RunError> {
        loop {
            self.page.immediate_exit().store(0, Ordering::SeqCst);
            if self.word.is_cancelled() {
                return Ok(Exit::Cancelled);
            }
            if let Some(exit) = self.next_element()? {
                return Ok(exit);
            }
            let raw = match self.queued.take() {
                Some(raw) => raw,
                None => {
                    let running = self.kick.enter(self.page.immediate_exit());
                    // A kick from here on finds this thread; one from before shows in the word.
                    if self.word.is_cancelled() {
                        return Ok(Exit::Cancelled);
                    }
                    if self.word.take_kick() {
                        return Ok(Exit::Interrupted);
                    }
                    self.pending = Pending::None;
                    self.debug = None;
                    let raw = enter(&mut self.fd, &self.page, self.id);
                    drop(running);
                    raw?
                }
            };
            if raw == RawExit::Interrupted {
                if self.word.is_cancelled() {
                    return Ok(Exit::Cancelled);
                }
                self.word.take_kick();
                return Ok(Exit::Interrupted);
            }
            if let Some(exit) = self.translate(raw)? {
                return Ok(exit);
            }
        }
    }

    fn set_budget(&mut self, _: Option<u64>) -> Result<(), BudgetError> {
        Err(BudgetError::Unsupported("KVM"))
    }

    fn instructions(&self) -> Option<u64> {
        None
    }

    fn complete_read(&mut self, value: u64) {
        match &mut self.pending {
            Pending::Port {
                access,
                index,
                answered,
            } if access.input => {
                self.page.set_port_data(access, *index, value);
                *answered = true;
            }
            Pending::Read { answered } => {
                self.page.set_mmio_data(value);
                *answered = true;
            }
            _ => {}
        }
    }

    fn request_interrupt_window(&mut self, wanted: bool) {
        self.page.request_interrupt_window(wanted);
    }

    fn ready_for_extint(&self) -> bool {
        self.page.ready_for_interrupt()
    }

    fn inject_extint(&mut self, vector: u8) -> Result<(), InterruptError> {
        sys::interrupt(&self.fd, vector).map_err(|source| InterruptError::Backend(source.into()))
    }

    fn set_boot_registers(&mut self, registers: &BootRegisters) -> Result<(), StateError> {
        self.write_boot_registers(registers)
    }

    fn boot_registers(&self) -> Result<BootRegisters, StateError> {
        self.read_boot_registers()
    }

    fn state(&mut self) -> Result<CpuState, StateError> {
        self.read_state()
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        self.write_state(state)
    }

    fn set_user_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        self.write_user_state(state)
    }
}
