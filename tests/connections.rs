//! Many TCP connections of one guest's that are there at once, both ways, each of which echoes; and ends
//! that close one side at a time.
//!
//! The long form, with ten thousand each way:
//! `SKERRY_TEST_CONNECTIONS=10000 cargo test --release -p skerry --test connections -- --nocapture`

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use common::home::Home;
use common::{eventually, noise};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const ROUNDS: usize = 2;
/// What a connection may take of the process, whatever its guest takes: buffers, sockets, tables.
const EACH: u64 = 40 << 10;
/// What the process may take besides.
const BASE: u64 = 48 << 20;
const PATIENCE: Duration = Duration::from_secs(300);

fn count() -> usize {
    let given = std::env::var("SKERRY_TEST_CONNECTIONS").ok();
    given.map_or(500, |text| text.parse().expect("a number of connections"))
}

/// A user may have so many files open: one of the tests that have very many runs at a time.
static ALONE: Mutex<()> = Mutex::new(());

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

/// Bytes of a machine's process in memory, those of its guest's memory apart.
fn own_memory(home: &Home, name: &str) -> Option<u64> {
    let pid = home.info(name)?["pid"].as_u64()?;
    // Only an administrator looks into a process that is confined.
    let maps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
    let (mut own, mut guest) = (0, false);
    for line in maps.lines() {
        // A line for each mapping, then its numbers.
        if line
            .split(' ')
            .next()
            .is_some_and(|first| first.contains('-'))
        {
            guest = line.contains("/snapshots/");
        } else if let Some(kib) = line.strip_prefix("Private_Dirty:")
            && !guest
        {
            own += kib.trim().trim_end_matches(" kB").parse::<u64>().ok()? << 10;
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
        "ulimit -n 20000; exec /programs/connections {verb} {}",
        count()
    );
    let volume = home.guest_program("connections");
    let own = ["--memory", "1G", "-v", &volume];
    let options = [&own[..], options].concat();
    // The next one goes on from this one's start: its memory is a mapping of that, and known by it.
    home.start_with("before", &options, &["true"]);
    home.done(&["wait", "before"]);
    home.start_with(name, &options, &["sh", "-c", &script]);
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
    let _alone = ALONE.lock();
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
    let _alone = ALONE.lock();
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
    let program = home.guest_program("connections");
    home.start_with(
        "ends",
        &["--network", "full", "-v", &program],
        &["sleep", "1000"],
    );
    let hash = sent.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    for verb in ["first", "last"] {
        let told = home.sh(
            "ends",
            &format!("/programs/connections {verb} 10.0.2.2:{port}"),
        );
        assert_eq!(told, format!("heard 300000 {hash:016x}"), "{verb}");
    }
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

/// Datagrams of eight and sixty kilobytes over a card whose packets have 1500 bytes: to servers on the host's
/// loopback interface, and through published ports.
#[test]
fn long_datagrams_pass_in_fragments() {
    let home = Home::new();
    let program = home.guest_program("connections");
    let options = ["-v", &program, "--network", "full", "--network-mtu", "1500"];
    let port = ["-p", "127.0.0.1::7001/udp"];
    let command = ["/programs/connections", "echo", "7001"];
    home.start_with("small", &[&options[..], &port].concat(), &command);
    says(&home, "small", "listening");
    let server = UdpSocket::bind("127.0.0.1:0").expect("bind");
    let port = server.local_addr().expect("an address").port();
    thread::spawn(move || {
        let mut data = vec![0; 1 << 16];
        while let Ok((len, from)) = server.recv_from(&mut data) {
            let _ = server.send_to(&data[..len], from);
        }
    });
    let client = UdpSocket::bind("127.0.0.1:0").expect("bind");
    client
        .connect(home.done(&["port", "small", "7001/udp"]))
        .expect("connect");
    client
        .set_read_timeout(Some(Duration::from_secs(2)))
        .expect("a timeout");
    for len in [1472, 1473, 8 << 10, 60 << 10] {
        let asked = home.sh(
            "small",
            &format!("/programs/connections ask 10.0.2.2:{port} {len}"),
        );
        assert_eq!(asked, format!("same {len}"));
        let data = noise(len, 9);
        let mut answer = vec![0; 1 << 16];
        eventually("the datagram back", || {
            client.send(&data).expect("send");
            client
                .recv(&mut answer)
                .is_ok_and(|got| answer[..got] == data)
        });
    }
    let text = home.done(&["inspect", "--sample", "1ms", "small"]);
    let inspected: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let reassembled = &inspected["network"]["counters"]["reassembled"];
    assert!(reassembled.as_u64() >= Some(6), "{reassembled}");
}
