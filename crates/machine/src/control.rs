//! What the threads of one machine agree on: who runs, who is parked, and how it ended.
//!
//! ```text
//!  handle ── pause, resume, kill ──┐                     ┌─► vCPU threads: next()
//!  devices ── MachineEvents ───────┼─► State + attention ┤
//!  vCPU threads ── end() ──────────┘   (cancels calls)   └─► supervisor: next_task()
//! ```
//! The vCPU exit path takes no lock here: it learns of a change because its call is cancelled.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use parking_lot::{Condvar, Mutex, MutexGuard};
use skerry_boot::Entry;
use skerry_devices::events::{MachineEvent, MachineEvents, ResetSource};
use skerry_hypervisor::state::CpuState;
use skerry_hypervisor::{Canceller, StateError, cancel_all};

use crate::outcome::{CrashReason, Outcome};
use crate::quota::{self, Quota};

/// Something that a parked vCPU thread does on behalf of another thread.
pub(crate) enum Command {
    /// Read the whole state.
    Save,
    /// Set the whole state.
    Restore(Box<CpuState>),
    /// Go back to the state after reset; then, on processor 0, to the kernel's entry.
    Reset(Option<Entry>),
    /// Describe the registers for a person.
    Describe,
}

/// What a [`Command`] gives back.
pub(crate) enum Reply {
    /// For `Save`.
    State(Box<CpuState>),
    /// For `Describe`.
    Text(String),
    /// For the others.
    Done,
}

/// What a vCPU thread does next.
pub(crate) enum Next {
    /// Run guest code.
    Run,
    /// Execute a command and give its reply.
    Command(Command),
    /// End the thread.
    Stop,
}

/// What the supervisor does next.
pub(crate) enum Task {
    /// The guest asked for a reset.
    Reset(ResetSource),
    /// The run is over.
    End(Outcome),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Run,
    Park,
    Stop,
}

#[derive(Default)]
struct Slot {
    command: Option<Command>,
    reply: Option<Result<Reply, StateError>>,
    /// The thread waits for its next task and touches nothing.
    parked: bool,
    /// The thread has ended.
    gone: bool,
}

struct State {
    wanted: Wanted,
    /// A user's pause outlasts a reset.
    paused: bool,
    reset: Option<ResetSource>,
    /// The supervisor carries out a reset.
    resetting: bool,
    ending: Option<Outcome>,
    outcome: Option<Outcome>,
    slots: Vec<Slot>,
    /// How much time the processors may take.
    quota: Option<Quota>,
}

/// Has the calling thread, which is processor `index`, pay for what it has taken; until when it has to wait.
fn charge(quota: &mut Option<Quota>, index: usize) -> Option<Instant> {
    let quota = quota.as_mut()?;
    quota.charge(index, quota::taken_by_thread(), Instant::now())
}

/// See the module's description.
pub(crate) struct Control {
    attention: AtomicBool,
    cancellers: OnceLock<Vec<Canceller>>,
    no_reboot: bool,
    state: Mutex<State>,
    changed: Condvar,
}

impl Control {
    /// A machine of `cpus` processors, parked.
    pub(crate) fn new(cpus: usize, no_reboot: bool) -> Self {
        Self {
            attention: AtomicBool::new(true),
            cancellers: OnceLock::new(),
            no_reboot,
            state: Mutex::new(State {
                wanted: Wanted::Park,
                paused: false,
                reset: None,
                resetting: false,
                ending: None,
                outcome: None,
                slots: (0..cpus).map(|_| Slot::default()).collect(),
                quota: None,
            }),
            changed: Condvar::new(),
        }
    }

    /// Gives the processors' cancellers; called once, before the threads start.
    pub(crate) fn connect(&self, cancellers: Vec<Canceller>) {
        let _ = self.cancellers.set(cancellers);
    }

    /// Whether a thread that is about to run guest code must ask [`Control::next`] again. Asked
    /// after [`skerry_hypervisor::Vcpu::begin_call`]: from then on a change cancels the call.
    pub(crate) fn wants_attention(&self) -> bool {
        self.attention.load(Ordering::SeqCst)
    }

    /// Wakes all who wait and gets all processors out of the guest.
    fn announce(&self, state: MutexGuard<'_, State>) {
        let busy = state.wanted != Wanted::Run || state.slots.iter().any(|s| s.command.is_some());
        self.attention.store(busy, Ordering::SeqCst);
        drop(state);
        self.changed.notify_all();
        if busy && let Some(cancellers) = self.cancellers.get() {
            // Those without an active call will see `attention` before they run.
            let _ = cancel_all(cancellers);
        }
    }

    /// Waits until the thread of processor `index` has something to do.
    pub(crate) fn next(&self, index: usize) -> Next {
        let mut state = self.state.lock();
        loop {
            let wanted = state.wanted;
            let slot = &mut state.slots[index];
            slot.parked = false;
            if let Some(command) = slot.command.take() {
                return Next::Command(command);
            }
            match wanted {
                Wanted::Stop => return Next::Stop,
                Wanted::Run => match charge(&mut state.quota, index) {
                    None => return Next::Run,
                    // Not parked: whoever wants that wakes it.
                    Some(until) => drop(self.changed.wait_until(&mut state, until)),
                },
                Wanted::Park => {
                    slot.parked = true;
                    self.changed.notify_all();
                    self.changed.wait(&mut state);
                }
            }
        }
    }

    /// Gives the result of a command.
    pub(crate) fn reply(&self, index: usize, reply: Result<Reply, StateError>) {
        self.state.lock().slots[index].reply = Some(reply);
        self.changed.notify_all();
    }

    /// A thread is gone: it counts as parked and answers no command.
    pub(crate) fn thread_ended(&self, index: usize) {
        let mut state = self.state.lock();
        let slot = &mut state.slots[index];
        slot.parked = true;
        slot.gone = true;
        drop(state);
        self.changed.notify_all();
    }

    /// Ends the run; the first reason counts.
    pub(crate) fn end(&self, outcome: Outcome) {
        let mut state = self.state.lock();
        if state.ending.is_none() {
            state.ending = Some(outcome);
            state.wanted = Wanted::Park;
        }
        self.announce(state);
    }

    fn ask_reset(&self, source: ResetSource) {
        if self.no_reboot {
            return self.end(Outcome::Reset);
        }
        let mut state = self.state.lock();
        if state.ending.is_none() {
            state.reset = Some(source);
            state.wanted = Wanted::Park;
        }
        self.announce(state);
    }

    /// For the supervisor: waits for a reset or the end, which comes at `deadline` at the latest.
    pub(crate) fn next_task(&self, deadline: Option<Instant>) -> Task {
        let mut state = self.state.lock();
        loop {
            if let Some(outcome) = state.ending.clone() {
                return Task::End(outcome);
            }
            if let Some(source) = state.reset.take() {
                state.resetting = true;
                return Task::Reset(source);
            }
            let look = state.quota.is_some().then(|| Instant::now() + quota::LOOK);
            let until = match (deadline, look) {
                (Some(at), Some(look)) => Some(at.min(look)),
                (at, look) => at.or(look),
            };
            let Some(until) = until else {
                self.changed.wait(&mut state);
                continue;
            };
            if !self.changed.wait_until(&mut state, until).timed_out() || state.ending.is_some() {
                continue;
            }
            if deadline.is_some_and(|at| at <= Instant::now()) {
                state.ending = Some(Outcome::TimedOut);
                state.wanted = Wanted::Park;
                self.announce(state);
                return Task::End(Outcome::TimedOut);
            }
            // Processors that run come by here, where they are charged.
            MutexGuard::unlocked(&mut state, || {
                self.cancellers.get().map(|all| cancel_all(all));
            });
        }
    }

    /// Limits the time that all processors take together: so much in each period.
    pub(crate) fn limit(&self, quota: Option<Quota>) {
        let mut state = self.state.lock();
        state.quota = quota;
        // The supervisor looks after it from now on.
        self.announce(state);
    }

    /// Waits until every vCPU thread is parked (or gone).
    pub(crate) fn wait_parked(&self) {
        let mut state = self.state.lock();
        while !state.slots.iter().all(|slot| slot.parked) {
            self.changed.wait(&mut state);
        }
    }

    /// Has a parked thread execute a command. `None`: the thread is gone.
    pub(crate) fn command(
        &self,
        index: usize,
        command: Command,
    ) -> Option<Result<Reply, StateError>> {
        let mut state = self.state.lock();
        let slot = state.slots.get_mut(index)?;
        slot.command = Some(command);
        slot.reply = None;
        self.changed.notify_all();
        loop {
            let slot = &mut state.slots[index];
            if let Some(reply) = slot.reply.take() {
                return Some(reply);
            }
            if slot.gone {
                return None;
            }
            self.changed.wait(&mut state);
        }
    }

    /// Lets the threads run, unless a user has paused them or the run is over.
    pub(crate) fn run(&self) {
        let mut state = self.state.lock();
        state.resetting = false;
        if state.ending.is_none() && !state.paused {
            state.wanted = Wanted::Run;
        }
        self.announce(state);
    }

    /// Parks the threads until [`Control::unpause`]. `false`: the run is over.
    pub(crate) fn pause(&self) -> bool {
        let mut state = self.state.lock();
        if state.ending.is_some() {
            return false;
        }
        state.paused = true;
        state.wanted = Wanted::Park;
        self.announce(state);
        self.wait_parked();
        // A reset that is under way writes memory.
        let mut state = self.state.lock();
        while state.ending.is_none() && (state.reset.is_some() || state.resetting) {
            self.changed.wait(&mut state);
        }
        state.ending.is_none()
    }

    /// Whether [`Control::pause`] has parked the threads; waits for one that has just executed a
    /// command.
    pub(crate) fn is_paused(&self) -> bool {
        let paused = self.state.lock().paused;
        if paused {
            self.wait_parked();
        }
        paused
    }

    /// Takes a pause back; a reset that waits is carried out first.
    pub(crate) fn unpause(&self) {
        let mut state = self.state.lock();
        state.paused = false;
        if state.ending.is_none() && state.reset.is_none() && !state.resetting {
            state.wanted = Wanted::Run;
        }
        self.announce(state);
    }

    /// Ends the vCPU threads.
    pub(crate) fn stop_threads(&self) {
        let mut state = self.state.lock();
        state.wanted = Wanted::Stop;
        self.announce(state);
    }

    /// Makes the outcome known to those who wait for it.
    pub(crate) fn publish(&self, outcome: Outcome) {
        self.state.lock().outcome = Some(outcome);
        self.changed.notify_all();
    }

    /// Waits for the outcome.
    pub(crate) fn outcome(&self) -> Outcome {
        let mut state = self.state.lock();
        loop {
            if let Some(outcome) = &state.outcome {
                return outcome.clone();
            }
            self.changed.wait(&mut state);
        }
    }

    /// Whether the run is over or about to be.
    pub(crate) fn is_ending(&self) -> bool {
        self.state.lock().ending.is_some()
    }

    /// The outcome, if the run is over.
    pub(crate) fn outcome_now(&self) -> Option<Outcome> {
        self.state.lock().outcome.clone()
    }
}

impl MachineEvents for Control {
    fn notify(&self, event: MachineEvent) {
        match event {
            MachineEvent::Reset(source) => self.ask_reset(source),
            MachineEvent::PowerOff => self.end(Outcome::PoweredOff),
            MachineEvent::DebugExit(status) => self.end(Outcome::DebugExit(status)),
            MachineEvent::GuestPanicked => self.end(Outcome::GuestCrash {
                reason: CrashReason::Panic,
                registers: String::new(),
            }),
            MachineEvent::GuestCrashLoaded => tracing::warn!("guest runs its crash kernel"),
            MachineEvent::GuestShutdown => tracing::debug!("guest announced its shutdown"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::Duration;

    #[test]
    fn the_first_end_counts_and_parks() {
        let control = Control::new(0, true);
        control.run();
        assert!(!control.wants_attention());
        control.notify(MachineEvent::DebugExit(3));
        control.notify(MachineEvent::PowerOff);
        assert!(control.wants_attention());
        assert!(matches!(
            control.next_task(None),
            Task::End(Outcome::DebugExit(3))
        ));
        control.run();
        assert!(control.wants_attention());
    }

    #[test]
    fn a_reset_ends_the_run_only_without_reboot() {
        let event = MachineEvent::Reset(ResetSource::ResetControl);
        let control = Control::new(0, true);
        control.notify(event);
        assert!(matches!(control.next_task(None), Task::End(Outcome::Reset)));
        let control = Control::new(0, false);
        control.notify(event);
        assert!(matches!(
            control.next_task(None),
            Task::Reset(ResetSource::ResetControl)
        ));
    }

    #[test]
    fn the_deadline_ends_the_run() {
        let control = Control::new(0, true);
        let deadline = Instant::now() + Duration::from_millis(5);
        assert!(matches!(
            control.next_task(Some(deadline)),
            Task::End(Outcome::TimedOut)
        ));
    }

    #[test]
    fn parked_threads_execute_commands() {
        let control = Arc::new(Control::new(1, true));
        let thread = std::thread::spawn({
            let control = control.clone();
            move || {
                let mut commands = 0;
                loop {
                    match control.next(0) {
                        Next::Stop => return commands,
                        Next::Run => std::thread::yield_now(),
                        Next::Command(_) => {
                            commands += 1;
                            control.reply(0, Ok(Reply::Done));
                        }
                    }
                }
            }
        });
        control.wait_parked();
        assert!(matches!(
            control.command(0, Command::Save),
            Some(Ok(Reply::Done))
        ));
        control.run();
        assert!(control.pause());
        assert!(matches!(
            control.command(0, Command::Describe),
            Some(Ok(Reply::Done))
        ));
        control.unpause();
        control.stop_threads();
        assert_eq!(thread.join().unwrap(), 2);
    }
}
