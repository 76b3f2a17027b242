//! Decompressing a kernel payload on the host.
//!
//! The kernel's build (scripts/Makefile.lib) makes: gzip with its own length field; the others with
//! the decompressed length appended as four bytes, which must not reach decoders that mind.
//! LZ4 is the "legacy" frame; xz has an x86 branch filter; LZMA is the headered "alone" format.

use std::io::{self, Cursor, Read};

use crate::FormatError;
use crate::bytes::{slice_at, u32_at};

/// No kernel decompresses to more than this.
pub const MAX_KERNEL: u64 = 1 << 30;
const LZ4_LEGACY_MAGIC: u32 = 0x184c_2102;
/// Decompressed size of every LZ4 legacy block but the last.
const LZ4_BLOCK: usize = 8 << 20;
/// What the decoder of xz and LZMA may use for its dictionary.
const LZMA_MEMORY_KIB: u32 = 256 << 10;

/// Decompresses `payload`, or copies it where it is an ELF file already.
pub fn payload(payload: &[u8]) -> Result<Vec<u8>, FormatError> {
    let start = *payload
        .first_chunk::<4>()
        .ok_or(FormatError::Truncated("compressed payload"))?;
    let cursor = || Cursor::new(payload);
    match start {
        [0x7f, b'E', b'L', b'F'] => Ok(payload.to_vec()),
        [0x1f, 0x8b | 0x9e, ..] => read("gzip", payload, flate2::read::GzDecoder::new(cursor())),
        [0xfd, b'7', b'z', b'X'] => {
            let reader = lzma_rust2::XzReader::new_mem_limit(cursor(), false, LZMA_MEMORY_KIB);
            read("xz", payload, reader)
        }
        [b'B', b'Z', b'h', _] => read("bzip2", payload, bzip2::read::BzDecoder::new(cursor())),
        [0x28, 0xb5, 0x2f, 0xfd] => zstd(payload),
        [0x5d, 0, 0, _] => {
            let reader = lzma_rust2::LzmaReader::new_mem_limit(cursor(), LZMA_MEMORY_KIB, None);
            let reader = reader.map_err(|source| failed("LZMA", source))?;
            read("LZMA", payload, reader)
        }
        _ if u32::from_le_bytes(start) == LZ4_LEGACY_MAGIC => lz4_legacy(payload),
        other => Err(FormatError::UnknownCompression(other)),
    }
}

fn failed(method: &'static str, source: impl Into<io::Error>) -> FormatError {
    FormatError::Decompress {
        method,
        source: source.into(),
    }
}

fn zstd(payload: &[u8]) -> Result<Vec<u8>, FormatError> {
    let reader = zstd::stream::read::Decoder::new(Cursor::new(payload))
        .map_err(|source| failed("Zstandard", source))?
        .single_frame();
    read("Zstandard", payload, reader)
}

/// The decompressed length that the kernel's build appends: only a hint for the first allocation.
fn size_hint(payload: &[u8]) -> usize {
    let size = payload
        .len()
        .checked_sub(4)
        .and_then(|at| u32_at(payload, at));
    let likely = |&size: &u32| (size as usize) < payload.len().saturating_mul(16);
    size.filter(likely).unwrap_or(0) as usize
}

fn read(method: &'static str, payload: &[u8], reader: impl Read) -> Result<Vec<u8>, FormatError> {
    let mut out = Vec::with_capacity(size_hint(payload));
    reader
        .take(MAX_KERNEL + 1)
        .read_to_end(&mut out)
        .map_err(|source| failed(method, source))?;
    if out.len() as u64 > MAX_KERNEL {
        return Err(FormatError::TooLarge { limit: MAX_KERNEL });
    }
    Ok(out)
}

/// LZ4 legacy frame: magic, then blocks of a 32-bit length and that many bytes, each of at most
/// 8 MiB decompressed; then, in a kernel, four bytes of total length.
fn lz4_legacy(payload: &[u8]) -> Result<Vec<u8>, FormatError> {
    let invalid = |what: &str| failed("LZ4", io::Error::new(io::ErrorKind::InvalidData, what));
    let mut out = Vec::with_capacity(size_hint(payload));
    let mut block = vec![0; LZ4_BLOCK];
    let mut at = 4_usize;
    // The appended total looks like one more block length; nothing follows it.
    while let Some(len) = u32_at(payload, at).filter(|_| payload.len() - at > 4) {
        if len == LZ4_LEGACY_MAGIC {
            at += 4;
            continue;
        }
        let input = slice_at(payload, at as u64 + 4, len.into())
            .ok_or_else(|| invalid("A block is longer than the file"))?;
        let size = lz4_flex::block::decompress_into(input, &mut block)
            .map_err(|source| failed("LZ4", io::Error::other(source)))?;
        out.extend_from_slice(&block[..size]);
        if out.len() as u64 > MAX_KERNEL {
            return Err(FormatError::TooLarge { limit: MAX_KERNEL });
        }
        at += 4 + input.len();
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    fn kernel() -> Vec<u8> {
        let mut body = b"\x7fELF".to_vec();
        for n in 0..200_000_u32 {
            body.extend_from_slice(&(n / 7).to_le_bytes());
        }
        body
    }

    fn with_size(mut compressed: Vec<u8>, size: usize) -> Vec<u8> {
        compressed.extend_from_slice(&u32::try_from(size).unwrap().to_le_bytes());
        compressed
    }

    #[test]
    fn gzip_zstandard_and_plain() {
        let kernel = kernel();
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(&kernel).unwrap();
        assert!(payload(&gz.finish().unwrap()).unwrap() == kernel);
        let zst = zstd::stream::encode_all(&kernel[..], 3).unwrap();
        assert!(payload(&with_size(zst, kernel.len())).unwrap() == kernel);
        assert!(payload(&kernel).unwrap() == kernel);
    }

    /// The formats as the kernel's build makes them, with the tools that it uses.
    #[test]
    fn what_the_tools_make() {
        let kernel = kernel();
        let tools: [(&str, &[&str]); 5] = [
            ("xz", &["--check=crc32", "--x86", "--lzma2=,dict=32MiB"]),
            ("lzma", &["-9"]),
            ("bzip2", &["-9"]),
            ("lz4", &["-l", "-9", "-"]),
            ("gzip", &["-n", "-9"]),
        ];
        for (tool, args) in tools {
            let child = Command::new(tool)
                .args(args)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn();
            let Ok(mut child) = child else {
                eprintln!("skipped: {tool} is not installed");
                continue;
            };
            let mut stdin = child.stdin.take().unwrap();
            let input = kernel.clone();
            let writer = std::thread::spawn(move || stdin.write_all(&input));
            let output = child.wait_with_output().unwrap();
            writer.join().unwrap().unwrap();
            let compressed = if tool == "gzip" {
                output.stdout
            } else {
                with_size(output.stdout, kernel.len())
            };
            let result = payload(&compressed).unwrap_or_else(|e| panic!("{tool}: {e:?}"));
            assert!(result == kernel, "{tool}");
            assert!(
                payload(&compressed[..compressed.len() / 2]).map_or(true, |k| k != kernel),
                "{tool}"
            );
        }
    }

    #[test]
    fn damage_is_an_error() {
        let mut zst = zstd::stream::encode_all(&kernel()[..], 3).unwrap();
        let middle = zst.len() / 2;
        zst.truncate(middle);
        assert!(matches!(
            payload(&zst),
            Err(FormatError::Decompress {
                method: "Zstandard",
                ..
            })
        ));
        assert!(matches!(
            payload(b"nope"),
            Err(FormatError::UnknownCompression(_))
        ));
        assert!(matches!(payload(b"no"), Err(FormatError::Truncated(_))));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_bytes_panic(start in 0_usize..6, rest in proptest::collection::vec(any::<u8>(), 0..256)) {
            let magic: [&[u8]; 6] = [
                b"\x1f\x8b\x08", b"\xfd7zXZ\0", b"BZh9", b"\x28\xb5\x2f\xfd", b"\x5d\0\0", b"\x02\x21\x4c\x18",
            ];
            let mut bytes = magic[start].to_vec();
            bytes.extend(rest);
            let _ = payload(&bytes);
        }
    }
}
