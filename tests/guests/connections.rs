//! A guest program: many TCP connections that are there at once, each of which echoes.
//!
//! ```text
//!  connections open IP:PORT COUNT     makes them all, then asks each something and checks the answer, twice
//!  connections serve PORT COUNT       takes them all, then answers each what it asked, twice
//!  connections first IP:PORT          says hello and its end, and tells what it hears after that
//!  connections last IP:PORT           hears all to the other's end, and says something after that
//!  connections ask IP:PORT LEN        sends one datagram of so many bytes, and checks that it comes back
//!  connections echo PORT              sends datagrams back, without end
//! ```
//! Nothing is asked before all are there, and none is closed before all were answered.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::process::ExitCode;
use std::time::Duration;

/// How often each is used.
const ROUNDS: u64 = 2;
/// Datagrams that may be lost.
const TRIES: usize = 10;

fn all(streams: io::Result<Vec<TcpStream>>, what: &str) -> io::Result<Vec<TcpStream>> {
    let streams = streams?;
    println!("{what} {}", streams.len());
    io::stdout().flush()?;
    Ok(streams)
}

fn open(to: &str, count: usize) -> io::Result<()> {
    let streams = (0..count).map(|_| TcpStream::connect(to)).collect();
    let mut streams = all(streams, "open")?;
    for round in 0..ROUNDS {
        let text = |number: usize| (round << 32 | number as u64).to_be_bytes();
        for (number, stream) in streams.iter_mut().enumerate() {
            stream.write_all(&text(number))?;
        }
        for (number, stream) in streams.iter_mut().enumerate() {
            let mut answer = [0; 8];
            stream.read_exact(&mut answer)?;
            if answer != text(number) {
                return Err(io::Error::other(format!("connection {number}: {answer:?}")));
            }
        }
    }
    println!("answered {}", streams.len());
    Ok(())
}

fn serve(port: &str, count: usize) -> io::Result<()> {
    let listener = TcpListener::bind(format!("0.0.0.0:{port}"))?;
    println!("listening");
    io::stdout().flush()?;
    let streams = (0..count).map(|_| Ok(listener.accept()?.0)).collect();
    let mut streams = all(streams, "accepted")?;
    for _ in 0..ROUNDS {
        for stream in &mut streams {
            let mut asked = [0; 8];
            stream.read_exact(&mut asked)?;
            stream.write_all(&asked)?;
        }
    }
    println!("answered {}", streams.len());
    io::stdout().flush()?;
    // Until the other side has closed all.
    for stream in &mut streams {
        let _ = stream.read(&mut [0]);
    }
    Ok(())
}

/// How much came to the other's end, and the FNV-1a hash of it.
fn hear(stream: &mut TcpStream) -> io::Result<()> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all)?;
    let hash = all.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    println!("heard {} {hash:016x}", all.len());
    Ok(())
}

fn end(to: &str, first: bool) -> io::Result<()> {
    let mut stream = TcpStream::connect(to)?;
    if first {
        stream.write_all(b"hello")?;
        stream.shutdown(Shutdown::Write)?;
        return hear(&mut stream);
    }
    hear(&mut stream)?;
    stream.write_all(b"after")
}

fn ask(to: &str, len: usize) -> io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    socket.connect(to)?;
    let data: Vec<u8> = (0..len).map(|at| (at as u8).wrapping_mul(31) ^ (at >> 8) as u8).collect();
    let mut answer = vec![0; 1 << 16];
    for _ in 0..TRIES {
        socket.send(&data)?;
        match socket.recv(&mut answer) {
            Ok(got) if answer[..got] == data => {
                println!("same {got}");
                return Ok(());
            }
            Ok(got) => return Err(io::Error::other(format!("{got} bytes, and not the same"))),
            // Datagrams may be lost.
            Err(_) => {}
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

fn echo(port: &str) -> io::Result<()> {
    let socket = UdpSocket::bind(format!("0.0.0.0:{port}"))?;
    println!("listening");
    io::stdout().flush()?;
    let mut data = vec![0; 1 << 16];
    loop {
        let (len, from) = socket.recv_from(&mut data)?;
        socket.send_to(&data[..len], from)?;
    }
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["open", to, count] => count.parse().map(|count| open(to, count)),
        ["serve", port, count] => count.parse().map(|count| serve(port, count)),
        ["first", to] => Ok(end(to, true)),
        ["last", to] => Ok(end(to, false)),
        ["ask", to, len] => len.parse().map(|len| ask(to, len)),
        ["echo", port] => Ok(echo(port)),
        _ => {
            eprintln!("usage: connections open IP:PORT COUNT | serve PORT COUNT | first IP:PORT | last IP:PORT | ask IP:PORT LEN | echo PORT");
            return ExitCode::from(2);
        }
    };
    match done.map_err(io::Error::other).and_then(|done| done) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
