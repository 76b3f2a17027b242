//! The initial RAM disk that starts the agent: a cpio archive of one program.

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// One file of an archive, owned by root.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    name: &'a str,
    mode: u32,
    device: (u32, u32),
    data: &'a [u8],
}

impl<'a> Entry<'a> {
    /// A folder; its parents come before it.
    pub fn folder(name: &'a str) -> Self {
        Self {
            name,
            mode: DIRECTORY,
            device: (0, 0),
            data: &[],
        }
    }

    /// An executable file.
    pub fn program(name: &'a str, data: &'a [u8]) -> Self {
        Self {
            name,
            mode: EXECUTABLE,
            device: (0, 0),
            data,
        }
    }

    /// `/dev/console`, which the first program's streams go to.
    pub fn console() -> Self {
        Self {
            name: "dev/console",
            mode: CHARACTER_DEVICE,
            device: (5, 1),
            data: &[],
        }
    }
}

/// Builds a "newc" cpio archive (Linux `Documentation/driver-api/early-userspace/buffer-format.rst`).
pub fn archive(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut archive = Archive::default();
    for entry in entries {
        archive.entry(entry.name, entry.mode, entry.device, entry.data);
    }
    archive.finish()
}

/// An archive with `program` as the executable `/init`, and the folder and console that a program
/// without any other file system needs.
pub fn with_init(program: &[u8]) -> Vec<u8> {
    archive(&[
        Entry::folder("dev"),
        Entry::console(),
        Entry::program("init", program),
    ])
}

#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    inodes: u32,
}

impl Archive {
    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
        self.inodes += 1;
        // Magic, inode, mode, uid, gid, links, mtime, size, device of the file, device that it is,
        // name length with its NUL, checksum (unused).
        let fields = [
            self.inodes,
            mode,
            0,
            0,
            1,
            0,
            data.len() as u32,
            0,
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_is_newc() {
        let archive = with_init(b"program");
        assert_eq!(archive.len() % 4, 0);
        assert!(archive.starts_with(b"070701"));
        let at = archive
            .windows(5)
            .position(|w| w == b"init\0")
            .expect("the program's name");
        // 110 bytes of header before the name; the size is the seventh field.
        let header = &archive[at - 110..at];
        assert_eq!(&header[6 + 6 * 8..6 + 7 * 8], b"00000007");
        let data = (at + 5).next_multiple_of(4);
        assert_eq!(&archive[data..data + 7], b"program");
    }
}
