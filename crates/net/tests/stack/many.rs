//! Ten thousand connections at once. The host's ends are in another process, since each process has only
//! so many descriptors.

use std::collections::HashSet;
use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdin, Command, Stdio};

use std::sync::{Mutex, PoisonError};

use skerry_net::Mapping;

use super::*;

const MANY: usize = 10_000;
/// One test at a time has so many descriptors, and knows whose memory it is.
static TURN: Mutex<()> = Mutex::new(());
/// What may be under way at a time.
const WINDOW: usize = 200;

/// Another process of this program, which does what it is told and holds on to the connections.
struct Helper {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<std::process::ChildStdout>,
}

impl Helper {
    fn start(order: &str) -> Self {
        let this = std::env::current_exe().expect("this program");
        let mut child = Command::new(this)
            .args(["--exact", "many::helper", "--ignored", "--nocapture"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a helper");
        let mut stdin = child.stdin.take().expect("stdin");
        writeln!(stdin, "{order}").expect("order");
        let stdout = BufReader::new(child.stdout.take().expect("stdout"));
        Self {
            child,
            stdin,
            stdout,
        }
    }

    /// The number behind the next line that begins with `word`.
    fn told(&mut self, word: &str) -> usize {
        let mut line = String::new();
        while self.stdout.read_line(&mut line).expect("a line") > 0 {
            // The test harness writes before it, without an end.
            if let Some((_, number)) = line.split_once(word) {
                return number.trim().parse().expect("a number");
            }
            line.clear();
        }
        panic!("the helper never said {word}");
    }

    fn end(mut self) {
        drop(self.stdin);
        self.child.wait().expect("the helper's end");
    }
}

#[test]
#[ignore = "a part of the tests beside it, which start it"]
fn helper() {
    let mut order = String::new();
    std::io::stdin().read_line(&mut order).expect("an order");
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit {
        current: limit.maximum,
        ..limit
    };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).expect("limit");
    let mut held = Vec::new();
    match order.trim().split_once(' ') {
        Some(("connect", port)) => {
            let port: u16 = port.parse().expect("a port");
            for _ in 0..MANY {
                let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("connect");
                stream.write_all(b"y").expect("write");
                held.push(stream);
            }
        }
        Some(("listen", _)) => {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("listen");
            // More than wait at a time: a client doesn't learn of it if the server's queue is full.
            rustix::net::listen(&listener, 4096).expect("a longer queue");
            println!("port:{}", listener.local_addr().expect("address").port());
            held.extend(
                listener
                    .incoming()
                    .take(MANY)
                    .map(|stream| stream.expect("accept")),
            );
            for stream in &mut held {
                stream.write_all(b"x").expect("write");
            }
        }
        // Nobody told it to do anything.
        _ => return,
    }
    println!("all:{}", held.len());
    let _ = std::io::stdin().read_line(&mut order);
}

/// Bytes of memory that this process has.
fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").expect("statm");
    let pages: usize = text
        .split(' ')
        .nth(1)
        .expect("pages")
        .parse()
        .expect("a number");
    pages * 4096
}

/// What the guest's end of a connection does with a segment: port of the guest's, and of the other end.
struct Segment {
    ports: (u16, u16),
    seq: u32,
    flags: u8,
    data: Vec<u8>,
}

impl Guest {
    fn segment(&mut self) -> Option<Segment> {
        let frame = self.receive_in(Duration::from_secs(20))?;
        let ports = (
            u16::from_be_bytes([frame[36], frame[37]]),
            u16::from_be_bytes([frame[34], frame[35]]),
        );
        let total = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
        let header = usize::from(frame[46] >> 4) * 4;
        Some(Segment {
            ports,
            seq: u32::from_be_bytes(frame[38..42].try_into().expect("four")),
            flags: frame[47],
            data: frame[34 + header..14 + total].to_vec(),
        })
    }
}

#[test]
fn the_guest_has_ten_thousand_connections() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut helper = Helper::start("listen -");
    let port = helper.told("port:") as u16;
    let mut guest = Guest::in_mode(NetworkMode::Full);
    let before = resident();
    let to = SocketAddr::from((GATEWAY, port));
    // By port: a segment comes again where its answer takes long.
    let (mut answers, mut gotten) = (HashSet::new(), HashSet::new());
    let (mut opened, mut answered, mut got) = (0, 0, 0);
    while got < MANY {
        while opened < MANY && opened - answered < WINDOW {
            guest.send_tcp((10_000 + opened as u16, to), (1, 0), SYN, b"");
            opened += 1;
        }
        let state = || format!("{opened} opened, {answered} answered, {got} with data");
        let segment = guest.segment().unwrap_or_else(|| panic!("{}", state()));
        let ends = (segment.ports.0, to);
        assert_eq!(segment.flags & RST, 0, "connection {}", segment.ports.0);
        if segment.flags & SYN != 0 {
            answered += usize::from(answers.insert(segment.ports.0));
            guest.send_tcp(ends, (2, segment.seq.wrapping_add(1)), ACK, b"h");
        } else if !segment.data.is_empty() {
            assert_eq!(segment.data, b"x");
            got += usize::from(gotten.insert(segment.ports.0));
            guest.send_tcp(ends, (3, segment.seq.wrapping_add(1)), ACK, b"");
        }
    }
    assert_eq!(helper.told("all:"), MANY);
    let counters = guest.network.counters();
    assert_eq!((counters.tcp_opened, counters.refused), (MANY as u64, 0));
    let each = (resident() - before) / MANY;
    println!("{each} bytes of memory for each of {MANY} connections of the guest's");
    assert!(each < 24_000, "{each} bytes for each connection");
    helper.end();
}

#[test]
fn ten_thousand_clients_come_to_a_published_port() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mapping: Mapping = "127.0.0.1::80".parse().expect("a mapping");
    let mut guest = Guest::new(&Options {
        publish: vec![mapping],
        ..Options::default()
    });
    let port = guest.network.published()[0].host.port();
    let before = resident();
    let mut helper = Helper::start(&format!("connect {port}"));
    let mut gotten = HashSet::new();
    let mut got = 0;
    while got < MANY {
        let segment = guest.segment().unwrap_or_else(|| panic!("{got} with data"));
        let ends = (80, SocketAddr::from((GATEWAY, segment.ports.1)));
        assert_eq!(segment.flags & RST, 0, "connection {}", segment.ports.1);
        let next = segment.seq.wrapping_add(1);
        if segment.flags & SYN != 0 {
            guest.send_tcp(ends, (1, next), SYN | ACK, b"");
        } else if !segment.data.is_empty() {
            assert_eq!(segment.data, b"y");
            got += usize::from(gotten.insert(segment.ports.1));
            guest.send_tcp(ends, (2, next), ACK, b"");
        }
    }
    assert_eq!(helper.told("all:"), MANY);
    let counters = guest.network.counters();
    assert_eq!((counters.tcp_accepted, counters.refused), (MANY as u64, 0));
    let each = (resident() - before) / MANY;
    println!("{each} bytes of memory for each of {MANY} connections to the guest");
    assert!(each < 24_000, "{each} bytes for each connection");
    helper.end();
}
