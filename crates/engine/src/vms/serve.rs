//! The server of a machine's control socket: a thread for each connection.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::Shutdown as SocketShutdown;

use super::attach;
use super::control::{self, Reply, Request};
use super::copies;
use super::host::Hosted;
use super::info::Status;
use crate::error::EngineError;
use crate::frozen::Writing;
use crate::network::NetworkReport;
use crate::parcel;
use crate::vm::GuestStream;
use skerry_confine::Role;
use skerry_hypervisor::probe::chain;
use skerry_protocol::Transport;

/// Enough for a request and a buffer.
const STACK: usize = 256 << 10;
/// Bytes that are passed on at a time.
const PIECE: usize = 32 << 10;
/// For so long at most it is looked at how processors spend their time: nobody waits longer.
const LONGEST_SAMPLE: Duration = Duration::from_secs(3600);

/// A server; dropping it ends the accepting of connections.
pub(super) struct Server(UnixListener);

impl Drop for Server {
    fn drop(&mut self) {
        // It fails only where the socket listens no more.
        let _ = rustix::net::shutdown(&self.0, SocketShutdown::Both);
    }
}

fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let thread = std::thread::Builder::new().name(name.to_owned());
    thread.stack_size(STACK).spawn(body).map(drop)
}

/// Begins to serve.
pub(super) fn start(listener: UnixListener, hosted: Arc<Hosted>) -> Result<Server, EngineError> {
    let failed = EngineError::host("serve a virtual machine's socket");
    let server = Server(listener.try_clone().map_err(&failed)?);
    let accepting = move || {
        skerry_confine::enter(Role::Control);
        while let Ok((stream, _)) = listener.accept() {
            let hosted = hosted.clone();
            // Without a thread the connection is closed, and the client says so.
            let _ = thread("control", move || serve(stream, &hosted));
        }
    };
    thread("accept", accepting).map_err(failed)?;
    Ok(server)
}

fn serve(mut stream: UnixStream, hosted: &Arc<Hosted>) {
    let request = match control::receive(&mut stream) {
        Ok(request) => request,
        Err(error) => {
            let reason = format!("the request is not understood: {error}");
            let _ = control::send(&mut stream, &Reply::Failed(reason));
            return;
        }
    };
    tracing::debug!(?request, "asked");
    let result = match request {
        Request::Exec => match connect(hosted) {
            Ok(guest) => {
                if control::send(&mut stream, &Reply::Done).is_ok() {
                    bridge(stream, guest);
                }
                return;
            }
            Err(error) => Err(error),
        },
        Request::Attach => {
            if control::send(&mut stream, &Reply::Done).is_ok() {
                attach::serve(stream, hosted);
            }
            return;
        }
        Request::Wait => {
            hosted.tell_end(|code| {
                let _ = control::send(&mut stream, &Reply::Ended(code));
            });
            return;
        }
        Request::Ready => {
            hosted.tell_ready(|reply| {
                let _ = control::send(&mut stream, &reply);
            });
            return;
        }
        Request::Kill => {
            hosted.kill();
            Ok(Reply::Done)
        }
        Request::Signal(signal) => hosted.signal(signal).map(|()| Reply::Done),
        Request::Rename(name) => hosted.update(|entry| entry.rename(&name)).map(|()| {
            hosted.renamed(&name);
            Reply::Done
        }),
        Request::Pause => pause(hosted).map(|()| Reply::Done),
        Request::Unpause => unpause(hosted).map(|()| Reply::Done),
        Request::Snapshot {
            name,
            difference,
            with_image,
        } => {
            let writing = Writing {
                durable: true,
                difference,
                with_root: with_image,
            };
            copies::snapshot(hosted, name.as_deref(), writing).map(Reply::Snapshotted)
        }
        Request::Fork => match copies::hand_out(hosted) {
            Ok((frozen, parted)) => {
                // Who asked may be gone, and the machine goes on all the same.
                if control::send(&mut stream, &Reply::Parted(parted)).is_ok()
                    && let Err(error) = parcel::hand_over(&mut stream, &frozen)
                {
                    tracing::warn!(%error, "nobody took the machine's state");
                }
                return;
            }
            Err(error) => Err(error),
        },
        Request::Network => hosted
            .life()
            .map(|life| Reply::Network(Box::new(NetworkReport::of(life.vm.network())))),
        Request::Confinement => Ok(Reply::Confinement(
            skerry_confine::active().cloned().unwrap_or_default(),
        )),
        Request::Traffic => hosted.life().map(|life| Reply::Traffic(life.vm.traffic())),
        Request::Statistics { sample_ms } => {
            let span = Duration::from_millis(sample_ms).min(LONGEST_SAMPLE);
            let sampled = hosted.life().and_then(|life| life.vm.sample(span));
            sampled.map(Reply::Statistics)
        }
    };
    let reply = match result {
        Ok(reply) => reply,
        Err(error) => Reply::Failed(chain(&error)),
    };
    let _ = control::send(&mut stream, &reply);
}

/// A connection to the guest's agent.
fn connect(hosted: &Hosted) -> Result<GuestStream, EngineError> {
    Ok(hosted.life()?.vm.connect()?)
}

fn pause(hosted: &Hosted) -> Result<(), EngineError> {
    hosted.life()?.vm.pause()?;
    hosted.update(|entry| entry.update(|state| state.status = Status::Paused))?;
    hosted.note("pause", &[]);
    Ok(())
}

fn unpause(hosted: &Hosted) -> Result<(), EngineError> {
    hosted.life()?.vm.unpause();
    hosted.update(|entry| entry.update(|state| state.status = state.under_way()))?;
    hosted.note("unpause", &[]);
    Ok(())
}

/// Makes one connection of two, until both ends have closed.
pub(crate) fn bridge(stream: UnixStream, guest: GuestStream) {
    let (Ok(from_guest), Ok(to_client)) = (guest.try_clone(), stream.try_clone()) else {
        return;
    };
    let back = thread("control-back", move || pass(from_guest, to_client));
    if back.is_ok() {
        pass(stream, guest);
    }
}

/// Passes bytes on until their end, then the end.
fn pass<R: Transport, W: Transport>(mut from: R, mut to: W) {
    let mut buffer = vec![0; PIECE];
    loop {
        let length = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        let bytes = buffer.get(..length).unwrap_or_default();
        if to.write_all(bytes).is_err() {
            let _ = from.shutdown(Shutdown::Read);
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
