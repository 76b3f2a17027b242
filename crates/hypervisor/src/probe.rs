//! Finding out whether a backend truly runs guests: a guest of a few instructions is run, its
//! speed measured, and SSE tried.
//!
//! Some machines offer a `/dev/kvm` that opens and then interprets every guest instruction in the
//! host's kernel: a thousandth of the speed, and no SSE. Asking for capabilities does not tell.

use std::error::Error;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::ser::{Serialize, SerializeStruct, Serializer};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use crate::cancel::Canceller;
use crate::cpuid::CpuidTable;
use crate::error::{CreateVcpuError, CreateVmError, MapError, RunError, StateError, Unusable};
use crate::exit::Exit;
use crate::memory::{Gpa, GuestRam, MemorySlot};
use crate::state::BootRegisters;
use crate::traits::{Capabilities, Hypervisor, Irqchip, Vcpu, Vm, VmSpec};

/// Slower than this a guest is of no use: the software processor does many times as much, and
/// emulation in a host's kernel a tenth.
pub const MIN_MIPS: f64 = 20.0;

/// The longest that a device which may be broken is waited for. Measuring takes a tenth of it,
/// even where every instruction is emulated; the rest is for a busy host.
pub const DEVICE_TIME_LIMIT: Duration = Duration::from_millis(400);
/// A measurement at least this long is exact enough: what is to be told apart differs by a factor of a
/// hundred, and every machine waits for it.
const LONG_ENOUGH: Duration = Duration::from_micros(300);
/// Rounds of the first look, and how often it is taken.
const FIRST_ROUNDS: u64 = 40;
const FIRST_LOOKS: u32 = 4;
/// What is slower than this at the first look is slow: a processor takes less than a microsecond
/// for it, so that each of the looks would have to be held up by forty.
const SURELY_SLOW_MIPS: f64 = MIN_MIPS / 4.0;

/// What [`measure_guest`] found.
#[derive(Clone, Debug, PartialEq)]
pub struct GuestSpeed {
    /// Guest instructions a second, in millions.
    pub mips: f64,
    /// Why SSE instructions don't run, if they don't; not tried where speed says enough.
    pub sse: Option<String>,
}

/// The probe's guest could not be run.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// No VM.
    #[error("Can't make a virtual machine")]
    Vm(#[from] CreateVmError),
    /// No memory.
    #[error("Can't make its memory")]
    Memory(#[from] vm_memory::mmap::FromRangesError),
    /// Memory could not be filled.
    #[error("Can't write its memory")]
    Write(#[from] GuestMemoryError),
    /// Memory not mapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// No processor.
    #[error(transparent)]
    Vcpu(#[from] CreateVcpuError),
    /// Registers refused.
    #[error(transparent)]
    State(#[from] StateError),
    /// The guest stopped.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The guest hangs, or is slower than can be measured.
    #[error("The probe's guest did not finish {instructions} instructions in {limit:?}")]
    TooSlow {
        /// Instructions of the step that did not end.
        instructions: u64,
        /// The time that it had.
        limit: Duration,
    },
    /// The guest did what it was not told.
    #[error("The probe's guest left with {0:?}")]
    Unexpected(Exit),
}

/// An error with its causes, on one line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

const CODE_AT: u64 = 0x8000;
const STACK_AT: u64 = 0x7000;
const RAM: usize = 0x1_0000;
const PORT: u16 = 0x10;
const INSTRUCTIONS_PER_ROUND: u64 = 5;
/// Sum of the squares of 1 to 16.
const SSE_ANSWER: u32 = 1496;

/// Asks the host for a number of rounds and turns so often, until that is 0; then computes in SSE2.
#[rustfmt::skip]
const CODE: &[u8] = &[
    0x66, 0xba, PORT as u8, 0,  // start: mov dx, PORT
    0xed,                       //        in eax, dx
    0x85, 0xc0,                 //        test eax, eax
    0x74, 0x13,                 //        jz sse
    0x89, 0xc1,                 //        mov ecx, eax
    0x48, 0x01, 0xcb,           // round: add rbx, rcx
    0x48, 0x31, 0xde,           //        xor rsi, rbx
    0x48, 0x8d, 0x3c, 0x1e,     //        lea rdi, [rsi + rbx]
    0xff, 0xc9,                 //        dec ecx
    0x75, 0xf2,                 //        jnz round
    0xef,                       //        out dx, eax
    0xeb, 0xe4,                 //        jmp start
    0xb9, 16, 0, 0, 0,          // sse:   mov ecx, 16
    0x0f, 0x57, 0xc9,           //        xorps xmm1, xmm1
    0xf2, 0x0f, 0x2a, 0xc1,     // sum:   cvtsi2sd xmm0, ecx
    0xf2, 0x0f, 0x59, 0xc0,     //        mulsd xmm0, xmm0
    0xf2, 0x0f, 0x58, 0xc8,     //        addsd xmm1, xmm0
    0xff, 0xc9,                 //        dec ecx
    0x75, 0xf0,                 //        jnz sum
    0xf2, 0x0f, 0x2c, 0xc1,     //        cvttsd2si eax, xmm1
    0x66, 0x0f, 0xfe, 0xc9,     //        paddd xmm1, xmm1
    0xef,                       //        out dx, eax
    0xf4,                       //        hlt
];

/// Cancels a call when its time is up.
struct Watchdog {
    done: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Watchdog {
    fn start(canceller: Canceller, limit: Duration) -> Self {
        let done = Arc::new((Mutex::new(false), Condvar::new()));
        let shared = done.clone();
        let call = canceller.current();
        let thread = std::thread::spawn(move || {
            let (done, wake) = &*shared;
            let done = done.lock().unwrap_or_else(PoisonError::into_inner);
            let waited = wake
                .wait_timeout_while(done, limit, |done| !*done)
                .unwrap_or_else(PoisonError::into_inner);
            if let (true, Some(call)) = (waited.1.timed_out(), call) {
                let _ = canceller.cancel(call);
            }
        });
        Self {
            done,
            thread: Some(thread),
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        *self.done.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.done.1.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn guest_memory() -> Result<GuestRam, ProbeError> {
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM)])?;
    // One 2 MiB page at 0: PML4 at 0x1000, PDPT at 0x2000, page directory at 0x3000.
    for (at, entry) in [(0x1000, 0x2003_u64), (0x2000, 0x3003), (0x3000, 0x83)] {
        ram.write_obj(entry, GuestAddress(at))?;
    }
    ram.write_slice(CODE, GuestAddress(CODE_AT))?;
    Ok(ram)
}

/// Runs the probe's guest; never takes much longer than `limit`.
pub fn measure_guest<H: Hypervisor>(
    hypervisor: &H,
    cpuid: &CpuidTable,
    limit: Duration,
) -> Result<GuestSpeed, ProbeError> {
    let vm = hypervisor.create_vm(&VmSpec {
        irqchip: Irqchip::None,
        max_vcpus: 1,
    })?;
    let ram = guest_memory()?;
    for region in ram.iter() {
        vm.map(MemorySlot {
            gpa: Gpa(region.start_addr().0),
            region: region.get_mmap(),
            offset: 0,
            len: RAM,
            read_only: false,
            log_dirty: false,
        })?;
    }
    let mut vcpu = vm.create_vcpu(0, cpuid)?;
    let mut registers = BootRegisters::long_mode(0x1000, CODE_AT, STACK_AT);
    const CR0_MP: u64 = 2;
    const CR4_OSFXSR_OSXMMEXCPT: u64 = 3 << 9;
    registers.system.cr0 |= CR0_MP;
    registers.system.cr4 |= CR4_OSFXSR_OSXMMEXCPT;
    vcpu.set_boot_registers(&registers)?;
    vcpu.begin_call();
    let _watchdog = Watchdog::start(vcpu.canceller(), limit);
    let result = speed(&mut vcpu, limit);
    // Taking a VM down can take a kernel longer than all the rest, and nobody needs to wait for it.
    // Where no thread can be had the VM goes here.
    let gone = move || drop((vcpu, vm, ram));
    let _ = std::thread::Builder::new()
        .name("probe-end".into())
        .spawn(gone);
    result
}

fn speed(vcpu: &mut impl Vcpu, limit: Duration) -> Result<GuestSpeed, ProbeError> {
    let first = first_look(vcpu, limit)?;
    if first < SURELY_SLOW_MIPS {
        return Ok(GuestSpeed {
            mips: first,
            sse: None,
        });
    }
    let mips = integer_speed(vcpu, limit)?;
    let sse = sse_failure(vcpu)?;
    Ok(GuestSpeed { mips, sse })
}

fn next_exit(vcpu: &mut impl Vcpu) -> Result<Exit, RunError> {
    loop {
        match vcpu.run()? {
            Exit::Interrupted => {}
            exit => return Ok(exit),
        }
    }
}

/// Runs so many rounds; `None` if time was up.
fn timed_rounds(vcpu: &mut impl Vcpu, rounds: u64) -> Result<Option<Duration>, ProbeError> {
    match next_exit(vcpu)? {
        Exit::PortIn { port: PORT, .. } => vcpu.complete_read(rounds),
        Exit::Cancelled => return Ok(None),
        other => return Err(ProbeError::Unexpected(other)),
    }
    let start = Instant::now();
    match next_exit(vcpu)? {
        Exit::PortOut { port: PORT, .. } => Ok(Some(start.elapsed())),
        Exit::Cancelled => Ok(None),
        other => Err(ProbeError::Unexpected(other)),
    }
}

fn mips(rounds: u64, took: Duration) -> f64 {
    (rounds * INSTRUCTIONS_PER_ROUND) as f64 / 1e6 / took.as_secs_f64().max(1e-9)
}

/// The speed at which a few instructions run, so that what emulates them is told at once: the time of
/// many rounds without that of one, which is that of leaving the guest. The shortest of each counts,
/// because anything may hold up one alone.
fn first_look(vcpu: &mut impl Vcpu, limit: Duration) -> Result<f64, ProbeError> {
    let (mut one, mut many) = (Duration::MAX, Duration::MAX);
    for _ in 0..FIRST_LOOKS {
        for (rounds, shortest) in [(1, &mut one), (FIRST_ROUNDS, &mut many)] {
            let took = timed_rounds(vcpu, rounds)?.ok_or(ProbeError::TooSlow {
                instructions: rounds * INSTRUCTIONS_PER_ROUND,
                limit,
            })?;
            *shortest = took.min(*shortest);
        }
    }
    Ok(mips(FIRST_ROUNDS - 1, many.saturating_sub(one)))
}

/// The best of a few measurements: on a busy host, or while a translating host warms up, one alone
/// may be far too low.
fn integer_speed(vcpu: &mut impl Vcpu, limit: Duration) -> Result<f64, ProbeError> {
    let mut rounds = 200_u64;
    let (mut best, mut long_ones) = (0.0_f64, 0);
    loop {
        let Some(took) = timed_rounds(vcpu, rounds)? else {
            if best > 0.0 {
                return Ok(best);
            }
            return Err(ProbeError::TooSlow {
                instructions: rounds * INSTRUCTIONS_PER_ROUND,
                limit,
            });
        };
        best = best.max(mips(rounds, took));
        if took < LONG_ENOUGH && rounds < 1 << 27 {
            rounds *= 4;
            continue;
        }
        long_ones += 1;
        if long_ones == 5 || (long_ones >= 2 && best >= MIN_MIPS) {
            return Ok(best);
        }
    }
}

fn sse_failure(vcpu: &mut impl Vcpu) -> Result<Option<String>, ProbeError> {
    match next_exit(vcpu)? {
        Exit::PortIn { port: PORT, .. } => vcpu.complete_read(0),
        other => return Err(ProbeError::Unexpected(other)),
    }
    Ok(match next_exit(vcpu) {
        Ok(Exit::PortOut {
            data: SSE_ANSWER, ..
        }) => None,
        Ok(Exit::PortOut { data, .. }) => Some(format!("SSE2 computed {data}, not {SSE_ANSWER}")),
        Ok(Exit::Cancelled) => Some("SSE2 did not come to an end".into()),
        Ok(other) => Some(format!("SSE2 ended in {other:?}")),
        Err(error) => Some(chain(&error)),
    })
}

/// Whether what was measured makes the device unusable, in words.
pub fn judge(device: &str, mips: f64, sse: Option<&str>) -> Option<Unusable> {
    let reason = if mips < MIN_MIPS {
        format!(
            "{device} opens, but emulates guests an instruction at a time: {mips:.1} million \
             instructions/s"
        )
    } else {
        format!("{device} opens, but its guests can't run SSE: {}", sse?)
    };
    Some(Unusable {
        reason,
        remedy: "Use a machine whose processor's virtualisation extensions reach its KVM (bare \
                 metal, or nested virtualisation enabled), or run with --hypervisor soft"
            .into(),
        measured_mips: Some(mips),
    })
}

/// What a backend's probe said, for `skerry doctor`.
#[derive(Clone, Debug, PartialEq)]
pub struct ProbeReport {
    /// Its name, as `--hypervisor` takes it.
    pub backend: &'static str,
    /// What it can do, or why it can't be used.
    pub result: Result<Capabilities, Unusable>,
}

impl ProbeReport {
    /// Probes a backend.
    pub fn of<H: Hypervisor>(backend: &'static str) -> Self {
        Self {
            backend,
            result: H::probe(),
        }
    }
}

impl Serialize for ProbeReport {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { backend, result } = self;
        let mut out = serializer.serialize_struct("ProbeReport", 9)?;
        let (capabilities, unusable) = (result.as_ref().ok(), result.as_ref().err());
        out.serialize_field("backend", backend)?;
        out.serialize_field("usable", &result.is_ok())?;
        out.serialize_field(
            "mips",
            &match result {
                Ok(capabilities) => capabilities.measured_mips,
                Err(unusable) => unusable.measured_mips,
            },
        )?;
        out.serialize_field("description", &capabilities.map(|c| &c.description))?;
        out.serialize_field("max_vcpus", &capabilities.map(|c| c.max_vcpus))?;
        out.serialize_field("tsc_khz", &capabilities.map(|c| c.tsc_khz))?;
        out.serialize_field(
            "physical_address_bits",
            &capabilities.map(|c| c.physical_address_bits),
        )?;
        out.serialize_field("reason", &unusable.map(|u| &u.reason))?;
        out.serialize_field("remedy", &unusable.map(|u| &u.remedy))?;
        out.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verdict_names_what_is_wrong() {
        assert_eq!(judge("/dev/x", 900.0, None), None);
        let slow = judge("/dev/x", 1.6, None).unwrap();
        assert!(slow.reason.ends_with("1.6 million instructions/s"));
        assert_eq!(slow.measured_mips, Some(1.6));
        assert!(
            judge("/dev/x", 900.0, Some("boom"))
                .unwrap()
                .reason
                .contains("boom")
        );
    }

    #[test]
    fn jumps_of_the_guest_land_where_they_should() {
        let sse = CODE.iter().position(|byte| *byte == 0xb9).unwrap();
        assert_eq!(9 + usize::from(CODE[8]), sse);
        assert_eq!(sse as i64 + i64::from(CODE[sse - 1] as i8), 0);
    }
}
