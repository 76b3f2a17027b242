//! How an image is named on the command line.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::registry::Name;

/// Where an image comes from.
///
/// In the forms with a path and a tag the first `:` ends the path, as for skopeo.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ImageRef {
    /// `oci:DIR[:TAG]`: a directory in the OCI image layout.
    OciLayout {
        /// The directory.
        dir: PathBuf,
        /// The value of `org.opencontainers.image.ref.name`, or its part after the last `:`.
        tag: Option<String>,
    },
    /// `oci-archive:TAR[:TAG]`: such a directory in a tar file.
    OciArchive {
        /// The tar file.
        path: PathBuf,
        /// As in [`ImageRef::OciLayout`].
        tag: Option<String>,
    },
    /// `docker-archive:TAR[:NAME[:TAG]]`: what `docker save` writes.
    DockerArchive {
        /// The tar file.
        path: PathBuf,
        /// One of its `RepoTags`.
        tag: Option<String>,
    },
    /// `dir:ROOTFS`: a directory that is the root file system itself.
    Directory {
        /// The directory.
        dir: PathBuf,
    },
    /// A name in the store.
    Stored(String),
}

/// Why a text names no image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RefError {
    /// Nothing at all.
    #[error(
        "An image name is empty; give a name from `skerry images` or `oci:DIR`, `oci-archive:TAR`, `docker-archive:TAR`, `dir:ROOTFS`"
    )]
    Empty,
    /// A form without its path.
    #[error("Image '{0}' lacks the path after the colon; write `{0}PATH`")]
    NoPath(String),
    /// A colon with nothing behind it.
    #[error("Image '{image}' ends in a colon without a tag; add the tag or leave the colon out")]
    NoTag {
        /// The whole text.
        image: String,
    },
    /// A tag with a character that none has.
    #[error(
        "Tag '{tag}' of image '{image}' has the character {character:?}; tags are made of letters, digits and . _ - + / : @"
    )]
    BadTag {
        /// The whole text.
        image: String,
        /// Its tag.
        tag: String,
        /// The character.
        character: char,
    },
    /// A form like `docker://`, for which there is no code here.
    #[error(
        "Image '{image}' is in a form that is not known, '{scheme}:'; copy it to a local one first, for example `skopeo copy {image} oci:DIR:TAG`"
    )]
    UnknownScheme {
        /// The whole text.
        image: String,
        /// What stands before its colon.
        scheme: String,
    },
    /// A plain name with a character that none has.
    #[error(
        "Image name '{image}' has {character:?} where no name has it; names start with a letter or digit and go on with those and . _ - / : @, and a path needs a form before it, for example `oci:{image}`"
    )]
    BadName {
        /// The whole text.
        image: String,
        /// The character.
        character: char,
    },
    /// Far too long.
    #[error("An image name of {0} bytes is too long; 4096 is the most")]
    TooLong(usize),
}

fn path_and_tag(image: &str, rest: &str) -> Result<(PathBuf, Option<String>), RefError> {
    let (path, tag) = match rest.split_once(':') {
        Some((path, tag)) => (path, Some(tag)),
        None => (rest, None),
    };
    if path.is_empty() {
        let scheme = image.split_inclusive(':').next().unwrap_or(image);
        return Err(RefError::NoPath(scheme.to_owned()));
    }
    if let Some(tag) = tag {
        if tag.is_empty() {
            return Err(RefError::NoTag {
                image: image.to_owned(),
            });
        }
        if let Some(character) = tag.chars().find(|c| !is_tag_char(*c)) {
            let (image, tag) = (image.to_owned(), tag.to_owned());
            return Err(RefError::BadTag {
                image,
                tag,
                character,
            });
        }
    }
    Ok((path.into(), tag.map(str::to_owned)))
}

fn is_tag_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || "._-+/:@".contains(c)
}

impl FromStr for ImageRef {
    type Err = RefError;

    fn from_str(image: &str) -> Result<Self, RefError> {
        if image.len() > 4096 {
            return Err(RefError::TooLong(image.len()));
        }
        let with_tag = |rest| path_and_tag(image, rest);
        match image.split_once(':') {
            Some(("oci", rest)) => {
                with_tag(rest).map(|(dir, tag)| ImageRef::OciLayout { dir, tag })
            }
            Some(("oci-archive", rest)) => {
                with_tag(rest).map(|(path, tag)| ImageRef::OciArchive { path, tag })
            }
            Some(("docker-archive", rest)) => {
                with_tag(rest).map(|(path, tag)| ImageRef::DockerArchive { path, tag })
            }
            Some(("dir", "")) => Err(RefError::NoPath("dir:".to_owned())),
            Some(("dir", rest)) => Ok(ImageRef::Directory { dir: rest.into() }),
            Some((scheme, rest))
                if rest.starts_with("//")
                    || matches!(
                        scheme,
                        "docker-daemon" | "containers-storage" | "sif" | "ostree"
                    ) =>
            {
                Err(RefError::UnknownScheme {
                    image: image.to_owned(),
                    scheme: scheme.to_owned(),
                })
            }
            _ => stored_name(image),
        }
    }
}

fn stored_name(image: &str) -> Result<ImageRef, RefError> {
    let mut chars = image.chars();
    let Some(first) = chars.next() else {
        return Err(RefError::Empty);
    };
    // The host of a registry may be an IPv6 address in brackets.
    let bad = if first == '[' && image.parse::<Name>().is_ok() {
        None
    } else if first.is_ascii_alphanumeric() {
        chars.find(|c| !(c.is_ascii_alphanumeric() || "._-/:@".contains(*c)))
    } else {
        Some(first)
    };
    match bad {
        Some(character) => Err(RefError::BadName {
            image: image.to_owned(),
            character,
        }),
        None => Ok(ImageRef::Stored(image.to_owned())),
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, path, tag) = match self {
            ImageRef::OciLayout { dir, tag } => ("oci", dir, tag.as_ref()),
            ImageRef::OciArchive { path, tag } => ("oci-archive", path, tag.as_ref()),
            ImageRef::DockerArchive { path, tag } => ("docker-archive", path, tag.as_ref()),
            ImageRef::Directory { dir } => ("dir", dir, None),
            ImageRef::Stored(name) => return f.write_str(name),
        };
        write!(f, "{scheme}:{}", path.display())?;
        tag.map_or(Ok(()), |tag| write!(f, ":{tag}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn each_form() {
        let oci = |dir: &str, tag: Option<&str>| ImageRef::OciLayout {
            dir: dir.into(),
            tag: tag.map(str::to_owned),
        };
        for (text, image) in [
            ("oci:a/b", oci("a/b", None)),
            ("oci:/a/b:1.2-x_y", oci("/a/b", Some("1.2-x_y"))),
            (
                "oci:/a:docker.io/lib/x:1",
                oci("/a", Some("docker.io/lib/x:1")),
            ),
            (
                "oci-archive:x.tar",
                ImageRef::OciArchive {
                    path: "x.tar".into(),
                    tag: None,
                },
            ),
            (
                "docker-archive:x.tar:debian:12",
                ImageRef::DockerArchive {
                    path: "x.tar".into(),
                    tag: Some("debian:12".into()),
                },
            ),
            (
                "dir:/srv/a:b",
                ImageRef::Directory {
                    dir: "/srv/a:b".into(),
                },
            ),
            ("demo", ImageRef::Stored("demo".into())),
            (
                "library/debian:12",
                ImageRef::Stored("library/debian:12".into()),
            ),
        ] {
            assert_eq!(text.parse(), Ok(image.clone()), "{text}");
            assert_eq!(image.to_string(), text);
        }
    }

    #[test]
    fn each_error() {
        let error = |text: &str| text.parse::<ImageRef>().unwrap_err();
        assert_eq!(error(""), RefError::Empty);
        assert_eq!(error("oci:"), RefError::NoPath("oci:".into()));
        assert_eq!(
            error("docker-archive::x"),
            RefError::NoPath("docker-archive:".into())
        );
        assert_eq!(error("dir:"), RefError::NoPath("dir:".into()));
        assert!(matches!(error("oci:a:"), RefError::NoTag { .. }));
        assert!(matches!(
            error("oci:a:b c"),
            RefError::BadTag { character: ' ', .. }
        ));
        assert!(matches!(
            error("docker://debian"),
            RefError::UnknownScheme { .. }
        ));
        assert!(matches!(
            error("./rootfs"),
            RefError::BadName { character: '.', .. }
        ));
        assert!(matches!(
            error("/tmp/x.tar"),
            RefError::BadName { character: '/', .. }
        ));
        assert!(matches!(
            error("a b"),
            RefError::BadName { character: ' ', .. }
        ));
        assert_eq!(error(&"a".repeat(5000)), RefError::TooLong(5000));
    }

    proptest! {
        #[test]
        fn what_parses_prints_as_itself(text in "(oci:|dir:|oci-archive:|docker-archive:)?[ -~]{0,40}") {
            if let Ok(image) = text.parse::<ImageRef>() {
                prop_assert_eq!(image.to_string(), text);
            }
        }

        #[test]
        fn nothing_panics(text in "\\PC*") {
            let _ = text.parse::<ImageRef>();
        }
    }
}
