//! Many TCP connections of one guest's that are there at once, both ways, each of which echoes; and ends
//! that close one side at a time.
//!
//! The long form, with ten thousand each way:
//! `SKERRY_TEST_CONNECTIONS=10000 cargo test --release -p skerry --test connections -- --nocapture`

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use common::home::Home;
use common::{eventually, noise};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const ROUNDS: usize = 2;
/// The guest's memory, by which its mapping is known.
const MEMORY: u64 = 1 << 30;
/// What a connection may take of the process, whatever its guest takes: buffers, sockets, tables.
const EACH: u64 = 40 << 10;
/// What the process may take besides.
const BASE: u64 = 96 << 20;
const PATIENCE: Duration = Duration::from_secs(300);

fn count() -> usize {
    let given = std::env::var("SKERRY_TEST_CONNECTIONS").ok();
    given.map_or(500, |text| text.parse().expect("a number of connections"))
}

fn raise_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised).expect("the hard limit");
    let enough = limit
        .maximum
        .is_none_or(|most| most as usize > count() + 100);
    assert!(enough, "this user may have {limit:?} files open");
}

/// The guest's program, in a folder to be mounted.
fn program(home: &Home) -> String {
    let folder = home.path("program");
    std::fs::create_dir(&folder).expect("a folder");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/guests/connections.rs");
    let status = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
        .args([
            "-O",
            "--edition",
            "2024",
            "-C",
            "target-feature=+crt-static",
        ])
        .args(["-C", "relocation-model=static", "-o"])
        .arg(folder.join("connections"))
        .arg(source)
        .status();
    assert!(status.expect("a compiler").success());
    format!("{}:/program:ro", folder.display())
}

/// Bytes of a machine's process in memory, those of its guest's memory apart.
fn own_memory(home: &Home, name: &str) -> Option<u64> {
    let info: serde_json::Value =
        serde_json::from_str(&home.done(&["ps", "-a", "--format", "json"])).expect("JSON");
    let all = info.as_array().expect("machines");
    let one = all
        .iter()
        .find(|one| one["name"] == name || one["config"]["name"] == name)?;
    let pid = one["pid"]
        .as_u64()
        .or_else(|| one["state"]["pid"].as_u64())?;
    // Only an administrator looks into a process that is confined.
    let maps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
    let (mut own, mut guest) = (0, false);
    for line in maps.lines() {
        let kilobytes = |line: &str| line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok();
        if let Some(size) = line.strip_prefix("Size:") {
            guest = size.trim().trim_end_matches(" kB").parse() == Ok(MEMORY >> 10);
        }
        if line.starts_with("Rss:") && !guest {
            own += kilobytes(line)? << 10;
        }
    }
    Some(own)
}

fn check_memory(home: &Home, name: &str, what: &str) {
    let Some(own) = own_memory(home, name) else {
        eprintln!("{what}: the process can't be looked into without the right to");
        return;
    };
    let count = count();
    println!(
        "{what}: {count} connections, {} MiB of the process beside its guest's memory",
        own >> 20
    );
    assert!(own < BASE + EACH * count as u64, "{own} bytes");
}

fn start(home: &Home, name: &str, options: &[&str], verb: &str) {
    let script = format!(
        "ulimit -n 20000; exec /program/connections {verb} {}",
        count()
    );
    let volume = program(home);
    let own = ["--memory", "1G", "-v", &volume];
    home.start_with(name, &[&own[..], options].concat(), &["sh", "-c", &script]);
}

/// Waits for a line of a machine's log.
#[track_caller]
fn says(home: &Home, name: &str, line: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let ran = home.run(&["logs", name]);
        if ran.text().lines().any(|found| found == line) {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "{line}: {} {}",
            ran.text(),
            ran.stderr
        );
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_guest_has_many_connections_to_the_host_at_once() {
    raise_limit();
    let home = Home::new();
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = listener.local_addr().expect("address").port();
    let server = thread::spawn(move || {
        let mut streams: Vec<TcpStream> = (0..count())
            .map(|_| listener.accept().expect("accept").0)
            .collect();
        for _ in 0..ROUNDS {
            for stream in &mut streams {
                stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
                let mut asked = [0; 8];
                stream.read_exact(&mut asked).expect("a question");
                stream.write_all(&asked).expect("an answer");
            }
        }
        streams
    });
    let verb = format!("open 10.0.2.2:{port}");
    start(&home, "many", &["--network", "full"], &verb);
    says(&home, "many", &format!("open {}", count()));
    check_memory(&home, "many", "from the guest");
    says(&home, "many", &format!("answered {}", count()));
    assert_eq!(server.join().expect("the server").len(), count());
    assert_eq!(home.done(&["wait", "many"]), "0");
}

#[test]
fn a_guest_takes_many_connections_from_the_host_at_once() {
    raise_limit();
    let home = Home::new();
    start(&home, "many", &["-p", "127.0.0.1::7000"], "serve 7000");
    says(&home, "many", "listening");
    let host = home.done(&["port", "many", "7000"]);
    let connect = |_| {
        let stream = TcpStream::connect(&host).expect("connect");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream
    };
    let mut streams: Vec<TcpStream> = (0..count()).map(connect).collect();
    says(&home, "many", &format!("accepted {}", count()));
    check_memory(&home, "many", "to the guest");
    for round in 0..ROUNDS {
        let text = |number: usize| (round << 32 | number).to_be_bytes();
        for (number, stream) in streams.iter_mut().enumerate() {
            stream.write_all(&text(number)).expect("a question");
        }
        for (number, stream) in streams.iter_mut().enumerate() {
            let mut answer = [0; 8];
            stream.read_exact(&mut answer).expect("an answer");
            assert_eq!(answer, text(number), "{number}");
        }
    }
    says(&home, "many", &format!("answered {}", count()));
    drop(streams);
    assert_eq!(home.done(&["wait", "many"]), "0");
}

/// Each side says its end by itself, and hears the other's data after that.
#[test]
fn either_end_closes_its_side_and_still_hears_the_other() {
    let home = Home::new();
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = listener.local_addr().expect("address").port();
    let sent = noise(300_000, 5);
    let answer = sent.clone();
    let server = thread::spawn(move || {
        // The guest ends first and hears on; then the host does.
        let (mut first, _) = listener.accept().expect("accept");
        let mut asked = Vec::new();
        first.read_to_end(&mut asked).expect("to the guest's end");
        first.write_all(&answer).expect("behind it");
        drop(first);
        let (mut second, _) = listener.accept().expect("accept");
        second.write_all(&answer).expect("data");
        second.shutdown(Shutdown::Write).expect("the host's end");
        let mut heard = Vec::new();
        second.read_to_end(&mut heard).expect("behind it");
        (asked, heard)
    });
    home.start_with("ends", &["--network", "full"], &["sleep", "1000"]);
    // nc ends its side with its input, and waits for the other's.
    let script = format!("printf hello | nc 10.0.2.2 {port} | md5sum");
    let first = home.sh("ends", &script);
    let script = format!(
        "mkfifo /tmp/way; nc 10.0.2.2 {port} </tmp/way >/tmp/got & exec 3>/tmp/way; \
        for n in $(seq 100); do [ $(stat -c %s /tmp/got) = 300000 ] && break; sleep 0.1; done; \
        printf after >&3; exec 3>&-; wait; md5sum </tmp/got"
    );
    let second = home.sh("ends", &script);
    assert_eq!(first, second);
    let (asked, heard) = server.join().expect("the server");
    assert_eq!((asked, heard), (b"hello".to_vec(), b"after".to_vec()));
}

/// Who takes nothing is sent no more than buffers hold, and everything once it takes it.
#[test]
fn a_reader_that_waits_holds_the_writer_up() {
    const ALL: usize = 64 << 20;
    let home = Home::new();
    home.start_with("slow", &["-p", "127.0.0.1::9000"], &["sleep", "1000"]);
    let host = home.done(&["port", "slow", "9000"]);
    home.sh(
        "slow",
        &format!("(head -c {ALL} /dev/zero | nc -l -p 9000; touch /tmp/sent) >/dev/null 2>&1 &"),
    );
    let mut stream = None;
    eventually("a listener", || {
        let mut tried = TcpStream::connect(&host).expect("connect");
        tried
            .set_read_timeout(Some(Duration::from_secs(5)))
            .expect("a timeout");
        let good = tried.read_exact(&mut [0]).is_ok();
        stream = good.then_some(tried);
        good
    });
    let mut stream = stream.expect("a connection");
    thread::sleep(Duration::from_secs(2));
    assert_ne!(
        home.exec("slow", &["test", "-e", "/tmp/sent"]).status,
        0,
        "it all went somewhere"
    );
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let mut rest = 0;
    let mut buffer = vec![0; 1 << 16];
    while let Ok(len @ 1..) = stream.read(&mut buffer) {
        rest += len;
    }
    assert_eq!(rest + 1, ALL);
}
