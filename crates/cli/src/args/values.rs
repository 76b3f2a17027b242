//! What values on the command line may be.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use skerry_engine::units;

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        units::bytes(text).map(Size)
    }
}

/// A length of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let scale = match &text[digits.len()..] {
            "ms" => 0.001,
            "" | "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            unit => return Err(format!("unknown unit {unit:?}: use ms, s, m or h")),
        };
        let number: f64 = digits
            .parse()
            .map_err(|_| "not a time: write a number of seconds, such as 30 or 1.5s".to_owned())?;
        Duration::try_from_secs_f64(number * scale)
            .map(Span)
            .map_err(|_| "out of range".to_owned())
    }
}

/// A signal of Linux on x86-64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SignalArg(pub u8);

impl FromStr for SignalArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        skerry_engine::signals::parse(text).map(Self)
    }
}

/// A disk of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskArg {
    /// The image file.
    pub path: PathBuf,
    /// Not written.
    pub read_only: bool,
}

impl FromStr for DiskArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (path, read_only) = match text.rsplit_once(',') {
            Some((path, "ro")) => (path, true),
            Some((path, "rw")) => (path, false),
            Some((_, option)) if !text.contains('/') || !option.contains('/') => {
                return Err(format!("unknown option {option:?}: use ro or rw"));
            }
            _ => (text, false),
        };
        if path.is_empty() {
            return Err("no file is named".to_owned());
        }
        Ok(Self {
            path: path.into(),
            read_only,
        })
    }
}

/// Where a serial port goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialArg {
    /// Output to stdout, input from stdin.
    Stdio,
    /// Output to a file.
    File(PathBuf),
    /// Nowhere.
    None,
}

impl FromStr for SerialArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "stdio" => Ok(Self::Stdio),
            "none" => Ok(Self::None),
            _ => match text.strip_prefix("file=") {
                Some(path) if !path.is_empty() => Ok(Self::File(path.into())),
                _ => Err("use stdio, file=FILE or none".to_owned()),
            },
        }
    }
}

pub(super) fn parse_port(text: &str) -> Result<u16, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u16::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| "not a port: write a number up to 0xffff, such as 0xf4".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!("512M".parse(), Ok(Size(512 << 20)));
        assert_eq!("8G".parse(), Ok(Size(8 << 30)));
        assert_eq!("4096".parse(), Ok(Size(4096)));
        assert!("".parse::<Size>().is_err());
        assert!("M".parse::<Size>().is_err());
        assert!("5X".parse::<Size>().is_err());
        assert!("99999999999999G".parse::<Size>().is_err());
    }

    #[test]
    fn times() {
        assert_eq!("250ms".parse(), Ok(Span(Duration::from_millis(250))));
        assert_eq!("1.5".parse(), Ok(Span(Duration::from_millis(1500))));
        assert_eq!("2m".parse(), Ok(Span(Duration::from_secs(120))));
        assert!("-1s".parse::<Span>().is_err());
        assert!("soon".parse::<Span>().is_err());
    }

    #[test]
    fn disks() {
        let disk = |text: &str| text.parse::<DiskArg>();
        assert!(disk("a.img,ro").unwrap().read_only);
        assert!(!disk("a.img").unwrap().read_only);
        assert!(disk("a.img,fast").is_err());
        assert!(disk(",ro").is_err());
    }
}
