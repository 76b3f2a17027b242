//! A hostile guest against the server: requests as bytes, the host's folder as the judge.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;
use rustix::io::Errno;
use skerry_storage::{IoBuf, IoBufMut};

use crate::nodes::ROOT;
use crate::wire::{Opcode, Put, WRITE_KILL_SUIDGID};
use crate::{Answer, REQUEST_HEADER, Share, ShareOptions, fuzz};

struct Guest {
    share: Arc<Share>,
    /// What its requests say of who makes them.
    user: u32,
    reply: Vec<u8>,
}

struct World {
    outer: tempfile::TempDir,
    guest: Guest,
}

impl World {
    fn with(options: ShareOptions) -> Self {
        let outer = tempfile::tempdir().unwrap();
        let shared = outer.path().join("shared");
        fs::create_dir(&shared).unwrap();
        fs::write(outer.path().join("secret"), "secret").unwrap();
        let guest = Guest {
            share: Share::open(&shared, options).unwrap(),
            user: 0,
            reply: Vec::new(),
        };
        Self { outer, guest }
    }

    fn new() -> Self {
        Self::with(ShareOptions::default())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.outer.path().join("shared").join(name)
    }
}

impl Guest {
    fn ask(&mut self, opcode: Opcode, node: u64, args: &[u8]) -> Result<&[u8], Errno> {
        self.ask_with(opcode, node, args, &[], &mut [])
    }

    fn ask_with(
        &mut self,
        opcode: Opcode,
        node: u64,
        args: &[u8],
        data: &[u8],
        room: &mut [u8],
    ) -> Result<&[u8], Errno> {
        let mut request = Vec::new();
        request.u32(0).u32(opcode as u32).u64(7).u64(node);
        request.u32(self.user).u32(self.user).u32(1).u32(0);
        assert_eq!(request.len(), REQUEST_HEADER);
        request.extend_from_slice(args);
        let data = [IoBuf::from(data)];
        let room = [IoBufMut::from(room)];
        let answer = self
            .share
            .serve(&request, &data, &room, 1 << 16, &mut self.reply);
        assert_ne!(answer, Answer::Silent);
        let number = |at: usize| i32::from_le_bytes(self.reply[at..at + 4].try_into().unwrap());
        match number(4) {
            0 => Ok(&self.reply[16..]),
            error => Err(Errno::from_raw_os_error(-error)),
        }
    }

    fn look_up(&mut self, parent: u64, name: &str) -> Result<u64, Errno> {
        let reply = self.ask(Opcode::Lookup, parent, &string(name))?;
        Ok(first(reply))
    }

    fn open(&mut self, node: u64, flags: u32) -> Result<u64, Errno> {
        let mut args = Vec::new();
        args.u32(flags).u32(0);
        self.ask(Opcode::Open, node, &args).map(first)
    }

    fn read(&mut self, handle: u64, room: &mut [u8]) -> Result<(), Errno> {
        let mut args = Vec::new();
        // The buffer is as long as what is asked for.
        args.u64(handle)
            .u64(0)
            .u32(room.len() as u32)
            .u32(0)
            .u64(0)
            .u64(0);
        self.ask_with(Opcode::Read, ROOT, &args, &[], room)
            .map(drop)
    }

    fn make_directory(&mut self, parent: u64, name: &str) -> Result<u64, Errno> {
        let mut args = Vec::new();
        args.u32(0o755).u32(0).extend_from_slice(&string(name));
        self.ask(Opcode::MkDir, parent, &args).map(first)
    }

    fn create(&mut self, parent: u64, name: &str, flags: u32) -> Result<u64, Errno> {
        let mut args = Vec::new();
        args.u32(flags)
            .u32(0o644)
            .u32(0)
            .u32(0)
            .extend_from_slice(&string(name));
        self.ask(Opcode::Create, parent, &args).map(first)
    }

    fn rename(&mut self, from: (u64, &str), to: (u64, &str)) -> Result<(), Errno> {
        let mut args = Vec::new();
        args.u64(to.0).extend_from_slice(&string(from.1));
        args.extend_from_slice(&string(to.1));
        self.ask(Opcode::Rename, from.0, &args).map(drop)
    }
}

fn string(text: &str) -> Vec<u8> {
    CString::new(text).unwrap().into_bytes_with_nul()
}

fn first(reply: &[u8]) -> u64 {
    u64::from_le_bytes(reply[..8].try_into().unwrap())
}

const READ: u32 = 0;
const WRITE: u32 = 1;

#[test]
fn names_lead_nowhere_but_down() {
    let mut world = World::new();
    let guest = &mut world.guest;
    for name in ["..", ".", "", "../secret", "/etc/passwd", "a/../../secret"] {
        assert_eq!(guest.look_up(ROOT, name), Err(Errno::INVAL), "{name:?}");
        assert!(guest.make_directory(ROOT, name).is_err(), "{name:?}");
        assert!(guest.create(ROOT, name, WRITE).is_err(), "{name:?}");
        assert!(guest.rename((ROOT, "x"), (ROOT, name)).is_err(), "{name:?}");
    }
    // A name without an end, and numbers that nobody gave out.
    assert_eq!(
        guest.ask(Opcode::Lookup, ROOT, b"name").err(),
        Some(Errno::INVAL)
    );
    assert_eq!(guest.look_up(99, "a"), Err(Errno::STALE));
    assert_eq!(guest.open(99, READ), Err(Errno::STALE));
    assert_eq!(guest.read(99, &mut [0; 8]), Err(Errno::BADF));
}

#[test]
fn planted_links_are_never_followed() {
    let mut world = World::new();
    symlink("../secret", world.path("link")).unwrap();
    symlink("/", world.path("root")).unwrap();
    symlink("..", world.path("up")).unwrap();
    let guest = &mut world.guest;
    for name in ["link", "root", "up"] {
        let node = guest.look_up(ROOT, name).unwrap();
        assert_eq!(guest.open(node, READ), Err(Errno::LOOP), "{name}");
        assert_eq!(guest.look_up(node, "secret"), Err(Errno::NOTDIR), "{name}");
        assert_eq!(
            guest.create(node, "made", WRITE),
            Err(Errno::NOTDIR),
            "{name}"
        );
        // Neither by the file that it would create.
        assert!(guest.create(ROOT, name, WRITE).is_err(), "{name}");
        let mut args = Vec::new();
        args.u32(8).u32(0).u64(0).u64(0).resize(88, 0);
        assert!(
            guest.ask(Opcode::SetAttr, node, &args).is_err(),
            "truncate {name}"
        );
    }
    assert_eq!(
        fs::read_to_string(world.outer.path().join("secret")).unwrap(),
        "secret"
    );
}

#[test]
fn a_link_in_the_place_of_a_directory_that_was_looked_up_changes_nothing() {
    let mut world = World::new();
    fs::create_dir(world.path("folder")).unwrap();
    fs::write(world.path("folder/secret"), "harmless").unwrap();
    let folder = world.guest.look_up(ROOT, "folder").unwrap();
    // Between LOOKUP and OPEN.
    fs::rename(world.path("folder"), world.path("moved")).unwrap();
    symlink("..", world.path("folder")).unwrap();
    let file = world.guest.look_up(folder, "secret").unwrap();
    let handle = world.guest.open(file, READ).unwrap();
    let mut text = [0; 8];
    world.guest.read(handle, &mut text).unwrap();
    assert_eq!(&text, b"harmless");
    // And between the two, the file too.
    fs::remove_file(world.path("moved/secret")).unwrap();
    symlink("../../secret", world.path("moved/secret")).unwrap();
    let handle = world.guest.open(file, READ).unwrap();
    world.guest.read(handle, &mut text).unwrap();
    assert_eq!(
        &text, b"harmless",
        "the file that was looked up, without a name now"
    );
    let link = world.guest.look_up(folder, "secret").unwrap();
    assert_eq!(world.guest.open(link, READ), Err(Errno::LOOP));
}

#[test]
fn special_files_are_looked_at_and_not_opened() {
    let mut world = World::new();
    let made = std::process::Command::new("mkfifo")
        .arg(world.path("fifo"))
        .status();
    assert!(made.unwrap().success());
    let _socket = std::os::unix::net::UnixListener::bind(world.path("socket")).unwrap();
    for name in ["fifo", "socket"] {
        let node = world.guest.look_up(ROOT, name).unwrap();
        // At once, though nobody has the other end.
        assert_eq!(world.guest.open(node, READ), Err(Errno::NXIO), "{name}");
        assert_eq!(world.guest.open(node, WRITE), Err(Errno::NXIO), "{name}");
        assert_eq!(
            world.guest.create(ROOT, name, WRITE),
            Err(Errno::NXIO),
            "{name}"
        );
    }
    for (mode, device, allowed) in [
        (0o010_644, 0, true),
        (0o140_644, 0, true),
        (0o020_644, 0x103, false),
        (0o060_644, 0x800, false),
    ] {
        let mut args = Vec::new();
        args.u32(mode)
            .u32(device)
            .u32(0)
            .u32(0)
            .extend_from_slice(&string(&format!("{mode:o}")));
        let made = world.guest.ask(Opcode::MkNod, ROOT, &args).map(drop);
        assert_eq!(made.is_ok(), allowed, "{mode:o}");
    }
    assert!(
        fs::metadata(world.path("10644"))
            .unwrap()
            .file_type()
            .is_fifo()
    );
    assert!(!world.path("20644").exists());
}

#[test]
fn a_share_to_read_changes_nothing() {
    let mut world = World::with(ShareOptions {
        read_only: true,
        only: None,
    });
    fs::write(world.path("file"), "text").unwrap();
    let guest = &mut world.guest;
    let node = guest.look_up(ROOT, "file").unwrap();
    assert_eq!(guest.open(node, WRITE), Err(Errno::ROFS));
    assert_eq!(
        guest.open(node, READ | 0o1000),
        Err(Errno::ROFS),
        "with O_TRUNC"
    );
    assert_eq!(guest.create(ROOT, "new", WRITE), Err(Errno::ROFS));
    assert_eq!(guest.make_directory(ROOT, "new"), Err(Errno::ROFS));
    assert_eq!(guest.rename((ROOT, "file"), (ROOT, "b")), Err(Errno::ROFS));
    for (opcode, args) in [
        (Opcode::Unlink, string("file")),
        (Opcode::SetAttr, vec![0; 88]),
        (Opcode::Symlink, [string("a"), string("b")].concat()),
        (Opcode::RemoveXattr, string("user.a")),
    ] {
        let node = if opcode == Opcode::Unlink { ROOT } else { node };
        assert_eq!(
            guest.ask(opcode, node, &args).err(),
            Some(Errno::ROFS),
            "{opcode:?}"
        );
    }
    let handle = guest.open(node, READ).unwrap();
    let mut text = [0; 4];
    guest.read(handle, &mut text).unwrap();
    assert_eq!(&text, b"text");
}

#[test]
fn one_file_is_all_that_is_seen_of_its_folder() {
    let mut world = World::with(ShareOptions {
        read_only: false,
        only: Some(c"file".to_owned()),
    });
    fs::write(world.path("file"), "text").unwrap();
    fs::write(world.path("other"), "secret").unwrap();
    let guest = &mut world.guest;
    let node = guest.look_up(ROOT, "file").unwrap();
    guest.open(node, WRITE).unwrap();
    assert_eq!(guest.look_up(ROOT, "other"), Err(Errno::NOENT));
    assert_eq!(guest.create(ROOT, "other", WRITE), Err(Errno::PERM));
    assert_eq!(
        guest.rename((ROOT, "file"), (ROOT, "other")),
        Err(Errno::PERM)
    );
    let mut args = Vec::new();
    args.u64(node).extend_from_slice(&string("second"));
    assert_eq!(
        guest.ask(Opcode::Link, ROOT, &args).err(),
        Some(Errno::PERM)
    );
    args.clear();
    let handle = first(guest.ask(Opcode::OpenDir, ROOT, &[0; 8]).unwrap());
    args.u64(handle).u64(0).u32(4096).u32(0);
    let listed = guest.ask(Opcode::ReadDirPlus, ROOT, &args).unwrap();
    let has = |name: &[u8]| listed.windows(name.len()).any(|part| part == name);
    assert!(has(b"file") && !has(b"other"));
}

#[test]
fn a_directory_is_listed_in_parts_of_any_size() {
    let mut world = World::new();
    for number in 0..1000 {
        fs::write(world.path(&format!("file-{number:04}")), "").unwrap();
    }
    let handle = first(world.guest.ask(Opcode::OpenDir, ROOT, &[0; 8]).unwrap());
    for (opcode, entry) in [(Opcode::ReadDir, 0), (Opcode::ReadDirPlus, 128)] {
        let (mut names, mut at) = (Vec::new(), 0);
        loop {
            let mut args = Vec::new();
            args.u64(handle).u64(at).u32(1000).u32(0);
            let mut reply = world.guest.ask(opcode, ROOT, &args).unwrap();
            if reply.is_empty() {
                break;
            }
            assert!(reply.len() <= 1000);
            while !reply.is_empty() {
                let dirent = &reply[entry..];
                at = first(&dirent[8..]);
                let len = u32::from_le_bytes(dirent[16..20].try_into().unwrap()) as usize;
                names.push(String::from_utf8(dirent[24..24 + len].to_vec()).unwrap());
                reply = &dirent[(24 + len).next_multiple_of(8)..];
            }
        }
        names.sort();
        assert_eq!(names.len(), 1002, "{opcode:?}");
        names.dedup();
        assert_eq!(names.len(), 1002, "{opcode:?}");
    }
    // Each was looked up once, and is forgotten so.
    let known = world.guest.share.nodes.lock().counts().0;
    assert_eq!(known, 1001);
}

#[test]
fn what_is_forgotten_is_gone_and_what_is_not_used_is_closed() {
    let mut world = World::new();
    let mut nodes = Vec::new();
    for number in 0..200 {
        fs::write(world.path(&number.to_string()), number.to_string()).unwrap();
        nodes.push(world.guest.look_up(ROOT, &number.to_string()).unwrap());
    }
    assert_eq!(
        world.guest.look_up(ROOT, "0"),
        Ok(nodes[0]),
        "the same number again"
    );
    world.guest.share.nodes.lock().shed();
    let (known, open) = world.guest.share.nodes.lock().counts();
    assert!(known == 201 && open <= 101, "{known} known, {open} open");
    // Those that were closed are found again, if they are the same.
    fs::rename(world.path("5"), world.path("elsewhere")).unwrap();
    fs::write(world.path("5"), "another").unwrap();
    let mut stale = 0;
    for (number, node) in nodes.iter().enumerate() {
        match world.guest.open(*node, READ) {
            Ok(handle) => {
                let mut text = [0; 3];
                world.guest.read(handle, &mut text).unwrap();
                assert!(text.starts_with(number.to_string().as_bytes()), "{number}");
            }
            Err(error) => {
                assert_eq!((number, error), (5, Errno::STALE));
                stale += 1;
            }
        }
    }
    assert!(stale <= 1);
    let forget = |share: &Share, node: u64, count: u64| share.nodes.lock().forget(node, count);
    forget(&world.guest.share, nodes[0], 1);
    assert!(
        world.guest.open(nodes[0], READ).is_ok(),
        "looked up twice, forgotten once"
    );
    forget(&world.guest.share, nodes[0], u64::MAX);
    assert_eq!(world.guest.open(nodes[0], READ), Err(Errno::STALE));
    forget(&world.guest.share, ROOT, u64::MAX);
    assert!(
        world.guest.look_up(ROOT, "1").is_ok(),
        "the folder itself stays"
    );
}

#[test]
fn a_saved_session_goes_on_where_its_files_are() {
    let mut world = World::new();
    fs::create_dir(world.path("folder")).unwrap();
    for name in ["folder/kept", "folder/lost", "folder/nameless"] {
        fs::write(world.path(name), name).unwrap();
    }
    let guest = &mut world.guest;
    let folder = guest.look_up(ROOT, "folder").unwrap();
    let names = ["kept", "lost", "nameless"];
    let nodes = names.map(|name| guest.look_up(folder, name).unwrap());
    let handles = nodes.map(|node| guest.open(node, READ).unwrap());
    guest.rename((folder, "kept"), (ROOT, "renamed")).unwrap();
    fs::remove_file(world.path("folder/nameless")).unwrap();
    let state = world.guest.share.save();
    let text = serde_json::to_vec(&state).unwrap();
    // Another file has the name now, which is not the one that was open.
    fs::write(world.path("folder/nameless"), "another").unwrap();
    fs::remove_file(world.path("folder/lost")).unwrap();
    let shared = world.outer.path().join("shared");
    let mut guest = Guest {
        share: Share::open(&shared, ShareOptions::default()).unwrap(),
        user: 0,
        reply: Vec::new(),
    };
    guest
        .share
        .restore(serde_json::from_slice(&text).unwrap())
        .unwrap();
    let mut content = [0; 11];
    guest.read(handles[0], &mut content).unwrap();
    assert_eq!(&content, b"folder/kept");
    for number in [1, 2] {
        assert_eq!(guest.read(handles[number], &mut content), Err(Errno::STALE));
        assert_eq!(guest.open(nodes[number], READ), Err(Errno::STALE));
    }
    assert!(guest.open(nodes[0], READ).is_ok());
    assert!(guest.look_up(folder, "nameless").is_ok());
}

#[test]
fn a_state_that_names_other_places_is_refused() {
    let world = World::new();
    for name in ["..", ".", "", "a/b", "/"] {
        let bytes: Vec<u8> = Path::new(name).as_os_str().as_bytes().to_vec();
        let text = format!(
            r#"{{"nodes":{{"next":9,"nodes":[{{"number":2,"kind":16384,"lookups":1,"place":[1,{bytes:?}]}}]}},"handles":{{"next":1,"handles":[]}}}}"#
        );
        let state = serde_json::from_str(&text).unwrap();
        assert!(world.guest.share.restore(state).is_err(), "{name:?}");
        fuzz::share_state(text.as_bytes());
    }
    // Directories that are in each other are found stale, in the end.
    let text = r#"{"nodes":{"next":9,"nodes":[{"number":2,"kind":16384,"lookups":1,"place":[3,[97]]},
        {"number":3,"kind":16384,"lookups":1,"place":[2,[98]]}]},"handles":{"next":1,"handles":[]}}"#;
    world
        .guest
        .share
        .restore(serde_json::from_str(text).unwrap())
        .unwrap();
    let mut guest = world.guest;
    assert_eq!(guest.look_up(2, "x"), Err(Errno::STALE));
}

#[test]
fn only_the_users_attributes_are_the_guests() {
    let mut world = World::new();
    fs::write(world.path("file"), "").unwrap();
    let guest = &mut world.guest;
    let node = guest.look_up(ROOT, "file").unwrap();
    let set = |name: &str| {
        let mut args = Vec::new();
        args.u32(5).u32(0).extend_from_slice(&string(name));
        args.extend_from_slice(b"value");
        args
    };
    for name in [
        "security.capability",
        "trusted.overlay.opaque",
        "system.posix_acl_access",
    ] {
        assert_eq!(
            guest.ask(Opcode::SetXattr, node, &set(name)).err(),
            Some(Errno::OPNOTSUPP)
        );
    }
    match guest.ask(Opcode::SetXattr, node, &set("user.a")).map(drop) {
        // The host's file system has none.
        Err(Errno::OPNOTSUPP) => return,
        set => set.unwrap(),
    }
    let mut args = Vec::new();
    args.u32(64).u32(0).extend_from_slice(&string("user.a"));
    assert_eq!(guest.ask(Opcode::GetXattr, node, &args).unwrap(), b"value");
    args.clear();
    args.u32(0).u32(0);
    assert_eq!(
        guest.ask(Opcode::ListXattr, node, &args).unwrap()[..4],
        7_u32.to_le_bytes()
    );
    args.clear();
    args.u32(3).u32(0);
    assert_eq!(
        guest.ask(Opcode::ListXattr, node, &args).err(),
        Some(Errno::RANGE)
    );
}

#[test]
fn new_files_belong_to_their_makers() {
    let mut world = World::new();
    if !rustix::process::geteuid().is_root() {
        world.guest.user = 5;
        world.guest.make_directory(ROOT, "mine").unwrap();
        let own = rustix::process::geteuid().as_raw();
        assert_eq!(fs::metadata(world.path("mine")).unwrap().uid(), own);
        return;
    }
    world.guest.user = 4711;
    world.guest.create(ROOT, "file", WRITE).unwrap();
    world.guest.make_directory(ROOT, "folder").unwrap();
    let mut args = string("link");
    args.extend_from_slice(&string("target"));
    world.guest.ask(Opcode::Symlink, ROOT, &args).unwrap();
    for name in ["file", "folder", "link"] {
        let metadata = fs::symlink_metadata(world.path(name)).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (4711, 4711), "{name}");
    }
    // A directory with set-group-id gives its group, and to directories the bit.
    let group = world.path("group");
    fs::create_dir(&group).unwrap();
    fs::set_permissions(&group, fs::Permissions::from_mode(0o2777)).unwrap();
    let node = world.guest.look_up(ROOT, "group").unwrap();
    world.guest.make_directory(node, "below").unwrap();
    let below = fs::metadata(group.join("below")).unwrap();
    assert_eq!(
        (below.uid(), below.gid(), below.mode() & 0o7777),
        (4711, 0, 0o2755)
    );
}

proptest! {
    #[test]
    fn no_session_reaches_what_is_outside(
        bytes in prop::collection::vec(prop_oneof![0..55_u8, any::<u8>(), Just(b'.'), Just(b'/')], 0..400)
    ) {
        fuzz::share_session(&bytes);
    }
}

/// A thread without rights that writes takes away set-user-id; one that must not wait has no use for files that are
/// written to the disk at once.
#[test]
fn what_is_written_by_a_thread_without_rights() {
    let mut world = World::new();
    fs::write(world.path("plain"), "").unwrap();
    fs::write(world.path("setuid"), "").unwrap();
    let node = world.guest.look_up(ROOT, "plain").unwrap();
    let quickly = |share: &Share, handle: u64, flags: u32| {
        let mut args = Vec::new();
        args.u64(handle).u64(0).u32(0).u32(flags).u64(0).u64(0);
        share.writes_quickly(args.as_slice().try_into().unwrap())
    };
    const WRITE_ONLY: u32 = 1;
    let handle = world.guest.open(node, WRITE_ONLY).unwrap();
    assert!(quickly(&world.guest.share, handle, 0));
    assert!(!quickly(&world.guest.share, handle, WRITE_KILL_SUIDGID));
    for sync in [rustix::fs::OFlags::SYNC, rustix::fs::OFlags::DSYNC] {
        let handle = world.guest.open(node, WRITE_ONLY | sync.bits()).unwrap();
        assert!(!quickly(&world.guest.share, handle, 0), "{sync:?}");
    }
    let node = world.guest.look_up(ROOT, "setuid").unwrap();
    let handle = world.guest.open(node, WRITE_ONLY).unwrap();
    for (mode, quick) in [(0o4755, false), (0o2755, false), (0o755, true)] {
        fs::set_permissions(world.path("setuid"), fs::Permissions::from_mode(mode)).unwrap();
        assert_eq!(quickly(&world.guest.share, handle, 0), quick, "{mode:o}");
    }
    // An error is one wherever it is answered.
    assert!(quickly(&world.guest.share, 99, 0));
}
