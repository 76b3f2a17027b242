//! Guests without SSE instructions: built for the target that has none.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The one flag.
pub const TARGET: &str = "x86_64-unknown-none";

/// Whether the toolchain can build for [`TARGET`].
fn has_target() -> bool {
    let printed = Command::new("rustc")
        .args(["--print", "target-libdir", "--target", TARGET])
        .output();
    printed.is_ok_and(|printed| Path::new(String::from_utf8_lossy(&printed.stdout).trim()).is_dir())
}

/// The folder with guests and libraries built without SSE, or why there is none.
pub fn folder() -> Result<PathBuf, String> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    BUILT.get_or_init(build).clone()
}

fn build() -> Result<PathBuf, String> {
    if !has_target() {
        return Err(format!(
            "the toolchain has no target {TARGET}: rustup target add {TARGET}"
        ));
    }
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guest/sandbox-rt/Cargo.toml");
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("sandbox-guests");
    let status = Command::new(env!("CARGO"))
        .args([
            "build",
            "--quiet",
            "--release",
            "--locked",
            "--target",
            TARGET,
        ])
        .args(["-p", "sandbox-testguest", "-p", "skerry-sandbox-c"])
        .arg("--manifest-path")
        .arg(&manifest)
        .arg("--target-dir")
        .arg(&target)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTFLAGS")
        .status()
        .expect("cargo runs");
    assert!(status.success(), "the guests don't build for {TARGET}");
    Ok(target.join(TARGET).join("release"))
}

/// The first instructions of a program that use an SSE register, by `objdump`; `None` without one.
pub fn sse_instructions(program: &Path) -> Option<Vec<String>> {
    let listing = Command::new("objdump")
        .args(["--disassemble", "--no-show-raw-insn"])
        .arg(program)
        .output()
        .ok()?;
    assert!(listing.status.success(), "objdump reads {program:?}");
    let listing = String::from_utf8_lossy(&listing.stdout).into_owned();
    assert!(listing.contains("_start"), "a listing of {program:?}");
    let uses = |line: &&str| {
        ["%xmm", "%ymm", "%zmm"]
            .iter()
            .any(|name| line.contains(name))
    };
    Some(
        listing
            .lines()
            .filter(uses)
            .take(5)
            .map(str::to_owned)
            .collect(),
    )
}
