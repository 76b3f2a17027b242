//! Commands that outlive their connections, as an ordinary process against the host's client.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use skerry_agent::exec::ExecServer;
use skerry_protocol::frame;
use skerry_protocol::host::{ExecSession, HostError};
use skerry_protocol::message::{ExecCommand, ExecRequest, ExitStatus, FailureKind, WinSize};

struct Guest(Arc<ExecServer>);

impl Guest {
    fn new() -> Self {
        Self(ExecServer::new(Vec::new(), None))
    }

    fn connect(&self) -> UnixStream {
        let (host, guest) = UnixStream::pair().unwrap();
        self.0.serve(guest);
        host
    }

    fn start(&self, id: u32, request: ExecRequest) -> ExecSession<UnixStream> {
        ExecSession::start_kept(self.connect(), id, request).unwrap()
    }

    fn attach(&self, id: u32) -> Result<ExecSession<UnixStream>, HostError> {
        ExecSession::attach(self.connect(), id)
    }

    fn finish(&self, id: u32) -> (ExitStatus, Vec<u8>) {
        finish(self.attach(id).unwrap())
    }
}

fn finish(session: ExecSession<UnixStream>) -> (ExitStatus, Vec<u8>) {
    let mut output = Vec::new();
    let status = session.wait(&mut output, &mut io::sink()).unwrap();
    (status, output)
}

fn sh(script: &str) -> ExecRequest {
    let id = rustix::process::getuid().as_raw();
    let group = rustix::process::getgid().as_raw();
    ExecRequest {
        user: format!("{id}:{group}"),
        ..ExecRequest::new(["sh", "-c", script])
    }
}

fn kind(result: Result<ExecSession<UnixStream>, HostError>) -> FailureKind {
    match result {
        Err(HostError::NotStarted(failure)) => failure.kind,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it worked"),
    }
}

fn wait_for(path: &Path) {
    let started = Instant::now();
    while !path.exists() {
        assert!(started.elapsed() < Duration::from_secs(10), "no {path:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_kept_command_with_one_connection_is_like_any_other() {
    let guest = Guest::new();
    let (status, output) = finish(guest.start(1, sh("echo hello; exit 7")));
    assert_eq!((status, output), (ExitStatus::Code(7), b"hello\n".to_vec()));
    // Its name is free again, as soon as the agent has seen the host hang up.
    let started = Instant::now();
    loop {
        match guest.attach(1) {
            Err(HostError::NotStarted(failure)) => {
                assert_eq!(failure.kind, FailureKind::NoSession);
                assert!(failure.message.contains('1'), "{}", failure.message);
                break;
            }
            _ => assert!(started.elapsed() < Duration::from_secs(5)),
        }
    }
    assert_eq!(finish(guest.start(1, sh("exit 8"))).0, ExitStatus::Code(8));
}

#[test]
fn a_command_without_a_host_goes_on_and_its_output_and_status_wait() {
    let guest = Guest::new();
    let directory = tempfile::tempdir().unwrap();
    let (go, done) = (directory.path().join("go"), directory.path().join("done"));
    let script = format!(
        "while ! [ -e {} ]; do sleep 0.01; done; echo after; echo to-nobody >&2; touch {}; exit 3",
        go.display(),
        done.display()
    );
    let session = guest.start(5, sh(&script));
    let pid = session.pid();
    drop(session);
    std::fs::write(&go, "").unwrap();
    wait_for(&done);
    // Long after its end.
    std::thread::sleep(Duration::from_millis(100));
    let session = guest.attach(5).unwrap();
    assert_eq!(session.pid(), pid);
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = session.wait(&mut out, &mut err).unwrap();
    assert_eq!(status, ExitStatus::Code(3));
    assert_eq!((out, err), (b"after\n".to_vec(), b"to-nobody\n".to_vec()));
}

#[test]
fn the_status_stays_until_a_host_has_read_it() {
    let guest = Guest::new();
    let start = ExecCommand::StartKept {
        id: 9,
        request: sh("exit 4"),
    };
    let attach = ExecCommand::Attach { id: 9 };
    for command in [&start, &attach, &attach, &attach] {
        let mut stream = guest.connect();
        frame::write(&mut stream, command).unwrap();
        // Waits for the first bytes and hangs up with the rest unread, as a host that dies does.
        stream.read_exact(&mut [0; 2]).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        drop(stream);
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(guest.finish(9).0, ExitStatus::Code(4));
}

#[test]
fn output_waits_within_its_bound_and_none_is_lost() {
    const TOTAL: usize = 3_000_000;
    let guest = Guest::new();
    let directory = tempfile::tempdir().unwrap();
    let done = directory.path().join("done");
    let script = format!(
        "i=0; while [ $i -lt 30 ]; do head -c 100000 /dev/zero | tr '\\0' \"$((i % 10))\"; \
         i=$((i + 1)); done; touch {}",
        done.display()
    );
    let expected: Vec<u8> = (0..30u8)
        .flat_map(|i| vec![b'0' + i % 10; 100_000])
        .collect();
    let mut started = Some(guest.start(2, sh(&script)));
    let mut seen = Vec::new();
    // Hosts come and go in the middle of frames.
    for _ in 0..12 {
        let session = started.take().unwrap_or_else(|| guest.attach(2).unwrap());
        let handle = session.handle();
        let cutter = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(7));
            let _ = handle.abort();
        });
        // Reads what has come before the end.
        let result = session.wait(&mut seen, &mut io::sink());
        cutter.join().unwrap();
        if result.is_ok() {
            assert!(seen == expected);
            return;
        }
        assert!(seen == expected[..seen.len()], "{} bytes", seen.len());
    }
    // Without a host the command has to wait.
    std::thread::sleep(Duration::from_millis(300));
    let left = expected.len() - seen.len();
    assert!(left < 400_000 || !done.exists());
    let (status, rest) = guest.finish(2);
    assert_eq!(status, ExitStatus::Code(0));
    seen.extend(rest);
    assert_eq!(seen.len(), TOTAL);
    assert!(seen == expected);
}

#[test]
fn input_goes_on_where_it_stopped() {
    let guest = Guest::new();
    let directory = tempfile::tempdir().unwrap();
    // Nothing is written to a host that is about to go.
    let file = directory.path().join("input");
    let request = ExecRequest {
        stdin: true,
        ..sh(&format!("cat > {0}; cat {0}", file.display()))
    };
    let session = guest.start(3, request);
    // Held, as dropping it is the end of the input.
    let mut first = session.stdin().unwrap();
    first.write_all(b"one ").unwrap();
    session.handle().abort().unwrap();
    drop(session);
    drop(first);
    let session = guest.attach(3).unwrap();
    session
        .pump_stdin(io::Cursor::new(vec![b'x'; 2_000_000]))
        .unwrap();
    let (status, output) = finish(session);
    assert_eq!(status, ExitStatus::Code(0));
    assert!(output.starts_with(b"one x"));
    assert_eq!(output.len(), 2_000_004);
}

#[test]
fn input_that_has_ended_stays_ended() {
    let guest = Guest::new();
    let request = ExecRequest {
        stdin: true,
        ..sh("cat; sleep 0.3; exit 6")
    };
    let session = guest.start(4, request);
    session
        .pump_stdin(io::Cursor::new(b"all".to_vec()))
        .unwrap();
    std::thread::sleep(Duration::from_millis(100));
    drop(session);
    let session = guest.attach(4).unwrap();
    let error = session.stdin().unwrap().write_all(b"more").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    assert_eq!(finish(session), (ExitStatus::Code(6), Vec::new()));
}

#[test]
fn a_second_host_takes_over_from_the_first() {
    let guest = Guest::new();
    let request = ExecRequest {
        stdin: true,
        ..sh("read line; echo got $line; exit 2")
    };
    let first = guest.start(6, request);
    let second = guest.attach(6).unwrap();
    assert!(first.wait(&mut io::sink(), &mut io::sink()).is_err());
    second.stdin().unwrap().write_all(b"it\n").unwrap();
    assert_eq!(finish(second), (ExitStatus::Code(2), b"got it\n".to_vec()));
}

#[test]
fn signals_and_sizes_reach_a_command_that_was_taken_up() {
    let guest = Guest::new();
    let request = ExecRequest {
        tty: Some(WinSize {
            rows: 10,
            cols: 20,
            ..WinSize::default()
        }),
        stdin: true,
        ..sh("stty size; read x; stty size; read x")
    };
    let session = guest.start(8, request);
    session.handle().abort().unwrap();
    drop(session);
    let session = guest.attach(8).unwrap();
    let size = WinSize {
        rows: 30,
        cols: 40,
        ..WinSize::default()
    };
    session.handle().resize(size).unwrap();
    let mut stdin = session.stdin().unwrap();
    stdin.write_all(b"\n").unwrap();
    let handle = session.handle();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        handle.signal(9).unwrap();
    });
    let (status, output) = finish(session);
    drop(stdin);
    assert_eq!(status.shell_code(), 137);
    let text = String::from_utf8(output).unwrap();
    assert!(text.contains("30 40"), "{text}");
}

#[test]
fn names_in_use_unknown_names_and_failed_starts_are_told() {
    let guest = Guest::new();
    assert_eq!(kind(guest.attach(77)), FailureKind::NoSession);
    let missing = ExecRequest {
        user: sh("").user,
        ..ExecRequest::new(["/no/such/program"])
    };
    let result = ExecSession::start_kept(guest.connect(), 1, missing);
    assert_eq!(kind(result), FailureKind::NotFound);
    assert_eq!(kind(guest.attach(1)), FailureKind::NoSession);
    let session = guest.start(1, sh("sleep 30"));
    let again = ExecSession::start_kept(guest.connect(), 1, sh("true"));
    assert_eq!(kind(again), FailureKind::BadRequest);
    session.handle().signal(9).unwrap();
    assert_eq!(finish(session).0.shell_code(), 137);
}

#[test]
fn a_host_that_breaks_the_protocol_loses_its_connection_and_not_the_command() {
    let guest = Guest::new();
    let session = guest.start(1, sh("sleep 0.3; exit 5"));
    let mut stream = guest.connect();
    frame::write(&mut stream, &ExecCommand::Attach { id: 1 }).unwrap();
    stream.write_all(&[1, 0, 0, 0, 99]).unwrap();
    let mut rest = Vec::new();
    // A reset is as good an end as any.
    let _ = stream.read_to_end(&mut rest);
    drop(session);
    assert_eq!(guest.finish(1).0, ExitStatus::Code(5));
}
