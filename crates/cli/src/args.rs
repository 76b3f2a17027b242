//! The command line, as clap parses it; man pages and completions come from the same definitions.

mod confine;
mod images;
mod lifecycle;
mod mounts;
mod network;
mod networks;
mod pool;
mod resources;
mod sandbox;
mod serve;
mod snapshot;
mod soft;
mod system;
mod values;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use confine::*;
pub use images::*;
pub use lifecycle::*;
pub use mounts::*;
pub use network::*;
pub use networks::*;
pub use pool::*;
pub use resources::*;
pub use sandbox::*;
pub use serve::*;
pub use snapshot::*;
pub use soft::*;
pub use system::*;
use values::parse_port;
pub use values::{DiskArg, SerialArg, SignalArg, Size, Span};

/// Any Linux guest or OCI image in its own virtual machine, on any x86-64 machine.
#[derive(Debug, Parser)]
#[command(
    name = "skerry",
    version,
    propagate_version = true,
    disable_help_subcommand = true,
    args_override_self = true,
    after_help = "Exit status: the command's own; 125 when skerry itself fails, 126 when the \
                  command can't be invoked, 127 when it isn't found, 128+n when signal n ended it, \
                  124 on a time-out."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,

    /// More notes on stderr; twice for the devices' and processors' own.
    #[arg(long, global = true, action = clap::ArgAction::Count, display_order = 1000)]
    pub verbose: u8,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a command in a new virtual machine made from an image
    Run(RunArgs),
    /// Make a virtual machine from an image, to be started later
    #[command(mut_arg("detach", |arg| arg.hide(true)))]
    Create(RunArgs),
    /// Start virtual machines that were created, or have ended
    Start(StartArgs),
    /// Be connected to the command of a machine that runs in the background
    Attach(AttachArgs),
    /// Stop virtual machines and start them again
    Restart(RestartArgs),
    /// Boot an image, warm it up, and have later runs start from there
    Warm(WarmArgs),
    /// Let a virtual machine go on from a snapshot of it
    Restore(RestoreArgs),
    /// Make more virtual machines that go on from where a running one is
    Fork(ForkArgs),
    /// Run one more command in a running virtual machine
    Exec(ExecArgs),
    /// List virtual machines
    Ps(PsArgs),
    /// Print all that is known of a virtual machine, and what its processors do, as JSON
    Inspect(InspectArgs),
    /// Print what virtual machines take of this one: processors, memory
    Stats(UsageArgs),
    /// Print what the command of a detached virtual machine wrote
    Logs(LogsArgs),
    /// List the processes in a virtual machine
    Top(TopArgs),
    /// Copy files into a virtual machine or out of it
    Cp(CpArgs),
    /// Print what happens to machines and images as it happens
    Events(EventsArgs),
    /// Print the published ports of a virtual machine, and where the host listens for them
    Port(PortArgs),
    /// Have virtual machines stand still
    Pause(NamesArgs),
    /// Let paused virtual machines go on
    Unpause(NamesArgs),
    /// Ask the commands of virtual machines to end, and end those that don't
    Stop(StopArgs),
    /// End virtual machines at once, or send their commands a signal
    Kill(KillArgs),
    /// Wait until the commands of virtual machines have ended, and print their exit statuses; or until
    /// the machines are ready
    Wait(WaitArgs),
    /// Give a virtual machine another name
    Rename(RenameArgs),
    /// Remove virtual machines that have ended
    Rm(RmArgs),
    /// Remove all virtual machines that have ended
    Prune(PruneArgs),
    /// Keep clean virtual machines ready
    Pool(PoolArgs),
    /// Networks that virtual machines share
    Network(NetworksArgs),
    /// Boot a kernel
    Boot(BootArgs),
    /// Get images from their registries
    Pull(PullArgs),
    /// Send images to their registries
    Push(PushArgs),
    /// Give an image a further name
    Tag(TagArgs),
    /// List the images in the store
    Images(ImagesArgs),
    /// Remove images from the store
    Rmi(RmiArgs),
    /// Write images to an archive, for docker and others too
    Save(SaveArgs),
    /// Bring the images of an archive into the store
    Load(LoadArgs),
    /// Look into images, and remove those without a name
    Image(ImageArgs),
    /// Make volumes, look at them, remove them
    Volume(VolumeArgs),
    /// Look at snapshots, carry them about, remove them
    Snapshot(SnapshotArgs),
    /// Call functions of small programs, each in a virtual machine of its own, without a kernel
    Sandbox(SandboxArgs),
    /// Answer at a socket: the same over HTTP, for programs and for docker's client
    Serve(ServeArgs),
    /// Look after what Skerry keeps on this machine
    System(SystemArgs),
    /// Say what this machine can run virtual machines on, and what to do where it can't
    Doctor(DoctorArgs),
    /// Print the version
    Version(VersionArgs),
    /// Print a completion script for a shell
    Completion(CompletionArgs),
    /// Write the man pages
    #[command(hide = true)]
    Man(ManArgs),
    /// Run a virtual machine for `run -d`, which tells it which over a socket
    #[command(hide = true)]
    VmHost,
    /// Keep a pool for `pool create`, which tells it which over a socket
    #[command(hide = true)]
    PoolHost,
}

/// Which hypervisor runs the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum HypervisorArg {
    /// The fastest that works here
    #[default]
    Auto,
    /// Linux KVM
    Kvm,
    /// Skerry's own processor
    Soft,
}

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    #[default]
    #[value(alias = "table")]
    Text,
    /// For programs
    Json,
}

/// Options of every command that makes a virtual machine.
#[derive(Debug, Args)]
pub struct MachineArgs {
    /// Memory of the machine: a number of bytes, or with K, M, G (powers of 1024)
    #[arg(long, short = 'm', value_name = "SIZE", default_value = "512M")]
    pub memory: Size,

    /// Processors: as many virtual ones, rounded up; a fraction, such as 0.5, bounds their time as well
    #[arg(long, value_name = "N", default_value = "1")]
    pub cpus: CpusArg,

    /// What runs the machine
    #[arg(long, value_enum, value_name = "NAME", default_value_t)]
    pub hypervisor: HypervisorArg,

    /// Processor model the guest sees: x86-64-v2, x86-64-v3 or host; behind commas, features to leave out
    /// (-pcid) and the frequency of its time-stamp counter (tsc-khz=N) [default: the best that the
    /// hypervisor can have of x86-64-v3 and x86-64-v2]
    #[arg(long, value_name = "MODEL", allow_hyphen_values = true)]
    pub cpu_model: Option<String>,

    /// Stop the machine after this time and exit with 124: a number of seconds, or with ms, s, m, h
    #[arg(long, value_name = "TIME")]
    pub timeout: Option<Span>,

    /// How the software processor runs code
    #[command(flatten)]
    pub soft: SoftArgs,

    /// How its process is confined
    #[command(flatten)]
    pub confine: ConfineArgs,
}

/// What is told of a machine that has ended.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct StatsArgs {
    /// Say on stderr, when the machine has ended, what its processors did; in JSON as the last line
    #[arg(
        long,
        value_enum,
        value_name = "FORMAT",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "text"
    )]
    pub stats: Option<Format>,
}

/// How a command is run, in a new machine or in one that runs.
#[derive(Debug, Default, Args)]
pub struct CommandArgs {
    /// Set a variable of the command's environment; KEY alone passes it on
    #[arg(short = 'e', long = "env", value_name = "KEY[=VALUE]")]
    pub env: Vec<String>,

    /// Working directory of the command
    #[arg(short = 'w', long, value_name = "DIR")]
    pub workdir: Option<String>,

    /// User (and group) of the command, by name or number
    #[arg(short = 'u', long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,

    /// Give the command a terminal
    #[arg(short = 't', long)]
    pub tty: bool,

    /// Pass stdin to the command
    #[arg(short = 'i', long)]
    pub interactive: bool,
}

/// The command of a machine that runs already: it has to be told.
#[derive(Debug, Args)]
pub struct CommandLine {
    /// The command and its arguments
    #[arg(
        value_name = "CMD",
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub command: Vec<String>,
}

/// `skerry run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The command's surroundings
    #[command(flatten)]
    pub io: CommandArgs,

    /// Run it in the background and print its ID
    #[arg(short = 'd', long, conflicts_with = "stats")]
    pub detach: bool,

    /// Name of the virtual machine [default: one is made up]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,

    /// Forget a machine in the background when it ends, as one in the foreground always is
    #[arg(long)]
    pub rm: bool,

    /// Replace the image's entry point
    #[arg(long, value_name = "COMMAND")]
    pub entrypoint: Option<String>,

    /// Keep the root file system as it is: writes fail
    #[arg(long)]
    pub read_only: bool,

    /// Boot, instead of going on from where the image's first run was ready; and keep nothing
    #[arg(long)]
    pub fresh: bool,

    /// When to get the image from its registry
    #[arg(
        long,
        value_enum,
        value_name = "WHEN",
        default_value_t,
        conflicts_with = "from_snapshot"
    )]
    pub pull: PullArg,

    /// Host name inside
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<String>,

    /// The machine is ready when its command has written TEXT: wait --ready waits for that
    #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub ready: Option<String>,

    /// The machine is ready when CMD, which its shell runs again and again, succeeds
    #[arg(long, value_name = "CMD", conflicts_with = "ready", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub ready_cmd: Option<String>,

    /// The machine is ready when a connection to this TCP port of it is accepted
    #[arg(long, value_name = "PORT", conflicts_with_all = ["ready", "ready_cmd"], value_parser = clap::value_parser!(u16).range(1..))]
    pub ready_tcp: Option<u16>,

    /// Labels, restarts
    #[command(flatten)]
    pub lifecycle: LifecycleArgs,

    /// What is told at the end
    #[command(flatten)]
    pub stats: StatsArgs,

    /// The machine
    #[command(flatten)]
    pub machine: MachineArgs,

    /// Its network
    #[command(flatten)]
    pub network: NetworkArgs,

    /// Its folders and volumes
    #[command(flatten)]
    pub mounts: MountArgs,

    /// What it may take of the host
    #[command(flatten)]
    pub resources: ResourceArgs,

    /// Kernel to boot instead of the built-in one
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,

    /// Go on from a snapshot instead of an image: all that follows is the command
    #[arg(
        long,
        value_name = "SNAPSHOT",
        conflicts_with_all = ["memory", "cpus", "cpu_model", "kernel", "read_only", "entrypoint", "fresh"]
    )]
    pub from_snapshot: Option<String>,

    /// What names the image.
    #[arg(
        value_name = "IMAGE",
        required_unless_present = "from_snapshot",
        help = "demo, the name of an image in the store or in a registry, oci:DIR[:TAG], oci-archive:TAR, \
                docker-archive:TAR, or dir:ROOTFS"
    )]
    pub image: Option<String>,

    /// The command and its arguments [default: the image's own, or what runs in the snapshot]
    #[arg(
        value_name = "CMD",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub command: Vec<String>,
}

/// `skerry warm`.
#[derive(Debug, Args)]
pub struct WarmArgs {
    /// The surroundings of the command that warms it up
    #[command(flatten)]
    pub io: CommandArgs,

    /// The command goes on in every later run, and is ready when it has written TEXT [default: it has
    /// to end, with status 0]
    #[arg(long, value_name = "TEXT", requires = "exec")]
    pub ready: Option<String>,

    /// Name the snapshot too, for run --from-snapshot and restore
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,

    /// Keep the root file system as it is: writes fail
    #[arg(long)]
    pub read_only: bool,

    /// Its network, which later runs have to have or not to have too
    #[command(flatten)]
    pub reach: ReachArgs,

    /// Room for folders and volumes, which runs may have as many of
    #[command(flatten)]
    pub mounts: MountArgs,

    /// When to get the image from its registry
    #[arg(long, value_enum, value_name = "WHEN", default_value_t)]
    pub pull: PullArg,

    /// The machine, which later runs have to ask for too
    #[command(flatten)]
    pub machine: MachineArgs,

    /// What names the image, as for run
    #[arg(value_name = "IMAGE")]
    pub image: String,

    /// Run this first: a command and, up to the end of the line, its arguments
    #[arg(long, value_name = "CMD", num_args = 1.., allow_hyphen_values = true)]
    pub exec: Vec<String>,
}

/// `skerry restore`.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// Run it in the background and print its ID
    #[arg(short = 'd', long, conflicts_with = "stats")]
    pub detach: bool,

    /// Name of the virtual machine [default: one is made up]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,

    /// Forget a machine in the background when it ends, as one in the foreground always is
    #[arg(long)]
    pub rm: bool,

    /// Host name inside
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<String>,

    /// What runs the machine
    #[arg(long, value_enum, value_name = "NAME", default_value_t)]
    pub hypervisor: HypervisorArg,

    /// Stop the machine after this time and exit with 124: a number of seconds, or with ms, s, m, h
    #[arg(long, value_name = "TIME")]
    pub timeout: Option<Span>,

    /// What is told at the end
    #[command(flatten)]
    pub stats: StatsArgs,

    /// Its network
    #[command(flatten)]
    pub network: NetworkArgs,

    /// Its folders: those that it had, by the places where it has them
    #[command(flatten)]
    pub mounts: MountArgs,

    /// How the software processor runs code
    #[command(flatten)]
    pub soft: SoftArgs,

    /// How its process is confined
    #[command(flatten)]
    pub confine: ConfineArgs,

    /// Name of the snapshot, its ID or the ID's first digits
    #[arg(value_name = "SNAPSHOT")]
    pub snapshot: String,
}

/// `skerry fork`.
#[derive(Debug, Args)]
pub struct ForkArgs {
    /// How many
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub count: u32,

    /// Their name; of several, with -1, -2 … behind it [default: names are made up]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,

    /// Forget them when they end
    #[arg(long)]
    pub rm: bool,

    /// How to print
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,

    /// Name of the virtual machine, its ID or the ID's first digits
    #[arg(value_name = "VM")]
    pub vm: String,
}

/// `skerry exec`.
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// The command's surroundings
    #[command(flatten)]
    pub io: CommandArgs,

    /// Name of the virtual machine, its ID or the ID's first digits
    #[arg(value_name = "VM")]
    pub vm: String,

    /// The command
    #[command(flatten)]
    pub line: CommandLine,
}

/// `skerry ps`.
#[derive(Debug, Args)]
pub struct PsArgs {
    /// Also those that have ended
    #[arg(short, long)]
    pub all: bool,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
    /// Only the IDs
    #[arg(short, long)]
    pub quiet: bool,
    /// Whole IDs and commands
    #[arg(long)]
    pub no_trunc: bool,
    /// Only some, of all: status=, name=, id=, image=, exited= or label=KEY[=VALUE]; with one key several
    /// times, any of the values will do
    #[arg(long, value_name = "KEY=VALUE")]
    pub filter: Vec<Filter>,
}

/// `skerry inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// How long to look at how the processors spend their time: a number of seconds, or with ms, s, m, h
    #[arg(long, value_name = "TIME", default_value = "100ms")]
    pub sample: Span,
    /// Name of the virtual machine, its ID or the ID's first digits
    #[arg(value_name = "VM")]
    pub vm: String,
}

/// `skerry stats`.
#[derive(Debug, Args)]
pub struct UsageArgs {
    /// Print it once, and not again and again
    #[arg(long)]
    pub no_stream: bool,
    /// How to print it; in JSON, a line for each virtual machine
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t)]
    pub format: Format,
    /// Names of virtual machines, their IDs or the IDs' first digits [default: all that run]
    #[arg(value_name = "VM")]
    pub vms: Vec<String>,
}

/// `skerry logs`.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Go on with what is written from now on, until the command ends
    #[arg(short, long)]
    pub follow: bool,
    /// Put the time in front of each line
    #[arg(short, long)]
    pub timestamps: bool,
    /// Only the last N lines
    #[arg(short = 'n', long, value_name = "N")]
    pub tail: Option<usize>,
    /// Name of the virtual machine, its ID or the ID's first digits
    #[arg(value_name = "VM")]
    pub vm: String,
}

/// Virtual machines, for verbs that need nothing else.
#[derive(Debug, Args)]
pub struct NamesArgs {
    /// Names of virtual machines, their IDs or the IDs' first digits
    #[arg(required = true, value_name = "VM")]
    pub vms: Vec<String>,
}

/// `skerry rename`.
#[derive(Debug, Args)]
pub struct RenameArgs {
    /// Name of the virtual machine, its ID or the ID's first digits
    #[arg(value_name = "VM")]
    pub vm: String,

    /// The new name
    #[arg(value_name = "NAME")]
    pub name: String,
}

/// `skerry wait`.
#[derive(Debug, Args)]
pub struct WaitArgs {
    /// Wait until they are ready, and print their names: see --ready and --ready-cmd of run
    #[arg(long)]
    pub ready: bool,

    /// Wait for so long at most, and exit with 124: a number of seconds, or with ms, s, m, h
    #[arg(long, value_name = "TIME", requires = "ready")]
    pub timeout: Option<Span>,

    /// Names of virtual machines, their IDs or the IDs' first digits
    #[arg(required = true, value_name = "VM")]
    pub vms: Vec<String>,
}

/// `skerry stop`.
#[derive(Debug, Args)]
pub struct StopArgs {
    /// How long a command may take to end after SIGTERM: a number of seconds, or with ms, s, m, h
    #[arg(short, long, value_name = "TIME", default_value = "10")]
    pub time: Span,
    /// Names of virtual machines, their IDs or the IDs' first digits
    #[arg(required = true, value_name = "VM")]
    pub vms: Vec<String>,
}

/// `skerry kill`.
#[derive(Debug, Args)]
pub struct KillArgs {
    /// What to send to the command, by name or number; KILL ends the machine
    #[arg(short, long, value_name = "SIGNAL", default_value = "KILL")]
    pub signal: SignalArg,
    /// Names of virtual machines, their IDs or the IDs' first digits
    #[arg(required = true, value_name = "VM")]
    pub vms: Vec<String>,
}

/// `skerry rm`.
#[derive(Debug, Args)]
pub struct RmArgs {
    /// End those that run
    #[arg(short, long)]
    pub force: bool,
    /// Names of virtual machines, their IDs or the IDs' first digits
    #[arg(required = true, value_name = "VM")]
    pub vms: Vec<String>,
}

/// `skerry boot`.
#[derive(Debug, Args)]
pub struct BootArgs {
    /// Kernel: bzImage, ELF vmlinux, or a multiboot-1 kernel [default: the built-in one]
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,

    /// Initial RAM disk; for a multiboot kernel a module, "FILE ARGS" with its command line
    #[arg(long, value_name = "FILE")]
    pub initrd: Vec<String>,

    /// Kernel command line, used as it is [default: console=ttyS0 panic=-1 for Linux, else none]
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,

    /// Disk image, raw; FILE,ro to protect it
    #[arg(long, value_name = "FILE[,ro]")]
    pub disk: Vec<DiskArg>,

    /// First serial port: stdio, file=FILE, or none
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    pub serial: SerialArg,

    /// End when the guest resets, instead of booting it again
    #[arg(long)]
    pub no_reboot: bool,

    /// The network: without --network there is no card; a DHCP client in the guest sets it up
    #[command(flatten)]
    pub network: NetworkArgs,

    /// Port of a debug-exit device: a guest that writes V there ends skerry with (V << 1) | 1
    #[arg(long, value_name = "PORT", value_parser = parse_port)]
    pub debug_exit: Option<u16>,

    /// What is told at the end
    #[command(flatten)]
    pub stats: StatsArgs,

    /// The machine
    #[command(flatten)]
    pub machine: MachineArgs,
}

/// `skerry doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
}

/// `skerry version`.
#[derive(Debug, Args)]
pub struct VersionArgs {
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
}

/// `skerry completion`.
#[derive(Debug, Args)]
pub struct CompletionArgs {
    /// The shell
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

/// `skerry man`.
#[derive(Debug, Args)]
pub struct ManArgs {
    /// Folder to write to
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn definitions_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_command_keeps_its_own_flags() {
        let cli = Cli::try_parse_from(["skerry", "run", "demo", "ls", "-l", "--color"]).unwrap();
        let Command::Run(run) = cli.command else {
            panic!("not run");
        };
        assert_eq!(run.command, ["ls", "-l", "--color"]);
        let cli = Cli::try_parse_from(["skerry", "run", "-i", "demo", "--", "ls", "-l"]).unwrap();
        let Command::Run(run) = cli.command else {
            panic!("not run");
        };
        assert_eq!(run.command, ["ls", "-l"]);
    }
}
