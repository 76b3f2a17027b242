//! The messages. Their order in each enum is the wire format: new ones go at the end.

use serde::{Deserialize, Serialize, Serializer};

/// A string of the guest that need not be UTF-8: argument, variable, path.
pub type GuestString = Vec<u8>;

/// First message of the agent on the control connection. Its shape never changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`Hello::MAGIC`], so that something else at this port is told from an agent.
    pub magic: u32,
    /// Oldest protocol version that the agent speaks.
    pub oldest: u16,
    /// Newest protocol version that the agent speaks.
    pub newest: u16,
    /// Version of the agent, for messages to people.
    pub agent: String,
    /// Release of the kernel that runs (`uname -r`).
    pub kernel: String,
}

impl Hello {
    /// "SKRY", little-endian.
    pub const MAGIC: u32 = u32::from_le_bytes(*b"SKRY");

    /// The newest version that both sides speak.
    #[must_use]
    pub fn common_version(&self) -> Option<u16> {
        let newest = self.newest.min(crate::VERSION);
        let oldest = self.oldest.max(crate::OLDEST_VERSION);
        (self.magic == Self::MAGIC && oldest <= newest).then_some(newest)
    }
}

/// A block device of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BlockDevice {
    /// By its virtio serial (virtio 1.3 §5.2.6.1, `VIRTIO_BLK_T_GET_ID`).
    Serial(String),
    /// By its path, for example `/dev/vda`.
    Path(String),
}

/// Where writes to the root file system go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Upper {
    /// Nowhere: the root is read-only once the agent has put its few files there.
    ReadOnly,
    /// Into guest memory, at most so many bytes (0: the kernel's default, half of memory).
    Tmpfs {
        /// Most bytes that may be written.
        size: u64,
    },
    /// Onto an ext4 file system.
    Ext4(BlockDevice),
}

/// What becomes `/` in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RootSpec {
    /// The initial RAM file system that the agent came with.
    Initramfs,
    /// A read-only image under a writable overlay.
    Image {
        /// Device with the image.
        device: BlockDevice,
        /// Type of the image's file system, for example `erofs`.
        fs_type: String,
        /// Where writes go.
        upper: Upper,
    },
}

/// What the agent makes of the guest before it reports ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// Protocol version that the host chose from the agent's offer.
    pub version: u16,
    /// The root file system.
    pub root: RootSpec,
    /// Host name, also put into `/etc/hostname` and `/etc/hosts`.
    pub hostname: String,
    /// Name servers for `/etc/resolv.conf`; where empty the file is left alone.
    pub nameservers: Vec<String>,
    /// Variables that every exec has unless it names them itself.
    pub env: Vec<(GuestString, GuestString)>,
    /// Entropy for the kernel's pool.
    pub entropy: Vec<u8>,
    /// Wall clock in nanoseconds since 1970, or 0 to leave the guest's clock alone.
    pub wall_clock: u64,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            version: crate::VERSION,
            root: RootSpec::Initramfs,
            hostname: "skerry".to_owned(),
            nameservers: Vec::new(),
            env: Vec::new(),
            entropy: Vec::new(),
            wall_clock: 0,
        }
    }
}

/// How the guest is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ShutdownMode {
    /// Power off.
    PowerOff,
    /// Reset.
    Reboot,
}

/// What the host asks of the agent after set-up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ControlRequest {
    /// Answer, to show that the agent lives.
    Ping,
    /// Set the wall clock: nanoseconds since 1970.
    SetClock(u64),
    /// Credit these bytes to the kernel's entropy pool and reseed its generator.
    Reseed(Vec<u8>),
    /// Stop every process, write everything back, end the guest. Answered before the end.
    Shutdown(ShutdownMode),
    /// Stop every process that an exec started, and their descendants, where they are. Answered when
    /// all stand still; execs that come later stand still from their first instruction.
    Freeze,
    /// Let them go on.
    Thaw,
    /// Write everything back to the disks.
    Sync,
    /// Sync, drop what the kernel keeps only to be faster, and tell the disks which blocks are free: what a
    /// snapshot has to hold gets smaller.
    Compact,
    /// Give the network card these addresses, `ADDRESS/PREFIX`, besides its own, and take those from it that
    /// an earlier request gave it. A guest that is restored has none of them.
    Addresses(Vec<String>),
    /// Mount these, in this order.
    Mount(Vec<Mount>),
    /// Write the volumes back to their disks.
    SyncVolumes,
    /// Have the network card be this on a network of the host's, in place of what an earlier request made it.
    Card(Card),
    /// Let all that execs start have so many processes and threads at most; `None`: as many as there can be.
    LimitProcesses(Option<u32>),
}

/// A network card on a network that isn't the guest's own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Card {
    /// Its link address.
    pub link_address: [u8; 6],
    /// Its addresses, `ADDRESS/PREFIX`; with none, the guest gets some by itself or has none.
    pub addresses: Vec<String>,
    /// Default routes, one of a family.
    pub gateways: Vec<String>,
    /// Name servers for `/etc/resolv.conf`; where empty the file is left alone.
    pub nameservers: Vec<String>,
}

/// A file system for the guest, besides its root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// What is mounted.
    pub source: MountSource,
    /// Where; made where it is missing.
    pub target: GuestString,
    /// Nothing may be written.
    pub read_only: bool,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountSource {
    /// A folder of the host's (virtio 1.3 §5.11).
    Share {
        /// The device's tag.
        tag: String,
        /// Only the file of this name in it.
        file: Option<GuestString>,
    },
    /// An ext4 disk, grown to the disk's size.
    Volume {
        /// Which.
        device: BlockDevice,
        /// The disk's size in bytes, which the guest may still have to learn.
        size: u64,
        /// Where the volume is empty, it gets what the image has in its place.
        fill: bool,
    },
    /// Guest memory.
    Tmpfs {
        /// The most bytes; 0: the kernel's default, half of memory.
        size: u64,
        /// Permissions of its root.
        mode: u32,
    },
}

/// Host to agent on the control connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToAgent {
    /// Answer to [`Hello`].
    Setup(Setup),
    /// The host speaks none of the agent's versions and hangs up.
    Refused,
    /// A request, answered by [`FromAgent::Reply`] in the order of asking.
    Request(ControlRequest),
}

/// Agent to host on the control connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromAgent {
    /// The first message.
    Hello(Hello),
    /// Set-up is done and execs are accepted; or it failed, and in what words.
    Ready(Result<(), String>),
    /// Result of a request.
    Reply(Result<(), String>),
}

/// Size of a terminal in characters and, where known, pixels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct WinSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub cols: u16,
    /// Width in pixels or 0.
    pub x_pixels: u16,
    /// Height in pixels or 0.
    pub y_pixels: u16,
}

/// A command to run in the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    /// Program and arguments; a program without `/` is looked for in the request's `PATH`.
    pub argv: Vec<GuestString>,
    /// Environment; a later entry of the same name wins.
    pub env: Vec<(GuestString, GuestString)>,
    /// Working directory; made when it doesn't exist. Empty: `/`.
    pub cwd: GuestString,
    /// `USER[:GROUP]`, names or numbers. Empty: root.
    pub user: String,
    /// A terminal of this size instead of three pipes.
    pub tty: Option<WinSize>,
    /// Whether input follows; without it the command reads `/dev/null`.
    pub stdin: bool,
}

impl ExecRequest {
    /// A request for `argv` with everything else empty.
    pub fn new<A: Into<GuestString>>(argv: impl IntoIterator<Item = A>) -> Self {
        Self {
            argv: argv.into_iter().map(Into::into).collect(),
            ..Self::default()
        }
    }
}

/// Host to agent on an exec connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecCommand<'a> {
    /// The first message.
    Start(ExecRequest),
    /// Bytes for standard input, within the credit granted.
    Stdin(#[serde(borrow, serialize_with = "as_bytes")] &'a [u8]),
    /// No more input.
    StdinEof,
    /// The terminal has another size now.
    Resize(WinSize),
    /// Send this signal: to the process, or with a terminal to its foreground group.
    Signal(u8),
    /// Like [`Self::Start`], but the command outlives its connection: it goes on, its output waits, and
    /// so does its status, until a connection takes it up again.
    StartKept {
        /// The host's name for it; none that is in use.
        id: u32,
        /// What to run.
        request: ExecRequest,
    },
    /// Take up a kept command: answered by [`ExecEvent::Started`], then [`ExecEvent::StdinCredit`] (all
    /// that there is now) or [`ExecEvent::StdinClosed`], then what the command wrote. The connection that
    /// had it before, if there is one still, is closed.
    Attach {
        /// The name that it was started under.
        id: u32,
    },
}

/// Agent to host on an exec connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecEvent<'a> {
    /// The command runs under this process id.
    Started(u32),
    /// Bytes of standard output, or of the terminal.
    Stdout(#[serde(borrow, serialize_with = "as_bytes")] &'a [u8]),
    /// Bytes of standard error.
    Stderr(#[serde(borrow, serialize_with = "as_bytes")] &'a [u8]),
    /// So many more bytes of input may be sent.
    StdinCredit(u32),
    /// Nobody reads the input any more: further input is dropped.
    StdinClosed,
    /// The command could not be started. Last message.
    Failed(ExecFailure),
    /// The command ended, and all output went before. Last message.
    Ended(ExitStatus),
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// It exited with this code.
    Code(u8),
    /// A signal ended it.
    Signal {
        /// Number of the signal.
        signal: u8,
        /// Whether the kernel wrote a core dump.
        core: bool,
    },
}

impl ExitStatus {
    /// The shell's single number for it: the code, or 128 and the signal's number.
    #[must_use]
    pub fn shell_code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal { signal, .. } => 128u8.saturating_add(signal),
        }
    }
}

/// Why a command could not be started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecFailure {
    /// The kind, for programs.
    pub kind: FailureKind,
    /// A sentence that names the thing, for people.
    pub message: String,
}

/// The kinds of [`ExecFailure`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// No such program.
    NotFound,
    /// A directory, no permission, or a format that the kernel doesn't run.
    NotExecutable,
    /// No such user or group in the image.
    BadUser,
    /// The working directory can't be entered or made.
    BadCwd,
    /// The request itself is wrong: no program, a NUL byte, too long.
    BadRequest,
    /// The guest lacks what it takes: memory, processes, terminals.
    Resources,
    /// No kept command has that name: it never was, or its status has been collected.
    NoSession,
}

impl FailureKind {
    /// Exit code by the habits of shells and container tools: 127, 126 or 125.
    #[must_use]
    pub fn shell_code(self) -> u8 {
        match self {
            Self::NotFound => 127,
            Self::NotExecutable | Self::BadCwd => 126,
            Self::BadUser | Self::BadRequest | Self::Resources | Self::NoSession => 125,
        }
    }
}

/// Serialises a byte slice as one run of bytes rather than element by element; the wire format is
/// the same, the speed is not.
pub(crate) fn as_bytes<S: Serializer>(bytes: &&[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{FrameDecoder, decode, encode_into};
    use proptest::prelude::*;

    fn round_trip<T>(message: &T) -> Vec<u8>
    where
        T: Serialize,
    {
        let mut wire = Vec::new();
        encode_into(message, &mut wire).unwrap();
        let mut decoder = FrameDecoder::new();
        decoder.push(&wire);
        decoder.next_frame().unwrap().unwrap().to_vec()
    }

    #[test]
    fn versions_that_overlap_agree_on_the_newest_common_one() {
        let hello = |magic, oldest, newest| Hello {
            magic,
            oldest,
            newest,
            agent: String::new(),
            kernel: String::new(),
        };
        assert_eq!(
            hello(Hello::MAGIC, 1, 9).common_version(),
            Some(crate::VERSION)
        );
        assert_eq!(
            hello(Hello::MAGIC, crate::VERSION + 1, 9).common_version(),
            None
        );
        assert_eq!(hello(Hello::MAGIC, 0, 0).common_version(), None);
        assert_eq!(hello(1, 1, 1).common_version(), None);
    }

    #[test]
    fn exit_statuses_map_as_shells_map_them() {
        assert_eq!(ExitStatus::Code(42).shell_code(), 42);
        assert_eq!(
            ExitStatus::Signal {
                signal: 9,
                core: false
            }
            .shell_code(),
            137
        );
        assert_eq!(FailureKind::NotFound.shell_code(), 127);
        assert_eq!(FailureKind::NotExecutable.shell_code(), 126);
    }

    #[test]
    fn the_first_messages_keep_their_bytes() {
        // A golden value: if it changes, old agents and new hosts stop understanding each other.
        let hello = FromAgent::Hello(Hello {
            magic: Hello::MAGIC,
            oldest: 1,
            newest: 1,
            agent: "a".to_owned(),
            kernel: "k".to_owned(),
        });
        assert_eq!(
            round_trip(&hello),
            [0, 0xd3, 0x96, 0xc9, 0xca, 0x05, 1, 1, 1, b'a', 1, b'k']
        );
        assert_eq!(round_trip(&ExecCommand::Stdin(b"xy")), [1, 2, b'x', b'y']);
        assert_eq!(
            round_trip(&ExecEvent::Ended(ExitStatus::Signal {
                signal: 9,
                core: true
            })),
            [6, 1, 9, 1]
        );
    }

    #[test]
    fn the_messages_of_version_two_keep_their_bytes() {
        let request = ExecRequest {
            user: "u".to_owned(),
            stdin: true,
            ..ExecRequest::new(["a"])
        };
        assert_eq!(
            round_trip(&ExecCommand::StartKept { id: 300, request }),
            [5, 0xac, 2, 1, 1, b'a', 0, 0, 1, b'u', 0, 1]
        );
        assert_eq!(round_trip(&ExecCommand::Attach { id: 7 }), [6, 7]);
        for (number, request) in [
            (4, ControlRequest::Freeze),
            (5, ControlRequest::Thaw),
            (6, ControlRequest::Sync),
            (7, ControlRequest::Compact),
        ] {
            assert_eq!(round_trip(&ToAgent::Request(request)), [2, number]);
        }
        let failure = ExecFailure {
            kind: FailureKind::NoSession,
            message: String::new(),
        };
        assert_eq!(round_trip(&ExecEvent::Failed(failure)), [5, 6, 0]);
    }

    fn string() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(any::<u8>(), 0..40)
    }

    prop_compose! {
        fn request()(
            argv in prop::collection::vec(string(), 0..8),
            env in prop::collection::vec((string(), string()), 0..8),
            cwd in string(),
            user in "[a-z0-9:]{0,12}",
            size in prop::option::of(any::<[u16; 4]>()),
            stdin in any::<bool>(),
        ) -> ExecRequest {
            let tty = size.map(|[rows, cols, x_pixels, y_pixels]| WinSize {
                rows, cols, x_pixels, y_pixels,
            });
            ExecRequest { argv, env, cwd, user, tty, stdin }
        }
    }

    proptest! {
        #[test]
        fn exec_messages_survive_the_wire(
            request in request(), bytes in string(), number in any::<u8>(), core in any::<bool>(),
            credit in any::<u32>(), message in ".{0,40}",
        ) {
            for command in [
                ExecCommand::Start(request.clone()),
                ExecCommand::StartKept { id: credit, request },
                ExecCommand::Attach { id: credit },
                ExecCommand::Resize(WinSize { rows: 1, cols: 2, x_pixels: 3, y_pixels: 4 }),
                ExecCommand::Stdin(&bytes),
                ExecCommand::StdinEof,
                ExecCommand::Signal(number),
            ] {
                let payload = round_trip(&command);
                prop_assert_eq!(decode::<ExecCommand<'_>>(&payload).unwrap(), command);
            }
            for event in [
                ExecEvent::Started(credit),
                ExecEvent::Stdout(&bytes),
                ExecEvent::Stderr(&bytes),
                ExecEvent::StdinCredit(credit),
                ExecEvent::StdinClosed,
                ExecEvent::Failed(ExecFailure { kind: FailureKind::BadCwd, message }),
                ExecEvent::Ended(ExitStatus::Code(number)),
                ExecEvent::Ended(ExitStatus::Signal { signal: number, core }),
            ] {
                let payload = round_trip(&event);
                prop_assert_eq!(decode::<ExecEvent<'_>>(&payload).unwrap(), event);
            }
        }

        #[test]
        fn control_messages_survive_the_wire(
            hostname in ".{0,20}", serial in "[a-z]{0,20}", size in any::<u64>(),
            entropy in string(), env in prop::collection::vec((string(), string()), 0..4),
        ) {
            let setup = |upper| Setup {
                root: RootSpec::Image {
                    device: BlockDevice::Serial(serial.clone()),
                    fs_type: "erofs".to_owned(),
                    upper,
                },
                hostname: hostname.clone(),
                nameservers: vec![hostname.clone()],
                env: env.clone(),
                entropy: entropy.clone(),
                wall_clock: size,
                ..Setup::default()
            };
            for message in [
                ToAgent::Setup(Setup::default()),
                ToAgent::Setup(setup(Upper::Tmpfs { size })),
                ToAgent::Setup(setup(Upper::ReadOnly)),
                ToAgent::Setup(setup(Upper::Ext4(BlockDevice::Path(serial.clone())))),
                ToAgent::Refused,
                ToAgent::Request(ControlRequest::Ping),
                ToAgent::Request(ControlRequest::SetClock(size)),
                ToAgent::Request(ControlRequest::Reseed(entropy.clone())),
                ToAgent::Request(ControlRequest::Shutdown(ShutdownMode::Reboot)),
                ToAgent::Request(ControlRequest::Freeze),
                ToAgent::Request(ControlRequest::Thaw),
                ToAgent::Request(ControlRequest::Sync),
                ToAgent::Request(ControlRequest::Compact),
            ] {
                let payload = round_trip(&message);
                prop_assert_eq!(decode::<ToAgent>(&payload).unwrap(), message);
            }
            for message in [
                FromAgent::Ready(Ok(())),
                FromAgent::Ready(Err(hostname.clone())),
                FromAgent::Reply(Err(hostname.clone())),
            ] {
                let payload = round_trip(&message);
                prop_assert_eq!(decode::<FromAgent>(&payload).unwrap(), message);
            }
        }
    }
}
