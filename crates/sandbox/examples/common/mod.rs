//! What the examples share: the guest, built by the cargo that is at hand.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Builds the examples' guest, and says where its program is.
pub fn guest() -> Result<PathBuf, Box<dyn std::error::Error>> {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let target = repository.join("target/sandbox-guests");
    let built = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args([
            "build",
            "--release",
            "--quiet",
            "--locked",
            "-p",
            "sandbox-exampleguest",
        ])
        .arg("--manifest-path")
        .arg(repository.join("guest/sandbox-rt/Cargo.toml"))
        .arg("--target-dir")
        .arg(&target)
        .status()?;
    match built.success() {
        true => Ok(target.join("release/sandbox-exampleguest")),
        false => Err("the guest can't be built".into()),
    }
}
