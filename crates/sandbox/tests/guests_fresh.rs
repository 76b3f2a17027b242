//! The guests that come with the crate were built from the sources beside them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// The folder of the guests. `NAME` in it is the package `sandbox-NAME`, whose program is `NAME-x86_64`.
const GUESTS: &str = "guest/sandbox-rt/guests";
/// Those that come built, a name a line.
static NAMES: &str = include_str!("../../../guest/sandbox-rt/guests/embedded.txt");

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn hex(hash: Sha256) -> String {
    let digest = hash.finalize();
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// Over the sources, the build settings and the dependencies' versions.
fn sources(guest: &str) -> String {
    let root = repository();
    let folder = format!("{GUESTS}/{guest}");
    let mut files: Vec<PathBuf> = [
        "crates/sandbox-abi/Cargo.toml",
        "guest/sandbox-rt/macros/Cargo.toml",
        &format!("{GUESTS}/build.sh"),
        &format!("{folder}/Cargo.toml"),
    ]
    .map(|file| root.join(file))
    .into();
    for folder in [
        "crates/sandbox-abi/src",
        "guest/sandbox-rt/src",
        "guest/sandbox-rt/macros/src",
        &folder,
    ] {
        collect(&root.join(folder), &mut files);
    }
    files.sort();
    let mut hash = Sha256::new();
    let mut add = |name: &str, bytes: &[u8]| {
        hash.update(format!("{name}\0{}\0", bytes.len()));
        hash.update(bytes);
    };
    for file in files {
        let name = file.strip_prefix(&root).unwrap().to_string_lossy();
        add(&name, &fs::read(&file).unwrap());
    }
    let manifest = fs::read_to_string(root.join("guest/sandbox-rt/Cargo.toml")).unwrap();
    let (_, profiles) = manifest.split_once("[profile.release]").expect("profiles");
    add("profiles", profiles.as_bytes());
    add("versions", versions(&root, guest).as_bytes());
    hex(hash)
}

/// Name and version of every package that the program is built from, by the lock file. Of a package that
/// is there in two versions, both count.
fn versions(root: &Path, guest: &str) -> String {
    let lock = fs::read_to_string(root.join("guest/sandbox-rt/Cargo.lock")).unwrap();
    let mut packages: BTreeMap<&str, Vec<(&str, Vec<&str>)>> = BTreeMap::new();
    for package in lock.split("[[package]]").skip(1) {
        let field = |name: &str| {
            let line = package.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.split('"').nth(1))
                .unwrap_or_default()
        };
        let list = package.split_once("dependencies = [").map(|(_, list)| list);
        let list = list
            .and_then(|list| list.split(']').next())
            .unwrap_or_default();
        let names = list.split('"').skip(1).step_by(2);
        let names = names.filter_map(|name| name.split(' ').next()).collect();
        let versions = packages.entry(field("name = ")).or_default();
        versions.push((field("version = "), names));
    }
    let package = format!("sandbox-{guest}");
    let mut seen = BTreeSet::new();
    let mut waiting = vec![package.as_str()];
    while let Some(name) = waiting.pop() {
        if seen.insert(name) {
            let versions = packages.get(name).expect("a package of the lock file");
            waiting.extend(versions.iter().flat_map(|(_, names)| names));
        }
    }
    seen.iter()
        .flat_map(|name| {
            packages[name]
                .iter()
                .map(move |(version, _)| (name, version))
        })
        .map(|(name, version)| format!("{name} {version}\n"))
        .collect()
}

#[test]
fn the_committed_guests_were_built_from_these_sources() {
    // What `build.sh` does last, for those that it has built.
    let built = std::env::var("SKERRY_BUILT_GUESTS").unwrap_or_default();
    let built: Vec<&str> = built.split(' ').collect();
    let mut stale = Vec::new();
    for name in NAMES.lines() {
        let folder = repository().join(GUESTS).join(name);
        let program = fs::read(folder.join(format!("{name}-x86_64"))).unwrap();
        assert!(program.starts_with(b"\x7fELF"), "{name} is no program");
        let record = format!(
            "sources {}\nprogram {}\n",
            sources(name),
            hex(Sha256::new_with_prefix(&program))
        );
        let recorded = folder.join(format!("{name}.sources.sha256"));
        if built.contains(&name) {
            fs::write(recorded, record).unwrap();
        } else if fs::read_to_string(recorded).unwrap_or_default() != record {
            stale.push(name);
        }
    }
    assert!(
        stale.is_empty(),
        "guests or their sources changed: run {GUESTS}/build.sh {} and commit the programs",
        stale.join(" ")
    );
}
