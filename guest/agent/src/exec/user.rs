//! `USER[:GROUP]` by the image's `/etc/passwd` and `/etc/group` (passwd(5), group(5)).

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use skerry_protocol::message::{ExecFailure, FailureKind};

use super::failure;

/// Longest account file that is read; the rest is ignored.
const MAX_FILE: u64 = 16 * 1024 * 1024;

/// Most groups of one process (Linux `NGROUPS_MAX`).
const MAX_GROUPS: usize = 65536;

/// The ids that a command runs under.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: String,
}

/// What tells one content of a file from another: device, inode, size, modification and change.
type Stamp = Option<(u64, u64, i64, [i64; 4])>;

/// Users that the last content of the files was asked for, at most so many.
const MAX_KNOWN: usize = 16;

/// What the account files say, read again when they have changed.
#[derive(Debug, Default)]
pub struct AccountCache {
    known: Mutex<Known>,
}

/// Answers of one content of the files.
#[derive(Debug, Default)]
struct Known {
    stamps: [Stamp; 2],
    users: Vec<(String, User)>,
}

impl AccountCache {
    /// [`Accounts::resolve`] by the files under `root`, always the same one.
    pub fn resolve(&self, root: &Path, spec: &str) -> Result<User, ExecFailure> {
        let stamps = [stamp(&root.join(PASSWD)), stamp(&root.join(GROUP))];
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.stamps != stamps {
            known.users.clear();
            known.stamps = stamps;
        }
        if let Some((_, user)) = known.users.iter().find(|(name, _)| name == spec) {
            return Ok(user.clone());
        }
        let user = Accounts::read(root).resolve(spec)?;
        // A file that was changed just now may change again without another time.
        if known.users.len() < MAX_KNOWN && known.stamps.iter().all(is_settled) {
            known.users.push((spec.to_owned(), user.clone()));
        }
        Ok(user)
    }
}

fn stamp(path: &Path) -> Stamp {
    let stat = rustix::fs::stat(path).ok()?;
    let times = [
        stat.st_mtime,
        stat.st_mtime_nsec as i64,
        stat.st_ctime,
        stat.st_ctime_nsec as i64,
    ];
    Some((stat.st_dev, stat.st_ino, stat.st_size, times))
}

fn is_settled(stamp: &Stamp) -> bool {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
    stamp.is_none_or(|(.., [_, _, changed, _])| now.tv_sec.abs_diff(changed) > 1)
}

const PASSWD: &str = "etc/passwd";
const GROUP: &str = "etc/group";

/// The account files of an image.
#[derive(Debug, Default)]
pub struct Accounts {
    passwd: String,
    group: String,
}

impl Accounts {
    /// Reads the files under `root`; a missing or unreadable one has no entries.
    #[must_use]
    pub fn read(root: &Path) -> Self {
        Self {
            passwd: read_text(&root.join(PASSWD)),
            group: read_text(&root.join(GROUP)),
        }
    }

    /// Resolves `USER[:GROUP]`; empty is root.
    ///
    /// A number needs no entry. Without a group, the user's own group and every group that lists
    /// the user apply; with one, only that.
    pub fn resolve(&self, spec: &str) -> Result<User, ExecFailure> {
        let (user, group) = match spec.split_once(':') {
            Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
            None => (spec, None),
        };
        let user = if user.is_empty() { "0" } else { user };
        // A name wins over a number: an account may be called "1000".
        let number: Option<u32> = user.parse().ok();
        let entry = self
            .users()
            .find(|entry| entry.name == user)
            .or_else(|| number.and_then(|uid| self.users().find(|entry| entry.uid == uid)));
        let (uid, own_gid, home, name) = match (&entry, number) {
            (Some(entry), _) => (entry.uid, entry.gid, entry.home, Some(entry.name)),
            (None, Some(uid)) => (uid, 0, "", None),
            (None, None) => {
                let text = format!("User \"{user}\" is not in the image's /etc/passwd");
                return Err(failure(FailureKind::BadUser, text));
            }
        };
        let (gid, mut groups) = match group {
            Some(group) => (self.gid(group)?, Vec::new()),
            None => (
                own_gid,
                name.map(|name| self.groups_of(name)).unwrap_or_default(),
            ),
        };
        // Named again among the supplementary groups, the group stays when a set-group-id program
        // changes the effective one: a file that is closed to it stays closed (CVE-2022-36109).
        groups.push(gid);
        groups.sort_unstable();
        groups.dedup();
        let home = if home.is_empty() { "/" } else { home }.to_owned();
        Ok(User {
            uid,
            gid,
            groups,
            home,
        })
    }

    fn gid(&self, group: &str) -> Result<u32, ExecFailure> {
        let named = self
            .groups()
            .find(|entry| entry.name == group)
            .map(|entry| entry.gid);
        named.or_else(|| group.parse().ok()).ok_or_else(|| {
            let text = format!("Group \"{group}\" is not in the image's /etc/group");
            failure(FailureKind::BadUser, text)
        })
    }

    fn groups_of(&self, name: &str) -> Vec<u32> {
        self.groups()
            .filter(|entry| entry.members.split(',').any(|member| member == name))
            .map(|entry| entry.gid)
            .take(MAX_GROUPS - 1)
            .collect()
    }

    fn users(&self) -> impl Iterator<Item = UserEntry<'_>> {
        self.passwd.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next().filter(|name| !name.is_empty())?;
            let uid = fields.nth(1)?.parse().ok()?;
            let gid = fields.next()?.parse().ok()?;
            let home = fields.nth(1).unwrap_or_default();
            Some(UserEntry {
                name,
                uid,
                gid,
                home,
            })
        })
    }

    fn groups(&self) -> impl Iterator<Item = GroupEntry<'_>> {
        self.group.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next().filter(|name| !name.is_empty())?;
            let gid = fields.nth(1)?.parse().ok()?;
            let members = fields.next().unwrap_or_default();
            Some(GroupEntry { name, gid, members })
        })
    }
}

struct UserEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

struct GroupEntry<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

/// Text of a regular file; anything else, a pipe that would block for instance, reads as empty.
fn read_text(path: &Path) -> String {
    let flags = (rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::CLOEXEC).bits() as i32;
    let mut bytes = Vec::new();
    let opened = OpenOptions::new().read(true).custom_flags(flags).open(path);
    if let Ok(file) = opened
        && file.metadata().is_ok_and(|metadata| metadata.is_file())
    {
        // What was read before an error still counts: an account at the end is then missing, and
        // asking for it says so.
        let _ = file.take(MAX_FILE).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts() -> Accounts {
        Accounts {
            passwd: "root:x:0:0:root:/root:/bin/sh\n\
                     broken\n\
                     app:x:1000:1001:App:/srv/app:/bin/sh\n\
                     1000:x:77:77::/odd:/bin/sh\n\
                     nohome:x:5:5\n"
                .to_owned(),
            group: "root:x:0:\nadm:x:4:root,app\nvideo:x:44:app\nstaff:x:50:\nbad:x:y:app\n"
                .to_owned(),
        }
    }

    fn user(uid: u32, gid: u32, groups: &[u32], home: &str) -> User {
        User {
            uid,
            gid,
            groups: groups.to_vec(),
            home: home.to_owned(),
        }
    }

    #[test]
    fn names_numbers_and_groups_resolve() {
        let accounts = accounts();
        let resolve = |spec| accounts.resolve(spec).unwrap();
        assert_eq!(resolve(""), user(0, 0, &[0, 4], "/root"));
        assert_eq!(resolve("app"), user(1000, 1001, &[4, 44, 1001], "/srv/app"));
        assert_eq!(resolve("app:staff"), user(1000, 50, &[50], "/srv/app"));
        assert_eq!(
            resolve("app:"),
            user(1000, 1001, &[4, 44, 1001], "/srv/app")
        );
        assert_eq!(resolve("app:12"), user(1000, 12, &[12], "/srv/app"));
        assert_eq!(resolve("1000"), user(77, 77, &[77], "/odd"));
        assert_eq!(resolve("4242"), user(4242, 0, &[0], "/"));
        assert_eq!(resolve("4242:4243"), user(4242, 4243, &[4243], "/"));
        assert_eq!(resolve("nohome"), user(5, 5, &[5], "/"));
        assert_eq!(resolve(":staff"), user(0, 50, &[50], "/root"));
    }

    #[test]
    fn unknown_names_and_impossible_numbers_are_refused_by_name() {
        for (spec, named) in [
            ("nobody2", "nobody2"),
            ("app:nogroup", "nogroup"),
            ("-1", "-1"),
        ] {
            let failure = accounts().resolve(spec).unwrap_err();
            assert_eq!(failure.kind, FailureKind::BadUser);
            assert!(failure.message.contains(named), "{}", failure.message);
        }
    }

    #[test]
    fn the_cache_follows_every_change_of_the_files() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let cache = AccountCache::default();
        let uid = || cache.resolve(root, "me").map(|user| user.uid).ok();
        assert_eq!(uid(), None);
        std::fs::create_dir(root.join("etc")).unwrap();
        // Of the same length, one right after the other.
        for number in [1000, 1001, 1002] {
            std::fs::write(root.join(PASSWD), format!("me:x:{number}:5::/:/bin/sh\n")).unwrap();
            assert_eq!(uid(), Some(number));
        }
        std::thread::sleep(std::time::Duration::from_millis(2100));
        assert_eq!(uid(), Some(1002));
        assert_eq!(cache.known.lock().unwrap().users.len(), 1);
        assert_eq!(uid(), Some(1002));
        std::fs::write(root.join("new"), "me:x:1003:5::/:/bin/sh\n").unwrap();
        std::fs::rename(root.join("new"), root.join(PASSWD)).unwrap();
        assert_eq!(uid(), Some(1003));
        std::fs::remove_file(root.join(PASSWD)).unwrap();
        assert_eq!(uid(), None);
    }

    #[test]
    fn missing_and_special_files_have_no_entries() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(directory.path().join("etc/passwd")).unwrap();
        let accounts = Accounts::read(directory.path());
        assert_eq!(accounts.resolve("").unwrap(), user(0, 0, &[0], "/"));
    }
}
