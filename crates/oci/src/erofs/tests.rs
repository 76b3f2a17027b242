use super::*;
use crate::spool::Spool;
use crate::testing::{Seen, apply, image_of, list};
use crate::tree::{FileData, Kind, Metadata, Tree, Xattrs};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

#[derive(Debug, Clone)]
enum Thing {
    File(usize, u8),
    Directory,
    Symlink(Vec<u8>),
    Char(u32, u32),
    Fifo,
    Socket,
    LinkTo(usize),
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof![8 => "[a-e]{1,2}", 1 => "[a-z.!~-]{1,255}".prop_filter("not a link to a directory", |n| n != "." && n != "..")]
}

fn xattrs() -> impl Strategy<Value = Xattrs> {
    let key = prop_oneof![Just("user."), Just("trusted."), Just("security.")];
    let value = prop_oneof![9 => proptest::collection::vec(any::<u8>(), 0..40),
        1 => proptest::collection::vec(any::<u8>(), 3000..9000)];
    let pair = (key, "[a-z]{1,20}", value)
        .prop_map(|(prefix, name, v)| (format!("{prefix}{name}").into_bytes().into(), v.into()));
    prop_oneof![4 => Just(Xattrs::new()), 1 => proptest::collection::btree_map(pair.clone().prop_map(|(k, _): (Box<[u8]>, Box<[u8]>)| k), pair.prop_map(|(_, v)| v), 1..4)]
}

fn thing() -> impl Strategy<Value = Thing> {
    let size = prop_oneof![
        0usize..200,
        1900usize..2200,
        3900usize..4300,
        8000usize..20_000
    ];
    prop_oneof![
        5 => (size, any::<u8>()).prop_map(|(len, seed)| Thing::File(len, seed)),
        4 => Just(Thing::Directory),
        2 => proptest::collection::vec(1u8..=255, 1..4095).prop_map(Thing::Symlink),
        1 => (0u32..4096, 0u32..1 << 20).prop_map(|(major, minor)| Thing::Char(major, minor)),
        1 => Just(Thing::Fifo),
        1 => Just(Thing::Socket),
        2 => any::<usize>().prop_map(Thing::LinkTo),
    ]
}

type Item = (usize, String, Thing, (u16, u32, u32, i64, u32), Xattrs);

fn items() -> impl Strategy<Value = Vec<Item>> {
    let meta = (
        0u16..0o10000,
        any::<u32>(),
        any::<u32>(),
        any::<i64>(),
        0u32..1_000_000_000,
    );
    proptest::collection::vec((any::<usize>(), name(), thing(), meta, xattrs()), 0..60)
}

fn content(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| (i / 7) as u8 ^ (i * 31) as u8 ^ seed)
        .collect()
}

/// Builds a tree, and what must be seen of it.
fn build(items: &[Item]) -> (Tree, Spool, BTreeMap<String, Seen>, tempfile::TempDir) {
    let host = tempfile::tempdir().unwrap();
    let (mut tree, mut files) = (Tree::new(), Vec::new());
    let mut dirs = vec![String::new()];
    let mut others: Vec<String> = Vec::new();
    let mut expected = BTreeMap::new();
    tree.begin_layer();
    let root = Metadata {
        mode: 0o750,
        ..Metadata::default()
    };
    tree.put_directory(b"/", root).unwrap();
    let seen = |kind, (mode, uid, gid, seconds, nanoseconds), xattrs: &Xattrs, data| Seen {
        kind,
        mode,
        uid,
        gid,
        links: 1,
        mtime: (seconds, nanoseconds),
        xattrs: xattrs.clone(),
        data,
    };
    let dir_kind = InodeKind::Directory;
    let plain = (0o750, 0, 0, 0, 0);
    expected.insert(
        String::new(),
        Seen {
            links: 2,
            ..seen(dir_kind, plain, &Xattrs::new(), vec![])
        },
    );
    for (dir, name, thing, m, xattrs) in items {
        let dir = dirs[dir % dirs.len()].clone();
        let path = format!("{dir}/{name}");
        if expected.contains_key(&path) || path.len() > 3000 {
            continue;
        }
        let mtime = crate::tar::Time {
            seconds: m.3,
            nanoseconds: m.4,
        };
        let meta = Metadata {
            mode: m.0,
            uid: m.1,
            gid: m.2,
            mtime,
            xattrs: xattrs.clone(),
        };
        let bytes = path.as_bytes();
        let (kind, as_seen, data) = match thing {
            Thing::Directory => {
                tree.put_directory(bytes, meta).unwrap();
                expected.insert(
                    path.clone(),
                    Seen {
                        links: 2,
                        ..seen(dir_kind, *m, xattrs, vec![])
                    },
                );
                expected.get_mut(&dir).unwrap().links += 1;
                dirs.push(path);
                continue;
            }
            Thing::LinkTo(_) if others.is_empty() => continue,
            Thing::LinkTo(which) => {
                let target = others[which % others.len()].clone();
                tree.link(bytes, target.as_bytes()).unwrap();
                let copy = expected[&target].clone();
                expected.insert(path.clone(), copy);
                others.push(path);
                continue;
            }
            Thing::File(len, seed) => {
                let bytes = content(*len, *seed);
                let file = host.path().join(files.len().to_string());
                std::fs::write(&file, &bytes).unwrap();
                files.push(file);
                let data = FileData::Host {
                    file: files.len() as u32 - 1,
                    len: *len as u64,
                };
                (Kind::File(data), InodeKind::File, bytes)
            }
            Thing::Symlink(target) => (
                Kind::Symlink(target.clone().into()),
                InodeKind::Symlink,
                target.clone(),
            ),
            Thing::Char(major, minor) => {
                let (major, minor) = (*major, *minor);
                (
                    Kind::CharDevice { major, minor },
                    InodeKind::CharDevice { major, minor },
                    vec![],
                )
            }
            Thing::Fifo => (Kind::Fifo, InodeKind::Fifo, vec![]),
            Thing::Socket => (Kind::Socket, InodeKind::Socket, vec![]),
        };
        tree.put(bytes, meta, kind).unwrap();
        expected.insert(path.clone(), seen(as_seen, *m, xattrs, data));
        others.push(path);
    }
    (tree, Spool::of_host_files(files), expected, host)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn trees_come_back_as_they_were(items in items()) {
        let (tree, spool, mut expected, _host) = build(&items);
        let image = image_of(&tree, &spool);
        let mut seen = list(&image);
        // Links are compared apart: a node's count is that of the names that show it.
        let reader = Reader::new(&image).unwrap();
        let mut names: BTreeMap<u64, u32> = BTreeMap::new();
        let mut todo = vec![reader.root().unwrap()];
        while let Some(dir) = todo.pop() {
            for (name, nid) in reader.names(&dir).unwrap() {
                let inode = reader.inode(nid).unwrap();
                *names.entry(nid).or_default() += 1;
                if inode.kind == InodeKind::Directory && name != b"." && name != b".." {
                    todo.push(inode);
                }
            }
        }
        // The root's ".." is itself: "." and ".." for it, and one name plus "." plus each
        // subdirectory's ".." for the others.
        for (nid, count) in names {
            prop_assert_eq!(reader.inode(nid).unwrap().links, count);
        }
        seen.values_mut().chain(expected.values_mut()).for_each(|seen| seen.links = 0);
        prop_assert_eq!(seen, expected);
    }

    #[test]
    fn the_same_tree_gives_the_same_bytes(items in items()) {
        let read = |file: File| {
            let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
            file.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        let (tree, spool, _, _host) = build(&items);
        let (again, spool_again, _, _host_again) = build(&items);
        prop_assert!(read(image_of(&tree, &spool)) == read(image_of(&again, &spool_again)));
    }

    /// Damage anywhere gives errors or other content, never a panic.
    #[test]
    fn damaged_images_are_read_without_panic(
        items in items(),
        damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..30),
    ) {
        let (tree, spool, _, _host) = build(&items);
        let image = image_of(&tree, &spool);
        let metadata = image.metadata().unwrap().len() as usize;
        for (at, byte) in damage {
            image.write_all_at(&[byte], at.index(metadata.min(32 << 10)) as u64).unwrap();
        }
        crate::fuzz::walk_image(&image);
    }
}

fn put_file(tree: &mut Tree, path: &str) {
    tree.put(
        path.as_bytes(),
        Metadata::default(),
        Kind::File(FileData::Empty),
    )
    .unwrap();
}

#[test]
fn directories_of_many_blocks() {
    let mut tree = Tree::new();
    for i in 0..5000 {
        put_file(&mut tree, &format!("d/{i}-{}", "x".repeat(i % 200)));
    }
    let seen = list(&image_of(&tree, &Spool::default()));
    assert_eq!(seen.len(), 5002);
}

#[test]
fn directories_fill_blocks_to_the_last_byte() {
    // 12 bytes of entry and 244 of name: 16 fill a block exactly; "." and ".." push one over.
    for count in 1..40 {
        let mut tree = Tree::new();
        for i in 0..count {
            put_file(&mut tree, &format!("d/{i:0244}"));
        }
        assert_eq!(list(&image_of(&tree, &Spool::default())).len(), count + 2);
    }
}

#[test]
fn files_over_4_gib() {
    let host = tempfile::tempdir().unwrap();
    let path = host.path().join("big");
    let file = File::create(&path).unwrap();
    file.set_len((5 << 30) + 10).unwrap();
    file.write_all_at(b"end", (5 << 30) + 7).unwrap();
    let mut tree = Tree::new();
    let data = FileData::Host {
        file: 0,
        len: (5 << 30) + 10,
    };
    tree.put(b"big", Metadata::default(), Kind::File(data))
        .unwrap();
    let image = image_of(&tree, &Spool::of_host_files(vec![path]));
    let reader = Reader::new(&image).unwrap();
    let names = reader.names(&reader.root().unwrap()).unwrap();
    let inode = reader
        .inode(names.iter().find(|(n, _)| n == b"big").unwrap().1)
        .unwrap();
    assert_eq!(inode.size, (5 << 30) + 10);
    let mut end = [0; 4];
    reader.read_at(&inode, &mut end, (5 << 30) + 6).unwrap();
    assert_eq!(&end, b"\0end");
    assert!(
        image.metadata().unwrap().blocks() * 512 < 64 << 20,
        "zeros are left as holes"
    );
}

#[test]
fn a_checksum_that_is_wrong_is_noticed() {
    let image = image_of(&Tree::new(), &Spool::default());
    check_superblock(&image).unwrap();
    image.write_all_at(&[1], 4000).unwrap();
    assert!(check_superblock(&image).is_err());
    let image = image_of(&Tree::new(), &Spool::default());
    image
        .set_len(image.metadata().unwrap().len() + 4096)
        .unwrap();
    assert!(check_superblock(&image).is_err());
    assert!(check_superblock(&tempfile::tempfile().unwrap()).is_err());
}

fn run(command: &mut Command) -> Option<std::process::Output> {
    match command.output() {
        Ok(output) => Some(output),
        Err(error) => {
            println!("skipped: {command:?} is not on this machine ({error})");
            None
        }
    }
}

/// A directory with most of what a file system can have; needs no privilege.
fn sample(dir: &Path) {
    let file = |name: &str, data: &[u8]| std::fs::write(dir.join(name), data).unwrap();
    std::fs::create_dir_all(dir.join("sub/deeper")).unwrap();
    file("empty", b"");
    file("small", b"small");
    file("block", &content(4096, 1));
    file("sub/large", &content(300_000, 2));
    file(&"n".repeat(255), b"long");
    std::fs::hard_link(dir.join("small"), dir.join("sub/linked")).unwrap();
    std::os::unix::fs::symlink("../small", dir.join("sub/link")).unwrap();
    std::fs::set_permissions(dir.join("small"), std::fs::Permissions::from_mode(0o4751)).unwrap();
    let mode = rustix::fs::Mode::from_raw_mode(0o640);
    let cwd = rustix::fs::CWD;
    rustix::fs::mknodat(cwd, dir.join("pipe"), rustix::fs::FileType::Fifo, mode, 0).unwrap();
    for i in 0..400 {
        file(
            &format!("sub/deeper/a-name-of-some-length-{i}"),
            &[i as u8; 10],
        );
    }
    let mut sparse = File::create(dir.join("sparse")).unwrap();
    sparse.write_all(b"start").unwrap();
    sparse.set_len(10 << 20).unwrap();
    sparse.write_all_at(b"middle", 5 << 20).unwrap();
    let flags = rustix::fs::XattrFlags::empty();
    // Not every file system has user attributes.
    let _ = rustix::fs::setxattr(dir.join("block"), "user.color", b"blue", flags);
}

/// EROFS's own tools find nothing wrong, and extract what was put in.
#[test]
fn erofs_utils_agree() {
    let dir = tempfile::tempdir().unwrap();
    let (root, out) = (dir.path().join("root"), dir.path().join("out"));
    std::fs::create_dir(&root).unwrap();
    sample(&root);
    let (tree, spool) = crate::hostdir::read(&root).unwrap();
    let path = dir.path().join("image");
    let mut file = File::create_new(&path).unwrap();
    write(&tree, &spool, [1; 16], &mut file).unwrap();
    let extract = format!("--extract={}", out.display());
    let Some(output) = run(Command::new("fsck.erofs").arg(&extract).arg(&path)) else {
        return;
    };
    assert!(output.status.success(), "{output:?}");
    let Some(output) = run(Command::new("diff")
        .arg("-r")
        .arg("--no-dereference")
        .args([&root, &out]))
    else {
        return;
    };
    let differences = String::from_utf8_lossy(&output.stdout);
    let real: Vec<_> = differences
        .lines()
        .filter(|line| !line.contains("fifo"))
        .collect();
    assert!(real.is_empty(), "{real:?}");
}

/// The kernel reads what was written, where this process may mount.
#[test]
fn the_kernel_agrees() {
    let dir = tempfile::tempdir().unwrap();
    let (root, mount) = (dir.path().join("root"), dir.path().join("mnt"));
    std::fs::create_dir(&root).unwrap();
    std::fs::create_dir(&mount).unwrap();
    sample(&root);
    let (tree, spool) = crate::hostdir::read(&root).unwrap();
    let path = dir.path().join("image");
    let image = {
        let mut file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        write(&tree, &spool, [1; 16], &mut file).unwrap();
        file
    };
    let mounted = run(Command::new("mount")
        .args(["-t", "erofs", "-o", "loop,ro"])
        .args([&path, &mount]));
    match mounted {
        Some(output) if output.status.success() => {}
        other => {
            println!("skipped: an EROFS image can't be mounted here ({other:?})");
            return;
        }
    }
    let back = crate::hostdir::read(&mount).map(|(tree, spool)| list(&image_of(&tree, &spool)));
    let output = Command::new("umount").arg(&mount).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(back.unwrap(), list(&image));
}

/// A directory packed by GNU tar, in each of its formats, is the directory itself.
#[test]
fn gnu_tar_and_the_directory_agree() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    std::fs::create_dir(&root).unwrap();
    sample(&root);
    let (tree, spool) = crate::hostdir::read(&root).unwrap();
    let mut expected = list(&image_of(&tree, &spool));
    for options in [
        &["--format=pax", "--xattrs"][..],
        &["--format=gnu"],
        &["--format=oldgnu"],
    ] {
        let mut command = Command::new("tar");
        command
            .args(options)
            .args(["--sparse", "-C"])
            .arg(&root)
            .args(["-cf", "-", "."]);
        let Some(output) = run(&mut command) else {
            return;
        };
        assert!(output.status.success(), "{output:?}");
        let mut seen = apply(&[output.stdout]).unwrap();
        if options.len() == 1 {
            // Those formats hold neither attributes nor parts of a second.
            for seen in seen.values_mut().chain(expected.values_mut()) {
                seen.xattrs.clear();
                seen.mtime.1 = 0;
            }
        }
        assert_eq!(seen, expected, "{options:?}");
    }
}
