//! What a device asks of the machine.

/// Which device asked for a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetSource {
    /// i8042 command 0xFE pulsed the CPU reset line.
    KeyboardController,
    /// Port 0x92 bit 0, "fast reset".
    SystemControlPortA,
    /// Reset control register 0xCF9.
    ResetControl,
}

/// Something that a device wants the machine to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MachineEvent {
    /// Reset the machine.
    Reset(ResetSource),
    /// The guest entered S5: power off.
    PowerOff,
    /// The guest ended itself through the debug-exit port, with this exit status.
    DebugExit(u32),
    /// The guest's kernel reported that it panicked and stays in that state.
    GuestPanicked,
    /// The guest's kernel panicked and loaded a crash kernel, which runs on.
    GuestCrashLoaded,
    /// The guest's kernel announced an orderly shutdown.
    GuestShutdown,
}

/// Receives the events of all devices of one machine.
///
/// Called on the thread that made the device act, mostly a vCPU thread inside an exit: it should
/// record the event and get the vCPUs to stop, not do the work.
pub trait MachineEvents: Send + Sync {
    /// Takes one event.
    fn notify(&self, event: MachineEvent);
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use parking_lot::Mutex;

    /// Keeps every event for a test to look at.
    #[derive(Debug, Default)]
    pub(crate) struct EventLog(pub(crate) Mutex<Vec<MachineEvent>>);

    impl MachineEvents for EventLog {
        fn notify(&self, event: MachineEvent) {
            self.0.lock().push(event);
        }
    }
}
