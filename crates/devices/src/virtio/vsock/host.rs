//! The host's sockets: listeners and streams inside the process.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::Shared;
use super::connection::Connection;
use super::packet::{SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::virtio::wait;

/// How long [`VsockHost::connect`] waits.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections that wait to be accepted.
const BACKLOG: usize = 128;

/// The host's side of a socket device. Clones are the same host.
#[derive(Clone)]
pub struct VsockHost {
    pub(super) shared: Arc<Shared>,
}

impl VsockHost {
    /// Listens for connections that the guest opens to `port` of the host (CID 2).
    pub fn listen(&self, port: u32) -> io::Result<VsockListener> {
        let queue = Arc::new(AcceptQueue::default());
        self.shared.add_listener(port, queue.clone())?;
        Ok(VsockListener {
            shared: self.shared.clone(),
            port,
            queue,
        })
    }

    /// Breaks all connections and tells the guest so, as restoring it does. Listeners stay.
    pub fn reset(&self) {
        self.shared.reset_transport();
    }

    /// Connects to `port` of the guest, giving up after ten seconds.
    pub fn connect(&self, port: u32) -> io::Result<VsockStream> {
        self.connect_timeout(port, CONNECT_TIMEOUT)
    }

    /// Connects to `port` of the guest. Waits for the guest's driver, and then for its answer, for
    /// `timeout` altogether.
    pub fn connect_timeout(&self, port: u32, timeout: Duration) -> io::Result<VsockStream> {
        let deadline = Instant::now() + timeout;
        let connection = self.shared.request(port, deadline)?;
        let stream = VsockStream::new(self.shared.clone(), connection);
        stream.end.connection.wait_established(deadline)?;
        Ok(stream)
    }
}

impl fmt::Debug for VsockHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VsockHost").finish_non_exhaustive()
    }
}

/// Connections that the guest has opened and nobody has accepted.
#[derive(Default)]
pub(super) struct AcceptQueue {
    /// `None` once the listener is closed.
    waiting: Mutex<AcceptState>,
    arrived: Condvar,
}

#[derive(Default)]
struct AcceptState {
    streams: VecDeque<VsockStream>,
    closed: bool,
}

impl AcceptQueue {
    /// Whether there is room for one more.
    pub(super) fn has_room(&self) -> bool {
        let state = self.waiting.lock();
        !state.closed && state.streams.len() < BACKLOG
    }

    pub(super) fn push(&self, stream: VsockStream) {
        let mut state = self.waiting.lock();
        if !state.closed {
            state.streams.push_back(stream);
            drop(state);
            self.arrived.notify_one();
        }
    }

    /// Drops the connections that wait.
    pub(super) fn forget_waiting(&self) {
        let streams = std::mem::take(&mut self.waiting.lock().streams);
        drop(streams);
    }

    pub(super) fn close(&self) {
        let mut state = self.waiting.lock();
        state.closed = true;
        // Dropping a stream talks to the device, which must find this lock free.
        let streams = std::mem::take(&mut state.streams);
        drop(state);
        drop(streams);
        self.arrived.notify_all();
    }
}

/// Accepts the guest's connections to one port. Dropping it refuses further ones.
pub struct VsockListener {
    shared: Arc<Shared>,
    port: u32,
    queue: Arc<AcceptQueue>,
}

impl VsockListener {
    /// The port.
    pub const fn port(&self) -> u32 {
        self.port
    }

    /// Waits for a connection. Fails with `ConnectionAborted` once the machine is gone.
    pub fn accept(&self) -> io::Result<VsockStream> {
        self.accept_until(None)
    }

    /// Waits for a connection for at most `timeout`; fails with `TimedOut` after it.
    pub fn accept_timeout(&self, timeout: Duration) -> io::Result<VsockStream> {
        self.accept_until(Some(Instant::now() + timeout))
    }

    fn accept_until(&self, deadline: Option<Instant>) -> io::Result<VsockStream> {
        let mut state = self.queue.waiting.lock();
        loop {
            if let Some(stream) = state.streams.pop_front() {
                return Ok(stream);
            }
            if state.closed {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            if !wait(&self.queue.arrived, &mut state, deadline) {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }

    /// Makes a blocked `accept` fail and refuses further connections.
    pub fn close(&self) {
        self.shared.remove_listener(self.port, &self.queue);
        self.queue.close();
    }
}

impl Drop for VsockListener {
    fn drop(&mut self) {
        self.close();
    }
}

impl fmt::Debug for VsockListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VsockListener")
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}

/// The host's end of a connection; the last clone to go closes it.
struct StreamEnd {
    shared: Arc<Shared>,
    connection: Arc<Connection>,
}

impl Drop for StreamEnd {
    fn drop(&mut self) {
        self.shared.abandon(&self.connection);
    }
}

/// A connected stream between host and guest.
///
/// Reads and writes block and may go on in two threads at once. Dropping the last clone closes the
/// connection after everything written has been sent.
pub struct VsockStream {
    end: Arc<StreamEnd>,
}

impl VsockStream {
    pub(super) fn new(shared: Arc<Shared>, connection: Arc<Connection>) -> Self {
        Self {
            end: Arc::new(StreamEnd { shared, connection }),
        }
    }

    /// Another handle on the same connection.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            end: self.end.clone(),
        })
    }

    /// Ends one or both directions. What was written before still reaches the guest.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        let flags = match how {
            Shutdown::Read => SHUTDOWN_RECEIVE,
            Shutdown::Write => SHUTDOWN_SEND,
            Shutdown::Both => SHUTDOWN_BOTH,
        };
        let claimed = self.end.connection.shutdown(flags);
        self.end.shared.send_if(claimed, &self.end.connection);
        Ok(())
    }

    /// How long a read waits; `None` for as long as it takes. Holds for all clones.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.end.connection.set_read_timeout(timeout);
        Ok(())
    }

    /// The guest's port.
    pub fn guest_port(&self) -> u32 {
        self.end.connection.key.guest_port
    }

    /// The host's port.
    pub fn host_port(&self) -> u32 {
        self.end.connection.key.host_port
    }
}

impl Read for &VsockStream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let (len, claimed) = self.end.connection.read(out)?;
        self.end.shared.send_if(claimed, &self.end.connection);
        Ok(len)
    }
}

impl Write for &VsockStream {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let (len, claimed) = self.end.connection.write(data)?;
        self.end.shared.send_if(claimed, &self.end.connection);
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for VsockStream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        (&*self).read(out)
    }
}

impl Write for VsockStream {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        (&*self).write(data)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl fmt::Debug for VsockStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("VsockStream")
            .field(&self.end.connection)
            .finish()
    }
}
