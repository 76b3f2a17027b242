//! A [`Frozen`] machine on its way to another process: its files as descriptors, the rest as text.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::{Deserialize, Serialize};
use skerry_machine::MachineState;
use skerry_snapshot::SnapshotId;
use skerry_storage::{Layer, LayerRun};

use crate::error::EngineError;
use crate::frozen::{About, Base, Frozen};
use crate::vms::{receive, send};

/// Descriptors that go with one message (`SCM_MAX_FD` of Linux is 253).
const AT_ONCE: usize = 128;
/// The most that a machine's parts can lie in.
const MOST: usize = 4096;

/// Where a layer is: in which of the files that come with this, and its runs (place on the disk,
/// length, place in the file).
#[derive(Debug, Serialize, Deserialize)]
struct PackedLayer(usize, Vec<(u64, u64, u64)>);

#[derive(Debug, Serialize, Deserialize)]
struct Packed {
    about: About,
    state: MachineState,
    memory: Vec<PackedLayer>,
    scratch: Option<(u64, Vec<PackedLayer>)>,
    base: Option<(String, usize, Vec<Range<u64>>)>,
    files: usize,
}

fn failed(source: io::Error) -> EngineError {
    EngineError::host("hand a machine's state over to another process")(source)
}

fn broken() -> EngineError {
    failed(io::Error::new(
        io::ErrorKind::InvalidData,
        "it is incomplete",
    ))
}

/// Files, each once.
#[derive(Default)]
struct Files(Vec<Arc<File>>);

impl Files {
    fn add(&mut self, file: &Arc<File>) -> usize {
        let known = self.0.iter().position(|known| Arc::ptr_eq(known, file));
        known.unwrap_or_else(|| {
            self.0.push(file.clone());
            self.0.len() - 1
        })
    }

    fn pack(&mut self, layers: &[Layer]) -> Vec<PackedLayer> {
        let packed = layers.iter().map(|layer| {
            let runs = layer.runs().iter().map(|run| (run.at, run.len, run.offset));
            PackedLayer(self.add(layer.file()), runs.collect())
        });
        packed.collect()
    }
}

fn unpack(files: &[Arc<File>], layers: Vec<PackedLayer>) -> Result<Vec<Layer>, EngineError> {
    let unpacked = layers.into_iter().map(|PackedLayer(file, runs)| {
        let file = files.get(file).ok_or_else(broken)?.clone();
        let runs = runs
            .into_iter()
            .map(|(at, len, offset)| LayerRun { at, len, offset });
        Ok(Layer::new(file, runs.collect::<Vec<_>>())?)
    });
    unpacked.collect()
}

fn packed_with(frozen: &Frozen, files: &mut Files) -> Packed {
    files.add(&frozen.root);
    let scratch = frozen.scratch.as_ref();
    Packed {
        about: frozen.about.clone(),
        state: (*frozen.state).clone(),
        memory: files.pack(&frozen.memory),
        scratch: scratch.map(|(size, layers)| (*size, files.pack(layers))),
        base: frozen
            .base
            .as_ref()
            .map(|base| (base.id.hex(), base.layers, base.disk.clone())),
        files: files.0.len(),
    }
}

/// Hands a machine over.
pub(crate) fn hand_over(stream: &mut UnixStream, frozen: &Frozen) -> Result<(), EngineError> {
    let mut files = Files::default();
    send(stream, &packed_with(frozen, &mut files)).map_err(failed)?;
    for files in files.0.chunks(AT_ONCE) {
        send_files(stream, files).map_err(failed)?;
    }
    Ok(())
}

/// Takes a machine over.
pub(crate) fn take_over(stream: &mut UnixStream) -> Result<Frozen, EngineError> {
    let packed: Packed = receive(stream).map_err(failed)?;
    if packed.files > MOST {
        return Err(broken());
    }
    let mut files = Vec::with_capacity(packed.files);
    while files.len() < packed.files {
        let wanted = (packed.files - files.len()).min(AT_ONCE);
        receive_files(stream, wanted, &mut files).map_err(failed)?;
    }
    let scratch = match packed.scratch {
        None => None,
        Some((size, layers)) => Some((size, unpack(&files, layers)?)),
    };
    let base = match packed.base {
        None => None,
        Some((id, layers, disk)) => Some(Base {
            id: SnapshotId::from_hex(&id).ok_or_else(broken)?,
            layers,
            disk,
        }),
    };
    let frozen = Frozen {
        about: packed.about,
        state: Arc::new(packed.state),
        memory: unpack(&files, packed.memory)?,
        scratch,
        root: files.first().ok_or_else(broken)?.clone(),
        base,
        capture: 0,
        working: None,
    };
    frozen.vet()?;
    Ok(frozen)
}

fn send_files(stream: &UnixStream, files: &[Arc<File>]) -> io::Result<()> {
    let descriptors: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(AT_ONCE))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let byte = [IoSlice::new(&[0])];
    rustix::net::sendmsg(stream, &byte, &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive_files(stream: &UnixStream, count: usize, files: &mut Vec<Arc<File>>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(AT_ONCE))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut parts = [IoSliceMut::new(&mut byte)];
    rustix::net::recvmsg(stream, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let mut received: Vec<OwnedFd> = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            received.extend(descriptors);
        }
    }
    if received.len() != count {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "descriptors are missing",
        ));
    }
    files.extend(received.into_iter().map(|fd| Arc::new(File::from(fd))));
    Ok(())
}

#[cfg(test)]
pub(crate) mod testing {
    //! Parcels that somebody has changed.

    use super::*;

    fn pack(frozen: &Frozen) -> (Packed, Files) {
        let mut files = Files::default();
        let packed = packed_with(frozen, &mut files);
        (packed, files)
    }

    /// What goes out as text.
    pub(crate) fn packed(frozen: &Frozen) -> serde_json::Value {
        serde_json::to_value(pack(frozen).0).expect("text")
    }

    /// Sends `packed` with the files of `frozen`, as far as anybody takes them.
    pub(crate) fn hand_over(stream: &mut UnixStream, packed: &serde_json::Value, frozen: &Frozen) {
        let _ = send(stream, packed);
        for files in pack(frozen).1.0.chunks(AT_ONCE) {
            let _ = send_files(stream, files);
        }
        let _ = stream.shutdown(std::net::Shutdown::Both);
    }
}
