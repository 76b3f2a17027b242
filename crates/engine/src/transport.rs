//! The agent's protocol over the machine's socket device.

use std::io::{self, Read, Write};
use std::net::Shutdown;

use skerry_devices::virtio::vsock::VsockStream;
use skerry_protocol::Transport;

/// A connection between the host and a program in the guest.
#[derive(Debug)]
pub struct GuestStream(pub(crate) VsockStream);

impl Read for GuestStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for GuestStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Transport for GuestStream {
    fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        self.0.shutdown(how)
    }
}
