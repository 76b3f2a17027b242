//! `skerry snapshot` and its verbs.

use std::path::PathBuf;

use clap::builder::{PathBufValueParser, TypedValueParser};
use clap::{Args, Subcommand};
use skerry_engine::Name;

use super::Format;

/// `skerry snapshot`.
#[derive(Debug, Args)]
#[command(disable_help_subcommand = true)]
pub struct SnapshotArgs {
    /// What to do.
    #[command(subcommand)]
    pub verb: SnapshotVerb,
}

/// The verbs of `skerry snapshot`. A snapshot is called by a name, its ID or the ID's first digits.
#[derive(Debug, Subcommand)]
pub enum SnapshotVerb {
    /// Take a snapshot of a running virtual machine, which goes on meanwhile
    Create(SnapshotCreateArgs),
    /// List the snapshots in the store
    Ls(SnapshotLsArgs),
    /// Verify a snapshot and print everything about it as JSON
    Inspect(SnapshotInspectArgs),
    /// Remove snapshots from the store
    Rm(SnapshotRmArgs),
    /// Copy a snapshot out of the store
    Export(SnapshotExportArgs),
    /// Verify a snapshot and take it into the store
    Import(SnapshotImportArgs),
    /// Send a snapshot, and what it is a difference to, to a registry
    Push(SnapshotPushArgs),
    /// Get a snapshot, and what it is a difference to, from a registry
    Pull(SnapshotPullArgs),
    /// Remove the kept starts of images, which the next run makes again, and what killed processes
    /// left
    Prune,
}

/// `skerry snapshot create`.
#[derive(Debug, Args)]
pub struct SnapshotCreateArgs {
    /// Only what differs from the snapshot that the machine goes on from, or that was taken of it last
    #[arg(long)]
    pub diff: bool,
    /// Put the image's root file system into it, so that it can go where the image is not
    #[arg(long)]
    pub with_image: bool,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
    /// Name of the virtual machine, its ID or the ID's first digits
    #[arg(value_name = "VM")]
    pub vm: String,
    /// Name it, taking the name from another that has it
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
}

/// `skerry snapshot push`.
#[derive(Debug, Args)]
pub struct SnapshotPushArgs {
    /// Show no progress
    #[arg(short, long)]
    pub quiet: bool,
    /// The snapshot
    #[arg(value_name = "SNAPSHOT")]
    pub name: String,
    /// Where to, as of an image: `registry.example/snapshots/web:v1`
    #[arg(value_name = "NAME")]
    pub target: Name,
}

/// `skerry snapshot pull`.
#[derive(Debug, Args)]
pub struct SnapshotPullArgs {
    /// Show no progress
    #[arg(short, long)]
    pub quiet: bool,
    /// Name it so in the store, taking the name from another that has it
    #[arg(long, value_name = "SNAPSHOT")]
    pub name: Option<String>,
    /// Where from, as of an image: `registry.example/snapshots/web:v1`
    #[arg(value_name = "NAME")]
    pub source: Name,
}

/// `skerry snapshot ls`.
#[derive(Debug, Args)]
pub struct SnapshotLsArgs {
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
    /// Only the IDs
    #[arg(short, long)]
    pub quiet: bool,
}

/// `skerry snapshot inspect`.
#[derive(Debug, Args)]
pub struct SnapshotInspectArgs {
    /// Name, ID or its first digits
    #[arg(value_name = "NAME")]
    pub name: String,
}

/// `skerry snapshot rm`.
#[derive(Debug, Args)]
pub struct SnapshotRmArgs {
    /// Names, IDs or their first digits; by one of several names, only that name is removed
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
}

/// `skerry snapshot export`.
#[derive(Debug, Args)]
pub struct SnapshotExportArgs {
    /// With all that the snapshot is a difference to
    #[arg(long)]
    pub with_parents: bool,
    /// Name, ID or its first digits
    #[arg(value_name = "NAME")]
    pub name: String,
    /// What to make: a tar archive if it ends in .tar, else a directory
    #[arg(value_name = "TARGET", value_parser = place())]
    pub target: PathBuf,
}

/// `skerry snapshot import`.
#[derive(Debug, Args)]
pub struct SnapshotImportArgs {
    /// Directory or tar archive, as export makes it
    #[arg(value_name = "SOURCE", value_parser = place())]
    pub source: PathBuf,
    /// Name it, taking the name from another that has it
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
}

/// A file or directory, never a stream: what is exported appears whole, by a rename.
fn place() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(|path| match path.as_os_str() == "-" {
        true => Err("a snapshot can't go through a pipe: name a .tar file or a directory"),
        false => Ok(path),
    })
}
