//! Folders, volumes and memory file systems, as docker writes them.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Subcommand};
use skerry_engine::mounts::{MountKind, MountSpec};

use super::{Format, Size};

/// Where help texts have the options.
const HEADING: &str = "Folders and volumes";

/// The file systems of one machine besides its root.
#[derive(Clone, Debug, Default, Args)]
pub struct MountArgs {
    /// Show a folder or file of this host (its path begins with / or .) in the guest, or a volume, which
    /// is made if there is none of that name; :ro keeps the guest from writing
    #[arg(help_heading = HEADING, short = 'v', long, value_name = "HOST:GUEST[:ro]")]
    pub volume: Vec<VolumeArg>,

    /// The same in more words, such as type=bind,source=/srv,target=/srv,readonly; or type=volume; or
    /// type=tmpfs,target=/run,tmpfs-size=64M,tmpfs-mode=755
    #[arg(help_heading = HEADING, long, value_name = "KEY=VALUE,...")]
    pub mount: Vec<MountArg>,

    /// A file system in guest memory, such as /run:size=64M,mode=755
    #[arg(help_heading = HEADING, long, value_name = "GUEST[:OPTIONS]")]
    pub tmpfs: Vec<TmpfsArg>,
}

impl MountArgs {
    /// All of them.
    pub fn specs(self) -> Vec<MountSpec> {
        let volumes = self.volume.into_iter().map(|arg| arg.0);
        let mounts = self.mount.into_iter().map(|arg| arg.0);
        let memory = self.tmpfs.into_iter().map(|arg| arg.0);
        volumes.chain(mounts).chain(memory).collect()
    }
}

/// A mount in the short form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeArg(MountSpec);

/// A mount in the long form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountArg(MountSpec);

/// A memory file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TmpfsArg(MountSpec);

fn bind(source: &str) -> Result<MountKind, String> {
    // The machine may run in a process that is somewhere else.
    let source = std::path::absolute(PathBuf::from(source)).map_err(|error| error.to_string())?;
    Ok(MountKind::Bind { source })
}

/// A folder of the host by its path, or a volume by its name.
fn source(text: &str) -> Result<MountKind, String> {
    match text.starts_with(['/', '.']) {
        true => bind(text),
        false => Ok(MountKind::Volume {
            name: Some(text.to_owned()),
            no_copy: false,
        }),
    }
}

fn absolute(target: &str) -> Result<String, String> {
    match target.starts_with('/') {
        true => Ok(target.to_owned()),
        false => Err(format!(
            "{target:?} is no place in a guest: its path begins with /"
        )),
    }
}

impl FromStr for VolumeArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split(':').collect();
        let (kind, target, options) = match parts[..] {
            [target] => (
                MountKind::Volume {
                    name: None,
                    no_copy: false,
                },
                target,
                "",
            ),
            ["", ..] => return Err("name a folder or a volume before the colon".to_owned()),
            [from, target] => (source(from)?, target, ""),
            [from, target, options] => (source(from)?, target, options),
            _ => return Err("write HOST:GUEST or HOST:GUEST:ro".to_owned()),
        };
        let mut spec = MountSpec {
            kind,
            target: absolute(target)?,
            read_only: false,
        };
        for option in options.split(',').filter(|option| !option.is_empty()) {
            match (option, &mut spec.kind) {
                ("ro", _) => spec.read_only = true,
                ("rw", _) => spec.read_only = false,
                ("nocopy", MountKind::Volume { no_copy, .. }) => *no_copy = true,
                _ => {
                    return Err(format!(
                        "{option:?} is not supported here: use ro, rw or nocopy"
                    ));
                }
            }
        }
        Ok(Self(spec))
    }
}

/// An octal number of permissions.
fn mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o7777);
    mode.ok_or_else(|| format!("{text:?} is no mode: write it in octal, such as 1777"))
}

fn size(text: &str) -> Result<u64, String> {
    text.parse::<Size>().map(|size| size.0)
}

impl FromStr for TmpfsArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (target, options) = text.split_once(':').unwrap_or((text, ""));
        let (mut bytes, mut permissions, mut read_only) = (None, None, false);
        for option in options.split(',').filter(|option| !option.is_empty()) {
            match option.split_once('=').unwrap_or((option, "")) {
                ("size", value) => bytes = Some(size(value)?),
                ("mode", value) => permissions = Some(mode(value)?),
                ("ro", "") => read_only = true,
                // What it is anyway.
                ("rw" | "noexec" | "nosuid" | "nodev", "") => {}
                _ => {
                    return Err(format!(
                        "{option:?} is not supported: use size=, mode= or ro"
                    ));
                }
            }
        }
        Ok(Self(MountSpec {
            kind: MountKind::Tmpfs {
                size: bytes,
                mode: permissions,
            },
            target: absolute(target)?,
            read_only,
        }))
    }
}

/// What a long form says, before it is known what it means.
#[derive(Default)]
struct Words<'a> {
    kind: Option<&'a str>,
    source: Option<&'a str>,
    target: Option<&'a str>,
    read_only: bool,
    no_copy: bool,
    size: Option<u64>,
    mode: Option<u32>,
}

impl FromStr for MountArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = Words::default();
        for word in text.split(',') {
            match word.split_once('=').unwrap_or((word, "")) {
                ("type", kind) => words.kind = Some(kind),
                ("source" | "src", source) => words.source = Some(source),
                ("target" | "dst" | "destination", target) => words.target = Some(target),
                ("readonly" | "ro", "" | "true" | "1") => words.read_only = true,
                ("readonly" | "ro", "false" | "0") => words.read_only = false,
                ("volume-nocopy", "" | "true" | "1") => words.no_copy = true,
                ("tmpfs-size", value) => words.size = Some(size(value)?),
                ("tmpfs-mode", value) => words.mode = Some(mode(value)?),
                _ => {
                    return Err(format!(
                        "{word:?} is not supported: use type, source, target, readonly, volume-nocopy, \
                         tmpfs-size or tmpfs-mode"
                    ));
                }
            }
        }
        words.spec().map(Self)
    }
}

impl Words<'_> {
    fn spec(self) -> Result<MountSpec, String> {
        let target = self.target.ok_or("target= is missing")?;
        let kind = match (self.kind.unwrap_or("volume"), self.source) {
            ("bind", Some(source)) => bind(source)?,
            ("bind", None) => return Err("source= is missing".to_owned()),
            ("volume", name) => MountKind::Volume {
                name: name.map(str::to_owned),
                no_copy: self.no_copy,
            },
            ("tmpfs", None) => MountKind::Tmpfs {
                size: self.size,
                mode: self.mode,
            },
            ("tmpfs", Some(_)) => return Err("a tmpfs has no source".to_owned()),
            (kind, _) => {
                return Err(format!(
                    "there is no type {kind:?}: use bind, volume or tmpfs"
                ));
            }
        };
        let memory = matches!(kind, MountKind::Tmpfs { .. });
        if !memory && (self.size.is_some() || self.mode.is_some()) {
            return Err("tmpfs-size and tmpfs-mode are for type=tmpfs".to_owned());
        }
        if self.no_copy && !matches!(kind, MountKind::Volume { .. }) {
            return Err("volume-nocopy is for type=volume".to_owned());
        }
        Ok(MountSpec {
            kind,
            target: absolute(target)?,
            read_only: self.read_only,
        })
    }
}

/// `skerry volume`.
#[derive(Debug, Args)]
pub struct VolumeArgs {
    /// What to do.
    #[command(subcommand)]
    pub verb: VolumeVerb,
}

/// The verbs of `skerry volume`.
#[derive(Debug, Subcommand)]
pub enum VolumeVerb {
    /// Make a volume, and print its name
    Create(VolumeCreateArgs),
    /// List the volumes
    Ls(VolumeLsArgs),
    /// Print everything about volumes as JSON
    Inspect(VolumeNamesArgs),
    /// Remove volumes that no virtual machine has
    Rm(VolumeNamesArgs),
    /// Remove the volumes without a name of their own that no virtual machine has
    Prune(VolumePruneArgs),
}

/// `skerry volume create`.
#[derive(Debug, Args)]
pub struct VolumeCreateArgs {
    /// What guests may write, 256M at least: the host spends what is written [default: 64G]
    #[arg(long, value_name = "SIZE")]
    pub size: Option<Size>,

    /// Its name [default: one is made up]
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
}

/// `skerry volume ls`.
#[derive(Debug, Args)]
pub struct VolumeLsArgs {
    /// Names alone
    #[arg(short, long)]
    pub quiet: bool,

    /// How to print
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
}

/// Volumes by name.
#[derive(Debug, Args)]
pub struct VolumeNamesArgs {
    /// The volumes
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
}

/// `skerry volume prune`.
#[derive(Debug, Args)]
pub struct VolumePruneArgs {
    /// Those with a name too
    #[arg(short, long)]
    pub all: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn short(text: &str) -> Result<MountSpec, String> {
        text.parse::<VolumeArg>().map(|arg| arg.0)
    }

    #[test]
    fn the_short_form_is_dockers() {
        let spec = short("/srv/www:/usr/share/www:ro").unwrap();
        let source = PathBuf::from("/srv/www");
        assert_eq!(spec.kind, MountKind::Bind { source });
        assert_eq!(
            (spec.target.as_str(), spec.read_only),
            ("/usr/share/www", true)
        );
        let spec = short("data:/var/lib/data").unwrap();
        let named = MountKind::Volume {
            name: Some("data".to_owned()),
            no_copy: false,
        };
        assert_eq!((spec.kind, spec.read_only), (named, false));
        assert!(matches!(
            short("/var/lib/data").unwrap().kind,
            MountKind::Volume { name: None, .. }
        ));
        let MountKind::Bind { source } = short("./here:/there").unwrap().kind else {
            panic!("a folder");
        };
        assert!(source.is_absolute() && source.ends_with("here"));
        for bad in [
            "",
            ":",
            ":/x",
            "a:b",
            "/a:/b:zz",
            "/a:/b:ro:x",
            "/a:/b:nocopy",
        ] {
            assert!(short(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_long_form_is_dockers() {
        let long = |text: &str| text.parse::<MountArg>().map(|arg| arg.0);
        let spec = long("type=bind,source=/a,target=/b,readonly").unwrap();
        assert!(
            spec.read_only
                && spec.kind
                    == MountKind::Bind {
                        source: "/a".into()
                    }
        );
        let spec = long("type=tmpfs,dst=/t,tmpfs-size=1M,tmpfs-mode=700").unwrap();
        let kind = MountKind::Tmpfs {
            size: Some(1 << 20),
            mode: Some(0o700),
        };
        assert_eq!(spec.kind, kind);
        assert!(matches!(
            long("src=v,dst=/t,volume-nocopy").unwrap().kind,
            MountKind::Volume { no_copy: true, .. }
        ));
        for bad in [
            "type=bind,target=/b",
            "type=nfs,target=/b",
            "source=a",
            "type=tmpfs,source=x,target=/b",
            "type=bind,source=/a,target=/b,bind-propagation=shared",
            "type=volume,target=/b,tmpfs-size=1M",
        ] {
            assert!(long(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn memory_has_size_and_mode() {
        let tmpfs = |text: &str| text.parse::<TmpfsArg>().map(|arg| arg.0.kind);
        let kind = |size, mode| MountKind::Tmpfs { size, mode };
        assert_eq!(tmpfs("/t"), Ok(kind(None, None)));
        assert_eq!(
            tmpfs("/t:size=2M,mode=0755,noexec"),
            Ok(kind(Some(2 << 20), Some(0o755)))
        );
        assert!(tmpfs("/t:exec").is_err() && tmpfs("t").is_err() && tmpfs("/t:mode=9").is_err());
    }
}
