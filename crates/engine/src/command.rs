//! What runs in a machine: the image's configuration merged with what the user says.

use serde::{Deserialize, Serialize};
use skerry_oci::ImageConfig;
use skerry_protocol::message::{ExecRequest, GuestString, WinSize};

/// The search path of a command whose image sets none, as other container tools have it.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A command, as the user describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(default, deny_unknown_fields)]
pub struct CommandSpec {
    /// Command and arguments in place of the image's.
    pub command: Vec<String>,
    /// Program in place of the image's entry point.
    pub entrypoint: Option<String>,
    /// Variables on top of the image's.
    pub env: Vec<(String, String)>,
    /// Working directory in place of the image's.
    pub working_dir: Option<String>,
    /// `USER[:GROUP]` in place of the image's.
    pub user: Option<String>,
    /// A terminal of this size.
    pub tty: Option<WinSize>,
    /// The command reads input.
    pub stdin: bool,
}

/// What every command in a machine has unless it says otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(default, deny_unknown_fields)]
pub struct Surroundings {
    /// Variables as `NAME=VALUE`.
    pub env: Vec<String>,
    /// Working directory; empty is `/`.
    pub working_dir: String,
    /// `USER[:GROUP]`; empty is root.
    pub user: String,
}

impl Surroundings {
    /// Those of an image.
    #[must_use]
    pub fn of(config: &ImageConfig) -> Self {
        Self {
            env: config.env.clone(),
            working_dir: config.working_dir.clone(),
            user: config.user.clone(),
        }
    }

    /// Those that further commands in the machine of `command` find.
    #[must_use]
    pub fn with(mut self, command: &CommandSpec) -> Self {
        let added = command.env.iter();
        self.env
            .extend(added.map(|(name, value)| format!("{name}={value}")));
        if let Some(folder) = &command.working_dir {
            self.working_dir.clone_from(folder);
        }
        if let Some(user) = &command.user {
            self.user.clone_from(user);
        }
        self
    }
}

/// What the agent is asked to run: `argv` with what `spec` says of the rest.
#[must_use]
pub fn request(argv: Vec<String>, surroundings: &Surroundings, spec: &CommandSpec) -> ExecRequest {
    let pair = |name: &str, value: &str| -> (GuestString, GuestString) {
        (name.as_bytes().to_vec(), value.as_bytes().to_vec())
    };
    let mut env = vec![pair("PATH", DEFAULT_PATH)];
    if spec.tty.is_some() {
        env.push(pair("TERM", "xterm"));
    }
    for variable in &surroundings.env {
        let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
        env.push(pair(name, value));
    }
    env.extend(spec.env.iter().map(|(name, value)| pair(name, value)));
    let user = spec.user.as_ref().unwrap_or(&surroundings.user);
    let cwd = spec.working_dir.as_ref();
    let cwd = cwd.unwrap_or(&surroundings.working_dir);
    ExecRequest {
        env,
        cwd: cwd.clone().into_bytes(),
        user: user.clone(),
        tty: spec.tty,
        stdin: spec.stdin,
        ..ExecRequest::new(argv)
    }
}

/// Entry point, then command; an entry point of the user's drops the image's command too.
#[must_use]
pub fn argv(config: &ImageConfig, spec: &CommandSpec) -> Vec<String> {
    let mut argv = match &spec.entrypoint {
        Some(program) if program.is_empty() => Vec::new(),
        Some(program) => vec![program.clone()],
        None => config.entrypoint.clone(),
    };
    if !spec.command.is_empty() {
        argv.extend(spec.command.iter().cloned());
    } else if spec.entrypoint.is_none() {
        argv.extend(config.cmd.iter().cloned());
    }
    argv
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn command_and_entry_point_merge_as_elsewhere() {
        let config = ImageConfig {
            entrypoint: words("/entry -x"),
            cmd: words("default args"),
            ..ImageConfig::default()
        };
        let argv = |entrypoint: Option<&str>, command: &str| {
            let spec = CommandSpec {
                entrypoint: entrypoint.map(str::to_owned),
                command: words(command),
                ..CommandSpec::default()
            };
            argv(&config, &spec)
        };
        assert_eq!(argv(None, ""), words("/entry -x default args"));
        assert_eq!(argv(None, "other"), words("/entry -x other"));
        assert_eq!(argv(Some("sh"), ""), words("sh"));
        assert_eq!(argv(Some("sh"), "-c true"), words("sh -c true"));
        assert_eq!(argv(Some(""), "ls"), words("ls"));
    }

    #[test]
    fn later_commands_find_what_the_first_one_was_given() {
        let config = ImageConfig {
            env: words("A=image B=image"),
            user: "www".to_owned(),
            ..ImageConfig::default()
        };
        let first = CommandSpec {
            env: vec![("A".to_owned(), "user".to_owned())],
            working_dir: Some("/srv".to_owned()),
            ..CommandSpec::default()
        };
        let surroundings = Surroundings::of(&config).with(&first);
        let later = request(words("env"), &surroundings, &CommandSpec::default());
        assert_eq!((later.user.as_str(), &later.cwd[..]), ("www", &b"/srv"[..]));
        let last = |name: &str| {
            let mut env = later.env.iter().rev();
            env.find(|(key, _)| key == name.as_bytes())
                .map(|(_, value)| value.clone())
        };
        assert_eq!(last("A"), Some(b"user".to_vec()));
        assert_eq!(last("B"), Some(b"image".to_vec()));
    }
}
