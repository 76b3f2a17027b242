//! What the verbs about images take.

use clap::{Args, ValueEnum};
use skerry_engine::Name;

use super::Format;

/// `skerry images`.
#[derive(Debug, Args)]
pub struct ImagesArgs {
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
    /// Only the digests
    #[arg(short, long)]
    pub quiet: bool,
}

/// `skerry rmi`.
#[derive(Debug, Args)]
pub struct RmiArgs {
    /// Names or digests
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<String>,
}

/// When an image is got from its registry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum PullArg {
    /// When the store doesn't have it
    #[default]
    Missing,
    /// Each time
    Always,
    /// Not at all
    Never,
}

/// `skerry pull`.
#[derive(Debug, Args)]
pub struct PullArgs {
    /// No notes and no progress
    #[arg(short, long)]
    pub quiet: bool,
    /// Names: [HOST[:PORT]/]REPOSITORY[:TAG|@DIGEST]
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<Name>,
}

/// `skerry push`.
#[derive(Debug, Args)]
pub struct PushArgs {
    /// No progress, and of the output the name alone
    #[arg(short, long)]
    pub quiet: bool,
    /// Names: [HOST[:PORT]/]REPOSITORY[:TAG]
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<Name>,
}

/// `skerry tag`.
#[derive(Debug, Args)]
pub struct TagArgs {
    /// What names the image, as for run
    #[arg(value_name = "IMAGE")]
    pub image: String,
    /// The new name: [HOST[:PORT]/]REPOSITORY[:TAG]
    #[arg(value_name = "NAME")]
    pub name: Name,
}
