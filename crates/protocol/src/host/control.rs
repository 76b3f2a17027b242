//! The control connection.

use crate::frame::{self, FrameDecoder};
use crate::message::{ControlRequest, FromAgent, Hello, Setup, ShutdownMode, ToAgent};
use crate::transport::Transport;

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

    /// A second handle of the stream, to shut it down from another thread.
    pub fn stream(&self) -> std::io::Result<T> {
        self.stream.try_clone()
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
