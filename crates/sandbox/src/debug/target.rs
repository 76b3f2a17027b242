//! What gdb asks for, as `gdbstub` passes it on.

use std::convert::Infallible;

use gdbstub::common::Signal;
use gdbstub::target::ext::auxv::{Auxv, AuxvOps};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::singlethread::{
    SingleThreadBase, SingleThreadRangeStepping, SingleThreadRangeSteppingOps, SingleThreadResume,
    SingleThreadResumeOps, SingleThreadSingleStep, SingleThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps,
    SwBreakpoint, SwBreakpointOps, WatchKind,
};
use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd, MonitorCmdOps, outputln};
use gdbstub::target::ext::section_offsets::{Offsets, SectionOffsets, SectionOffsetsOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use gdbstub_arch::x86::X86_64_SSE;
use gdbstub_arch::x86::reg::X86_64CoreRegs;

use super::points::Hardware;
use super::registers;
use super::session::{Debugging, Resume};
use crate::sandbox::Sandbox;

/// `errno`s of gdb's file-I/O protocol, which are Linux's here.
const EIO: TargetError<Infallible> = TargetError::Errno(5);
const EFAULT: TargetError<Infallible> = TargetError::Errno(14);
const EINVAL: TargetError<Infallible> = TargetError::Errno(22);
const EROFS: TargetError<Infallible> = TargetError::Errno(30);

impl Sandbox {
    /// The debugger of a stopped guest.
    fn stopped(&mut self) -> Result<&mut Debugging, TargetError<Infallible>> {
        self.debug.as_deref_mut().ok_or(EIO)
    }

    /// As well, where the guest may be changed.
    fn changeable(&mut self) -> Result<&mut Debugging, TargetError<Infallible>> {
        match self.stopped()? {
            debugging if debugging.read_only => Err(EROFS),
            debugging => Ok(debugging),
        }
    }
}

#[doc(hidden)]
impl Target for Sandbox {
    type Arch = X86_64_SSE;
    type Error = Infallible;

    fn base_ops(&mut self) -> BaseOps<'_, X86_64_SSE, Infallible> {
        BaseOps::SingleThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_section_offsets(&mut self) -> Option<SectionOffsetsOps<'_, Self>> {
        Some(self)
    }

    fn support_auxv(&mut self) -> Option<AuxvOps<'_, Self>> {
        Some(self)
    }

    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }
}

#[doc(hidden)]
impl SingleThreadBase for Sandbox {
    fn read_registers(&mut self, into: &mut X86_64CoreRegs) -> TargetResult<(), Self> {
        let context = self.stopped()?.context.as_ref().ok_or(EIO)?;
        registers::read(&context.state, into);
        Ok(())
    }

    fn write_registers(&mut self, from: &X86_64CoreRegs) -> TargetResult<(), Self> {
        let context = self.changeable()?.context.as_mut().ok_or(EIO)?;
        registers::write(&mut context.state, from).map_err(|registers::Refused| EINVAL)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8]) -> TargetResult<usize, Self> {
        match self.read_guest(start, data) {
            0 if !data.is_empty() => Err(EFAULT),
            len => Ok(len),
        }
    }

    fn write_addrs(&mut self, start: u64, data: &[u8]) -> TargetResult<(), Self> {
        self.changeable()?;
        self.change_guest(start, data).ok_or(EFAULT)
    }

    fn support_resume(&mut self) -> Option<SingleThreadResumeOps<'_, Self>> {
        Some(self)
    }
}

impl Sandbox {
    fn go(&mut self, resume: Resume, signal: Option<Signal>) {
        if let Some(debugging) = self.debug.as_deref_mut() {
            debugging.resume = resume;
            debugging.signal = signal;
        }
    }
}

#[doc(hidden)]
impl SingleThreadResume for Sandbox {
    fn resume(&mut self, signal: Option<Signal>) -> Result<(), Infallible> {
        self.go(Resume::Continue, signal);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<SingleThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_range_step(&mut self) -> Option<SingleThreadRangeSteppingOps<'_, Self>> {
        Some(self)
    }
}

#[doc(hidden)]
impl SingleThreadSingleStep for Sandbox {
    fn step(&mut self, signal: Option<Signal>) -> Result<(), Infallible> {
        self.go(Resume::Step, signal);
        Ok(())
    }
}

#[doc(hidden)]
impl SingleThreadRangeStepping for Sandbox {
    fn resume_range_step(&mut self, start: u64, end: u64) -> Result<(), Infallible> {
        self.go(Resume::Range(start, end), None);
        Ok(())
    }
}

#[doc(hidden)]
impl Breakpoints for Sandbox {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        self.has_debug_registers().then_some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        self.has_debug_registers().then_some(self)
    }
}

#[doc(hidden)]
impl SwBreakpoint for Sandbox {
    fn add_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        self.changeable()?;
        // Where nothing is there is nothing to stop at.
        if self.read_guest(address, &mut [0]) == 0 {
            return Err(EFAULT);
        }
        Ok(self.changeable()?.points.add(address))
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.changeable()?.points.remove(address))
    }
}

#[doc(hidden)]
impl HwBreakpoint for Sandbox {
    fn add_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        let points = &mut self.changeable()?.points;
        Ok(points.add_hardware(address, Hardware::Execute))
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        let points = &mut self.changeable()?.points;
        Ok(points.remove_hardware(address, Hardware::Execute))
    }
}

/// The processor can't tell reads from writes where it stops at both.
fn watched(len: u64, kind: WatchKind) -> Option<Hardware> {
    (kind != WatchKind::Read).then_some(Hardware::Data { len, kind })
}

#[doc(hidden)]
impl HwWatchpoint for Sandbox {
    fn add_hw_watchpoint(
        &mut self,
        address: u64,
        len: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        let points = &mut self.changeable()?.points;
        Ok(watched(len, kind).is_some_and(|what| points.add_hardware(address, what)))
    }

    fn remove_hw_watchpoint(
        &mut self,
        address: u64,
        len: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        let points = &mut self.changeable()?.points;
        Ok(watched(len, kind).is_some_and(|what| points.remove_hardware(address, what)))
    }
}

#[doc(hidden)]
impl SectionOffsets for Sandbox {
    fn get_section_offsets(&mut self) -> Result<Offsets<u64>, Infallible> {
        let moved = self.image().map_or(0, |image| image.moved);
        Ok(Offsets::Sections {
            text: moved,
            data: moved,
            bss: None,
        })
    }
}

#[doc(hidden)]
impl Auxv for Sandbox {
    fn get_auxv(&self, offset: u64, length: usize, buf: &mut [u8]) -> TargetResult<usize, Self> {
        let auxv = self.auxv();
        let rest = usize::try_from(offset).ok().and_then(|at| auxv.get(at..));
        let rest = rest.unwrap_or_default();
        let len = rest.len().min(length).min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }
}

#[doc(hidden)]
impl MonitorCmd for Sandbox {
    fn handle_monitor_cmd(
        &mut self,
        command: &[u8],
        mut out: ConsoleOutput<'_>,
    ) -> Result<(), Infallible> {
        match command {
            b"why" => {
                let why = self.debug.as_deref().map_or("", |d| d.why.as_str());
                let why = if why.is_empty() {
                    "It was stopped"
                } else {
                    why
                };
                outputln!(out, "{why}");
            }
            b"memory" => {
                for range in self.ranges() {
                    let end = range.gva + range.len;
                    let write = if range.write { 'w' } else { '-' };
                    let execute = if range.execute { 'x' } else { '-' };
                    outputln!(out, "{:#014x}-{end:#014x} r{write}{execute}", range.gva);
                }
            }
            _ => {
                outputln!(out, "monitor why     why the guest stopped");
                outputln!(
                    out,
                    "monitor memory  what is mapped, and the guest's rights"
                );
            }
        }
        Ok(())
    }
}
