//! The WebAssembly guest that comes with the crate was built from the sources beside it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// The package that the program is.
const PACKAGE: &str = "sandbox-wasm";
const GUEST: &str = "guest/sandbox-rt/guests/wasm";

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
fn sources() -> String {
    let root = repository();
    let mut files: Vec<PathBuf> = [
        "crates/sandbox-abi/Cargo.toml",
        "guest/sandbox-rt/macros/Cargo.toml",
        "guest/sandbox-rt/guests/wasm/Cargo.toml",
        "guest/sandbox-rt/guests/wasm/build.sh",
    ]
    .map(|file| root.join(file))
    .into();
    for folder in [
        "crates/sandbox-abi/src",
        "guest/sandbox-rt/src",
        "guest/sandbox-rt/macros/src",
        GUEST,
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
    add("versions", versions(&root).as_bytes());
    hex(hash)
}

/// Name and version of every package that the program is built from, by the lock file.
fn versions(root: &Path) -> String {
    let lock = fs::read_to_string(root.join("guest/sandbox-rt/Cargo.lock")).unwrap();
    let mut packages: BTreeMap<&str, (&str, Vec<&str>)> = BTreeMap::new();
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
        packages.insert(field("name = "), (field("version = "), names));
    }
    let mut seen = BTreeSet::new();
    let mut waiting = vec![PACKAGE];
    while let Some(name) = waiting.pop() {
        if seen.insert(name) {
            waiting.extend(&packages.get(name).expect("a package of the lock file").1);
        }
    }
    seen.iter()
        .map(|name| format!("{name} {}\n", packages[name].0))
        .collect()
}

#[test]
fn the_committed_guest_was_built_from_these_sources() {
    let folder = repository().join(GUEST);
    let program = fs::read(folder.join("wasm-x86_64")).unwrap();
    let record = format!(
        "sources {}\nprogram {}\n",
        sources(),
        hex(Sha256::new_with_prefix(&program))
    );
    let recorded = folder.join("wasm.sources.sha256");
    // What `build.sh` does last.
    if std::env::var_os("SKERRY_BLESS").is_some() {
        fs::write(recorded, record).unwrap();
        return;
    }
    assert_eq!(
        fs::read_to_string(recorded).unwrap(),
        record,
        "the WebAssembly guest or its sources changed: run {GUEST}/build.sh and commit wasm-x86_64"
    );
    assert!(program.starts_with(b"\x7fELF"));
}
