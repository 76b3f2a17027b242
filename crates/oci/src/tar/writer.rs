//! Writing tar archives of plain files, always the same bytes for the same files.

use std::io::{self, Read, Write};

use super::BLOCK;

/// The largest size in octal digits; above it GNU's base-256 numbers (tar(5), "Numeric Extensions").
const OCTAL_MAX: u64 = (1 << 33) - 1;

/// Appends files to an archive.
pub(crate) struct TarWriter<W>(W);

impl<W: Write> TarWriter<W> {
    pub(crate) fn new(out: W) -> Self {
        TarWriter(out)
    }

    /// A file of `size` bytes, which `from` has to give. The name is one of an image's parts:
    /// short, and made by us.
    pub(crate) fn file(&mut self, name: &str, size: u64, from: impl Read) -> io::Result<()> {
        self.0.write_all(&header(name, size)?)?;
        let copied = io::copy(&mut from.take(size), &mut self.0)?;
        if copied != size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let rest = size.next_multiple_of(BLOCK as u64) - size;
        self.0.write_all(&[0; BLOCK][..rest as usize])
    }

    /// Ends the archive.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        self.0.write_all(&[0; 2 * BLOCK])?;
        self.0.flush()
    }
}

/// A header of POSIX ustar (IEEE 1003.1, pax, "ustar Interchange Format").
fn header(name: &str, size: u64) -> io::Result<[u8; BLOCK]> {
    let mut h = [0u8; BLOCK];
    if name.len() >= 100 {
        return Err(io::Error::other(
            "the name of a part is too long for an archive",
        ));
    }
    h[..name.len()].copy_from_slice(name.as_bytes());
    h[100..108].copy_from_slice(b"0000644\0");
    h[108..116].copy_from_slice(b"0000000\0");
    h[116..124].copy_from_slice(b"0000000\0");
    if size <= OCTAL_MAX {
        h[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    } else {
        h[124] = 0x80;
        h[128..136].copy_from_slice(&size.to_be_bytes());
    }
    h[136..148].copy_from_slice(b"00000000000\0");
    h[148..156].fill(b' ');
    h[156] = b'0';
    h[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = h.iter().map(|byte| u32::from(*byte)).sum();
    h[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Ok(h)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tar::{Limits, Streaming, TarReader};

    #[test]
    fn what_is_written_is_read() {
        let mut bytes = Vec::new();
        let mut writer = TarWriter::new(&mut bytes);
        let files = [
            ("a", vec![1; 512]),
            ("b/c", vec![2; 513]),
            ("d", Vec::new()),
        ];
        for (name, data) in &files {
            writer.file(name, data.len() as u64, &data[..]).unwrap();
        }
        assert!(writer.file("short", 9, &b"x"[..]).is_err());
        let mut bytes = Vec::new();
        let mut writer = TarWriter::new(&mut bytes);
        for (name, data) in &files {
            writer.file(name, data.len() as u64, &data[..]).unwrap();
        }
        writer.finish().unwrap();
        assert_eq!(bytes.len() % BLOCK, 0);
        let mut reader = TarReader::new(Streaming(&bytes[..]), Limits::default());
        for (name, data) in &files {
            let entry = reader.next_entry().unwrap().unwrap();
            assert_eq!(entry.path, name.as_bytes());
            let mut found = Vec::new();
            reader.read_to_end(&mut found).unwrap();
            assert_eq!(found, *data);
        }
        assert!(reader.next_entry().unwrap().is_none());
    }

    #[test]
    fn sizes_beyond_octal() {
        let size = OCTAL_MAX + 1;
        let h = header("x", size).unwrap();
        assert_eq!((h[124], &h[128..136]), (0x80, &size.to_be_bytes()[..]));
    }
}
