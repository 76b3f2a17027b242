//! Commands that outlive their connections: who has which name, and how a new connection gets to the
//! thread that serves the command.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::EventfdFlags;
use skerry_protocol::frame::FrameDecoder;
use skerry_protocol::message::{ExecFailure, FailureKind};

use super::failure;

/// A host's connection and what has been read from it.
#[derive(Debug)]
pub struct Link {
    /// The connection.
    pub connection: UnixStream,
    /// Bytes behind the first frame.
    pub decoder: FrameDecoder,
}

/// The kept commands of a guest.
#[derive(Debug, Default)]
pub struct Kept {
    seats: Mutex<HashMap<u32, Seat>>,
}

/// Where a new connection waits for its command.
#[derive(Debug)]
struct Seat {
    newcomer: Option<Link>,
    /// Readable when there is a newcomer.
    bell: Arc<OwnedFd>,
}

/// A name in use, until dropped.
#[derive(Debug)]
pub struct Lease {
    kept: Arc<Kept>,
    id: u32,
    bell: Arc<OwnedFd>,
}

impl Kept {
    fn seats(&self) -> MutexGuard<'_, HashMap<u32, Seat>> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a name for a new command.
    pub fn lease(self: &Arc<Self>, id: u32) -> Result<Lease, ExecFailure> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let bell = rustix::event::eventfd(0, flags).map_err(|error| {
            let text = format!("No event descriptor for a kept command: {error}");
            failure(FailureKind::Resources, text)
        })?;
        let bell = Arc::new(bell);
        let mut seats = self.seats();
        if seats.contains_key(&id) {
            let text = format!("Kept command {id} exists already");
            return Err(failure(FailureKind::BadRequest, text));
        }
        let seat = Seat {
            newcomer: None,
            bell: Arc::clone(&bell),
        };
        seats.insert(id, seat);
        drop(seats);
        Ok(Lease {
            kept: Arc::clone(self),
            id,
            bell,
        })
    }

    /// Gives a connection to the command of that name, instead of any that it has. Without such a
    /// command the connection comes back.
    pub fn attach(&self, id: u32, link: Link) -> Result<(), Link> {
        let mut seats = self.seats();
        let Some(seat) = seats.get_mut(&id) else {
            return Err(link);
        };
        // One that waited and wasn't met is closed here.
        seat.newcomer = Some(link);
        // Fails only when the counter is full, and it can be read then.
        let _ = rustix::io::write(&*seat.bell, &1u64.to_ne_bytes());
        Ok(())
    }
}

impl Lease {
    /// Readable when [`Self::newcomer`] has somebody.
    #[must_use]
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// The connection that waits.
    #[must_use]
    pub fn newcomer(&self) -> Option<Link> {
        let mut seats = self.kept.seats();
        // Fails when it hasn't rung.
        let _ = rustix::io::read(&*self.bell, &mut [0; 8]);
        seats.get_mut(&self.id)?.newcomer.take()
    }

    /// Gives the name up, unless somebody has come meanwhile.
    pub fn end(&self) -> Option<Link> {
        let mut seats = self.kept.seats();
        let newcomer = seats.get_mut(&self.id)?.newcomer.take();
        if newcomer.is_none() {
            seats.remove(&self.id);
        }
        newcomer
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut seats = self.kept.seats();
        // The name may be another's by now.
        if let Some(seat) = seats.get(&self.id)
            && Arc::ptr_eq(&seat.bell, &self.bell)
        {
            seats.remove(&self.id);
        }
    }
}
