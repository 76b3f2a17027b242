//! Frames on their way to the host, of which a connection may take any part before it breaks.

use std::io::{self, Write};

use skerry_protocol::frame::{self, FrameDecoder, FrameError};
use skerry_protocol::message::ExecEvent;

/// Bytes that a connection has taken may stay in the buffer up to this many.
const SLACK: usize = 64 * 1024;

/// Frames that the host hasn't taken.
#[derive(Debug, Default)]
pub struct Output {
    bytes: Vec<u8>,
    /// Start of the first frame that the connection hasn't taken whole.
    frame: usize,
    /// Bytes that the connection has taken.
    sent: usize,
}

impl Output {
    /// Bytes that the connection hasn't taken.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.bytes.len() - self.sent
    }

    /// Adds a frame.
    pub fn push(&mut self, event: &ExecEvent<'_>) -> Result<(), FrameError> {
        if self.frame > SLACK {
            self.bytes.drain(..self.frame);
            self.sent -= self.frame;
            self.frame = 0;
        }
        frame::encode_into(event, &mut self.bytes)
    }

    /// Sends what the connection takes.
    pub fn flush(&mut self, connection: &mut impl Write) -> Result<(), FrameError> {
        while self.pending() > 0 {
            match connection.write(self.bytes.get(self.sent..).unwrap_or_default()) {
                Ok(0) => return Err(FrameError::Closed),
                Ok(length) => self.sent += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.find_frame();
                    return Ok(());
                }
                Err(error) => {
                    self.find_frame();
                    return Err(error.into());
                }
            }
        }
        self.bytes.clear();
        self.frame = 0;
        self.sent = 0;
        Ok(())
    }

    /// Moves [`Self::frame`] up to the frame that `sent` is in.
    fn find_frame(&mut self) {
        while let Some((header, _)) = self
            .bytes
            .get(self.frame..self.sent)
            .and_then(<[u8]>::split_first_chunk::<4>)
        {
            let next = self.frame + header.len() + u32::from_le_bytes(*header) as usize;
            if next > self.sent {
                return;
            }
            self.frame = next;
        }
    }

    /// Begins anew on another connection: with `greeting`, then what the command wrote and no
    /// connection took whole. What else the last connection was to be told is nothing to this one.
    pub fn restart(&mut self, greeting: &[ExecEvent<'_>]) -> Result<(), FrameError> {
        let mut old = FrameDecoder::new();
        old.push(self.bytes.get(self.frame..).unwrap_or_default());
        let mut bytes = Vec::new();
        for event in greeting {
            frame::encode_into(event, &mut bytes)?;
        }
        while let Some(payload) = old.next_frame()? {
            let event = frame::decode(payload)?;
            if matches!(event, ExecEvent::Stdout(_) | ExecEvent::Stderr(_)) {
                frame::encode_into(&event, &mut bytes)?;
            }
        }
        *self = Self {
            bytes,
            frame: 0,
            sent: 0,
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use skerry_protocol::message::ExitStatus;

    /// Takes so many bytes, then none for now.
    struct Narrow {
        left: usize,
        taken: Vec<u8>,
    }

    impl Write for Narrow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.left == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            // In pieces that don't respect frames.
            let length = bytes.len().min(self.left).min(7);
            self.left -= length;
            self.taken.extend_from_slice(&bytes[..length]);
            Ok(length)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Standard output of the whole frames in `wire`.
    fn stdout_of(wire: &[u8]) -> Vec<u8> {
        let mut decoder = FrameDecoder::new();
        decoder.push(wire);
        let mut text = Vec::new();
        while let Some(payload) = decoder.next_frame().unwrap() {
            if let ExecEvent::Stdout(bytes) = frame::decode(payload).unwrap() {
                text.extend_from_slice(bytes);
            }
        }
        text
    }

    #[test]
    fn a_connection_that_breaks_anywhere_loses_and_repeats_nothing() {
        let pieces: Vec<Vec<u8>> = (0..40u8).map(|n| vec![n; usize::from(n) * 3 + 1]).collect();
        let whole: Vec<u8> = pieces.concat();
        let mut probe = Output::default();
        for piece in &pieces {
            probe.push(&ExecEvent::Stdout(piece)).unwrap();
        }
        let length = probe.pending();
        for cut in (0..length).step_by(13) {
            let mut output = Output::default();
            output.push(&ExecEvent::Started(1)).unwrap();
            let mut first = Narrow {
                left: cut,
                taken: Vec::new(),
            };
            for piece in &pieces {
                output.push(&ExecEvent::StdinCredit(5)).unwrap();
                output.push(&ExecEvent::Stdout(piece)).unwrap();
                output.flush(&mut first).unwrap();
            }
            output.push(&ExecEvent::Ended(ExitStatus::Code(0))).unwrap();
            output.restart(&[ExecEvent::Started(1)]).unwrap();
            let mut second = Narrow {
                left: usize::MAX,
                taken: Vec::new(),
            };
            output.flush(&mut second).unwrap();
            assert_eq!(output.pending(), 0);
            let seen = [stdout_of(&first.taken), stdout_of(&second.taken)].concat();
            assert!(seen == whole, "cut at {cut}");
            // Neither credit nor the end is repeated: that is the new greeting's.
            let mut decoder = FrameDecoder::new();
            decoder.push(&second.taken);
            let mut others = 0;
            while let Some(payload) = decoder.next_frame().unwrap() {
                match frame::decode(payload).unwrap() {
                    ExecEvent::Stdout(_) => {}
                    event => {
                        assert_eq!(event, ExecEvent::Started(1));
                        others += 1;
                    }
                }
            }
            assert_eq!(others, 1);
        }
    }

    #[test]
    fn a_slow_connection_does_not_make_the_buffer_grow() {
        let mut output = Output::default();
        let piece = vec![7; 10_000];
        let mut sink = Narrow {
            left: 0,
            taken: Vec::new(),
        };
        for _ in 0..500 {
            output.push(&ExecEvent::Stdout(&piece)).unwrap();
            // Always a little less than there is.
            sink.left = output.pending() - 5;
            output.flush(&mut sink).unwrap();
            assert!(
                output.bytes.len() < SLACK + 30_000,
                "{}",
                output.bytes.len()
            );
        }
    }
}
