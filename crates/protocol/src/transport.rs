//! What a connection must be able to do to carry frames.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};

/// A byte stream in both directions whose halves can be used from two threads.
pub trait Transport: Read + Write + Send + Sized + 'static {
    /// A second handle of the same stream.
    fn try_clone(&self) -> io::Result<Self>;

    /// Ends one direction or both, on every handle of the stream; a blocked read then returns.
    fn shutdown(&self, how: Shutdown) -> io::Result<()>;
}

impl Transport for TcpStream {
    fn try_clone(&self) -> io::Result<Self> {
        TcpStream::try_clone(self)
    }

    fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        TcpStream::shutdown(self, how)
    }
}

#[cfg(unix)]
impl Transport for std::os::unix::net::UnixStream {
    fn try_clone(&self) -> io::Result<Self> {
        std::os::unix::net::UnixStream::try_clone(self)
    }

    fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        std::os::unix::net::UnixStream::shutdown(self, how)
    }
}
