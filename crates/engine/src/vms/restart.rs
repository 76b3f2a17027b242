//! When a machine is started again without being asked, and after how long.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The pause before the first new start; it doubles with each one.
const FIRST: Duration = Duration::from_millis(100);
/// The longest pause.
const LONGEST: Duration = Duration::from_secs(60);
/// A machine that ran for so long ran well: the pauses begin anew.
const WELL: Duration = Duration::from_secs(10);

/// When a machine is started again without being asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// Never.
    #[default]
    No,
    /// When it ended with another exit status than 0: so often at most, or for ever.
    OnFailure(Option<u32>),
    /// Whenever it ended by itself.
    Always,
    /// The same, unless it was stopped before everything was started.
    UnlessStopped,
}

impl RestartPolicy {
    /// Whether a machine is started again that ended by itself with this status, after so many new
    /// starts.
    #[must_use]
    pub fn applies(self, code: u8, restarts: u32) -> bool {
        match self {
            Self::No => false,
            Self::OnFailure(most) => code != 0 && most.is_none_or(|most| restarts < most),
            Self::Always | Self::UnlessStopped => true,
        }
    }
}

impl fmt::Display for RestartPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::No => f.write_str("no"),
            Self::OnFailure(None) => f.write_str("on-failure"),
            Self::OnFailure(Some(most)) => write!(f, "on-failure:{most}"),
            Self::Always => f.write_str("always"),
            Self::UnlessStopped => f.write_str("unless-stopped"),
        }
    }
}

impl FromStr for RestartPolicy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unknown = || {
            format!(
                "{text:?} is no restart policy: use no, on-failure, on-failure:N, always or unless-stopped"
            )
        };
        match text {
            "no" => Ok(Self::No),
            "on-failure" => Ok(Self::OnFailure(None)),
            "always" => Ok(Self::Always),
            "unless-stopped" => Ok(Self::UnlessStopped),
            _ => {
                let most = text.strip_prefix("on-failure:").ok_or_else(unknown)?;
                // As docker has it, 0 sets no bound.
                let most: u32 = most.parse().map_err(|_| unknown())?;
                Ok(Self::OnFailure((most > 0).then_some(most)))
            }
        }
    }
}

/// The pauses before new starts.
#[derive(Debug)]
pub(super) struct Pauses(Duration);

impl Pauses {
    pub(super) fn new() -> Self {
        Self(FIRST)
    }

    /// The pause after a life of this length.
    pub(super) fn after(&mut self, life: Duration) -> Duration {
        if life >= WELL {
            self.0 = FIRST;
        }
        let pause = self.0;
        self.0 = (pause * 2).min(LONGEST);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_written_as_they_are_read() {
        for text in [
            "no",
            "on-failure",
            "on-failure:3",
            "always",
            "unless-stopped",
        ] {
            let policy: RestartPolicy = text.parse().expect("a policy");
            assert_eq!(policy.to_string(), text);
        }
        assert_eq!("on-failure:0".parse(), Ok(RestartPolicy::OnFailure(None)));
        for text in [
            "",
            "yes",
            "on-failure:",
            "on-failure:-1",
            "on-failure:x",
            "always:2",
        ] {
            assert!(text.parse::<RestartPolicy>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_policy_looks_at_status_and_count() {
        let thrice = RestartPolicy::OnFailure(Some(3));
        assert!(thrice.applies(1, 2) && !thrice.applies(1, 3) && !thrice.applies(0, 0));
        assert!(RestartPolicy::OnFailure(None).applies(137, u32::MAX));
        assert!(RestartPolicy::Always.applies(0, 9) && RestartPolicy::UnlessStopped.applies(0, 9));
        assert!(!RestartPolicy::No.applies(1, 0));
    }

    #[test]
    fn pauses_double_up_to_a_minute_and_begin_anew() {
        let mut pauses = Pauses::new();
        let brief = Duration::from_secs(1);
        let all: Vec<u128> = (0..12).map(|_| pauses.after(brief).as_millis()).collect();
        assert_eq!(all[..4], [100, 200, 400, 800]);
        assert_eq!(all[10..], [60_000, 60_000]);
        assert_eq!(pauses.after(WELL).as_millis(), 100);
        assert_eq!(pauses.after(brief).as_millis(), 200);
    }
}
