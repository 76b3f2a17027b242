//! The loop of a call: into the guest, and what to do with each exit.

use skerry_hypervisor::Exit;
use skerry_sandbox_abi::{Control, Encode, PORT, PORT_EXCEPTION, Reader, Writer, leave, status};

use crate::error::CallError;
use crate::fault::{Frame, in_stub};
use crate::interrupt::Reason;
use crate::sandbox::Sandbox;

/// What an exit of the guest's leads to.
pub(crate) enum Next {
    /// Back into the guest.
    Resume,
    /// The request is answered.
    Answered,
}

fn misbehaved(what: impl Into<String>) -> CallError {
    CallError::Misbehaved(what.into())
}

impl Sandbox {
    /// Runs the guest until it has answered the request that is in the control page, or has failed.
    pub(crate) fn enter(&mut self) -> Result<(), CallError> {
        if self.debug.is_some() {
            return self.enter_debugged();
        }
        if self.limits.instructions.is_some() {
            self.processor.set_budget(self.limits.instructions)?;
        }
        let call = self.processor.begin_call();
        if let Some(timer) = &self.timer {
            self.shared.take_reason();
            timer.set(call, self.limits.timeout, self.limits.cpu_time);
        }
        let ended = self.exits();
        self.processor.end_call();
        if let Some(timer) = &self.timer {
            timer.clear();
        }
        self.entered(ended)
    }

    /// What follows every request, however it has ended.
    pub(crate) fn entered(&mut self, ended: Result<(), CallError>) -> Result<(), CallError> {
        if self.control.log_len() != 0 {
            self.show_log();
        }
        match &ended {
            Ok(()) => self.spans.leave_all(),
            Err(error) => {
                self.spans.close_all();
                self.dump_crash(error);
            }
        }
        ended
    }

    pub(crate) fn exits(&mut self) -> Result<(), CallError> {
        loop {
            let exit = self.processor.run()?;
            if let Next::Answered = self.exit(exit)? {
                return Ok(());
            }
        }
    }

    /// What an exit leads to.
    #[inline(always)]
    pub(crate) fn exit(&mut self, exit: Exit) -> Result<Next, CallError> {
        const GUEST: u16 = PORT as u16;
        const STUB: u16 = PORT_EXCEPTION as u16;
        match exit {
            Exit::PortOut {
                port: GUEST,
                size: 4,
                data,
            } => self.left(data),
            Exit::PortOut { port: STUB, .. } => Err(self.excepted()?),
            Exit::Interrupted => Ok(Next::Resume),
            Exit::BudgetSpent => {
                let budget = self.limits.instructions.unwrap_or_default();
                Err(CallError::BudgetSpent(budget))
            }
            Exit::Cancelled => Err(self.cancelled()),
            Exit::PortIn { port, .. } => {
                // Completed, so that the processor stands between two instructions.
                self.processor.complete_read(0);
                Err(misbehaved(format!("it read port {port:#x}")))
            }
            Exit::PortOut { port, .. } => Err(misbehaved(format!("it wrote port {port:#x}"))),
            Exit::MmioRead { gpa, .. } => {
                self.processor.complete_read(0);
                Err(misbehaved(format!(
                    "it read memory that isn't there, {gpa}"
                )))
            }
            Exit::Shutdown => Err(misbehaved("its processor shut down")),
            other => Err(misbehaved(format!("it left with {other:?}"))),
        }
    }

    /// The guest has left by its own wish.
    fn left(&mut self, reason: u32) -> Result<Next, CallError> {
        match reason {
            // The one that knows no version has chosen none: see `introduce`.
            leave::RETURN | leave::NO_VERSION => Ok(Next::Answered),
            leave::HOST_CALL => {
                self.metrics.host_calls += 1;
                // So that what the function logs comes after it, and lies in the guest's spans.
                if self.control.log_len() != 0 {
                    self.show_log();
                }
                self.host_call()?;
                Ok(Next::Resume)
            }
            leave::FLUSH_LOG => {
                self.show_log();
                Ok(Next::Resume)
            }
            leave::ABORT => Err(self.aborted()),
            other => Err(misbehaved(format!(
                "it left for the unknown reason {other}"
            ))),
        }
    }

    fn cancelled(&mut self) -> CallError {
        match self.shared.take_reason() {
            Reason::Killed => CallError::Cancelled,
            Reason::TimedOut => CallError::TimedOut(self.limits.timeout.unwrap_or_default()),
            Reason::CpuTime => CallError::CpuTime(self.limits.cpu_time.unwrap_or_default()),
        }
    }

    /// The guest's last words.
    fn aborted(&mut self) -> CallError {
        /// More is not for people.
        const MAX: u64 = 4096;
        let len = u64::from(self.control.output_len()).min(MAX);
        let text = self
            .region
            .bytes(self.layout.output.at, len.min(self.layout.output.len));
        let text = String::from_utf8_lossy(text.unwrap_or_default()).into_owned();
        match self.control.status() {
            status::OUT_OF_MEMORY => CallError::OutOfMemory {
                bytes: self.control.detail(),
            },
            _ => CallError::Panicked(text),
        }
    }

    fn excepted(&mut self) -> Result<CallError, CallError> {
        let system = self.processor.registers()?.system;
        // Ring 3 that writes the stubs' port tells of no exception.
        if !in_stub(&system) {
            return Err(misbehaved("it used the exception stubs' port"));
        }
        let frame = Frame::read(&self.region).ok_or_else(|| misbehaved("no exception frame"))?;
        Ok(frame.fault(system.cr2, &self.layout).into())
    }

    /// Shows what is in the log area, and empties it.
    pub(crate) fn show_log(&mut self) {
        let len = u64::from(self.control.log_len()).min(self.layout.log.len);
        if let Some(area) = self.region.bytes(self.layout.log.at, len) {
            let profile = self.aids.profile.as_deref_mut();
            self.metrics.log_damaged += u64::from(self.spans.show(area, profile));
        }
        self.control.set_log_len(0);
    }

    /// Calls a function of the host's for the guest.
    fn host_call(&mut self) -> Result<(), CallError> {
        let (input, output) = (self.layout.input, self.layout.output);
        let args_len = u64::from(self.control.host_args_len());
        let reply_at = u64::from(self.control.reply_at());
        if args_len > output.len || reply_at > input.len || reply_at < self.input_used {
            return Err(misbehaved(
                "a host call's arguments or reply lie outside of their area",
            ));
        }
        // Both are whole areas of the region, and apart.
        let (arguments, reply) = self
            .region
            .two(
                output.at,
                args_len,
                input.at + reply_at,
                input.len - reply_at,
            )
            .ok_or_else(|| misbehaved("a host call's areas"))?;
        let mut from = Reader::new(arguments);
        let mut out = Writer::new(reply);
        let function = self.control.host_function();
        let index = match function {
            Control::BY_NAME => match from_name(&mut from) {
                Some(name) => self.functions.index(name),
                None => return Err(misbehaved("a host call without a name")),
            },
            _ => self.links.get(function as usize).copied().flatten(),
        };
        let ended = index.and_then(|index| self.functions.call(index, &mut from, &mut out));
        let status = match ended {
            None => status::NO_FUNCTION,
            Some(Ok(status)) => status,
            Some(Err(error)) => {
                out.restart();
                error.to_string().encode(&mut out);
                status::TYPE
            }
        };
        let (status, len) = match out.finish() {
            Ok(len) => (status, len as u64),
            Err(wanted) => {
                self.control
                    .set_host_detail(u32::try_from(wanted).unwrap_or(u32::MAX));
                (status::TOO_LARGE, 0)
            }
        };
        self.note_input(reply_at + len);
        self.control.set_reply_len(len as u32);
        self.control.set_host_status(status);
        Ok(())
    }
}

fn from_name<'a>(from: &mut Reader<'a>) -> Option<&'a str> {
    use skerry_sandbox_abi::Decode;
    <&str>::decode(from).ok()
}
