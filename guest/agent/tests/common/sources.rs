//! Checksum of everything that the committed agent was built from.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Direct dependencies of the agent and of the protocol that are part of the program (and not only
/// of tests, which the lock file doesn't tell apart).
const DIRECT: [&str; 6] = ["libc", "postcard", "rustix", "serde", "tar", "thiserror"];

/// The repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// SHA-256 in hexadecimal over the sources, the build settings and the dependencies' versions.
pub fn checksum() -> String {
    let root = repository();
    let mut hash = Sha256::new();
    let mut files = vec![
        root.join("guest/agent/Cargo.toml"),
        root.join("guest/agent/build.sh"),
        root.join("crates/protocol/Cargo.toml"),
    ];
    collect(&root.join("guest/agent/src"), &mut files);
    collect(&root.join("crates/protocol/src"), &mut files);
    files.sort();
    for file in files {
        // The host's side is not in the program.
        let name = file
            .strip_prefix(&root)
            .unwrap()
            .to_string_lossy()
            .into_owned();
        if name.starts_with("crates/protocol/src/host") {
            continue;
        }
        add(&mut hash, &name, &fs::read(&file).unwrap());
    }
    add(&mut hash, "versions", versions(&root).as_bytes());
    add(&mut hash, "profile", profile(&root).as_bytes());
    hash.finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn add(hash: &mut Sha256, name: &str, bytes: &[u8]) {
    hash.update(format!("{name}\0{}\0", bytes.len()));
    hash.update(bytes);
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

/// The `[profile.agent]` table of the workspace.
fn profile(root: &Path) -> String {
    let manifest = fs::read_to_string(root.join("Cargo.toml")).unwrap();
    let (_, rest) = manifest
        .split_once("[profile.agent]")
        .expect("profile.agent");
    rest.split("\n[")
        .next()
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// Name and version of every package that the program is built from, by the lock file.
fn versions(root: &Path) -> String {
    let lock = fs::read_to_string(root.join("Cargo.lock")).unwrap();
    let mut packages: BTreeMap<String, (String, Vec<String>)> = BTreeMap::new();
    for package in lock.split("[[package]]").skip(1) {
        let field = |name: &str| {
            let line = package
                .lines()
                .find(|line| line.starts_with(&format!("{name} = \"")));
            line.and_then(|line| line.split('"').nth(1))
                .unwrap_or_default()
                .to_owned()
        };
        let dependencies = package.split_once("dependencies = [").map(|(_, list)| {
            let list = list.split(']').next().unwrap_or_default();
            let names = list.split('"').skip(1).step_by(2);
            names
                .filter_map(|name| name.split(' ').next())
                .map(str::to_owned)
                .collect()
        });
        packages.insert(
            field("name"),
            (field("version"), dependencies.unwrap_or_default()),
        );
    }
    let mut seen = BTreeSet::new();
    let mut waiting: Vec<String> = DIRECT.iter().map(|&name| name.to_owned()).collect();
    while let Some(name) = waiting.pop() {
        // The Windows side of cross-platform crates is not in the program.
        if !name.starts_with("windows") && seen.insert(name.clone()) {
            waiting.extend(
                packages
                    .get(&name)
                    .expect("a package of the lock file")
                    .1
                    .clone(),
            );
        }
    }
    seen.iter()
        .map(|name| format!("{name} {}\n", packages[name].0))
        .collect()
}
