//! The loop of a call under a debugger.

use gdbstub::common::Signal;
use skerry_hypervisor::Exit;
use skerry_sandbox_abi::PORT_EXCEPTION;

use super::context::{BREAKPOINT, Context, DEBUG, Exception, RESUME, TRAP, of_error, of_vector};
use super::points::{Hardware, INT3};
use super::session::{Resume, Stop, Wish};
use crate::error::CallError;
use crate::exits::Next;
use crate::fault::in_stub;
use crate::sandbox::Sandbox;

/// DR6: a single step (Intel SDM 3B §18.2.3).
const STEPPED: u64 = 1 << 14;

/// What follows an exit.
enum After {
    /// The guest goes on.
    On,
    /// The request is answered.
    Answered,
}

impl Sandbox {
    /// As [`Sandbox::enter`], with the debugger looking on, whose time does not count.
    pub(crate) fn enter_debugged(&mut self) -> Result<(), CallError> {
        self.connect().map_err(CallError::Debugger)?;
        if self.limits.instructions.is_some() {
            self.processor.set_budget(None)?;
        }
        self.processor.begin_call();
        let ended = self.debugged();
        self.processor.end_call();
        self.entered(ended)
    }

    fn debugged(&mut self) -> Result<(), CallError> {
        // A host function may have panicked in the middle of the last call.
        self.lift();
        let context = self.context()?;
        if let Some(debugging) = self.debug.as_deref_mut() {
            debugging.context = Some(context);
            if debugging.resume != Resume::Continue {
                // The last call has ended before its step did.
                debugging.due = debugging.due.or(Some(Stop::DoneStep));
            }
        }
        let ended = self.debugged_exits();
        if self.debug.is_some() {
            let settled = self.settle();
            self.lift();
            if ended.is_ok() {
                settled?;
            }
        }
        ended
    }

    fn debugged_exits(&mut self) -> Result<(), CallError> {
        while let Some(debugging) = self.debug.as_deref_mut() {
            // A stop that is due while an exception is on its way waits for that.
            if debugging.context.is_some()
                && let Some(stop) = debugging.due.take()
            {
                self.halt(stop, None)?;
                continue;
            }
            // First to be reached, then to look, then to go: nothing that is sent is missed.
            self.listen();
            if self.interrupted()? {
                continue;
            }
            self.arm()?;
            let exit = self.processor.run()?;
            match self.after(exit)? {
                After::On => {}
                After::Answered => return Ok(()),
            }
        }
        // The debugger has left.
        self.exits()
    }

    fn after(&mut self, exit: Exit) -> Result<After, CallError> {
        const STUB: u16 = PORT_EXCEPTION as u16;
        match exit {
            Exit::PortOut { port: STUB, .. } => {
                self.excepted_debugged()?;
                Ok(After::On)
            }
            // The loop looks why.
            Exit::Interrupted => Ok(After::On),
            other => {
                // Host functions may look at the sandbox's memory by other ways, and may panic.
                self.lift();
                match self.exit(other) {
                    Ok(Next::Resume) => Ok(After::On),
                    Ok(Next::Answered) => Ok(After::Answered),
                    Err(error) => Err(self.failing(error)),
                }
            }
        }
    }

    /// A call is about to fail for another reason than an exception: the debugger may look first.
    fn failing(&mut self, error: CallError) -> CallError {
        let context = match self.context() {
            Ok(context) => context,
            Err(_) => return error,
        };
        if let Some(debugging) = self.debug.as_deref_mut() {
            debugging.context = Some(context);
        }
        // It can't be made good again: whatever the debugger says, the call fails.
        match self.halt(Stop::Signal(of_error(&error)), Some(&error)) {
            Ok(_) => error,
            Err(killed) => killed,
        }
    }

    /// Stops for the debugger. The signal with which the guest goes on, if the debugger says so.
    fn halt(&mut self, stop: Stop, why: Option<&CallError>) -> Result<Option<Signal>, CallError> {
        self.lift();
        if let Some(debugging) = self.debug.as_deref_mut() {
            debugging.why = why.map(ToString::to_string).unwrap_or_default();
        }
        match self.serve(stop) {
            Wish::Go(signal) => Ok(signal),
            Wish::Leave => self.leave_debugger().map(|()| None),
            Wish::Kill => {
                self.leave_debugger()?;
                Err(CallError::Cancelled)
            }
        }
    }

    /// Without the debugger from here on, as if it had never been there.
    fn leave_debugger(&mut self) -> Result<(), CallError> {
        self.lift();
        let debugging = self.debug.take();
        match debugging.and_then(|mut debugging| debugging.context.take()) {
            Some(context) => Ok(self.processor.set_state(&context.state)?),
            None => self.settle(),
        }
    }

    /// Looks at what the debugger has sent; whether the guest has stopped for it, or the debugger has left.
    fn interrupted(&mut self) -> Result<bool, CallError> {
        let attended = self.attend();
        if let Ok(false) = attended {
            return Ok(false);
        }
        if self.debug.as_deref().is_some_and(|d| d.context.is_none()) {
            let state = self.processor.state()?;
            if in_stub(&state.system) {
                // An exception is on its way, perhaps the debugger's own: it comes first.
                if let Some(debugging) = self.debug.as_deref_mut() {
                    debugging.due = Some(Stop::Signal(Signal::SIGINT));
                }
                return Ok(false);
            }
            self.take_context()?;
        }
        match attended {
            Ok(_) => {
                self.halt(Stop::Signal(Signal::SIGINT), None)?;
            }
            Err(wish) => {
                self.leave_debugger()?;
                if wish == Wish::Kill {
                    return Err(CallError::Cancelled);
                }
            }
        }
        Ok(true)
    }

    fn take_context(&mut self) -> Result<(), CallError> {
        let context = self.context()?;
        if let Some(debugging) = self.debug.as_deref_mut() {
            debugging.context = Some(context);
        }
        Ok(())
    }

    /// The guest stands in an exception stub.
    fn excepted_debugged(&mut self) -> Result<(), CallError> {
        let mut context = self.context()?;
        let exception = context
            .exception
            .ok_or_else(|| CallError::Misbehaved("it used the exception stubs' port".into()))?;
        let stop = self.reason(&mut context, exception);
        let fault = context.fault.clone();
        if let Some(debugging) = self.debug.as_deref_mut() {
            debugging.context = Some(context);
        }
        let Some(stop) = stop else {
            return Ok(());
        };
        let error = fault.map(CallError::Fault);
        let signal = self.halt(stop, error.as_ref())?;
        // With the signal it is what it would have been without debugger.
        match (error, stop) {
            (Some(error), Stop::Signal(own)) if signal == Some(own) => Err(error),
            _ => Ok(()),
        }
    }

    /// What an exception is to the debugger; `None` if it is a step of many.
    fn reason(&self, context: &mut Context, exception: Exception) -> Option<Stop> {
        let debugging = self.debug.as_deref()?;
        let rip = context.state.general.rip;
        match exception.vector {
            BREAKPOINT if debugging.points.is_software(rip) => {
                context.state.general.rip = rip.wrapping_sub(1);
                Some(Stop::SwBreak(()))
            }
            DEBUG => match debugging.points.met(exception.conditions) {
                Some((_, Hardware::Execute)) => Some(Stop::HwBreak(())),
                Some((addr, Hardware::Data { kind, .. })) => Some(Stop::Watch {
                    tid: (),
                    kind,
                    addr,
                }),
                None if exception.conditions & STEPPED == 0 => {
                    Some(Stop::Signal(of_vector(exception.vector)))
                }
                None => match debugging.resume {
                    Resume::Step => Some(Stop::DoneStep),
                    Resume::Range(start, end) if (start..end).contains(&rip) => None,
                    Resume::Range(..) => Some(Stop::DoneStep),
                    // The guest's own trap flag.
                    Resume::Continue => Some(Stop::Signal(Signal::SIGTRAP)),
                },
            },
            vector => Some(Stop::Signal(of_vector(vector))),
        }
    }

    /// From here on what the debugger sends gets the guest out.
    fn listen(&self) {
        if let Some(input) = self.debug.as_deref().and_then(|d| d.input.as_ref()) {
            input.set_running(Some(self.shared.canceller.clone()));
        }
    }

    /// Puts breakpoints in, and the guest's state back with what stops it.
    fn arm(&mut self) -> Result<(), CallError> {
        self.plant();
        let Some(debugging) = self.debug.as_deref_mut() else {
            return Ok(());
        };
        let Some(mut context) = debugging.context.take() else {
            return Ok(());
        };
        let state = &mut context.state;
        debugging.points.set(&mut state.debug);
        if debugging.resume != Resume::Continue {
            state.general.rflags |= TRAP;
        }
        if debugging.points.breaks_at(state.general.rip) {
            state.general.rflags |= RESUME;
        }
        Ok(self.processor.set_state(state)?)
    }

    /// After a call: no trap flag and no debug register stays behind.
    fn settle(&mut self) -> Result<(), CallError> {
        if let Some(debugging) = self.debug.as_deref_mut() {
            debugging.context = None;
            if debugging.resume == Resume::Continue && !debugging.points.has_hardware() {
                return Ok(());
            }
        }
        let now = self.processor.state()?;
        if in_stub(&now.system) {
            // Poisoned: a restore replaces all of it, and a look at it finds its frame.
            return Ok(());
        }
        let context = self.context()?;
        Ok(self.processor.set_state(&context.state)?)
    }

    /// Puts INT3 where the guest is to stop.
    fn plant(&mut self) {
        let Some(debugging) = self.debug.as_deref_mut() else {
            return;
        };
        let mut software = std::mem::take(&mut debugging.points.software);
        for point in software.iter_mut().filter(|point| point.replaced.is_none()) {
            let mut byte = [0];
            if self.read_guest(point.address, &mut byte) == 1
                && self.write_guest(point.address, &[INT3]).is_some()
            {
                point.replaced = Some(byte[0]);
            }
        }
        if let Some(debugging) = self.debug.as_deref_mut() {
            debugging.points.software = software;
        }
    }

    /// Takes it out again; where the guest has written something else, that stays.
    pub(super) fn lift(&mut self) {
        let Some(debugging) = self.debug.as_deref_mut() else {
            return;
        };
        let mut software = std::mem::take(&mut debugging.points.software);
        for point in &mut software {
            let Some(byte) = point.replaced.take() else {
                continue;
            };
            let mut now = [0];
            if self.read_guest(point.address, &mut now) == 1 && now[0] == INT3 {
                self.write_guest(point.address, &[byte]);
            }
        }
        if let Some(debugging) = self.debug.as_deref_mut() {
            debugging.points.software = software;
        }
    }
}
