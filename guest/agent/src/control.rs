//! The guest's side of the control connection.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use rustix::system::RebootCommand;
use rustix::time::{ClockId, Timespec};
use skerry_protocol::frame::{self, FrameDecoder, FrameError};
use skerry_protocol::message::{
    Card, ControlRequest, FromAgent, Hello, Setup, ShutdownMode, ToAgent,
};

use crate::cgroup::Cgroup;
use crate::clone_event::{self, CloneEvents};
use crate::{files, log, sys, volumes};

/// A control connection.
#[derive(Debug)]
pub struct Control {
    stream: UnixStream,
    decoder: FrameDecoder,
}

impl Control {
    /// Says hello on a fresh connection.
    pub fn greet(mut stream: UnixStream) -> Result<Self, FrameError> {
        let kernel = rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned();
        let hello = Hello {
            magic: Hello::MAGIC,
            oldest: skerry_protocol::OLDEST_VERSION,
            newest: skerry_protocol::VERSION,
            agent: env!("CARGO_PKG_VERSION").to_owned(),
            kernel,
        };
        frame::write(&mut stream, &FromAgent::Hello(hello))?;
        Ok(Self {
            stream,
            decoder: FrameDecoder::new(),
        })
    }

    /// Waits for the set-up.
    pub fn receive_setup(&mut self) -> io::Result<Setup> {
        match self.receive() {
            Ok(ToAgent::Setup(setup)) => Ok(setup),
            Ok(ToAgent::Refused) => Err(io::Error::other("the host speaks another protocol")),
            Ok(ToAgent::Request(_)) => Err(io::Error::other("the host asked before set-up")),
            Err(error) => Err(io::Error::other(error)),
        }
    }

    /// Reports the set-up done, or failed with these words.
    pub fn ready(&mut self, result: Result<(), String>) -> Result<(), FrameError> {
        frame::write(&mut self.stream, &FromAgent::Ready(result))
    }

    /// Does what the host asks until it hangs up; returns whether it asked for anything.
    pub fn serve(&mut self, guest: &mut Guest) -> bool {
        let mut asked = false;
        loop {
            let result = match self.receive() {
                Ok(ToAgent::Request(request)) => self.obey(request, guest),
                // The host of a restored guest greets an agent that has been set up already.
                Ok(ToAgent::Setup(setup)) => {
                    let result = guest.become_clone(&setup);
                    self.ready(result.map_err(|error| error.to_string()))
                }
                Ok(ToAgent::Refused) => Err(FrameError::Closed),
                Err(error) => Err(error),
            };
            if result.is_err() {
                return asked;
            }
            asked = true;
        }
    }

    fn receive(&mut self) -> Result<ToAgent, FrameError> {
        frame::decode(self.decoder.read_frame(&mut self.stream)?)
    }

    fn obey(&mut self, request: ControlRequest, guest: &mut Guest) -> Result<(), FrameError> {
        let result = match request {
            ControlRequest::Ping => Ok(()),
            ControlRequest::SetClock(nanoseconds) => set_clock(nanoseconds),
            ControlRequest::Reseed(entropy) => sys::add_entropy(&entropy),
            ControlRequest::Shutdown(mode) => {
                frame::write(&mut self.stream, &FromAgent::Reply(Ok(())))?;
                shut_down(mode);
            }
            ControlRequest::Freeze => guest.freeze(),
            ControlRequest::Thaw => guest.thaw(),
            ControlRequest::Sync => {
                rustix::fs::sync();
                Ok(())
            }
            ControlRequest::Compact => guest.compact(),
            ControlRequest::Addresses(addresses) => share_networks(&addresses),
            ControlRequest::Mount(mounts) => {
                volumes::mount_all(&mounts).map(|mounted| guest.volumes = mounted)
            }
            ControlRequest::SyncVolumes => guest.sync_volumes(),
            ControlRequest::Card(card) => take_card(&card),
            ControlRequest::LimitProcesses(most) => guest.limit_processes(most),
        };
        let reply = FromAgent::Reply(result.map_err(|error| error.to_string()));
        frame::write(&mut self.stream, &reply)
    }
}

/// What the host's requests are about, from set-up on.
#[derive(Debug, Default)]
pub struct Guest {
    /// The cgroup of the user's processes, where the kernel has such.
    pub cgroup: Option<Arc<Cgroup>>,
    /// Where programs learn of a clone, if that could be made.
    pub clones: Option<CloneEvents>,
    /// The file system that takes the root's writes, where it is on a disk.
    pub disk: Option<OwnedFd>,
    /// The volumes that can be written.
    pub volumes: Vec<OwnedFd>,
}

impl Guest {
    fn cgroup(&self) -> io::Result<&Cgroup> {
        let none = || io::Error::other("this guest's kernel has no version 2 cgroups");
        self.cgroup.as_deref().ok_or_else(none)
    }

    fn freeze(&self) -> io::Result<()> {
        self.cgroup()?.freeze()
    }

    fn thaw(&self) -> io::Result<()> {
        self.cgroup()?.thaw()
    }

    fn limit_processes(&self, most: Option<u32>) -> io::Result<()> {
        self.cgroup()?.limit_processes(most)
    }

    /// Makes this guest one of its own, after it was restored from a state that others share. The
    /// user's processes, if they were stopped, go on when nothing is left that they could mistake
    /// for another guest's.
    fn become_clone(&mut self, setup: &Setup) -> io::Result<()> {
        refresh(setup);
        // Those that the state has are another guest's.
        crate::network::set_addresses(&[])?;
        files::become_clone(setup);
        if let Some(clones) = &mut self.clones
            && let Err(error) = clones.record()
        {
            log::error(format_args!("{}: {error}", clone_event::PATH));
        }
        match &self.cgroup {
            Some(cgroup) => cgroup.thaw(),
            None => Ok(()),
        }
    }

    /// Writes the volumes back.
    fn sync_volumes(&self) -> io::Result<()> {
        self.volumes
            .iter()
            .try_for_each(|volume| Ok(rustix::fs::syncfs(volume)?))
    }

    /// Gives up what a snapshot need not hold.
    fn compact(&self) -> io::Result<()> {
        rustix::fs::sync();
        std::fs::write("/proc/sys/vm/drop_caches", "3")?;
        match &self.disk {
            Some(disk) => sys::trim(disk.as_fd()),
            None => Ok(()),
        }
    }
}

/// Takes these addresses on networks that machines share.
fn share_networks(addresses: &[String]) -> io::Result<()> {
    crate::network::set_addresses(addresses)?;
    let uname = rustix::system::uname();
    files::set_addresses(&uname.nodename().to_string_lossy(), addresses);
    Ok(())
}

/// Takes a place on a network of the host's.
fn take_card(card: &Card) -> io::Result<()> {
    crate::network::set_card(card)?;
    files::set_nameservers(&card.nameservers);
    let uname = rustix::system::uname();
    files::set_addresses(&uname.nodename().to_string_lossy(), &card.addresses);
    Ok(())
}

/// Takes clock and entropy from a set-up.
pub fn refresh(setup: &Setup) {
    if setup.wall_clock != 0
        && let Err(error) = set_clock(setup.wall_clock)
    {
        log::error(format_args!("clock: {error}"));
    }
    if !setup.entropy.is_empty()
        && let Err(error) = sys::add_entropy(&setup.entropy)
    {
        log::error(format_args!("entropy: {error}"));
    }
}

fn set_clock(nanoseconds: u64) -> io::Result<()> {
    const SECOND: u64 = 1_000_000_000;
    // Both casts are exact: a 64-bit count of nanoseconds has fewer than 2^63 seconds.
    let time = Timespec {
        tv_sec: (nanoseconds / SECOND) as i64,
        tv_nsec: (nanoseconds % SECOND) as i64,
    };
    Ok(rustix::time::clock_settime(ClockId::Realtime, time)?)
}

/// Ends the guest.
pub fn shut_down(mode: ShutdownMode) -> ! {
    sys::signal_everyone(Signal::TERM);
    // For programs that write something down at their end; one that takes longer is killed.
    std::thread::sleep(Duration::from_millis(20));
    sys::signal_everyone(Signal::KILL);
    rustix::fs::sync();
    let command = match mode {
        ShutdownMode::PowerOff => RebootCommand::PowerOff,
        ShutdownMode::Reboot => RebootCommand::Restart,
    };
    if let Err(error) = rustix::system::reboot(command) {
        log::error(format_args!("power-off: {error}"));
    }
    // The kernel panics when PID 1 ends, which ends the machine too.
    std::process::exit(1);
}
