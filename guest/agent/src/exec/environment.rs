//! The environment of a command: defaults, then the guest's variables, then the request's.

use std::ffi::CString;

use skerry_protocol::message::{ExecFailure, FailureKind, GuestString};

use super::{failure, show};

/// Where programs are looked for when nobody says otherwise.
pub const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Variables in the order of their first mention; a later value replaces an earlier one.
#[derive(Debug, Default)]
pub struct Environment {
    variables: Vec<(GuestString, GuestString)>,
}

impl Environment {
    /// Defaults for a command of a user with this home.
    #[must_use]
    pub fn new(home: &str, hostname: &[u8], tty: bool) -> Self {
        let mut environment = Self::default();
        environment.set(b"PATH", DEFAULT_PATH);
        environment.set(b"HOSTNAME", hostname);
        environment.set(b"HOME", home.as_bytes());
        if tty {
            environment.set(b"TERM", b"xterm");
        }
        environment
    }

    /// Sets one variable.
    pub fn set(&mut self, name: &[u8], value: &[u8]) {
        match self.variables.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => *old = value.to_vec(),
            None => self.variables.push((name.to_vec(), value.to_vec())),
        }
    }

    /// Sets variables after checking that they can be passed on.
    pub fn extend(&mut self, more: &[(GuestString, GuestString)]) -> Result<(), ExecFailure> {
        for (name, value) in more {
            if name.is_empty() || name.contains(&b'=') || name.contains(&0) || value.contains(&0) {
                let text = format!("Environment variable \"{}\" is not valid", show(name));
                return Err(failure(FailureKind::BadRequest, text));
            }
            self.set(name, value);
        }
        Ok(())
    }

    /// Value of a variable.
    #[must_use]
    pub fn get(&self, name: &[u8]) -> Option<&[u8]> {
        let found = self.variables.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| value.as_slice())
    }

    /// `NAME=value` strings for `execve`.
    pub fn strings(&self) -> Result<Vec<CString>, ExecFailure> {
        self.variables
            .iter()
            .map(|(name, value)| {
                CString::new([name.as_slice(), value.as_slice()].join(&b'=')).map_err(|_| {
                    let text = format!("Environment variable \"{}\" holds a NUL", show(name));
                    failure(FailureKind::BadRequest, text)
                })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_values_win_and_order_stays() {
        let mut environment = Environment::new("/root", b"box", true);
        let more = [
            (b"A".to_vec(), b"1".to_vec()),
            (b"PATH".to_vec(), b"/x".to_vec()),
        ];
        environment.extend(&more).unwrap();
        environment
            .extend(&[(b"A".to_vec(), b"2=3".to_vec())])
            .unwrap();
        let strings: Vec<_> = environment.strings().unwrap();
        let strings: Vec<&str> = strings.iter().map(|s| s.to_str().unwrap()).collect();
        assert_eq!(
            strings,
            [
                "PATH=/x",
                "HOSTNAME=box",
                "HOME=/root",
                "TERM=xterm",
                "A=2=3"
            ]
        );
    }

    #[test]
    fn names_that_no_program_could_see_are_refused() {
        for name in [&b""[..], b"A=B", b"A\0"] {
            let mut environment = Environment::default();
            let result = environment.extend(&[(name.to_vec(), Vec::new())]);
            assert_eq!(result.unwrap_err().kind, FailureKind::BadRequest);
        }
    }
}
