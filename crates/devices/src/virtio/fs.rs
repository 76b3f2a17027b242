//! The file system device (virtio 1.3, 5.11) over a [`Share`]: carries FUSE requests to it and answers back.
//!
//! Names are the business of the device's own thread, which is confined to what a server of files does;
//! a processor's answers only what concerns files that are open, and needs no rights and no disk. What a request
//! reads or writes of a file goes straight between the file and the guest's buffers.

use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use skerry_confine::Role;
use skerry_hypervisor::memory::GuestRam;
use skerry_share::{
    Answer, REPLY_HEADER, REQUEST_HEADER, RequestHeader, Share, ShareState, WRITE_ARGS,
};
use skerry_storage::{IoBuf, IoBufMut};

use super::{
    Chain, DeviceKind, DeviceState, Queue, QueueError, Served, VirtioDevice, read_config_bytes,
};
use crate::state::StateError;

/// Bytes of the tag in the configuration (5.11.4).
pub const TAG_LEN: usize = 36;
const CONFIG_LEN: usize = TAG_LEN + 4;
/// The high priority queue, then one for requests: Linux 6.1 uses no more.
const QUEUES: usize = 2;
const REQUEST_QUEUES: u32 = QUEUES as u32 - 1;
/// Linux asks for as many pages at a time as a queue has room for, less four; this is enough for 1 MiB.
const QUEUE_SIZE: u16 = 512;
/// The most bytes of a request that are not data of a write: more than the longest attribute takes.
const MAX_ARGS: usize = 128 << 10;

/// Buffers that are used again from request to request.
#[derive(Default)]
struct Scratch {
    request: Vec<u8>,
    reply: Vec<u8>,
}

/// The file system device.
pub struct FsDevice {
    share: Arc<Share>,
    config: [u8; CONFIG_LEN],
    scratch: [Mutex<Scratch>; QUEUES],
}

/// What a snapshot keeps of a file system device: the session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsState {
    share: ShareState,
}

impl FsDevice {
    /// A device that the guest finds by `tag`, of which [`TAG_LEN`] bytes count.
    pub fn new(tag: &str, share: Arc<Share>) -> Arc<Self> {
        let mut config = [0; CONFIG_LEN];
        let len = tag.len().min(TAG_LEN);
        config[..len].copy_from_slice(&tag.as_bytes()[..len]);
        config[TAG_LEN..].copy_from_slice(&REQUEST_QUEUES.to_le_bytes());
        Arc::new(Self {
            share,
            config,
            scratch: Default::default(),
        })
    }

    /// Whether a processor's thread may answer a request.
    fn is_quick(&self, header: &RequestHeader, chain: &Chain, ram: &GuestRam) -> bool {
        if !header.is_write() {
            return header.is_quick();
        }
        let mut args = [0; WRITE_ARGS];
        let mut reader = chain.reader(ram);
        let read = reader.skip(REQUEST_HEADER);
        let read = read.and_then(|()| reader.read_exact(&mut args));
        read.is_ok() && self.share.writes_quickly(&args)
    }

    /// Answers one request; returns the bytes written to the guest's memory.
    fn request(
        &self,
        header: &RequestHeader,
        chain: &Chain,
        ram: &GuestRam,
        scratch: &mut Scratch,
    ) -> Result<u32, QueueError> {
        let mut reader = chain.reader(ram);
        let args_end = header.args_end(chain.readable_len() as usize);
        scratch.request.resize(args_end.min(MAX_ARGS), 0);
        reader.read_exact(&mut scratch.request)?;
        let mut slices = Vec::new();
        if args_end < chain.readable_len() as usize {
            reader.take_slices(reader.remaining() as usize, &mut slices)?;
        }
        let data: Vec<_> = slices.iter().map(IoBuf::from_volatile).collect();

        let mut head = chain.writer(ram);
        let mut slices = Vec::new();
        if header.fills_buffers() {
            let mut room = head.clone();
            room.skip(REPLY_HEADER)?;
            room.take_slices(room.remaining() as usize, &mut slices)?;
        }
        let room: Vec<_> = slices.iter().map(IoBufMut::from_volatile).collect();
        let writable = chain.writable_len();
        let (request, reply) = (&scratch.request, &mut scratch.reply);
        let filled = match self
            .share
            .serve(request, &data, &room, writable as usize, reply)
        {
            Answer::Silent => return Ok(0),
            Answer::Bytes => 0,
            Answer::Filled(len) => len,
        };
        if reply.len() + filled > writable as usize {
            return Err(QueueError::Request("room for an answer"));
        }
        head.write_all(reply)?;
        // No more than `writable`.
        Ok((reply.len() + filled) as u32)
    }
}

fn header(chain: &Chain, ram: &GuestRam) -> Result<RequestHeader, QueueError> {
    let mut raw = [0; REQUEST_HEADER];
    let read = chain.reader(ram).read_exact(&mut raw);
    read.map_err(|_| QueueError::Request("header"))?;
    Ok(RequestHeader::parse(&raw))
}

impl VirtioDevice for FsDevice {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Fs
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; QUEUES]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn worker_role(&self) -> Option<Role> {
        Some(Role::Share)
    }

    fn reset(&self) {
        self.share.reset();
    }

    fn process(&self, index: usize, queue: &mut Queue) -> Result<Served, QueueError> {
        let Some(scratch) = self.scratch.get(index) else {
            return Ok(Served::Drained);
        };
        let mut scratch = scratch.lock();
        let ram = queue.ram().clone();
        while let Some(chain) = queue.pop()? {
            let header = header(&chain, &ram)?;
            if !queue.may_wait() && !self.is_quick(&header, &chain, &ram) {
                queue.put_back(chain);
                return Ok(Served::Later);
            }
            let written = self.request(&header, &chain, &ram, &mut scratch)?;
            queue.complete(chain, written)?;
        }
        Ok(Served::Drained)
    }

    fn save(&self) -> DeviceState {
        DeviceState::Fs(FsState {
            share: self.share.save(),
        })
    }

    fn restore(&self, saved: DeviceState) -> Result<(), StateError> {
        let DeviceState::Fs(FsState { share }) = saved else {
            let problem = "it belongs to another kind of device";
            return Err(StateError::new("virtio-fs", problem));
        };
        let restored = self.share.restore(share);
        restored.map_err(|error| StateError::new("virtio-fs", error.to_string()))
    }
}

impl fmt::Debug for FsDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FsDevice")
            .field("share", &self.share)
            .finish_non_exhaustive()
    }
}
