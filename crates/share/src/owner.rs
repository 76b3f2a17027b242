//! Whose files they are, on either side.

/// How the host's users and groups appear in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owners {
    /// As they are: the process is root and can give files to anybody.
    Same,
    /// The process's own user and group are the guest's root; others appear as they are. What the guest
    /// makes belongs to the process's user whoever makes it.
    MineAreRoots { user: u32, group: u32 },
}

impl Owners {
    pub(crate) fn of_process() -> Self {
        let user = rustix::process::geteuid();
        match user.is_root() && knows_all_users() {
            true => Self::Same,
            false => Self::MineAreRoots {
                user: user.as_raw(),
                group: rustix::process::getegid().as_raw(),
            },
        }
    }

    pub(crate) fn user_shown(self, host: u32) -> u32 {
        match self {
            Self::MineAreRoots { user, .. } if user == host => 0,
            _ => host,
        }
    }

    pub(crate) fn group_shown(self, host: u32) -> u32 {
        match self {
            Self::MineAreRoots { group, .. } if group == host => 0,
            _ => host,
        }
    }

    pub(crate) fn user_meant(self, guest: u32) -> u32 {
        match self {
            Self::MineAreRoots { user, .. } if guest == 0 => user,
            _ => guest,
        }
    }

    pub(crate) fn group_meant(self, guest: u32) -> u32 {
        match self {
            Self::MineAreRoots { group, .. } if guest == 0 => group,
            _ => guest,
        }
    }
}

/// Whether this user namespace has all users, as the host's own does (user_namespaces(7)).
fn knows_all_users() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let last = |line: &str| line.split_whitespace().nth(2)?.parse::<u64>().ok();
    map.lines().filter_map(last).sum::<u64>() >= u64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_user_is_the_guests_root() {
        let owners = Owners::MineAreRoots {
            user: 1000,
            group: 100,
        };
        assert_eq!((owners.user_shown(1000), owners.group_shown(100)), (0, 0));
        assert_eq!((owners.user_shown(7), owners.group_shown(1000)), (7, 1000));
        assert_eq!((owners.user_meant(0), owners.group_meant(0)), (1000, 100));
        assert_eq!((owners.user_meant(7), owners.group_meant(8)), (7, 8));
        assert_eq!(
            (Owners::Same.user_shown(0), Owners::Same.user_meant(5)),
            (0, 5)
        );
    }
}
