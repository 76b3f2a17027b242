//! Bytes between commands, which are read and written on threads, and HTTP, which is neither.
//!
//! ```text
//!  hijacked connection ─► Input (Read)        command's stdin
//!  Wire (Write) ─ frames of docker's, or plain ─► hijacked connection   ◄─ stdout, stderr
//!  Lines (Write) ─ one JSON object a piece ─► body of an answer
//! ```
//! What a client doesn't take holds the command up, and nothing is kept for it but a few pieces.

use std::io::{self, Read, Write};
use std::sync::Arc;

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use serde::Serialize;
use tokio::io::{ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::io::SyncIoBridge;

/// Pieces of an answer that its client hasn't taken yet.
const PIECES: usize = 16;

/// Which of a command's streams, as docker numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Stdout = 1,
    Stderr = 2,
}

/// The body of an answer that is written on a thread.
#[derive(Clone, Debug)]
pub(crate) struct BodySender(mpsc::Sender<Bytes>);

/// A body, and the way to write it.
pub(crate) fn body() -> (BodySender, Body) {
    let (sender, receiver) = mpsc::channel(PIECES);
    let pieces = ReceiverStream::new(receiver).map(Ok::<Bytes, io::Error>);
    (BodySender(sender), Body::from_stream(pieces))
}

impl BodySender {
    /// Whether the client has gone.
    pub(crate) fn is_closed(&self) -> bool {
        self.0.is_closed()
    }

    pub(crate) fn send(&self, bytes: impl Into<Bytes>) -> io::Result<()> {
        let sent = self.0.blocking_send(bytes.into());
        sent.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    /// Sends an object on a line of its own.
    pub(crate) fn send_line(&self, object: &impl Serialize) -> io::Result<()> {
        let mut text = serde_json::to_vec(object)?;
        text.push(b'\n');
        self.send(text)
    }
}

impl Write for BodySender {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.send(Bytes::copy_from_slice(bytes))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a command writes, as lines of JSON: `{"stream": "stdout", "base64": "…"}`.
#[derive(Debug)]
pub(crate) struct Lines {
    pub(crate) out: BodySender,
    pub(crate) kind: Kind,
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let stream = match self.kind {
            Kind::Stdout => "stdout",
            Kind::Stderr => "stderr",
        };
        let base64 = BASE64_STANDARD.encode(bytes);
        self.out
            .send_line(&serde_json::json!({ "stream": stream, "base64": base64 }))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Frames in which docker sends two streams over one connection: kind, three zero bytes, length in
/// network order, bytes.
pub(crate) fn frame(kind: Kind, bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let mut frame = Vec::with_capacity(8 + bytes.len());
    frame.extend([kind as u8, 0, 0, 0]);
    frame.extend(length.to_be_bytes());
    frame.extend(bytes);
    frame
}

/// Takes one of a command's streams for a client of docker's.
#[derive(Debug)]
pub(crate) struct Wire<W> {
    pub(crate) out: Arc<Mutex<W>>,
    /// Of which stream each piece tells; nothing where there is a terminal, which has but one.
    pub(crate) kind: Option<Kind>,
}

/// The longest piece in one frame.
const LONGEST: usize = 1 << 20;

impl<W: Write> Write for Wire<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = bytes.get(..LONGEST).unwrap_or(bytes);
        let mut out = self.out.lock();
        match self.kind {
            Some(kind) => out.write_all(&frame(kind, piece))?,
            None => out.write_all(piece)?,
        }
        out.flush()?;
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.lock().flush()
    }
}

/// Where a client's input is read.
pub(crate) struct Input(SyncIoBridge<ReadHalf<TokioIo<Upgraded>>>);

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

/// The way back to a client, which is told the end when it is dropped.
pub(crate) struct Output(SyncIoBridge<WriteHalf<TokioIo<Upgraded>>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        // A client that has gone needs no end.
        let _ = self.0.shutdown();
    }
}

/// Whether a request asks for its connection.
pub(crate) fn asks_upgrade(headers: &HeaderMap) -> bool {
    headers.contains_key(header::UPGRADE)
}

/// Takes the connection of a request, whose answer has to be [`switching`].
pub(crate) fn take(request: Request) -> OnUpgrade {
    hyper::upgrade::on(request)
}

/// Both directions of a connection that was taken, once its request is answered. To be called, and used,
/// on threads that may wait.
pub(crate) fn ends(
    runtime: &tokio::runtime::Handle,
    upgrade: OnUpgrade,
) -> io::Result<(Input, Output)> {
    let upgraded = runtime.block_on(upgrade).map_err(io::Error::other)?;
    let (input, output) = tokio::io::split(TokioIo::new(upgraded));
    Ok((
        Input(SyncIoBridge::new_with_handle(input, runtime.clone())),
        Output(SyncIoBridge::new_with_handle(output, runtime.clone())),
    ))
}

/// What docker calls a terminal's output, or the frames of two streams.
pub(crate) fn content_type(tty: bool) -> &'static str {
    match tty {
        true => "application/vnd.docker.raw-stream",
        false => "application/vnd.docker.multiplexed-stream",
    }
}

/// The answer by which the connection is the request's.
pub(crate) fn switching(tty: bool) -> Response {
    let headers = [
        (header::CONNECTION, "Upgrade"),
        (header::UPGRADE, "tcp"),
        (header::CONTENT_TYPE, content_type(tty)),
    ];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_dockers() {
        assert_eq!(
            frame(Kind::Stderr, b"no\n"),
            [2, 0, 0, 0, 0, 0, 0, 3, b'n', b'o', b'\n']
        );
        let out = Arc::new(Mutex::new(Vec::new()));
        let mut wire = Wire {
            out: out.clone(),
            kind: Some(Kind::Stdout),
        };
        let long = vec![b'x'; LONGEST + 5];
        wire.write_all(&long).expect("written");
        let out = out.lock();
        assert_eq!(out.len(), LONGEST + 5 + 16);
        assert_eq!(out.get(..8), Some(&[1, 0, 0, 0, 0, 16, 0, 0][..]));
        let second = out.get(8 + LONGEST..16 + LONGEST);
        assert_eq!(second, Some(&[1, 0, 0, 0, 0, 0, 0, 5][..]));
    }
}
