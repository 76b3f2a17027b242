//! Where gdb connects, and what comes and goes there.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};

use gdbstub::conn::Connection;
use parking_lot::Mutex;
use skerry_hypervisor::Canceller;

/// Where a debugger can connect: `target remote HOST:PORT`, or `target remote PATH`.
///
/// Whoever connects reads and writes all of the guest's memory and registers, and nothing of the host's.
#[derive(Debug)]
pub struct DebugListener(Inner);

#[derive(Debug)]
enum Inner {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

impl DebugListener {
    /// Listens on an address; port 0 for any that is free.
    pub fn tcp(address: impl ToSocketAddrs) -> io::Result<Self> {
        Ok(Self(Inner::Tcp(TcpListener::bind(address)?)))
    }

    /// Listens on a socket at a path, which must not exist, and which is removed in the end.
    pub fn unix(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref();
        Ok(Self(Inner::Unix(UnixListener::bind(path)?, path.into())))
    }

    /// The address, with the port that was free.
    pub fn local_address(&self) -> Option<SocketAddr> {
        match &self.0 {
            Inner::Tcp(listener) => listener.local_addr().ok(),
            Inner::Unix(..) => None,
        }
    }

    /// Waits for a debugger.
    pub(super) fn accept(&self) -> io::Result<Stream> {
        match &self.0 {
            Inner::Tcp(listener) => {
                let stream = listener.accept()?.0;
                // Each packet waits for the answer to the one before.
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
            Inner::Unix(listener, _) => Ok(Stream::Unix(listener.accept()?.0)),
        }
    }
}

impl Drop for DebugListener {
    fn drop(&mut self) {
        if let Inner::Unix(_, path) = &self.0 {
            // Somebody may have removed it already.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A debugger.
#[derive(Debug)]
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(stream) => Self::Tcp(stream.try_clone()?),
            Self::Unix(stream) => Self::Unix(stream.try_clone()?),
        })
    }

    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(into),
            Self::Unix(stream) => stream.read(into),
        }
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => Write::write_all(stream, bytes),
            Self::Unix(stream) => Write::write_all(stream, bytes),
        }
    }

    fn shutdown(&self) {
        // It may be shut from the other side.
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

/// What goes to the debugger: a packet at a time.
#[derive(Debug)]
pub(super) struct Output {
    stream: Stream,
    packet: Vec<u8>,
}

impl Connection for Output {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.packet.push(byte);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let packet = std::mem::take(&mut self.packet);
        self.stream.write_all(&packet)
    }
}

/// What comes from the debugger. A thread of its own reads it, so that a Ctrl-C gets a running guest out.
pub(super) struct Input {
    received: Receiver<Vec<u8>>,
    /// Set while the guest runs.
    running: Arc<Mutex<Option<Canceller>>>,
    stream: Stream,
}

impl fmt::Debug for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Input")
            .field("stream", &self.stream)
            .finish_non_exhaustive()
    }
}

/// The debugger is gone.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gone;

/// Both directions of a connection.
pub(super) fn connect(stream: Stream) -> io::Result<(Input, Output)> {
    /// Chunks that wait to be read.
    const WAITING: usize = 64;
    let (sender, received) = sync_channel(WAITING);
    let running = Arc::new(Mutex::new(None));
    let input = Input {
        received,
        running: running.clone(),
        stream: stream.try_clone()?,
    };
    let from = stream.try_clone()?;
    let thread = std::thread::Builder::new().name("sandbox-gdb".into());
    thread.spawn(move || {
        read_all(from, &sender, &running);
        drop(sender);
        kick(&running);
    })?;
    let packet = Vec::new();
    Ok((input, Output { stream, packet }))
}

fn read_all(mut from: Stream, sender: &SyncSender<Vec<u8>>, running: &Mutex<Option<Canceller>>) {
    let mut chunk = [0; 4096];
    loop {
        let len = match from.read(&mut chunk) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Ok(len @ 1..) => len,
            // The end: the channel's other side learns of it when this one is dropped.
            Ok(0) | Err(_) => return,
        };
        if sender.send(chunk[..len].to_vec()).is_err() {
            return;
        }
        kick(running);
    }
}

/// Gets a running guest out, after something was sent or the sender dropped: who sets `running` looks at
/// the channel afterwards, so that one of the two sees the other.
fn kick(running: &Mutex<Option<Canceller>>) {
    if let Some(canceller) = &*running.lock() {
        canceller.kick();
    }
}

impl Input {
    /// Waits for more.
    pub(super) fn receive(&self) -> Result<Vec<u8>, Gone> {
        self.received.recv().map_err(|_| Gone)
    }

    /// What has come, if anything has.
    pub(super) fn poll(&self) -> Result<Option<Vec<u8>>, Gone> {
        match self.received.try_recv() {
            Ok(bytes) => Ok(Some(bytes)),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(Gone),
        }
    }

    /// From here on, what comes gets the guest out.
    pub(super) fn set_running(&self, canceller: Option<Canceller>) {
        *self.running.lock() = canceller;
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        self.stream.shutdown();
    }
}
