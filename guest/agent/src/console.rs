//! Connections over a console port.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// placeholder
#[derive(Debug)]
pub struct Console {}
impl Console {
    /// x
    pub fn open_default() -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// x
    pub fn open(_path: &Path) -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// x
    pub fn connect(&self, _port: u32) -> io::Result<UnixStream> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// x
    pub fn accept(&self, _port: u32) -> io::Result<UnixStream> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
