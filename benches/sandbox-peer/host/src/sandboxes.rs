//! The operations themselves. What is made ready for a sample, and what is torn down after it, lies
//! outside its time.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hyperlight_host::func::Registerable;
use hyperlight_host::hypervisor::InterruptHandle;
use hyperlight_host::{HostFunctions, HyperlightError, Sandbox, SandboxBuilder};

/// Samples thrown away at the start of each row.
const WARM_UP: u32 = 5;

/// The pages that a guest dirties before each restore.
const DIRTIED: u32 = 16;

/// How long after its announcement a guest is killed: long enough for it to be back from the host call
/// that announces it, which costs an emulated guest 9 ms in all.
const SPIN: Duration = Duration::from_millis(10);

/// How often a sample is tried whose guest was not running yet, on a host that is busy elsewhere.
const TRIES: u32 = 10;

/// Makes sandboxes of one guest.
pub struct Peer {
    guest: Vec<u8>,
}

impl Peer {
    /// A peer that runs this ELF image.
    pub fn new(guest: Vec<u8>) -> Self {
        Self { guest }
    }

    /// A builder with the host functions of the guest; `started` is told when `Spin` runs.
    fn builder(&self, started: Sender<()>) -> Result<SandboxBuilder> {
        Ok(SandboxBuilder::from_bytes(self.guest.clone()).host_functions(host_functions(started)?))
    }

    fn sandbox(&self) -> Result<Sandbox> {
        Ok(self.builder(channel().0)?.build()?)
    }

    /// Times the making of a sandbox from the ELF image.
    pub fn create_elf(&self, samples: u32) -> Result<Vec<Duration>> {
        sample(samples, || {
            let builder = self.builder(channel().0)?;
            let begun = Instant::now();
            let mut sandbox = builder.build()?;
            let time = begun.elapsed();
            check_add(&mut sandbox, "Add", 1)?;
            Ok(time)
        })
    }

    /// Times the making of a sandbox from a snapshot in memory.
    pub fn create_snapshot(&self, samples: u32) -> Result<Vec<Duration>> {
        let snapshot = self.sandbox()?.snapshot()?;
        sample(samples, || {
            let functions = host_functions(channel().0)?;
            let begun = Instant::now();
            let mut sandbox = Sandbox::from_snapshot(Arc::clone(&snapshot), functions, None)?;
            let time = begun.elapsed();
            check_add(&mut sandbox, "Add", 1)?;
            Ok(time)
        })
    }

    /// Times the call of a function that adds two integers.
    pub fn call(&self, function: &str, samples: u32) -> Result<Vec<Duration>> {
        let mut sandbox = self.sandbox()?;
        let mut number = 0;
        sample(samples, || {
            number += 1;
            check_add(&mut sandbox, function, number)
        })
    }

    /// Times the restore of a sandbox with `heap` bytes of heap that has dirtied 16 pages.
    pub fn restore(&self, heap: u64, samples: u32) -> Result<Vec<Duration>> {
        let mut sandbox = self
            .builder(channel().0)?
            .heap_size(heap)
            .scratch_size(scratch_for(heap)?)
            .build()?;
        let snapshot = sandbox.snapshot()?;
        sample(samples, || {
            let dirty: u32 = sandbox.call("Dirty", DIRTIED)?;
            ensure!(dirty == DIRTIED, "The guest dirtied {dirty} pages");
            let begun = Instant::now();
            sandbox.restore(Arc::clone(&snapshot))?;
            let time = begun.elapsed();
            let dirty: u32 = sandbox.call("Dirty", 0_u32)?;
            ensure!(dirty == 0, "{dirty} pages are dirty after a restore");
            Ok(time)
        })
    }

    /// Times the end of a call that spins, from the moment it is killed.
    pub fn kill(&self, samples: u32) -> Result<Vec<Duration>> {
        let (started, mut spinning) = channel();
        let mut sandbox = self.builder(started)?.build()?;
        let snapshot = sandbox.snapshot()?;
        sample(samples, || {
            for _ in 0..TRIES {
                let time = kill_spinning(&mut sandbox, &mut spinning)?;
                sandbox.restore(Arc::clone(&snapshot))?;
                if let Some(time) = time {
                    return Ok(time);
                }
            }
            bail!("{TRIES} times the guest was not running when it was killed")
        })
    }
}

/// Has the guest spin and kills it. None where the kill came while it was not running, as the call
/// then ends when the guest would go on, not by the kill.
fn kill_spinning(sandbox: &mut Sandbox, spinning: &mut Receiver<()>) -> Result<Option<Duration>> {
    let handle = sandbox.interrupt_handle();
    let (result, ended, killed) = thread::scope(|scope| {
        let killer = scope.spawn(move || kill_when_started(spinning, handle.as_ref()));
        let result = sandbox.call::<i32>("Spin", ());
        (result, Instant::now(), killer.join())
    });
    let Ok(killed) = killed else {
        bail!("The thread that kills has panicked");
    };
    match result {
        Err(HyperlightError::ExecutionCanceledByHost()) => {}
        Err(error) => return Err(error).context("The guest was not killed"),
        Ok(_) => bail!("The guest stopped spinning by itself"),
    }
    Ok(killed?.map(|begun| ended.duration_since(begun)))
}

/// The functions that the guest may call. The default ones are kept, as its library may want them.
fn host_functions(started: Sender<()>) -> Result<HostFunctions> {
    let mut functions = HostFunctions::default();
    functions.register_host_function("HostAdd", |a: i32, b: i32| Ok(a.wrapping_add(b)))?;
    functions.register_host_function("Started", move || {
        // Where nobody waits for it, there is nobody to tell.
        let _ = started.send(());
        Ok(())
    })?;
    Ok(functions)
}

/// Calls a function that adds, and says how long it took. The numbers differ from call to call.
fn check_add(sandbox: &mut Sandbox, function: &str, number: i32) -> Result<Duration> {
    let begun = Instant::now();
    let sum: i32 = sandbox.call(function, (number, 41_i32))?;
    let time = begun.elapsed();
    ensure!(sum == number + 41, "{function} of {number} and 41 is {sum}");
    Ok(time)
}

/// Kills the guest once it spins. Says when it began to, or None where the guest was not running. (A
/// receiver is not for two threads, so this one has it to itself.)
fn kill_when_started(
    spinning: &mut Receiver<()>,
    handle: &dyn InterruptHandle,
) -> Result<Option<Instant>> {
    spinning
        .recv_timeout(Duration::from_secs(10))
        .context("The guest does not spin")?;
    thread::sleep(SPIN);
    let begun = Instant::now();
    Ok(handle.kill().then_some(begun))
}

/// The scratch memory that a heap needs: the default, with room for the heap's page tables (8 bytes a
/// page), of which Hyperlight keeps a copy there. No more than that, as a restore costs with its size.
fn scratch_for(heap: u64) -> Result<usize> {
    const DEFAULT: u64 = 0x6_4000;
    let tables = (heap / 4096 * 8).next_multiple_of(4096);
    usize::try_from(DEFAULT + tables).context("The heap is too large")
}

/// Takes `samples` times after the warm-up.
fn sample(samples: u32, mut once: impl FnMut() -> Result<Duration>) -> Result<Vec<Duration>> {
    for _ in 0..WARM_UP {
        once()?;
    }
    (0..samples).map(|_| once()).collect()
}
