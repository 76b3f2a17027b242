//! The standard input of a command behind no terminal: whoever is attached writes to it.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use parking_lot::Mutex;

/// The end to write to. What the command doesn't read holds up the writers, and nobody else.
#[derive(Debug)]
pub(super) struct Input {
    to: Mutex<UnixStream>,
    /// To free a writer that is held up.
    closer: UnixStream,
}

impl Input {
    /// Gives also the end to read from.
    pub(super) fn new() -> io::Result<(Self, UnixStream)> {
        let (to, from) = UnixStream::pair()?;
        let closer = to.try_clone()?;
        let to = Mutex::new(to);
        Ok((Self { to, closer }, from))
    }

    /// Passes bytes on, all of one writer's before those of another.
    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<()> {
        self.to.lock().write_all(bytes)
    }

    /// There is no more: the command finds the end of its input.
    pub(super) fn end(&self) {
        // It fails only where it was done before.
        let _ = self.closer.shutdown(Shutdown::Write);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn the_end_frees_a_writer_that_is_held_up() {
        let (input, mut from) = Input::new().expect("a socket");
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| input.write(&vec![7; 8 << 20]));
            std::thread::sleep(std::time::Duration::from_millis(50));
            input.end();
            assert!(writer.join().expect("no panic").is_err());
        });
        let mut read = Vec::new();
        from.read_to_end(&mut read).expect("its end");
        assert!(!read.is_empty() && input.write(b"more").is_err());
    }
}
