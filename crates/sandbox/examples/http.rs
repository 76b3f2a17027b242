//! An HTTP server that answers each request in a clean sandbox: one that was taken back to a snapshot after the
//! request before, or, with `--fresh`, one that is made for the request and dropped after it.
//!
//! ```text
//! cargo run --release -p skerry-sandbox --example http -- [--fresh] 127.0.0.1:8080
//! cargo run --release -p skerry-sandbox --example http -- [--fresh] --measure 5
//! ```

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use skerry_sandbox::{HostFunctions, Sandbox, Snapshot, serde_value};

type Error = Box<dyn std::error::Error + Send + Sync>;

/// More than this is no request.
const LINE_MAX: u64 = 8192;
const HEADERS_MAX: usize = 100;
const BODY_MAX: usize = 64 << 10;

#[derive(Debug, Serialize, Deserialize)]
struct Request {
    method: String,
    path: String,
    body: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Response {
    status: u32,
    body: String,
}

serde_value!(Request, Response);

/// What makes the sandboxes.
struct Server {
    snapshot: Arc<Snapshot>,
    functions: Arc<HostFunctions>,
    /// Clean ones, unless each request is to have a new one.
    clean: Option<Mutex<Vec<Sandbox>>>,
}

impl Server {
    fn new(fresh: bool) -> Result<Self, Box<dyn std::error::Error>> {
        let mut functions = HostFunctions::new();
        functions.add("lookup", |name: String| match name.as_str() {
            "Ada" => Some("Countess".to_owned()),
            _ => None,
        });
        let mut sandbox = Sandbox::builder()
            .guest(common::guest()?)
            .call_timeout(Duration::from_millis(100))
            .host_functions(&functions)
            .build()?;
        // Once before the snapshot: what a first call sets up is in all copies then.
        let request = Request {
            method: "GET".into(),
            path: "/".into(),
            body: String::new(),
        };
        sandbox.call::<Response>("handle", (request,))?;
        Ok(Self {
            snapshot: sandbox.snapshot()?,
            functions: Arc::new(functions),
            clean: (!fresh).then(Mutex::default),
        })
    }

    fn sandbox(&self) -> Result<Sandbox, Error> {
        let clean = self.clean.as_ref().and_then(|clean| {
            let mut clean = clean.lock().unwrap_or_else(PoisonError::into_inner);
            clean.pop()
        });
        match clean {
            Some(sandbox) => Ok(sandbox),
            None => Ok(Sandbox::from_snapshot(&self.snapshot, &self.functions)?),
        }
    }

    /// Answers one request.
    fn answer(&self, request: Request) -> Result<Response, Error> {
        let mut sandbox = self.sandbox()?;
        let response = sandbox.call::<Response>("handle", (request,));
        // Whatever happened in it: it is taken back, or it isn't kept.
        if let Some(clean) = &self.clean
            && sandbox.restore(&self.snapshot).is_ok()
        {
            let mut clean = clean.lock().unwrap_or_else(PoisonError::into_inner);
            clean.push(sandbox);
        }
        Ok(response?)
    }

    /// Serves a connection until its client is done.
    fn serve(&self, stream: TcpStream) -> Result<(), Error> {
        stream.set_nodelay(true)?;
        let mut out = stream.try_clone()?;
        let mut from = BufReader::new(stream);
        while let Some(request) = read_request(&mut from)? {
            let response = self.answer(request).unwrap_or_else(|error| Response {
                status: 500,
                body: format!("{error}\n"),
            });
            let Response { status, body } = response;
            let status = status.clamp(200, 599);
            let head = format!(
                "HTTP/1.1 {status} -\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            out.write_all((head + &body).as_bytes())?;
        }
        Ok(())
    }
}

fn line(from: &mut impl BufRead) -> Result<String, Error> {
    let mut line = String::new();
    from.take(LINE_MAX).read_line(&mut line)?;
    Ok(line.trim_end().to_owned())
}

/// The next request; `None` at the end.
fn read_request(from: &mut impl BufRead) -> Result<Option<Request>, Error> {
    let first = line(from)?;
    if first.is_empty() {
        return Ok(None);
    }
    let mut words = first.split(' ').map(str::to_owned);
    let (Some(method), Some(path)) = (words.next(), words.next()) else {
        return Err("not a request".into());
    };
    let mut length = 0;
    for n in 0.. {
        let header = line(from)?.to_ascii_lowercase();
        if header.is_empty() {
            break;
        }
        if n == HEADERS_MAX {
            return Err("too many headers".into());
        }
        if let Some(value) = header.strip_prefix("content-length:") {
            length = value.trim().parse::<usize>()?.min(BODY_MAX);
        }
    }
    let mut body = vec![0; length];
    from.read_exact(&mut body)?;
    let body = String::from_utf8_lossy(&body).into_owned();
    Ok(Some(Request { method, path, body }))
}

fn listen(server: Arc<Server>, listener: TcpListener) {
    for stream in listener.incoming().flatten() {
        let server = server.clone();
        std::thread::spawn(move || {
            if let Err(error) = server.serve(stream) {
                eprintln!("a connection ended: {error}");
            }
        });
    }
}

/// Asks over and over on one connection.
fn client(address: SocketAddr, stop: &AtomicBool, done: &AtomicU64) -> Result<(), Error> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let mut from = BufReader::new(stream.try_clone()?);
    while !stop.load(Ordering::Relaxed) {
        stream.write_all(b"GET /greet/Ada HTTP/1.1\r\nhost: localhost\r\n\r\n")?;
        let status = line(&mut from)?;
        let mut length = 0;
        loop {
            let header = line(&mut from)?;
            if header.is_empty() {
                break;
            }
            if let Some(value) = header.strip_prefix("content-length: ") {
                length = value.parse()?;
            }
        }
        let mut body = vec![0; length];
        from.read_exact(&mut body)?;
        if !status.contains(" 200 ") || body != b"good day, Countess Ada\n" {
            return Err(format!("{status}: {}", String::from_utf8_lossy(&body)).into());
        }
        done.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

fn measure(server: Arc<Server>, seconds: u64) -> Result<(), Box<dyn std::error::Error>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    std::thread::spawn(move || listen(server, listener));
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let clients = std::thread::available_parallelism().map_or(2, usize::from) * 2;
    let started = Instant::now();
    let failed = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..clients)
            .map(|_| scope.spawn(|| client(address, &stop, &done)))
            .collect();
        std::thread::sleep(Duration::from_secs(seconds));
        stop.store(true, Ordering::Relaxed);
        let ended = threads.into_iter().map(|thread| thread.join());
        ended.filter(|ended| !matches!(ended, Ok(Ok(())))).count()
    });
    let done = done.load(Ordering::Relaxed);
    let rate = done as f64 / started.elapsed().as_secs_f64();
    println!("{done} requests by {clients} clients, each in a clean sandbox: {rate:.0} a second");
    match failed {
        0 => Ok(()),
        failed => Err(format!("{failed} clients failed").into()),
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (mut fresh, mut seconds, mut address) = (false, None, None);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--fresh" => fresh = true,
            "--measure" => seconds = Some(arguments.next().ok_or("--measure SECONDS")?.parse()?),
            _ if argument.starts_with('-') || address.is_some() => {
                return Err(
                    format!("{argument:?}? [--fresh] [--measure SECONDS | ADDRESS]").into(),
                );
            }
            _ => address = Some(argument),
        }
    }
    let server = Arc::new(Server::new(fresh)?);
    if let Some(seconds) = seconds {
        return measure(server, seconds);
    }
    let address = address.unwrap_or_else(|| "127.0.0.1:8080".into());
    let listener = TcpListener::bind(&address)?;
    println!("http://{}", listener.local_addr()?);
    listen(server, listener);
    Ok(())
}
