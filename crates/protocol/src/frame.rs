//! Frames: a length, then postcard. Encoding into a buffer, decoding from a stream in pieces.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// Longest payload of a frame in bytes.
pub const MAX_FRAME: usize = 1024 * 1024;

/// Bytes of the length field before each payload.
const HEADER: usize = 4;

/// Why a frame could not be sent or understood.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The length field or the value to send exceeds [`MAX_FRAME`].
    #[error("Frame of {0} bytes exceeds the limit of {MAX_FRAME} bytes; the connection is closed")]
    TooLong(usize),
    /// The payload isn't a message of the expected type, or has bytes after it.
    #[error("Frame doesn't hold the expected message; host and agent may differ in version")]
    Malformed,
    /// The stream ended inside a frame.
    #[error("Connection closed inside a frame")]
    Truncated,
    /// The stream ended between frames where another frame was due.
    #[error("Connection closed by the peer")]
    Closed,
    /// The stream failed.
    #[error("Connection failed: {0}")]
    Io(#[from] io::Error),
}

/// Appends `message` as one frame to `buffer`; on error `buffer` is as it was.
pub fn encode_into<T: Serialize>(message: &T, buffer: &mut Vec<u8>) -> Result<(), FrameError> {
    let start = buffer.len();
    buffer.extend_from_slice(&[0; HEADER]);
    let written = postcard::to_io(message, &mut *buffer).map(|_| ());
    let length = buffer.len() - start - HEADER;
    if written.is_err() || length > MAX_FRAME {
        buffer.truncate(start);
        return Err(if length > MAX_FRAME {
            FrameError::TooLong(length)
        } else {
            FrameError::Malformed
        });
    }
    // The cast is exact: MAX_FRAME fits in 32 bits.
    buffer[start..start + HEADER].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(())
}

/// Decodes one payload, refusing bytes left over after the message.
pub fn decode<'a, T: Deserialize<'a>>(payload: &'a [u8]) -> Result<T, FrameError> {
    match postcard::take_from_bytes(payload) {
        Ok((message, [])) => Ok(message),
        _ => Err(FrameError::Malformed),
    }
}

/// Writes `message` as one frame with a single call to `write_all`.
pub fn write<T: Serialize>(stream: &mut impl Write, message: &T) -> Result<(), FrameError> {
    let mut buffer = Vec::with_capacity(256);
    encode_into(message, &mut buffer)?;
    stream.write_all(&buffer)?;
    stream.flush()?;
    Ok(())
}

/// Takes frames out of a byte stream that arrives in pieces of any size.
///
/// The buffer never holds more than one longest frame and one read more.
#[derive(Debug)]
pub struct FrameDecoder {
    buffer: Vec<u8>,
    /// Bytes at the start of `buffer` that were handed out already.
    taken: usize,
    /// Bytes to ask a stream for: few for short conversations, more when it gave all of that.
    piece: usize,
}

/// Bytes that a decoder asks for first.
const FIRST_PIECE: usize = 4096;

impl Default for FrameDecoder {
    fn default() -> Self {
        Self {
            buffer: Vec::new(),
            taken: 0,
            piece: FIRST_PIECE,
        }
    }
}

impl FrameDecoder {
    /// An empty decoder.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes that arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.compact();
        self.buffer.extend_from_slice(bytes);
    }

    /// Payload of the next frame when all of it has arrived.
    pub fn next_frame(&mut self) -> Result<Option<&[u8]>, FrameError> {
        let pending = self.buffer.get(self.taken..).unwrap_or_default();
        let Some((header, rest)) = pending.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*header) as usize;
        if length > MAX_FRAME {
            return Err(FrameError::TooLong(length));
        }
        let Some(payload) = rest.get(..length) else {
            return Ok(None);
        };
        self.taken += HEADER + length;
        Ok(Some(payload))
    }

    /// Whether a frame has begun to arrive and isn't complete.
    #[must_use]
    pub fn is_inside_frame(&self) -> bool {
        self.taken < self.buffer.len()
    }

    /// Blocks until a whole frame is there and returns its payload.
    ///
    /// [`FrameError::Closed`] when the stream ends between two frames.
    pub fn read_frame<R: Read>(&mut self, stream: &mut R) -> Result<&[u8], FrameError> {
        loop {
            // Asked twice because a borrow returned from inside the loop would last over the
            // read that follows.
            if self.has_frame()? {
                return self.next_frame()?.ok_or(FrameError::Malformed);
            }
            self.fill(stream)?;
        }
    }

    /// Whether [`Self::next_frame`] would return a frame.
    fn has_frame(&self) -> Result<bool, FrameError> {
        let pending = self.buffer.get(self.taken..).unwrap_or_default();
        let Some((header, rest)) = pending.split_first_chunk::<HEADER>() else {
            return Ok(false);
        };
        let length = u32::from_le_bytes(*header) as usize;
        if length > MAX_FRAME {
            return Err(FrameError::TooLong(length));
        }
        Ok(rest.len() >= length)
    }

    /// Reads once from `stream` into the buffer.
    fn fill<R: Read>(&mut self, stream: &mut R) -> Result<(), FrameError> {
        self.compact();
        let old = self.buffer.len();
        self.buffer.resize(old + self.piece, 0);
        let result = loop {
            match stream.read(&mut self.buffer[old..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other,
            }
        };
        let length = *result.as_ref().unwrap_or(&0);
        self.buffer.truncate(old + length);
        if length == self.piece {
            self.piece = (self.piece * 4).min(crate::MAX_DATA);
        }
        match result? {
            0 if old > 0 => Err(FrameError::Truncated),
            0 => Err(FrameError::Closed),
            _ => Ok(()),
        }
    }

    /// Drops bytes that were handed out.
    fn compact(&mut self) {
        self.buffer.drain(..self.taken);
        self.taken = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_frame_split_into_single_bytes_arrives_whole() {
        let mut wire = Vec::new();
        encode_into(&"hello", &mut wire).unwrap();
        let mut decoder = FrameDecoder::new();
        for &byte in &wire[..wire.len() - 1] {
            decoder.push(&[byte]);
            assert!(decoder.next_frame().unwrap().is_none());
            assert!(decoder.is_inside_frame());
        }
        decoder.push(&wire[wire.len() - 1..]);
        let payload = decoder.next_frame().unwrap().unwrap();
        assert_eq!(decode::<&str>(payload).unwrap(), "hello");
        assert!(!decoder.is_inside_frame());
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_anything_is_reserved() {
        let mut decoder = FrameDecoder::new();
        decoder.push(&u32::MAX.to_le_bytes());
        assert!(matches!(decoder.next_frame(), Err(FrameError::TooLong(_))));
        let too_long = vec![0u8; MAX_FRAME + 1];
        let mut buffer = vec![7];
        let result = encode_into(&too_long, &mut buffer);
        assert!(matches!(result, Err(FrameError::TooLong(_))));
        assert_eq!(buffer, [7]);
    }

    #[test]
    fn bytes_after_the_message_are_refused() {
        assert!(matches!(decode::<u8>(&[1, 2]), Err(FrameError::Malformed)));
        assert!(matches!(decode::<u8>(&[]), Err(FrameError::Malformed)));
    }

    #[test]
    fn end_of_stream_is_told_apart_inside_and_between_frames() {
        let mut empty: &[u8] = &[];
        let mut decoder = FrameDecoder::new();
        assert!(matches!(
            decoder.read_frame(&mut empty),
            Err(FrameError::Closed)
        ));
        let mut half: &[u8] = &[4, 0, 0, 0, 1];
        assert!(matches!(
            decoder.read_frame(&mut half),
            Err(FrameError::Truncated)
        ));
    }

    proptest! {
        #[test]
        fn any_split_of_any_frames_gives_the_frames_back(
            messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..20),
            cuts in prop::collection::vec(1usize..97, 1..50),
        ) {
            let mut wire = Vec::new();
            for message in &messages {
                encode_into(message, &mut wire).unwrap();
            }
            let mut decoder = FrameDecoder::new();
            let mut seen: Vec<Vec<u8>> = Vec::new();
            let (mut rest, mut cut) = (wire.as_slice(), cuts.iter().cycle());
            while !rest.is_empty() {
                let (piece, tail) = rest.split_at(rest.len().min(*cut.next().unwrap()));
                rest = tail;
                decoder.push(piece);
                while let Some(payload) = decoder.next_frame().unwrap() {
                    seen.push(decode(payload).unwrap());
                }
            }
            prop_assert_eq!(seen, messages);
        }

        #[test]
        fn garbage_never_panics_and_never_grows_the_buffer(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..500), 0..30),
        ) {
            let mut decoder = FrameDecoder::new();
            'pieces: for piece in &pieces {
                decoder.push(piece);
                loop {
                    match decoder.next_frame() {
                        Ok(Some(payload)) => {
                            let _ = decode::<crate::message::ExecCommand<'_>>(payload);
                            let _ = decode::<crate::message::ExecEvent<'_>>(payload);
                            let _ = decode::<crate::message::FromAgent>(payload);
                            let _ = decode::<crate::message::ToAgent>(payload);
                        }
                        Ok(None) => break,
                        Err(_) => break 'pieces,
                    }
                }
                prop_assert!(decoder.buffer.len() <= MAX_FRAME + HEADER + 500);
            }
        }

        #[test]
        fn garbage_payloads_decode_or_fail(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let _ = decode::<crate::message::ExecCommand<'_>>(&bytes);
            let _ = decode::<crate::message::ExecEvent<'_>>(&bytes);
            let _ = decode::<crate::message::FromAgent>(&bytes);
            let _ = decode::<crate::message::ToAgent>(&bytes);
        }
    }
}
