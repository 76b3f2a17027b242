//! The exec service as an ordinary process, over a socket pair, against the host's client.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use skerry_agent::exec::ExecServer;
use skerry_protocol::frame;
use skerry_protocol::host::{ExecSession, HostError};
use skerry_protocol::message::{
    ExecCommand, ExecRequest, ExitStatus, FailureKind, GuestString, WinSize,
};

/// What a command did.
#[derive(Debug)]
struct Outcome {
    status: ExitStatus,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Outcome {
    fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }
}

fn connect() -> UnixStream {
    let (host, guest) = UnixStream::pair().unwrap();
    let env = vec![(b"FROM_SETUP".to_vec(), b"yes".to_vec())];
    ExecServer::new(env, None).serve(guest);
    host
}

/// A request that runs as whoever runs the tests.
fn request(argv: &[&str]) -> ExecRequest {
    let id = format!(
        "{}:{}",
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw()
    );
    ExecRequest {
        user: id,
        ..ExecRequest::new(argv.iter().map(|argument| argument.as_bytes()))
    }
}

fn sh(script: &str) -> ExecRequest {
    request(&["sh", "-c", script])
}

fn run(request: ExecRequest) -> Result<Outcome, HostError> {
    run_with(request, io::empty())
}

fn run_with(request: ExecRequest, input: impl Read + Send + 'static) -> Result<Outcome, HostError> {
    let session = ExecSession::start(connect(), request)?;
    session.pump_stdin(input).unwrap();
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let status = session.wait(&mut stdout, &mut stderr)?;
    Ok(Outcome {
        status,
        stdout,
        stderr,
    })
}

fn failure(request: ExecRequest) -> (FailureKind, String) {
    match run(request).unwrap_err() {
        HostError::NotStarted(failure) => (failure.kind, failure.message),
        other => panic!("not a failed start: {other}"),
    }
}

#[test]
fn exit_codes_are_exact() {
    for code in [0u8, 1, 42, 126, 127, 255] {
        let outcome = run(sh(&format!("exit {code}"))).unwrap();
        assert_eq!(outcome.status, ExitStatus::Code(code));
    }
}

#[test]
fn a_signal_that_ends_the_command_is_reported_as_such() {
    for (name, number) in [("KILL", 9), ("TERM", 15), ("USR1", 10), ("PIPE", 13)] {
        let outcome = run(sh(&format!("kill -{name} $$; sleep 5"))).unwrap();
        let ExitStatus::Signal { signal, .. } = outcome.status else {
            panic!("{name}: {:?}", outcome.status);
        };
        assert_eq!(signal, number);
        assert_eq!(outcome.status.shell_code(), 128 + number);
    }
}

#[test]
fn commands_that_cannot_start_say_why() {
    let (kind, message) = failure(request(&["no-such-program"]));
    assert_eq!((kind, kind.shell_code()), (FailureKind::NotFound, 127));
    assert!(message.contains("no-such-program"), "{message}");
    assert_eq!(
        failure(request(&["/no/such/file"])).0,
        FailureKind::NotFound
    );
    assert_eq!(
        failure(request(&["/etc/passwd"])).0,
        FailureKind::NotExecutable
    );
    assert_eq!(failure(request(&["/etc"])).0, FailureKind::NotExecutable);
    assert_eq!(failure(request(&[])).0, FailureKind::BadRequest);
    assert_eq!(failure(request(&["sh", "a\0b"])).0, FailureKind::BadRequest);
    let user = ExecRequest {
        user: "no-such-user".to_owned(),
        ..request(&["true"])
    };
    assert_eq!(failure(user).0, FailureKind::BadUser);
    let cwd = ExecRequest {
        cwd: b"/etc/passwd".to_vec(),
        ..request(&["true"])
    };
    assert_eq!(failure(cwd).0, FailureKind::BadCwd);
}

#[test]
fn files_that_the_kernel_refuses_are_told_apart() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let make = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let orphan = make("orphan", "#!/no/such/interpreter\n");
    let (kind, message) = failure(request(&[&orphan]));
    assert_eq!(kind, FailureKind::NotFound);
    assert!(message.contains("interpreter"), "{message}");
    let bare = make("bare", "echo hello\n");
    assert_eq!(failure(request(&[&bare])).0, FailureKind::NotExecutable);
    let script = make("script", "#!/bin/sh\necho \"$0 $1\"\n");
    assert_eq!(
        run(request(&[&script, "x"])).unwrap().text(),
        format!("{script} x\n")
    );
}

#[test]
fn megabytes_of_binary_pass_through_unchanged() {
    let mut data = Vec::with_capacity(12 << 20);
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    while data.len() < 12 << 20 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        data.extend_from_slice(&state.to_le_bytes());
    }
    let request = ExecRequest {
        stdin: true,
        ..request(&["cat"])
    };
    let outcome = run_with(request, io::Cursor::new(data.clone())).unwrap();
    assert_eq!(outcome.status, ExitStatus::Code(0));
    assert_eq!(outcome.stdout.len(), data.len());
    assert!(outcome.stdout == data);
    assert!(outcome.stderr.is_empty());
}

#[test]
fn the_streams_stay_apart() {
    let outcome = run(sh("echo out; echo err >&2; echo out2")).unwrap();
    assert_eq!(outcome.text(), "out\nout2\n");
    assert_eq!(outcome.stderr, b"err\n");
}

#[test]
fn output_written_just_before_the_end_arrives() {
    for _ in 0..20 {
        let outcome = run(sh("head -c 300000 /dev/zero; printf end >&2")).unwrap();
        assert_eq!(outcome.stdout.len(), 300_000);
        assert_eq!(outcome.stderr, b"end");
    }
}

/// A sink that stops for a while once, near the end.
struct Sleepy {
    before: usize,
    taken: usize,
}

impl Write for Sleepy {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let was = self.taken;
        self.taken += bytes.len();
        if was < self.before && self.taken >= self.before {
            std::thread::sleep(Duration::from_millis(2500));
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_host_that_falls_asleep_loses_nothing_that_the_command_wrote() {
    const TOTAL: usize = 3_000_000;
    // The sizes of all buffers on the way vary; some of these sleeps begin when the command has
    // written everything and the last of it is still in the pipe.
    let threads: Vec<_> = (0..32usize)
        .map(|number| {
            std::thread::spawn(move || {
                // A descendant keeps the pipe open, so that only the command's end tells.
                let script = format!("sleep 30 & exec head -c {TOTAL} /dev/zero");
                let session = ExecSession::start(connect(), sh(&script)).unwrap();
                let mut sink = Sleepy {
                    before: TOTAL - 200_000 - 15_000 * number,
                    taken: 0,
                };
                let status = session.wait(&mut sink, &mut io::sink()).unwrap();
                assert_eq!((status, sink.taken), (ExitStatus::Code(0), TOTAL));
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn a_background_process_that_holds_the_output_does_not_hold_the_report() {
    let started = Instant::now();
    let outcome = run(sh("sleep 30 & echo started; exit 3")).unwrap();
    assert_eq!(outcome.status, ExitStatus::Code(3));
    assert_eq!(outcome.text(), "started\n");
    assert!(started.elapsed() < Duration::from_secs(10));
    let started = Instant::now();
    let outcome = run(sh("yes > /dev/stdout & echo started; exit 4")).unwrap();
    assert_eq!(outcome.status, ExitStatus::Code(4));
    assert!(started.elapsed() < Duration::from_secs(15));
}

#[test]
fn a_descendant_that_writes_shortly_after_the_end_is_still_heard() {
    let outcome = run(sh("(sleep 0.1; echo late) & exit 0")).unwrap();
    assert_eq!(outcome.text(), "late\n");
}

#[test]
fn environment_and_directory_are_the_requests() {
    let pair =
        |name: &str, value: &str| -> (GuestString, GuestString) { (name.into(), value.into()) };
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("made/for/it");
    let request = ExecRequest {
        env: vec![pair("A", "1"), pair("B", "x=y"), pair("A", "2")],
        cwd: missing.to_str().unwrap().into(),
        ..sh("echo $A $B $FROM_SETUP; pwd; env | grep -c ^PATH=; echo ${TERM-none}")
    };
    let outcome = run(request).unwrap();
    let expected = format!("2 x=y yes\n{}\n1\nnone\n", missing.display());
    assert_eq!(outcome.text(), expected);
}

#[test]
fn without_input_the_command_reads_nothing() {
    let outcome = run(request(&["cat"])).unwrap();
    assert_eq!(outcome.status, ExitStatus::Code(0));
    assert!(outcome.stdout.is_empty());
}

#[test]
fn input_that_nobody_reads_ends_neither_side() {
    let request = ExecRequest {
        stdin: true,
        ..sh("exec <&-; sleep 0.2; echo done")
    };
    let outcome = run_with(request, io::repeat(b'x')).unwrap();
    assert_eq!(outcome.text(), "done\n");
    let request = ExecRequest {
        stdin: true,
        ..sh("head -c 3; exit 5")
    };
    let outcome = run_with(request, io::repeat(b'x')).unwrap();
    assert_eq!(
        (outcome.text(), outcome.status),
        ("xxx", ExitStatus::Code(5))
    );
}

#[test]
fn a_signal_overtakes_input_that_nobody_reads() {
    let request = ExecRequest {
        stdin: true,
        ..sh("echo ready; exec sleep 30")
    };
    let session = ExecSession::start(connect(), request).unwrap();
    session.pump_stdin(io::repeat(b'x')).unwrap();
    let handle = session.handle();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        handle.signal(15).unwrap();
    });
    let started = Instant::now();
    let status = session.wait(&mut io::sink(), &mut io::sink()).unwrap();
    assert_eq!(
        status,
        ExitStatus::Signal {
            signal: 15,
            core: false
        }
    );
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_terminal_has_the_size_it_was_given_and_follows_changes() {
    let size = |rows, cols| WinSize {
        rows,
        cols,
        ..WinSize::default()
    };
    let request = ExecRequest {
        tty: Some(size(40, 132)),
        stdin: true,
        ..sh("stty size; test -t 0 -a -t 1 -a -t 2 && echo tty; echo $TERM; read x; stty size")
    };
    let session = ExecSession::start(connect(), request).unwrap();
    let handle = session.handle();
    let mut stdin = session.stdin().unwrap();
    std::thread::spawn(move || {
        handle.resize(size(50, 100)).unwrap();
        // The size has to be there first: both take the same connection.
        std::thread::sleep(Duration::from_millis(300));
        stdin.write_all(b"go\n").unwrap();
        std::thread::sleep(Duration::from_secs(2));
    });
    let mut output = Vec::new();
    let status = session.wait(&mut output, &mut io::sink()).unwrap();
    assert_eq!(status, ExitStatus::Code(0));
    let text = String::from_utf8(output).unwrap().replace("\r\n", "\n");
    // The resize may come before the first look.
    assert!(
        text.starts_with("40 132\n") || text.starts_with("50 100\n"),
        "{text}"
    );
    assert!(text.contains("\ntty\nxterm\n"), "{text}");
    assert!(text.ends_with("50 100\n"), "{text}");
}

#[test]
fn the_interrupt_character_reaches_the_foreground_group_of_a_terminal() {
    let request = ExecRequest {
        tty: Some(WinSize {
            rows: 24,
            cols: 80,
            ..WinSize::default()
        }),
        stdin: true,
        ..request(&["cat"])
    };
    let session = ExecSession::start(connect(), request).unwrap();
    let mut stdin = session.stdin().unwrap();
    let writer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        stdin.write_all(&[3]).unwrap();
        stdin
    });
    let status = session.wait(&mut io::sink(), &mut io::sink()).unwrap();
    assert_eq!(status.shell_code(), 130);
    drop(writer.join());
}

#[test]
fn the_end_of_input_on_a_terminal_is_the_end_of_file() {
    let request = ExecRequest {
        tty: Some(WinSize::default()),
        stdin: true,
        ..request(&["cat"])
    };
    let outcome = run_with(request, io::Cursor::new(b"line\n".to_vec())).unwrap();
    assert_eq!(outcome.status, ExitStatus::Code(0));
    assert_eq!(outcome.text(), "line\r\nline\r\n");
}

#[test]
fn the_command_leads_a_session_and_has_default_signals() {
    let outcome = run(sh(
        "ps -o pid=,sid=,pgid= -p $$; grep -E 'SigIgn|SigBlk' /proc/self/status",
    ));
    let outcome = outcome.unwrap();
    let mut lines = outcome.text().lines();
    let ids: Vec<&str> = lines.next().unwrap().split_whitespace().collect();
    assert!(
        ids.len() == 3 && ids.iter().all(|id| *id == ids[0]),
        "{ids:?}"
    );
    for line in lines {
        let mask = line.split_whitespace().nth(1).unwrap();
        // Signals 32 and 33 are the C library's: it keeps what the test runner left there.
        let mask = u64::from_str_radix(mask, 16).unwrap() & !(0b11 << 31);
        assert_eq!(mask, 0, "{line}");
    }
}

#[test]
fn another_user_has_its_ids_and_may_reopen_its_output() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: changing the user takes root");
        return;
    }
    let request = ExecRequest {
        user: "1000:1001".to_owned(),
        ..sh("id -u; id -g; id -G; echo $HOME; echo again > /dev/stdout")
    };
    let outcome = run(request).unwrap();
    let lines: Vec<&str> = outcome.text().lines().collect();
    assert_eq!((lines[0], lines[1], lines[2]), ("1000", "1001", "1001"));
    assert_eq!(lines[4], "again");
}

#[test]
fn a_host_that_hangs_up_ends_the_command() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("pid");
    let script = format!("echo $$ > {}; exec sleep 30", file.display());
    let session = ExecSession::start(connect(), sh(&script)).unwrap();
    let pid = session.pid();
    while !file.exists() {
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(session);
    let deadline = Instant::now() + Duration::from_secs(5);
    while std::path::Path::new(&format!("/proc/{pid}")).exists() {
        assert!(Instant::now() < deadline, "process {pid} still lives");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn what_is_not_the_protocol_closes_the_session() {
    let expect_end = |mut stream: UnixStream| {
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        let mut rest = Vec::new();
        // A reset is as good an end as any.
        let _ = stream.read_to_end(&mut rest);
    };
    for garbage in [
        &b"GET / HTTP/1.0\r\n\r\n"[..],
        &[0xff; 64],
        &[1, 0, 0, 0, 99],
        &[0; 4],
    ] {
        let mut stream = connect();
        stream.write_all(garbage).unwrap();
        expect_end(stream);
    }
    // More input than the window allows.
    let mut stream = connect();
    let start = ExecRequest {
        stdin: true,
        ..request(&["sleep", "30"])
    };
    frame::write(&mut stream, &ExecCommand::Start(start)).unwrap();
    let piece = vec![0; 60_000];
    let started = Instant::now();
    while frame::write(&mut stream, &ExecCommand::Stdin(&piece)).is_ok() {
        assert!(
            started.elapsed() < Duration::from_secs(10),
            "the session takes everything"
        );
    }
}

#[test]
fn many_commands_at_once_get_their_own_statuses() {
    let server = ExecServer::new(Vec::new(), None);
    let threads: Vec<_> = (0..40u8)
        .map(|number| {
            let (host, guest) = UnixStream::pair().unwrap();
            server.serve(guest);
            std::thread::spawn(move || {
                let request = sh(&format!("echo {number}; exit {number}"));
                let session = ExecSession::start(host, request).unwrap();
                let mut output = Vec::new();
                let status = session.wait(&mut output, &mut io::sink()).unwrap();
                assert_eq!(status, ExitStatus::Code(number));
                assert_eq!(output, format!("{number}\n").as_bytes());
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}
