//! What the verbs about images take.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
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
    /// Remove the last name of an image that a machine needs too: it stays until the machine is removed
    #[arg(short, long)]
    pub force: bool,
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
    /// What to get
    #[arg(
        required = true,
        value_name = "NAME",
        help = "Names: [HOST[:PORT]/]REPOSITORY[:TAG|@DIGEST]"
    )]
    pub names: Vec<Name>,
}

/// `skerry push`.
#[derive(Debug, Args)]
pub struct PushArgs {
    /// No progress, and of the output the name alone
    #[arg(short, long)]
    pub quiet: bool,
    /// What to send
    #[arg(
        required = true,
        value_name = "NAME",
        help = "Names: [HOST[:PORT]/]REPOSITORY[:TAG]"
    )]
    pub names: Vec<Name>,
}

/// `skerry tag`.
#[derive(Debug, Args)]
pub struct TagArgs {
    /// What names the image, as for run
    #[arg(value_name = "IMAGE")]
    pub image: String,
    /// What it is called from now on
    #[arg(
        value_name = "NAME",
        help = "The new name: [HOST[:PORT]/]REPOSITORY[:TAG]"
    )]
    pub name: Name,
}

/// `skerry save`.
#[derive(Debug, Args)]
pub struct SaveArgs {
    /// Write here [default: stdout, unless that is a terminal]
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Names or digests of images in the store
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<String>,
}

/// `skerry load`.
#[derive(Debug, Args)]
pub struct LoadArgs {
    /// Read from here: an archive, compressed or not, or a directory in the OCI layout [default: stdin]
    #[arg(short, long, value_name = "FILE")]
    pub input: Option<PathBuf>,
    /// Of the output the names alone
    #[arg(short, long)]
    pub quiet: bool,
}

/// `skerry image`.
#[derive(Debug, Args)]
pub struct ImageArgs {
    /// What to do
    #[command(subcommand)]
    pub verb: ImageVerb,
}

/// What can be done with images besides the verbs of their own.
#[derive(Debug, Subcommand)]
pub enum ImageVerb {
    /// Print all that is known of images, as JSON
    Inspect(ImageInspectArgs),
    /// Print how an image was built, the last step first
    History(ImageHistoryArgs),
    /// Remove images without a name, and what broken pulls have left
    Prune,
}

/// `skerry image inspect`.
#[derive(Debug, Args)]
pub struct ImageInspectArgs {
    /// Names or digests of images in the store
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<String>,
}

/// `skerry image history`.
#[derive(Debug, Args)]
pub struct ImageHistoryArgs {
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
    /// Whole commands
    #[arg(long)]
    pub no_trunc: bool,
    /// Name or digest of an image in the store
    #[arg(value_name = "IMAGE")]
    pub image: String,
}
