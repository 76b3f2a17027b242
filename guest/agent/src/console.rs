//! Connections over a console port, where the guest has no vsock.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::termios::OptionalActions;
use skerry_protocol::Transport;
use skerry_protocol::mux::{Mux, Side};

use crate::mounts::named;

/// Name of the virtio port (virtio 1.3 §5.3.6.3, `VIRTIO_CONSOLE_PORT_NAME`) that is the host's.
pub const PORT_NAME: &str = "skerry.agent";

/// The console device to use where no port has that name.
const FALLBACK: &str = "/dev/hvc1";

/// How long a port may take to appear.
const PATIENCE: Duration = Duration::from_secs(10);

/// The host's end is reached through a device.
#[derive(Debug)]
pub struct Console {
    mux: Mux,
}

impl Console {
    /// Opens the port named [`PORT_NAME`], or the second virtio console.
    pub fn open_default() -> io::Result<Self> {
        let started = Instant::now();
        loop {
            let named = find_port(Path::new("/sys/class/virtio-ports"));
            let path = named.unwrap_or_else(|| PathBuf::from(FALLBACK));
            match Self::open(&path) {
                Err(_) if started.elapsed() < PATIENCE => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                result => return result,
            }
        }
    }

    /// Opens a character device.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = rustix::fs::OFlags::NOCTTY.bits() as i32;
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path);
        let device = device.map_err(|error| named(path.display(), &error))?;
        if let Ok(mut settings) = rustix::termios::tcgetattr(&device) {
            // The bytes are not a terminal's: no echo, no line editing, no translation.
            settings.make_raw();
            rustix::termios::tcsetattr(&device, OptionalActions::Now, &settings)?;
        }
        Ok(Self {
            mux: Mux::start(Port(device), Side::Guest)?,
        })
    }

    /// Connects to a port of the host.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        self.mux.connect(port)
    }

    /// The host's next connection to a port.
    pub fn accept(&self, port: u32) -> io::Result<UnixStream> {
        self.mux.accept(port)
    }
}

/// Device node of the virtio port with our name.
fn find_port(class: &Path) -> Option<PathBuf> {
    for entry in std::fs::read_dir(class).ok()?.flatten() {
        let name = std::fs::read_to_string(entry.path().join("name"));
        if name.is_ok_and(|name| name.trim_end() == PORT_NAME) {
            return Some(Path::new("/dev").join(entry.file_name()));
        }
    }
    None
}

/// A character device as a stream.
struct Port(File);

impl Read for Port {
    /// A virtio port reads as ended while the host has it closed; it may open it again.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(buffer) {
                Ok(0) if !buffer.is_empty() => std::thread::sleep(Duration::from_millis(20)),
                result => return result,
            }
        }
    }
}

impl Write for Port {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.0.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Transport for Port {
    fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// A device has no ends of its own.
    fn shutdown(&self, _how: Shutdown) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_found_by_its_name() {
        let class = tempfile::tempdir().unwrap();
        assert_eq!(find_port(class.path()), None);
        for (port, name) in [("vport1p0", "other\n"), ("vport1p1", "skerry.agent\n")] {
            std::fs::create_dir(class.path().join(port)).unwrap();
            std::fs::write(class.path().join(port).join("name"), name).unwrap();
        }
        assert_eq!(
            find_port(class.path()),
            Some(PathBuf::from("/dev/vport1p1"))
        );
    }
}
