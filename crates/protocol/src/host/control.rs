//! The control connection.

use crate::frame::{self, FrameDecoder};
use crate::message::{Card, ControlRequest, FromAgent, Hello, Mount, Setup, ShutdownMode, ToAgent};
use crate::transport::Transport;
use crate::{ADDRESS_VERSION, CARD_VERSION, MOUNT_VERSION, PROCESSES_VERSION, SNAPSHOT_VERSION};

use super::HostError;

/// Control connection of one guest, from the agent's hello to the guest's end.
#[derive(Debug)]
pub struct Control<T> {
    stream: T,
    decoder: FrameDecoder,
    hello: Hello,
    version: u16,
}

impl<T: Transport> Control<T> {
    /// Reads the agent's hello from a connection that the guest opened to
    /// [`crate::CONTROL_PORT`].
    ///
    /// Blocks until the agent speaks: give the transport a time-out where a guest may never get
    /// that far.
    pub fn accept(mut stream: T) -> Result<Self, HostError> {
        let mut decoder = FrameDecoder::new();
        let FromAgent::Hello(hello) = frame::decode(decoder.read_frame(&mut stream)?)? else {
            return Err(HostError::Protocol("its first message was not a hello"));
        };
        let Some(version) = hello.common_version() else {
            // The agent may be gone already; the error to report is the version.
            let _ = frame::write(&mut stream, &ToAgent::Refused);
            return Err(HostError::Version {
                agent: hello.agent,
                oldest: hello.oldest,
                newest: hello.newest,
            });
        };
        Ok(Self {
            stream,
            decoder,
            hello,
            version,
        })
    }

    /// What the agent said of itself.
    #[must_use]
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// The protocol version that both sides speak.
    #[must_use]
    pub fn version(&self) -> u16 {
        self.version
    }

    /// Whether the agent knows [`super::ExecSession::start_kept`] and
    /// [`super::ExecSession::attach`]; an older one ends a connection that asks for them.
    pub fn require_kept_sessions(&self) -> Result<(), HostError> {
        self.require(SNAPSHOT_VERSION, "keep commands without a host")
    }

    /// Has the guest set up; returns when the agent accepts execs.
    pub fn set_up(&mut self, setup: &Setup) -> Result<(), HostError> {
        let setup = Setup {
            version: self.version,
            ..setup.clone()
        };
        frame::write(&mut self.stream, &ToAgent::Setup(setup))?;
        match self.receive()? {
            FromAgent::Ready(Ok(())) => Ok(()),
            FromAgent::Ready(Err(reason)) => Err(HostError::Agent {
                asked: "set up the guest",
                reason,
            }),
            _ => Err(HostError::Protocol("set-up was not answered with ready")),
        }
    }

    /// Asks for a sign of life.
    pub fn ping(&mut self) -> Result<(), HostError> {
        self.request(ControlRequest::Ping, "answer")
    }

    /// Sets the guest's wall clock: nanoseconds since 1970.
    pub fn set_clock(&mut self, nanoseconds: u64) -> Result<(), HostError> {
        self.request(ControlRequest::SetClock(nanoseconds), "set the clock")
    }

    /// Gives the guest's kernel new entropy and has it reseed.
    pub fn reseed(&mut self, entropy: &[u8]) -> Result<(), HostError> {
        self.request(
            ControlRequest::Reseed(entropy.to_vec()),
            "reseed the random generator",
        )
    }

    /// Stops every process of the guest, writes its file systems back and ends it. Returns when
    /// that has begun; the machine reports the end itself.
    pub fn shut_down(&mut self, mode: ShutdownMode) -> Result<(), HostError> {
        self.request(ControlRequest::Shutdown(mode), "shut down")
    }

    /// Stops all of the user's processes where they are. They go on with [`Self::thaw`], or in a
    /// restored copy of this guest when [`Self::set_up`] has made it one of its own.
    pub fn freeze(&mut self) -> Result<(), HostError> {
        self.newer_request(ControlRequest::Freeze, "stop the guest's processes")
    }

    /// Lets the user's processes go on.
    pub fn thaw(&mut self) -> Result<(), HostError> {
        self.newer_request(ControlRequest::Thaw, "let the guest's processes go on")
    }

    /// Has everything written back to the disks.
    pub fn sync(&mut self) -> Result<(), HostError> {
        self.newer_request(ControlRequest::Sync, "write its disks back")
    }

    /// Has the guest give up what a snapshot need not hold: clean caches, freed blocks.
    pub fn compact(&mut self) -> Result<(), HostError> {
        self.newer_request(ControlRequest::Compact, "give up caches and free blocks")
    }

    /// Gives the network card addresses besides its own.
    pub fn set_addresses(&mut self, addresses: Vec<String>) -> Result<(), HostError> {
        const ASKED: &str = "take part in shared networks";
        self.require(ADDRESS_VERSION, ASKED)?;
        self.request(ControlRequest::Addresses(addresses), ASKED)
    }

    /// Has the network card take its place on a network of the host's.
    pub fn set_card(&mut self, card: Card) -> Result<(), HostError> {
        const ASKED: &str = "take part in a network of the host's";
        self.require(CARD_VERSION, ASKED)?;
        self.request(ControlRequest::Card(card), ASKED)
    }

    /// Has file systems mounted, besides the root.
    pub fn mount(&mut self, mounts: Vec<Mount>) -> Result<(), HostError> {
        const ASKED: &str = "mount folders and volumes";
        self.require(MOUNT_VERSION, ASKED)?;
        self.request(ControlRequest::Mount(mounts), ASKED)
    }

    /// Has the volumes written back to their disks.
    pub fn sync_volumes(&mut self) -> Result<(), HostError> {
        const ASKED: &str = "write its volumes back";
        self.require(MOUNT_VERSION, ASKED)?;
        self.request(ControlRequest::SyncVolumes, ASKED)
    }

    /// Limits the number of processes and threads of all that execs start.
    pub fn limit_processes(&mut self, most: Option<u32>) -> Result<(), HostError> {
        const ASKED: &str = "limit the number of its processes";
        self.require(PROCESSES_VERSION, ASKED)?;
        self.request(ControlRequest::LimitProcesses(most), ASKED)
    }

    /// A second handle of the stream, to shut it down from another thread.
    pub fn stream(&self) -> std::io::Result<T> {
        self.stream.try_clone()
    }

    fn require(&self, needs: u16, asked: &'static str) -> Result<(), HostError> {
        if self.version >= needs {
            return Ok(());
        }
        Err(HostError::TooOld {
            agent: self.hello.agent.clone(),
            asked,
            speaks: self.version,
            needs,
        })
    }

    fn newer_request(
        &mut self,
        request: ControlRequest,
        asked: &'static str,
    ) -> Result<(), HostError> {
        self.require(SNAPSHOT_VERSION, asked)?;
        self.request(request, asked)
    }

    fn request(&mut self, request: ControlRequest, asked: &'static str) -> Result<(), HostError> {
        frame::write(&mut self.stream, &ToAgent::Request(request))?;
        match self.receive()? {
            FromAgent::Reply(Ok(())) => Ok(()),
            FromAgent::Reply(Err(reason)) => Err(HostError::Agent { asked, reason }),
            _ => Err(HostError::Protocol(
                "a request was not answered with a reply",
            )),
        }
    }

    fn receive(&mut self) -> Result<FromAgent, HostError> {
        let payload = self.decoder.read_frame(&mut self.stream)?;
        Ok(frame::decode(payload)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn an_older_agent_is_told_from_one_that_fails() {
        let (host, mut guest) = UnixStream::pair().unwrap();
        let hello = Hello {
            magic: Hello::MAGIC,
            oldest: 1,
            newest: 1,
            agent: "0.0.9".to_owned(),
            kernel: String::new(),
        };
        frame::write(&mut guest, &FromAgent::Hello(hello)).unwrap();
        let mut control = Control::accept(host).unwrap();
        assert_eq!(control.version(), 1);
        let error = control.freeze().unwrap_err();
        assert!(matches!(error, HostError::TooOld { needs: 2, .. }));
        assert!(error.to_string().contains("0.0.9"), "{error}");
        assert!(control.require_kept_sessions().is_err());
        // Nothing of it went to the agent, and what it does know still works.
        frame::write(&mut guest, &FromAgent::Reply(Ok(()))).unwrap();
        control.ping().unwrap();
        drop(control);
        let mut sent = Vec::new();
        guest.read_to_end(&mut sent).unwrap();
        assert_eq!(sent, [2, 0, 0, 0, 2, 0]);
    }

    #[test]
    fn a_failed_freeze_says_why() {
        let (host, mut guest) = UnixStream::pair().unwrap();
        let hello = Hello {
            magic: Hello::MAGIC,
            oldest: 1,
            newest: 2,
            agent: String::new(),
            kernel: String::new(),
        };
        frame::write(&mut guest, &FromAgent::Hello(hello)).unwrap();
        frame::write(&mut guest, &FromAgent::Reply(Err("it is late".to_owned()))).unwrap();
        let mut control = Control::accept(host).unwrap();
        let error = control.freeze().unwrap_err();
        assert!(matches!(error, HostError::Agent { .. }));
        assert!(error.to_string().contains("it is late"), "{error}");
    }
}
