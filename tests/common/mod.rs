//! Running the `skerry` program from tests.
#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each test file uses its part"
)]

pub mod home;
pub mod registry;

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

/// What a run printed and returned.
#[derive(Debug)]
pub struct Ran {
    pub status: i32,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Ran {
    /// stdout as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Asserts status and stdout.
    #[track_caller]
    pub fn expect(&self, status: i32, stdout: &str) {
        assert_eq!(
            (self.status, self.text().as_str()),
            (status, stdout),
            "stderr: {}",
            self.stderr
        );
    }
}

/// A data folder for all tests of one file, so that the demo image is converted once.
pub fn data_folder() -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER
        .get_or_init(|| {
            let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("data");
            std::fs::create_dir_all(&folder).expect("a data folder");
            folder
        })
        .clone()
}

/// What the software processor does with code in all tests that don't say: `SKERRY_TEST_SOFT_MODE`, which
/// the tests alone know, or its default.
pub fn soft_mode() -> Option<String> {
    std::env::var("SKERRY_TEST_SOFT_MODE").ok()
}

/// The arguments, with the mode that the tests are to run in behind `--hypervisor soft`.
fn in_mode(args: &[&str], mode: Option<String>) -> Vec<String> {
    let mut args: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
    let place = args
        .windows(2)
        .position(|pair| pair == ["--hypervisor", "soft"]);
    if let (Some(place), Some(mode)) = (place, mode)
        && !args.iter().any(|arg| arg == "--soft-mode")
    {
        args.splice(place + 2..place + 2, ["--soft-mode".to_owned(), mode]);
    }
    args
}

/// Copies a program that is to be run, by another process: a file that this one writes would be open in every
/// child that another test starts meanwhile, and a program that is open for writing doesn't run (ETXTBSY).
pub fn copy_program(from: impl AsRef<std::ffi::OsStr>, to: &std::path::Path) {
    let mut copy = Command::new("install");
    copy.args(["-m", "755"]).arg(from).arg(to);
    let status = copy.status().expect("install starts");
    assert!(status.success(), "install: {status}");
}

/// Bytes, a digest for one, in hexadecimal digits.
pub fn hex(bytes: impl AsRef<[u8]>) -> String {
    let bytes = bytes.as_ref().iter();
    bytes.map(|byte| format!("{byte:02x}")).collect()
}

/// `skerry` with these arguments, its own data folder and a clean environment.
pub fn skerry(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_skerry"));
    command
        .args(in_mode(args, soft_mode()))
        .env("XDG_DATA_HOME", data_folder())
        .env("COLUMNS", "100")
        .env_remove("NO_COLOR");
    command
}

/// Runs it with empty input.
pub fn run(args: &[&str]) -> Ran {
    run_with(skerry(args), b"")
}

/// Runs it with input.
pub fn run_with(mut command: Command, input: &[u8]) -> Ran {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("skerry starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    let input = input.to_vec();
    let feeder = std::thread::spawn(move || {
        // A program that doesn't read its input closes the pipe.
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output().expect("skerry ends");
    feeder.join().expect("feeder");
    use std::os::unix::process::ExitStatusExt;
    Ran {
        status: output
            .status
            .code()
            .unwrap_or_else(|| -output.status.signal().unwrap_or(0)),
        stdout: output.stdout,
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// `skerry run --hypervisor soft` with options, the demo image and a command.
pub fn demo(options: &[&str], command: &[&str]) -> Ran {
    run_with(demo_command(options, command), b"")
}

/// The same, not yet started.
pub fn demo_command(options: &[&str], command: &[&str]) -> Command {
    let mut args = vec!["run", "--hypervisor", "soft", "--timeout", "300"];
    args.extend(options);
    args.push("demo");
    args.extend(command);
    skerry(&args)
}

/// Compares with a file in `tests/golden`; `SKERRY_BLESS=1` writes it.
#[track_caller]
pub fn golden(name: &str, text: &str) {
    let path = format!("{}/../../tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("SKERRY_BLESS").is_some() {
        std::fs::write(&path, text).expect("golden file");
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        text == expected,
        "{name} is not what skerry prints now; look, then run with SKERRY_BLESS=1.\n{text}"
    );
}

/// Waits for something that another thread or process does.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..600 {
        if holds() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("{what} did not happen in 30 s");
}

/// Asserts that a program behind pipes gives each line back as it is typed, and ends with its input.
#[track_caller]
pub fn echoes_as_typed(mut child: Child) {
    let mut input = child.stdin.take().expect("a pipe");
    let mut output = child.stdout.take().expect("a pipe");
    for line in ["one\n", "two\n"] {
        input.write_all(line.as_bytes()).expect("write");
        let mut back = vec![0; line.len()];
        output.read_exact(&mut back).expect("read");
        assert_eq!(back, line.as_bytes());
    }
    drop(input);
    assert_eq!(child.wait().expect("end").code(), Some(0));
}

/// Bytes of every value, the same for the same seed.
pub fn noise(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}
