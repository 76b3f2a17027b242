//! Connections to the host: vsock, or streams multiplexed over a console port where there is none.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use skerry_protocol::{CONTROL_PORT, EXEC_PORT};

use crate::console::Console;
use crate::exec::Accept;
use crate::sys;

/// How the guest reaches its host.
#[derive(Debug)]
pub enum Transport {
    /// Virtio sockets.
    Vsock,
    /// A byte stream that carries several connections.
    Console(Console),
}

/// Where exec connections come in.
#[derive(Debug)]
pub enum Listener {
    /// A listening vsock.
    Vsock(OwnedFd),
    /// The console's multiplexer.
    Console(&'static Console),
}

impl Transport {
    /// The transport that the kernel's command line asks for with `skerry.transport=`: `vsock` (the
    /// default), `console` (a virtio port or `/dev/hvc1`), or the path of a device.
    pub fn from_command_line(command_line: &str) -> io::Result<Self> {
        match parameter(command_line, "skerry.transport") {
            None | Some("vsock") => Ok(Self::Vsock),
            Some("console") => Ok(Self::Console(Console::open_default()?)),
            Some(path) if path.starts_with('/') => Ok(Self::Console(Console::open(path.as_ref())?)),
            Some(other) => {
                let text = format!("unknown skerry.transport={other}");
                Err(io::Error::new(io::ErrorKind::InvalidInput, text))
            }
        }
    }

    /// Connects to the host's control port.
    pub fn connect(&self) -> io::Result<UnixStream> {
        match self {
            Self::Vsock => sys::vsock_connect(CONTROL_PORT).map(UnixStream::from),
            Self::Console(console) => console.connect(CONTROL_PORT),
        }
    }

    /// Begins to accept exec connections.
    pub fn listen(&'static self) -> io::Result<Listener> {
        match self {
            Self::Vsock => Ok(Listener::Vsock(sys::vsock_listen(EXEC_PORT)?)),
            Self::Console(console) => Ok(Listener::Console(console)),
        }
    }
}

impl Accept for Listener {
    /// The next connection of the host.
    ///
    /// A connection that a process of the guest made over the vsock loopback is closed: whoever
    /// may exec is root.
    fn accept(&self) -> io::Result<UnixStream> {
        let socket = match self {
            Self::Console(console) => return console.accept(EXEC_PORT),
            Self::Vsock(socket) => socket,
        };
        loop {
            match sys::vsock_accept(socket.as_fd()) {
                Ok((connection, sys::HOST_CID)) => return Ok(connection.into()),
                Ok(_) => {}
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
                    ) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Value of the last `name=value` on a kernel command line.
#[must_use]
pub fn parameter<'a>(command_line: &'a str, name: &str) -> Option<&'a str> {
    command_line
        .split_ascii_whitespace()
        .filter_map(|word| word.split_once('='))
        .filter(|(key, _)| *key == name)
        .map(|(_, value)| value)
        .next_back()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_parameter_of_a_name_counts() {
        let line = "console=ttyS0 skerry.transport=vsock quiet skerry.transport=console\n";
        assert_eq!(parameter(line, "skerry.transport"), Some("console"));
        assert_eq!(parameter(line, "console"), Some("ttyS0"));
        assert_eq!(parameter(line, "quiet"), None);
        assert_eq!(parameter(line, "transport"), None);
    }

    #[test]
    fn an_unknown_transport_is_refused_by_name() {
        let error = Transport::from_command_line("skerry.transport=pigeon").unwrap_err();
        assert!(error.to_string().contains("pigeon"));
    }
}
