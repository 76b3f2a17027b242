//! A debugger's session.

use std::{fmt, io};

use gdbstub::common::Signal;
use gdbstub::conn::Connection as _;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub, SingleThreadStopReason};

use super::DebugError;
use super::context::Context;
use super::listener::{DebugListener, Gone, Input, Output, connect};
use super::points::Points;
use crate::sandbox::{Sandbox, Status};

pub(super) type Machine = GdbStubStateMachine<'static, Sandbox, Output>;
pub(super) type Stop = SingleThreadStopReason<u64>;

/// How the guest goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Resume {
    Continue,
    /// For one instruction.
    Step,
    /// Until it leaves these addresses.
    Range(u64, u64),
}

/// What a debugger wants when it has seen a stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// To go on, with the signal that ends the guest if there is one.
    Go(Option<Signal>),
    /// Not to be there any more.
    Leave,
    /// To end the call.
    Kill,
}

/// What a sandbox keeps of its debugger.
pub(crate) struct Debugging {
    /// Until one connects.
    listener: Option<DebugListener>,
    pub(super) input: Option<Input>,
    /// `None` while it is fed.
    machine: Option<Machine>,
    pub(super) points: Points,
    /// While the guest is stopped.
    pub(super) context: Option<Context>,
    pub(super) resume: Resume,
    pub(super) signal: Option<Signal>,
    /// Stop before the next instruction, for this.
    pub(super) due: Option<Stop>,
    /// Nothing may be changed, and the guest doesn't run.
    pub(super) read_only: bool,
    /// Why the guest stopped, in words: `monitor why`.
    pub(super) why: String,
}

impl fmt::Debug for Debugging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Debugging")
            .field("listener", &self.listener)
            .field("input", &self.input)
            .field("points", &self.points)
            .field("resume", &self.resume)
            .finish_non_exhaustive()
    }
}

impl Debugging {
    pub(crate) fn new(listener: DebugListener) -> Box<Self> {
        Box::new(Self {
            listener: Some(listener),
            input: None,
            machine: None,
            points: Points::default(),
            context: None,
            resume: Resume::Continue,
            signal: None,
            due: None,
            read_only: false,
            why: String::new(),
        })
    }
}

impl Drop for Debugging {
    fn drop(&mut self) {
        if let Some(GdbStubStateMachine::Running(machine)) = &mut self.machine {
            // gdb waits for the guest to stop, and it will not: "the process exited".
            let connection = machine.borrow_conn();
            let _ = connection.write_all(b"$W00#b7");
            let _ = connection.flush();
        }
    }
}

impl Sandbox {
    /// Waits for a debugger at the next call, which stops before its first instruction. The debugger
    /// stays for all calls until it leaves. Calls that begin with it have no limits of time or instructions.
    pub fn debug(&mut self, listener: DebugListener) {
        self.debug = Some(Debugging::new(listener));
    }

    /// Whether a debugger is there, or waited for.
    pub fn is_debugged(&self) -> bool {
        self.debug.is_some()
    }

    /// Lets a debugger look at a sandbox as a failed call has left it. Waits for it, and returns when it
    /// leaves. Nothing can be changed, and the guest doesn't run.
    pub fn debug_post_mortem(&mut self, listener: DebugListener) -> Result<(), DebugError> {
        if let Status::Unrecoverable(why) = &self.status {
            return Err(DebugError::Unrecoverable(why.clone()));
        }
        let context = self.context();
        let context = context.map_err(|error| DebugError::State(Box::new(error)))?;
        let signal = self.crash(&context).unwrap_or(Signal::SIGTRAP);
        let mut debugging = Debugging::new(listener);
        if let Status::Poisoned(why) = &self.status {
            debugging.why.clone_from(why);
        }
        debugging.read_only = true;
        debugging.context = Some(context);
        let before = self.debug.replace(debugging);
        let connected = self.connect();
        if connected.is_ok()
            && let Wish::Go(_) = self.serve(Stop::Signal(signal))
        {
            // There is nothing to go on with.
            self.serve(Stop::Terminated(signal));
        }
        self.debug = before;
        connected.map_err(DebugError::Connection)
    }

    /// Waits for a debugger, unless one is there.
    pub(super) fn connect(&mut self) -> io::Result<()> {
        let Some(debugging) = self.debug.as_deref_mut() else {
            return Ok(());
        };
        let Some(listener) = debugging.listener.take() else {
            return Ok(());
        };
        let (input, output) = connect(listener.accept()?)?;
        debugging.input = Some(input);
        debugging.due = Some(Stop::DoneStep);
        let machine = GdbStub::new(output).run_state_machine(self);
        let machine = machine.map_err(|error| io::Error::other(error.to_string()))?;
        if let Some(debugging) = self.debug.as_deref_mut() {
            debugging.machine = Some(machine);
        }
        Ok(())
    }

    /// Tells the debugger why the guest stands, and does what it says until the guest is to go on.
    pub(super) fn serve(&mut self, stop: Stop) -> Wish {
        let Some(debugging) = self.debug.as_deref_mut() else {
            return Wish::Leave;
        };
        let Some(mut machine) = debugging.machine.take() else {
            return Wish::Leave;
        };
        debugging.signal = None;
        if let Some(input) = &debugging.input {
            input.set_running(None);
        }
        if let GdbStubStateMachine::Running(running) = machine {
            machine = match running.report_stop(self, stop) {
                Ok(machine) => machine,
                Err(error) => return lost(error),
            };
        }
        while let GdbStubStateMachine::Idle(_) = machine {
            let input = self.debug.as_deref().and_then(|d| d.input.as_ref());
            let Some(Ok(bytes)) = input.map(Input::receive) else {
                return Wish::Leave;
            };
            machine = match self.feed(machine, &bytes) {
                Ok((machine, _)) => machine,
                Err(wish) => return wish,
            };
        }
        let wish = match &machine {
            GdbStubStateMachine::Disconnected(end) => wish(end.get_reason()),
            _ => Wish::Go(self.debug.as_deref().and_then(|d| d.signal)),
        };
        if let Some(debugging) = self.debug.as_deref_mut() {
            debugging.machine = Some(machine);
        }
        wish
    }

    /// What the debugger has sent while the guest ran: whether it is to stop.
    pub(super) fn attend(&mut self) -> Result<bool, Wish> {
        let mut interrupted = false;
        loop {
            let Some(debugging) = self.debug.as_deref_mut() else {
                return Err(Wish::Leave);
            };
            let polled = debugging.input.as_ref().map(Input::poll);
            let bytes = match polled {
                Some(Ok(Some(bytes))) => bytes,
                Some(Ok(None)) => return Ok(interrupted),
                Some(Err(Gone)) | None => return Err(Wish::Leave),
            };
            let Some(machine) = debugging.machine.take() else {
                return Err(Wish::Leave);
            };
            // It may be about breakpoints.
            self.lift();
            let (machine, stop) = self.feed(machine, &bytes)?;
            interrupted |= stop;
            if let GdbStubStateMachine::Disconnected(end) = &machine {
                return Err(wish(end.get_reason()));
            }
            if let Some(debugging) = self.debug.as_deref_mut() {
                debugging.machine = Some(machine);
            }
        }
    }

    /// Passes bytes to the stub; whether there was a Ctrl-C among them.
    fn feed(&mut self, mut machine: Machine, bytes: &[u8]) -> Result<(Machine, bool), Wish> {
        let mut interrupted = false;
        for byte in bytes {
            let fed = match machine {
                GdbStubStateMachine::Idle(machine) => machine.incoming_data(self, *byte),
                GdbStubStateMachine::Running(machine) => machine.incoming_data(self, *byte),
                other => Ok(other),
            };
            machine = fed.map_err(lost)?;
            if let GdbStubStateMachine::CtrlCInterrupt(machine_) = machine {
                interrupted = true;
                // The stop is told when the guest has stopped; one that stands has been told.
                let handled = machine_.interrupt_handled(self, None::<Stop>);
                machine = handled.map_err(lost)?;
            }
        }
        Ok((machine, interrupted))
    }
}

fn wish(reason: DisconnectReason) -> Wish {
    match reason {
        DisconnectReason::Kill => Wish::Kill,
        _ => Wish::Leave,
    }
}

/// What can't be understood ends the session, as a lost connection does.
fn lost(error: impl fmt::Display) -> Wish {
    tracing::warn!("The debugger's session ended: {error}");
    Wish::Leave
}
