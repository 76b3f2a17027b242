//! The user's terminal: raw while a guest owns it, and its size.

use std::io::{self, IsTerminal, Read};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use skerry_engine::WinSize;

/// Puts stdin's terminal into raw mode until dropped.
#[derive(Debug)]
pub struct Raw {
    before: Termios,
}

impl Raw {
    /// `None` where stdin is no terminal.
    pub fn enter() -> Option<Self> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return None;
        }
        let before = tcgetattr(&stdin).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw).ok()?;
        Some(Self { before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // A terminal that is gone needs no restoring.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}

/// The size of the terminal that stdout, or else stdin, is.
pub fn size() -> Option<WinSize> {
    let size = tcgetwinsize(io::stdout())
        .or_else(|_| tcgetwinsize(io::stdin()))
        .ok()?;
    Some(WinSize {
        rows: size.ws_row,
        cols: size.ws_col,
        x_pixels: size.ws_xpixel,
        y_pixels: size.ws_ypixel,
    })
}

/// Input from a raw terminal, in which Ctrl-A x means "end the machine" and Ctrl-A Ctrl-A one
/// Ctrl-A.
pub struct Escapes<R, F> {
    inner: R,
    end: F,
    prefix: bool,
}

impl<R: Read, F: FnMut()> Escapes<R, F> {
    /// `end` is called on Ctrl-A x.
    pub fn new(inner: R, end: F) -> Self {
        Self {
            inner,
            end,
            prefix: false,
        }
    }
}

impl<R: Read, F: FnMut()> Read for Escapes<R, F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        const PREFIX: u8 = 1;
        if buffer.len() < 2 {
            return self.inner.read(buffer);
        }
        loop {
            let mut input = vec![0; buffer.len() / 2];
            let length = self.inner.read(&mut input)?;
            if length == 0 {
                return Ok(0);
            }
            let mut written = 0;
            for &byte in input.iter().take(length) {
                let pass: &[u8] = match (std::mem::take(&mut self.prefix), byte) {
                    (false, PREFIX) => {
                        self.prefix = true;
                        &[]
                    }
                    (true, b'x' | b'X') => {
                        (self.end)();
                        return Ok(0);
                    }
                    (true, PREFIX) => &[PREFIX],
                    (true, _) => &[PREFIX, byte],
                    (false, _) => &[byte],
                };
                for &byte in pass {
                    // An input byte gives two at most, and the buffer is twice the input.
                    if let Some(slot) = buffer.get_mut(written) {
                        *slot = byte;
                        written += 1;
                    }
                }
            }
            if written > 0 {
                return Ok(written);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(keys: &[u8]) -> (Vec<u8>, bool) {
        let mut ended = false;
        let mut seen = Vec::new();
        Escapes::new(keys, || ended = true)
            .read_to_end(&mut seen)
            .unwrap();
        (seen, ended)
    }

    #[test]
    fn escape_sequences() {
        assert_eq!(typed(b"ls\r"), (b"ls\r".to_vec(), false));
        assert_eq!(typed(b"a\x01\x01b"), (b"a\x01b".to_vec(), false));
        assert_eq!(typed(b"a\x01c"), (b"a\x01c".to_vec(), false));
        assert!(typed(b"\x01x").1);
    }
}
