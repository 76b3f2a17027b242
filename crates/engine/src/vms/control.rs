//! What the process of a virtual machine is asked over its socket, and how.
//!
//! ```text
//!  client: connect ─► Request ─►            ◄─ Reply ◄─ the machine's process
//!                     Exec: after the reply, the connection is one to the guest's agent
//! ```
//! One request for each connection. Messages are JSON behind a 32-bit little-endian length, so that
//! processes of different builds can tell what they don't know.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::EngineError;
use crate::confinement::Report;
use crate::network::NetworkReport;
use crate::run::RunSpec;
use crate::statistics::Statistics;

/// The longest message.
const LONGEST: usize = 1 << 20;

/// What a machine's process is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Turn the connection into one to the guest's agent, for a command.
    Exec,
    /// Turn the connection into one for input, signals and sizes of the command: see `attach`.
    Attach,
    /// Stand still.
    Pause,
    /// Go on.
    Unpause,
    /// Send a signal to the command.
    Signal(u8),
    /// End the machine at once.
    Kill,
    /// Tell when the command has ended, and how.
    Wait,
    /// Tell when the machine is ready, or that it has ended before.
    Ready,
    /// Have another name.
    Rename(String),
    /// Write a snapshot to the store while the machine goes on.
    Snapshot {
        /// What to call it.
        name: Option<String>,
        /// Only what differs from the snapshot that the machine goes on from.
        difference: bool,
        /// The image's root file system goes with it.
        with_image: bool,
    },
    /// Give the machine's state, for more machines that go on from where this one is. It follows the
    /// reply.
    Fork,
    /// Tell of its network.
    Network,
    /// Tell how its process is confined.
    Confinement,
    /// Tell what it has moved.
    Traffic,
    /// Tell what the processors do.
    Statistics {
        /// For how long to look at how they spend their time.
        sample_ms: u64,
    },
}

/// A snapshot of a running machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Snapshotted {
    /// The snapshot.
    pub id: String,
    /// How long no instruction of the guest ran, in microseconds.
    pub pause_us: u64,
    /// How long its user code stood still, in microseconds.
    pub freeze_us: u64,
}

/// What a machine has moved since it was started, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Traffic {
    /// Of the frames that its network card received.
    pub network_received: u64,
    /// Of those that it sent.
    pub network_sent: u64,
    /// Read from its disks: its image, its own, its volumes.
    pub block_read: u64,
    /// Written to them.
    pub block_written: u64,
    /// Why a disk first failed a request of the guest's, if one has.
    pub disk_failure: Option<String>,
}

/// A running machine's state, on its way to copies of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Parted {
    /// The machine's name.
    pub(super) parent: String,
    /// What the copies run on, and their network.
    pub(super) spec: Box<RunSpec>,
    pub(super) pause_us: u64,
    pub(super) freeze_us: u64,
}

/// Machines that were made from a running one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Forked {
    /// Their identities.
    pub ids: Vec<String>,
    /// How long no instruction of the parent ran, in microseconds.
    pub pause_us: u64,
    /// How long its user code stood still, in microseconds.
    pub freeze_us: u64,
}

/// What a machine's process answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// It is done.
    Done,
    /// The command ended with this exit status.
    Ended(u8),
    /// There is a snapshot.
    Snapshotted(Snapshotted),
    /// The state of the machine follows.
    Parted(Parted),
    /// Its network.
    Network(Box<NetworkReport>),
    /// How its process is confined.
    Confinement(Report),
    /// What it has moved.
    Traffic(Traffic),
    /// What the processors have done.
    Statistics(Statistics),
    /// It can't be done, for this reason.
    Failed(String),
}

/// Sends one message.
pub(crate) fn send(stream: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message)?;
    let length = bytes.len() - 4;
    if length > LONGEST {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "message too long",
        ));
    }
    bytes[..4].copy_from_slice(&(length as u32).to_le_bytes());
    stream.write_all(&bytes)
}

/// Receives one message.
pub(crate) fn receive<T: DeserializeOwned>(stream: &mut impl Read) -> io::Result<T> {
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > LONGEST {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "message too long",
        ));
    }
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}

/// Calls `with` with a path to the socket that is short enough for `sockaddr_un`, however long its
/// folder's is.
fn at_socket<T>(path: &Path, with: impl FnOnce(PathBuf) -> io::Result<T>) -> io::Result<T> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let flags = rustix::fs::OFlags::DIRECTORY.bits().cast_signed();
    let folder = File::options()
        .read(true)
        .custom_flags(flags)
        .open(folder)?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd()));
    with(short.join(name))
}

/// Listens at `path`.
pub(crate) fn listen(path: &Path) -> io::Result<UnixListener> {
    at_socket(path, UnixListener::bind)
}

/// Connects to the process that listens at `path`.
pub(crate) fn connect(path: &Path) -> io::Result<UnixStream> {
    at_socket(path, UnixStream::connect)
}

/// A connection to the process of a machine.
#[derive(Debug)]
pub struct Client {
    name: String,
    stream: UnixStream,
}

impl Client {
    pub(crate) fn connect(name: &str, socket: &Path) -> Result<Self, EngineError> {
        let stream = connect(socket).map_err(|source| EngineError::VmSilent {
            name: name.to_owned(),
            source,
        })?;
        let name = name.to_owned();
        Ok(Self { name, stream })
    }

    fn silent(&self) -> impl FnOnce(io::Error) -> EngineError + use<> {
        let name = self.name.clone();
        move |source| EngineError::VmSilent { name, source }
    }

    /// How long an answer may take; for ever where none is set.
    pub fn limit(&self, patience: Duration) -> Result<(), EngineError> {
        let set = self.stream.set_read_timeout(Some(patience));
        set.map_err(self.silent())
    }

    /// Asks, and waits for the answer.
    pub fn ask(mut self, request: &Request) -> Result<(Reply, UnixStream), EngineError> {
        let asked = send(&mut self.stream, request).and_then(|()| receive(&mut self.stream));
        match asked.map_err(self.silent())? {
            Reply::Failed(reason) => Err(EngineError::VmRefused {
                name: self.name,
                reason,
            }),
            reply => Ok((reply, self.stream)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_wire() {
        let requests = [
            Request::Exec,
            Request::Attach,
            Request::Pause,
            Request::Unpause,
            Request::Signal(15),
            Request::Kill,
            Request::Wait,
            Request::Ready,
            Request::Rename("b".to_owned()),
            Request::Snapshot {
                name: Some("a".to_owned()),
                difference: true,
                with_image: false,
            },
            Request::Fork,
            Request::Statistics { sample_ms: 100 },
        ];
        for request in requests {
            let mut wire = Vec::new();
            send(&mut wire, &request).expect("send");
            assert_eq!(
                receive::<Request>(&mut &wire[..]).expect("receive"),
                request
            );
        }
    }

    #[test]
    fn what_is_not_a_message_is_an_error() {
        let long = u32::MAX.to_le_bytes();
        assert!(receive::<Request>(&mut &long[..]).is_err());
        assert!(receive::<Request>(&mut &[2, 0, 0, 0, b'{', b'}'][..]).is_err());
        assert!(receive::<Request>(&mut &[9, 0, 0, 0, b'{'][..]).is_err());
        let mut wire = Vec::new();
        send(&mut wire, &serde_json::json!("of another build")).expect("send");
        let error = receive::<Request>(&mut &wire[..]).expect_err("unknown");
        assert!(error.to_string().contains("unknown variant"), "{error}");
    }

    #[test]
    fn folders_may_be_deep() {
        let folder = tempfile::tempdir().expect("folder");
        let deep = folder.path().join("d".repeat(120));
        std::fs::create_dir(&deep).expect("deep");
        let listener = listen(&deep.join("control")).expect("listen");
        let mut client = connect(&deep.join("control")).expect("connect");
        let (mut served, _) = listener.accept().expect("accept");
        send(&mut client, &Request::Wait).expect("send");
        assert_eq!(
            receive::<Request>(&mut served).expect("receive"),
            Request::Wait
        );
    }
}
