//! How much of the host a machine may take.

use std::str::FromStr;

use clap::Args;

use super::Size;

/// Digits behind the point of a number of processors.
const DIGITS: usize = 9;

/// A number of processors, in billionths of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpusArg(pub u64);

impl FromStr for CpusArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "not a number of processors: write one such as 2 or 0.5".to_owned();
        let (whole, part) = text.split_once('.').unwrap_or((text, ""));
        let is_number = |digits: &str| digits.bytes().all(|byte| byte.is_ascii_digit());
        if !is_number(whole) || !is_number(part) || whole.len() + part.len() == 0 {
            return Err(wrong());
        }
        if part.len() > DIGITS {
            return Err(format!("no more than {DIGITS} digits behind the point"));
        }
        let whole: u64 = format!("0{whole}").parse().map_err(|_| wrong())?;
        let part: u64 = format!("{part:0<DIGITS$}").parse().map_err(|_| wrong())?;
        let nano_cpus = whole
            .checked_mul(1_000_000_000)
            .and_then(|whole| whole.checked_add(part))
            .ok_or_else(wrong)?;
        skerry_engine::MachineOptions::default()
            .set_nano_cpus(nano_cpus)
            .map_err(|error| error.to_string())?;
        Ok(Self(nano_cpus))
    }
}

/// An option of a machine's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StorageOpt(pub u64);

impl FromStr for StorageOpt {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some(("size", size)) => Ok(Self(size.parse::<Size>()?.0)),
            _ => Err("the only option is size, such as size=10G".to_owned()),
        }
    }
}

/// A number of processes; 0 and -1 are no limit, as docker has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PidsLimit(pub Option<u32>);

impl FromStr for PidsLimit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse::<i64>() {
            Ok(-1 | 0) => Ok(Self(None)),
            Ok(most) => u32::try_from(most)
                .map(|most| Self(Some(most)))
                .map_err(|_| "not a number of processes; -1 is no limit".to_owned()),
            Err(_) => Err("write a number, such as 100; -1 is no limit".to_owned()),
        }
    }
}

/// Bounds of a machine's resources, its processors and memory apart.
#[derive(Debug, Default, Args)]
pub struct ResourceArgs {
    /// The most processes and threads of the machine's commands; -1 for no limit
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub pids_limit: Option<PidsLimit>,

    /// Size of the machine's own disk: what is written beyond it fails with "No space left on device"
    /// [default: size=64G, of which the host spends what is written]
    #[arg(long, value_name = "size=SIZE", conflicts_with = "from_snapshot")]
    pub storage_opt: Option<StorageOpt>,

    /// Bound the machine's process by a cgroup of its own in PATH, below the mount of cgroups: its memory,
    /// and its time where --cpus is no whole number
    #[arg(long, value_name = "PATH")]
    pub cgroup_parent: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_may_be_fractions() {
        assert_eq!("0.5".parse(), Ok(CpusArg(500_000_000)));
        assert_eq!(".25".parse(), Ok(CpusArg(250_000_000)));
        assert_eq!("1.5".parse(), Ok(CpusArg(1_500_000_000)));
        assert_eq!("2".parse(), Ok(CpusArg(2_000_000_000)));
        assert_eq!("2.".parse(), Ok(CpusArg(2_000_000_000)));
        for wrong in [
            "",
            ".",
            "0",
            "0.001",
            "-1",
            "1e3",
            "65",
            "1.0000000001",
            "a",
            "1.5.2",
            "+1",
        ] {
            assert!(wrong.parse::<CpusArg>().is_err(), "{wrong}");
        }
        assert!("99999999999999999999".parse::<CpusArg>().is_err());
    }

    #[test]
    fn limits_of_processes_and_disks() {
        assert_eq!("100".parse(), Ok(PidsLimit(Some(100))));
        assert_eq!("-1".parse(), Ok(PidsLimit(None)));
        assert_eq!("0".parse(), Ok(PidsLimit(None)));
        assert!("-2".parse::<PidsLimit>().is_err() && "x".parse::<PidsLimit>().is_err());
        assert_eq!("size=10G".parse(), Ok(StorageOpt(10 << 30)));
        for wrong in ["10G", "size=", "size", "dm.basesize=10G", "size=x"] {
            assert!(wrong.parse::<StorageOpt>().is_err(), "{wrong}");
        }
    }
}
