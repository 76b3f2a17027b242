//! From the making of a machine to its removal.

use std::str::FromStr;

use clap::Args;
use skerry_engine::vms::RestartPolicy;

use super::{Format, Span};

/// What a machine is known by, and when it is started again.
#[derive(Clone, Debug, Default, Args)]
pub struct LifecycleArgs {
    /// Note something about the machine; KEY alone has an empty value
    #[arg(short = 'l', long = "label", value_name = "KEY[=VALUE]")]
    pub labels: Vec<String>,

    /// When to start the machine again after its command has ended: no, on-failure, on-failure:N, always
    /// or unless-stopped
    #[arg(long, value_name = "POLICY", default_value_t, conflicts_with = "rm")]
    pub restart: RestartPolicy,
}

/// `skerry start`.
#[derive(Debug, Args)]
pub struct StartArgs {
    /// Pass on what the command writes, and end with its exit status; for one machine
    #[arg(short, long)]
    pub attach: bool,

    /// Pass stdin to the command, too: it must have been made with -i
    #[arg(short, long)]
    pub interactive: bool,

    /// Keys that leave the command to itself, where it has a terminal
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    pub detach_keys: Keys,

    /// Start all that a restart policy has run for ever, unless they were stopped (unless-stopped): for a
    /// script that runs when the host has booted
    #[arg(long, conflicts_with_all = ["attach", "interactive", "vms"])]
    pub all_restarting: bool,

    /// Names of virtual machines, their IDs or the IDs' first digits
    #[arg(required_unless_present = "all_restarting", value_name = "VM")]
    pub vms: Vec<String>,
}

/// `skerry attach`.
#[derive(Debug, Args)]
pub struct AttachArgs {
    /// Don't pass stdin on
    #[arg(long)]
    pub no_stdin: bool,

    /// Pass signals on to the command
    #[arg(long, value_name = "WHETHER", default_value_t = true, num_args = 0..=1, require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub sig_proxy: bool,

    /// Keys that leave the command to itself, where it has a terminal
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    pub detach_keys: Keys,

    /// Name of the virtual machine, its ID or the ID's first digits
    #[arg(value_name = "VM")]
    pub vm: String,
}

/// `skerry restart`.
#[derive(Debug, Args)]
pub struct RestartArgs {
    /// How long a command may take to end after SIGTERM: a number of seconds, or with ms, s, m, h
    #[arg(short, long, value_name = "TIME", default_value = "10")]
    pub time: Span,

    /// Names of virtual machines, their IDs or the IDs' first digits
    #[arg(required = true, value_name = "VM")]
    pub vms: Vec<String>,
}

/// `skerry top`.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,

    /// Name of the virtual machine, its ID or the ID's first digits
    #[arg(value_name = "VM")]
    pub vm: String,
}

/// `skerry cp`.
#[derive(Debug, Args)]
pub struct CpArgs {
    /// Keep owners and groups
    #[arg(short, long)]
    pub archive: bool,

    /// Copy what a symbolic link that is named points to
    #[arg(short = 'L', long)]
    pub follow_link: bool,

    /// VM:PATH or a path of this machine; PATH/. for what is in a folder; - for a tar archive on stdin
    #[arg(value_name = "SRC")]
    pub from: String,

    /// The same; - for a tar archive on stdout
    #[arg(value_name = "DST")]
    pub to: String,
}

/// `skerry events`.
#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Begin with what happened then: RFC 3339, seconds since 1970, or a span before now (10m)
    #[arg(long, value_name = "TIME")]
    pub since: Option<String>,

    /// End with what happened then
    #[arg(long, value_name = "TIME")]
    pub until: Option<String>,

    /// Only some: type=, event=, machine=, image= or label=KEY[=VALUE]
    #[arg(short, long, value_name = "KEY=VALUE")]
    pub filter: Vec<Filter>,

    /// How to print; in JSON, a line for each
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
}

/// `skerry prune`.
#[derive(Debug, Args)]
pub struct PruneArgs {
    /// Only some: label=KEY[=VALUE]
    #[arg(long, value_name = "KEY=VALUE")]
    pub filter: Vec<Filter>,
}

/// `KEY=VALUE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// What is looked at.
    pub key: String,
    /// What it has to be.
    pub value: String,
}

impl FromStr for Filter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok(Self {
                key: key.to_owned(),
                value: value.to_owned(),
            }),
            _ => Err(format!("{text:?} is no filter: write KEY=VALUE")),
        }
    }
}

/// Keys, as bytes that a terminal sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys(pub Vec<u8>);

impl FromStr for Keys {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let key = |word: &str| match (word.strip_prefix("ctrl-"), word.as_bytes()) {
            (Some(key), _) => match key.as_bytes() {
                [key @ (b'a'..=b'z' | b'@' | b'[' | b']' | b'\\' | b'^' | b'_')] => {
                    Some(key & 0x1f)
                }
                _ => None,
            },
            (None, &[key]) if key.is_ascii_graphic() => Some(key),
            _ => None,
        };
        let keys: Option<Vec<u8>> = match text {
            "" => Some(Vec::new()),
            _ => text.split(',').map(key).collect(),
        };
        keys.map(Self).ok_or_else(|| {
            format!("{text:?} are no keys: write letters or ctrl-LETTER, with commas between them")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_what_a_terminal_sends() {
        let keys = |text: &str| text.parse::<Keys>().map(|keys| keys.0);
        assert_eq!(keys("ctrl-p,ctrl-q"), Ok(vec![0x10, 0x11]));
        assert_eq!(keys("ctrl-@,x"), Ok(vec![0, b'x']));
        assert_eq!(keys(""), Ok(Vec::new()));
        for text in ["ctrl-", "ctrl-pq", "xy", ",", "ctrl-A", "\u{e4}"] {
            assert!(keys(text).is_err(), "{text}");
        }
    }
}
