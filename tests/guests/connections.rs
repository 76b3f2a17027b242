//! A guest program: many TCP connections that are there at once, each of which echoes.
//!
//! ```text
//!  connections open IP:PORT COUNT     makes them all, then asks each something and checks the answer, twice
//!  connections serve PORT COUNT       takes them all, then answers each what it asked, twice
//! ```
//! Nothing is asked before all are there, and none is closed before all were answered.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;

/// How often each is used.
const ROUNDS: u64 = 2;

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

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["open", to, count] => count.parse().map(|count| open(to, count)),
        ["serve", port, count] => count.parse().map(|count| serve(port, count)),
        _ => {
            eprintln!("usage: connections open IP:PORT COUNT | serve PORT COUNT");
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
