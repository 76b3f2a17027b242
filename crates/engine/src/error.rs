//! What can go wrong between a request and a running machine.

use std::io;
use std::path::PathBuf;

use skerry_hypervisor::cpu_model::CpuModelError;
use skerry_hypervisor::{NotPortable, Unusable};
use skerry_machine::MachineError;
use skerry_protocol::host::HostError;
use skerry_storage::DiskError;
use thiserror::Error;

use crate::hypervisor::Backend;

/// An operation of the engine failed.
#[derive(Debug, Error)]
pub enum EngineError {
    /// There is no place for the store.
    #[error("Neither XDG_DATA_HOME nor HOME names a folder for images: set one of them")]
    NoHome,
    /// A folder can't be made.
    #[error("Can't make the folder {}: check its parent's permissions and free space", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// No backend has this name.
    #[error("There is no hypervisor {0:?}: use auto, kvm or soft")]
    UnknownHypervisor(String),
    /// The backend that was asked for can't be used.
    #[error("Can't use the hypervisor {backend}. {remedy}")]
    Hypervisor {
        /// Which.
        backend: Backend,
        /// What the user can do.
        remedy: String,
        /// What the probe found.
        source: Unusable,
    },
    /// A folder can't be shared.
    #[error(transparent)]
    Share(#[from] skerry_share::ShareError),
    /// What is to be mounted isn't there.
    #[error("Can't mount {}: name a folder or a file of this host that you may read", path.display())]
    MountSource {
        /// The folder or file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// It is neither a folder nor a file.
    #[error("{} is neither a folder nor a regular file: a guest gets no others", .0.display())]
    MountSpecial(PathBuf),
    /// Nothing can be mounted there.
    #[error("{0:?} is no place for a mount: write an absolute path other than /, without ..")]
    MountTarget(String),
    /// Two mounts in one place.
    #[error("Two mounts are to be at {0}: leave one out")]
    MountTwice(String),
    /// More mounts than devices.
    #[error("A machine has at most {most} folders and {most} volumes: leave some out")]
    TooManyMounts {
        /// How many there can be.
        most: usize,
    },
    /// A kept machine was made for other mounts.
    #[error(
        "The machine was kept with {shares} folders and {volumes} volumes, and can't be given others: name as many with -v"
    )]
    OtherMounts {
        /// Folders.
        shares: usize,
        /// Volumes.
        volumes: usize,
    },
    /// A folder that was mounted in a kept machine is not named.
    #[error(
        "The machine was kept with a folder of its host at {0}: say which it is to be with -v HOST:{0}"
    )]
    MountMissing(String),
    /// A mount that a kept machine doesn't have.
    #[error("The machine was kept without a mount at {0}, and can't be given one: leave it out")]
    MountNew(String),
    /// The state of a machine with a volume would be of no use.
    #[error(
        "The machine has a volume, whose content is not part of a machine's state: run it without one to take snapshots or fork it"
    )]
    VolumeInState,
    /// A command that would see folders that a start can't keep.
    #[error(
        "A kept start has room for folders and volumes, and none mounted, since each run has its own: leave --exec out, or -v, --mount and --tmpfs"
    )]
    WarmMounts,
    /// A port for several machines.
    #[error(
        "A port of the host's leads to one machine, and a pool has several: leave --publish out, or run machines by themselves"
    )]
    PoolPorts,
    /// A volume for several machines.
    #[error(
        "The machines of a pool are copies of one, and a volume has one machine that writes it: mount a folder, or give the volume to a machine by itself"
    )]
    PoolVolume,
    /// A volume can't have this name.
    #[error(
        "{0:?} can't be the name of a volume: use letters, digits, '_', '.' and '-', the first a letter or digit; a folder of this host begins with / or ./"
    )]
    VolumeName(String),
    /// A volume can't have this size.
    #[error("A volume has between {least} MiB and {most} TiB")]
    VolumeSize {
        /// In MiB.
        least: u64,
        /// In TiB.
        most: u64,
    },
    /// A machine was made from the image.
    #[error("Conflict: unable to {what} ({remedy}): the image {by}")]
    ImageNeeded {
        /// What was tried.
        what: String,
        /// Whether it can be forced.
        remedy: String,
        /// Who needs it.
        by: String,
    },
    /// A machine can't have so much or so little of the host's processors.
    #[error("A machine takes between 0.01 and {most} processors: give --cpus such a number")]
    Processors {
        /// The most.
        most: u64,
    },
    /// A limit of processes that makes no sense.
    #[error("A limit of processes is between 1 and {most}; -1 is none")]
    Processes {
        /// The most.
        most: u32,
    },
    /// A machine's disk can't have this size.
    #[error(
        "A machine's disk has between {least} MiB and {most} TiB: give --storage-opt such a size"
    )]
    DiskSize {
        /// In MiB.
        least: u64,
        /// In TiB.
        most: u64,
    },
    /// The image alone is larger than the machine's disk was to be.
    #[error(
        "The image takes {image} MiB, more than the {size} MiB that the machine's disk is to have: give --storage-opt a larger size"
    )]
    DiskBelowImage {
        /// In MiB.
        size: u64,
        /// In MiB.
        image: u64,
    },
    /// A root that isn't written has no disk.
    #[error("A read-only machine has no disk of its own: leave out --read-only or --storage-opt")]
    DiskOfNone,
    /// A state has its disk.
    #[error(
        "A machine that goes on from a snapshot has the disk that is in it: leave out --storage-opt"
    )]
    DiskOfState,
    /// A path that is none of a cgroup.
    #[error("{0:?} is no cgroup: name one by its path below the mount of cgroups, without ..")]
    CgroupParent(String),
    /// The machine's process can't be put where it was to be.
    #[error(
        "Can't make a cgroup in {parent}: name one that you may write, or leave out --cgroup-parent"
    )]
    Cgroup {
        /// The cgroup that was named.
        parent: String,
        /// The cause.
        source: io::Error,
    },
    /// There is a volume of this name.
    #[error("There is a volume {0} already: choose another name")]
    VolumeExists(String),
    /// There is none.
    #[error("There is no volume {0}: see skerry volume ls")]
    NoVolume(String),
    /// A machine has it.
    #[error("The volume {name} is in use by {}: stop it first, or mount it read-only in all of them",
        match holder { Some(name) => format!("the machine {name}"), None => "another process".to_owned() })]
    VolumeInUse {
        /// The volume.
        name: String,
        /// The machine that has it.
        holder: Option<String>,
    },
    /// A volume's files.
    #[error("Can't {what} the volume {name}")]
    Volume {
        /// The volume.
        name: String,
        /// What was tried.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// A network can't be made.
    #[error(transparent)]
    Network(#[from] skerry_net::NetworkError),
    /// Ports or name servers of a network that isn't wanted.
    #[error(
        "Without a network no port is published, no name server asked and nothing allowed or denied: leave --publish, --dns, --network-allow and --network-deny out, or --network none"
    )]
    NetworkOff,
    /// A TAP device can't be used.
    #[error(transparent)]
    Tap(#[from] skerry_net::TapError),
    /// Addresses that a guest can't have behind a TAP device.
    #[error(
        "The guest's addresses make no sense, since {problem}: see ip= and gateway= of --network tap="
    )]
    TapAddresses {
        /// Why.
        problem: String,
    },
    /// A name server that no guest behind a TAP device can be told of.
    #[error(
        "A guest behind a TAP device asks name servers at port 53, not {server}: leave the port of --dns out"
    )]
    TapDns {
        /// What was asked for.
        server: std::net::SocketAddr,
    },
    /// Options of the user-mode network beside a TAP device.
    #[error(
        "A TAP device is the machine's whole network, and the host's rules are what holds there: leave --publish, --network-allow, --network-deny, --network-alias and other --network out"
    )]
    TapAlone,
    /// A machine of several on one TAP device.
    #[error(
        "A TAP device takes one machine, and a pool has several: leave tap= out, or run machines by themselves"
    )]
    TapOfOne,
    /// Addresses for a guest without an agent.
    #[error(
        "Nobody in the guest of a boot takes addresses: leave ip=, gateway= and mac= out, and have the guest set them"
    )]
    TapWithoutAgent,
    /// Packets that are longer than the device's.
    #[error(
        "Packets of the TAP device {name} have {mtu} bytes at most, and the machine's {card}: raise it with ip link set {name} mtu {card}"
    )]
    TapMtu {
        /// The device.
        name: String,
        /// Its longest packet.
        mtu: u16,
        /// The machine's.
        card: u16,
    },
    /// A TAP device for a card of another kind.
    #[error(
        "The machine was kept with a card for the user-mode network: leave tap= out, or start the image with it"
    )]
    TapOfOther,
    /// A card that is for a TAP device.
    #[error(
        "The machine was kept with a card for a TAP device: name one with --network tap=NAME, or --network none"
    )]
    NeedsTap,
    /// A longest packet that no card can have.
    #[error(
        "No network card has packets of that length: --network-mtu goes from {least} to {most}"
    )]
    BadMtu {
        /// The shortest.
        least: u16,
        /// The longest.
        most: u16,
    },
    /// The machine was kept with another card.
    #[error(
        "The machine was kept with packets of up to {kept} bytes, which can't be changed: leave --network-mtu out"
    )]
    OtherMtu {
        /// Its card's.
        kept: u16,
    },
    /// A further name on no network.
    #[error(
        "Only networks that machines share have names for them: leave --network-alias out, or name a network with --network"
    )]
    AliasOfNothing,
    /// A further name that can't be asked for.
    #[error("{alias:?} can't be asked for as a name: write letters, digits and hyphens")]
    BadAlias {
        /// What was asked for.
        alias: String,
    },
    /// A network's name that can't be one.
    #[error(
        "{name:?} can't be a network's name: write a letter or digit, then letters, digits, \"_\", \".\" and \"-\"; none, public and full are no networks but reaches"
    )]
    BadNetworkName {
        /// What was asked for.
        name: String,
    },
    /// There is no such network.
    #[error(
        "There is no network {name}: see skerry network ls, or make it with skerry network create {name}"
    )]
    NoSuchNetwork {
        /// What was asked for.
        name: String,
    },
    /// There is one.
    #[error(
        "There is a network {name} already: choose another name, or remove it with skerry network rm {name}"
    )]
    NetworkExists {
        /// The name.
        name: String,
    },
    /// Machines are on it.
    #[error(
        "The network {name} has {count} machine(s): stop them first, see skerry network inspect {name}"
    )]
    NetworkInUse {
        /// Its name.
        name: String,
        /// How many.
        count: usize,
    },
    /// All its addresses are taken.
    #[error(
        "The network {name} has no address left in {subnet}: make a larger one with skerry network create --subnet"
    )]
    NetworkFull {
        /// Its name.
        name: String,
        /// Its addresses.
        subnet: ipnet::Ipv4Net,
    },
    /// Addresses that no network can have.
    #[error(
        "No network can have the addresses {subnet}, since {reason}: choose others, or leave --subnet out"
    )]
    BadSubnet {
        /// What was asked for.
        subnet: ipnet::IpNet,
        /// Why not.
        reason: String,
    },
    /// A gateway that is not on its network.
    #[error(
        "The gateway {gateway} is not the address of one machine in {subnet}: choose one that is, or leave --gateway out"
    )]
    BadGateway {
        /// What was asked for.
        gateway: std::net::Ipv4Addr,
        /// The network's addresses.
        subnet: ipnet::Ipv4Net,
    },
    /// All addresses for networks are taken.
    #[error(
        "No addresses are left for another network: name some with --subnet, or remove networks with skerry network prune"
    )]
    NoSubnet,
    /// A network for a machine that was kept without a card.
    #[error(
        "The machine was kept without a network card, and can't be given one: leave --network and the other options on its network out"
    )]
    NoCard,
    /// An option of the software processor, for a machine that has none.
    #[error(
        "{option} is for the software processor, and {backend} runs this machine: use --hypervisor soft, \
         or leave {option} out"
    )]
    SoftOption {
        /// The option.
        option: &'static str,
        /// What runs the machine.
        backend: Backend,
    },
    /// An option for compiled code where there is none.
    #[error(
        "{option} is about compiled code, and with --soft-mode interpreter there is none: use another \
         mode, or leave {option} out"
    )]
    NothingCompiled {
        /// The option.
        option: &'static str,
    },
    /// Too little or too much memory for code.
    #[error("--soft-code-memory can't be {bytes} bytes: use from 1M to 1G")]
    CodeMemory {
        /// What was asked for.
        bytes: u64,
    },
    /// The processor model can't be had.
    #[error(transparent)]
    CpuModel(#[from] CpuModelError),
    /// The machine can't be built.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The image can't be had.
    #[error(transparent)]
    Image(#[from] skerry_oci::Error),
    /// What should name an image does not.
    #[error(transparent)]
    ImageName(#[from] skerry_oci::RefError),
    /// What should name an image of a registry does not.
    #[error(transparent)]
    RegistryName(#[from] skerry_oci::NameError),
    /// A name that only the content itself can give.
    #[error("{0} has a digest, which isn't given but computed: tag with a name without it")]
    TagWithDigest(String),
    /// An image that is not a registry's.
    #[error(
        "The image {0} comes from no registry, so that it can't be pulled: leave out --pull always"
    )]
    NotFromRegistry(String),
    /// A disk can't be had.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A snapshot can't be written or used.
    #[error(transparent)]
    Snapshot(#[from] skerry_snapshot::Error),
    /// A machine's state can't be read from its snapshot, or written.
    #[error(
        "The machine state of the snapshot {snapshot} can't be read: make it again with this build"
    )]
    SavedState {
        /// The snapshot.
        snapshot: String,
        /// The cause.
        source: serde_json::Error,
    },
    /// What no machine of this build says of itself.
    #[error(
        "The saved machine can't go on: {problem}; it was damaged or made up: take another one"
    )]
    Implausible {
        /// What is wrong with it.
        problem: String,
    },
    /// A snapshot's image is not here.
    #[error(
        "The snapshot needs the image {name} ({digest}), which isn't in the store: import it, or export \
         the snapshot with its image"
    )]
    SnapshotImage {
        /// As the user named it.
        name: String,
        /// Its digest.
        digest: String,
    },
    /// A snapshot's guest can't go on here.
    #[error(transparent)]
    NotPortable(#[from] NotPortable),
    /// A name that is not the user's to give.
    #[error(
        "A snapshot can't be named {name:?}: names with {prefix:?} in front are those of kept starts of images"
    )]
    ReservedName {
        /// What was asked for.
        name: String,
        /// What it begins with.
        prefix: &'static str,
    },
    /// A file of the host can't be opened.
    #[error("Can't open {what} {}: check the path and its permissions", path.display())]
    Open {
        /// What it is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Nothing says what to run.
    #[error("The image {0} names no command: give one after it")]
    NoCommand(String),
    /// The agent and the host don't understand each other.
    #[error("The guest's agent failed")]
    Agent(#[from] HostError),
    /// The guest ended before the command did.
    #[error("The virtual machine ended before the command did: {0}")]
    GuestEnded(String),
    /// The machine's time limit passed.
    #[error("The time limit passed")]
    TimedOut,
    /// The registry of virtual machines can't be used.
    #[error("Can't {what} in {}: check the folder's permissions and free space", path.display())]
    Registry {
        /// What was tried.
        what: &'static str,
        /// The registry's folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// What can't be a name of a virtual machine.
    #[error(
        "{name:?} can't be a virtual machine's name: use letters, digits, '_', '.' and '-', a letter or \
         digit first, 64 at most"
    )]
    BadVmName {
        /// The name.
        name: String,
    },
    /// A name that another virtual machine has.
    #[error(
        "There is a virtual machine {name} already: remove it with skerry rm, or use another name"
    )]
    NameTaken {
        /// The name.
        name: String,
    },
    /// Nothing has that name.
    #[error("There is no virtual machine {name}: skerry ps -a lists them")]
    NoSuchVm {
        /// The name.
        name: String,
    },
    /// The first digits of several.
    #[error("{count} virtual machines have identities that begin with {name}: give more digits")]
    AmbiguousVm {
        /// The digits.
        name: String,
        /// How many.
        count: usize,
    },
    /// It can't be removed.
    #[error("The virtual machine {name} runs: stop it first, or use --force")]
    VmRuns {
        /// Its name.
        name: String,
    },
    /// It takes no requests.
    #[error("The virtual machine {name} is not running")]
    VmStopped {
        /// Its name.
        name: String,
    },
    /// It stands still.
    #[error("The virtual machine {name} is paused: let it go on with skerry unpause first")]
    VmPaused {
        /// Its name.
        name: String,
    },
    /// It doesn't stand still.
    #[error("The virtual machine {name} is not paused")]
    VmNotPaused {
        /// Its name.
        name: String,
    },
    /// Its process gives no answer.
    #[error("The process of the virtual machine {name} doesn't answer: skerry kill {name} ends it")]
    VmSilent {
        /// Its name.
        name: String,
        /// The cause.
        source: io::Error,
    },
    /// Its process said no.
    #[error("The virtual machine {name} refused: {reason}")]
    VmRefused {
        /// Its name.
        name: String,
        /// In its words.
        reason: String,
    },
    /// Nothing was said by which it could be known.
    #[error(
        "Nothing says when the virtual machine {name} is ready: run it with --ready or --ready-cmd"
    )]
    NoReadyMark {
        /// Its name.
        name: String,
    },
    /// Its command has ended first.
    #[error("The virtual machine {name} ended (exit status {code}) before it was ready")]
    EndedUnready {
        /// Its name.
        name: String,
        /// Its command's exit status.
        code: u8,
    },
    /// It takes longer than was allowed.
    #[error("The virtual machine {name} was not ready in time: skerry logs {name} may say why")]
    Unready {
        /// Its name.
        name: String,
    },
    /// A snapshot of a machine without a command.
    #[error("No command runs in {0}: give one after it")]
    NothingRuns(String),
    /// It stands still, and its agent can't prepare it.
    #[error("It is paused: let it go on first")]
    CapturePaused,
    /// The command that was to prepare a machine failed.
    #[error("The command that was to warm the machine up failed: {command}: {why}")]
    Prewarm {
        /// The command.
        command: String,
        /// How it ended.
        why: String,
    },
    /// Nothing has that name.
    #[error("There is no pool {name}: skerry pool ls lists them")]
    NoSuchPool {
        /// The name.
        name: String,
    },
    /// A name that another pool has.
    #[error("There is a pool {name} already: remove it with skerry pool rm, or use another name")]
    PoolTaken {
        /// The name.
        name: String,
    },
    /// Its process gives no answer.
    #[error(
        "The process of the pool {name} doesn't answer: end it by its pid, which skerry pool ls --format json tells"
    )]
    PoolSilent {
        /// Its name.
        name: String,
        /// The cause.
        source: io::Error,
    },
    /// Its process said no.
    #[error("The pool {name} refused: {reason}")]
    PoolRefused {
        /// Its name.
        name: String,
        /// In its words.
        reason: String,
    },
    /// No machine was given out under this number.
    #[error("No machine {lease} is out of the pool {pool}: it was given back, or never given out")]
    NoSuchLease {
        /// The pool.
        pool: String,
        /// The number.
        lease: u64,
    },
    /// A pool gave nothing.
    #[error(transparent)]
    Pool(#[from] crate::pools::PoolError),
    /// It was booted, and never resumed or taken.
    #[error("The machine has no beginning to be taken back to: resume it from a snapshot")]
    NoOrigin,
    /// No snapshot for a difference.
    #[error(
        "{name} goes on from no snapshot: take a full one, and later ones can be differences to it"
    )]
    NoParent {
        /// The machine.
        name: String,
    },
    /// The process that runs it answered what it was not asked.
    #[error(
        "Its process is of another version of skerry, which forks otherwise: restart the machine"
    )]
    CantFork,
    /// The process can't be confined as was asked.
    #[error(transparent)]
    Confine(#[from] skerry_confine::ConfineError),
    /// None, or too many.
    #[error("One fork makes at least one machine and at most {most}")]
    ForkCount {
        /// How many.
        most: usize,
    },
    /// Not all children could be made.
    #[error("Only {made} of {wanted} machines were made, and run")]
    ForkedSome {
        /// How many were.
        made: usize,
        /// How many were asked for.
        wanted: usize,
        /// Why not all.
        source: Box<EngineError>,
    },
    /// Its command has ended, and is started again in a moment.
    #[error("The machine waits to be started again, as its restart policy has it: try it later")]
    VmRests,
    /// Only a guest reads its own disk.
    #[error("{name} doesn't run, and only its guest can read its files: start it first")]
    CopyStopped {
        /// The machine.
        name: String,
    },
    /// Files can't be copied so.
    #[error("{path} {problem}")]
    Copy {
        /// What was named.
        path: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The agent's program in a guest failed.
    #[error("It can't be done in the guest of {name}: {reason}")]
    InGuest {
        /// The machine.
        name: String,
        /// In the guest's words.
        reason: String,
    },
    /// Its output goes elsewhere.
    #[error("The virtual machine {name} keeps no log: its output goes to where it was run")]
    NoLog {
        /// The machine.
        name: String,
    },
    /// Nothing is kept that it could begin with.
    #[error(
        "{name} can't be started again: it was made from another machine, whose state is gone, or is to be forgotten at its end"
    )]
    NotAgain {
        /// The machine.
        name: String,
    },
    /// The process that was to run a machine said no.
    #[error("{0}")]
    Detached(String),
    /// A thread or channel of the host failed.
    #[error("Can't {what} on this host")]
    Host {
        /// What.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
}

impl EngineError {
    /// Whether what was named isn't there.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        match self {
            Self::NoSuchVm { .. }
            | Self::NoSuchPool { .. }
            | Self::NoSuchLease { .. }
            | Self::NoSuchNetwork { .. }
            | Self::NoVolume(_) => true,
            Self::Image(skerry_oci::Error::NoSuchImage { .. })
            | Self::Snapshot(skerry_snapshot::Error::NoSuchSnapshot { .. }) => true,
            Self::Image(skerry_oci::Error::Registry(error)) => {
                matches!(**error, skerry_oci::RegistryError::NotFound { .. })
            }
            _ => false,
        }
    }

    /// What turns an error of the host into one that says what was tried.
    pub(crate) fn host(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}
