//! The test guest, built once per run by the cargo that runs the tests.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};

use skerry_sandbox::{Builder, HostFunctions, Sandbox};

/// Builds packages of the guests' workspace, and says where the programs are.
///
/// With `SKERRY_TEST_GUESTS` they are in that folder already: for machines without a compiler.
pub fn build(packages: &[&str]) -> PathBuf {
    if let Some(folder) = std::env::var_os("SKERRY_TEST_GUESTS") {
        return folder.into();
    }
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guest/sandbox-rt/Cargo.toml");
    let target = std::env::var_os("CARGO_TARGET_TMPDIR")
        .map(PathBuf::from)
        .unwrap_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")));
    let target = target.join("sandbox-guests");
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--release", "--locked"])
        .args(packages)
        .arg("--manifest-path")
        .arg(&manifest)
        .arg("--target-dir")
        .arg(&target)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTFLAGS")
        .status()
        .expect("cargo runs");
    assert!(status.success(), "the guests don't build");
    target.join("release")
}

/// Builds a package of the guests' workspace and says where its program is.
pub fn guest(package: &str) -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    // Some come built, the last has the runtime library with other features.
    let come_built = include_str!("../../../../guest/sandbox-rt/guests/embedded.txt");
    let without = come_built.lines().chain(["tracedguest"]);
    let without: Vec<String> = without
        .map(|name| format!("--exclude=sandbox-{name}"))
        .collect();
    let mut all = vec!["--workspace"];
    all.extend(without.iter().map(String::as_str));
    BUILT.get_or_init(|| build(&all)).join(package)
}

/// The host functions that the test guest needs.
pub fn functions() -> Arc<HostFunctions> {
    let mut functions = HostFunctions::new();
    functions.add("host_add", |a: i32, b: i32| a.wrapping_add(b));
    functions.add("host_echo", |bytes: Vec<u8>| bytes);
    functions.add("host_fail", |message: String| Err::<i32, String>(message));
    Arc::new(functions)
}

/// A builder with the test guest and the host functions that it needs.
pub fn builder() -> Builder {
    Sandbox::builder()
        .guest(guest("sandbox-testguest"))
        .backend(crate::backend())
        .host_functions(&functions())
}

/// A sandbox of the test guest.
pub fn sandbox() -> Sandbox {
    builder().build().expect("the test guest starts")
}
