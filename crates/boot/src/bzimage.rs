//! The setup header of a bzImage (Documentation/arch/x86/boot.rst, "The real-mode kernel header").
//!
//! The file is: boot sector and setup sectors (real-mode code, skipped), then the protected-mode
//! part, which holds a small decompressor and the compressed kernel. The header says where that
//! payload lies, so the decompressor never runs: we decompress on the host.

use crate::FormatError;
use crate::bytes::{slice_at, u16_at, u32_at, u64_at};

/// Offset of the setup header in the file and in the zero page.
pub const HEADER_OFFSET: usize = 0x1f1;
const HDRS: u32 = u32::from_le_bytes(*b"HdrS");
const XLF_KERNEL_64: u16 = 1;
/// Boot protocol 2.12: the first with `xloadflags`.
const MIN_VERSION: u16 = 0x20c;

/// What the loader needs of a setup header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetupHeader {
    /// Boot protocol version, major in the high byte.
    pub version: u16,
    /// The header's bytes, for the zero page at [`HEADER_OFFSET`].
    pub raw: Vec<u8>,
    /// Highest address that the initrd may end at, inclusive.
    pub initrd_max: u64,
    /// Longest command line without its NUL.
    pub command_line_max: usize,
    /// Where the kernel prefers to be.
    pub preferred_address: u64,
    /// Bytes from `preferred_address` that the kernel needs before it reads the memory map.
    pub init_size: u64,
}

/// A bzImage: its header and its compressed kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BzImage<'a> {
    /// The header.
    pub header: SetupHeader,
    /// The compressed kernel, as `payload_offset` and `payload_length` give it.
    pub payload: &'a [u8],
}

/// Whether the bytes have the setup header's signature.
pub fn is_bzimage(bytes: &[u8]) -> bool {
    u32_at(bytes, 0x202) == Some(HDRS) && u16_at(bytes, 0x1fe) == Some(0xaa55)
}

/// Parses the setup header and finds the payload.
pub fn parse(bytes: &[u8]) -> Result<BzImage<'_>, FormatError> {
    if !is_bzimage(bytes) {
        return Err(FormatError::Unknown);
    }
    let cut = || FormatError::Truncated("setup header");
    let version = u16_at(bytes, 0x206).ok_or_else(cut)?;
    if version < MIN_VERSION {
        return Err(FormatError::OldProtocol { version });
    }
    let xloadflags = u16_at(bytes, 0x236).ok_or_else(cut)?;
    if xloadflags & XLF_KERNEL_64 == 0 {
        return Err(FormatError::OldProtocol { version });
    }
    // The header ends 0x202 plus the byte after the jump opcode (boot.rst, "jump").
    let header_end = 0x202 + usize::from(*bytes.get(0x201).ok_or_else(cut)?);
    let raw = bytes.get(HEADER_OFFSET..header_end).ok_or_else(cut)?;
    let setup_sectors = match bytes[HEADER_OFFSET] {
        0 => 4,
        n => u64::from(n),
    };
    let payload_offset = u64::from(u32_at(bytes, 0x248).ok_or_else(cut)?);
    let payload_length = u64::from(u32_at(bytes, 0x24c).ok_or_else(cut)?);
    let payload = slice_at(
        bytes,
        (setup_sectors + 1) * 512 + payload_offset,
        payload_length,
    )
    .ok_or(FormatError::Truncated("compressed payload"))?;
    let preferred_address = u64_at(bytes, 0x258).ok_or_else(cut)?;
    if preferred_address > 1 << 40 {
        return Err(FormatError::BadField {
            field: "pref_address",
            value: preferred_address,
            why: "is outside any guest memory",
        });
    }
    Ok(BzImage {
        header: SetupHeader {
            version,
            raw: raw.to_vec(),
            initrd_max: u32_at(bytes, 0x22c).ok_or_else(cut)?.into(),
            command_line_max: u32_at(bytes, 0x238).ok_or_else(cut)? as usize,
            preferred_address,
            init_size: u32_at(bytes, 0x260).ok_or_else(cut)?.into(),
        },
        payload,
    })
}

impl SetupHeader {
    /// The header for a 64-bit `vmlinux`, which has none of its own: as protocol 2.12 with its
    /// usual limits.
    pub fn for_vmlinux(preferred_address: u64, init_size: u64) -> Self {
        let mut raw = vec![0; 0x264 - HEADER_OFFSET];
        let mut put = |offset: usize, value: &[u8]| {
            crate::bytes::put(&mut raw, offset - HEADER_OFFSET, value);
        };
        let initrd_max = 0x7fff_ffff_u32;
        let command_line_max = 2047_u32;
        put(0x1fe, &0xaa55_u16.to_le_bytes());
        put(0x202, &HDRS.to_le_bytes());
        put(0x206, &MIN_VERSION.to_le_bytes());
        put(0x211, &[1]); // loadflags: LOADED_HIGH
        put(0x22c, &initrd_max.to_le_bytes());
        put(0x230, &0x20_0000_u32.to_le_bytes());
        put(0x236, &XLF_KERNEL_64.to_le_bytes());
        put(0x238, &command_line_max.to_le_bytes());
        put(0x258, &preferred_address.to_le_bytes());
        put(
            0x260,
            &u32::try_from(init_size).unwrap_or(u32::MAX).to_le_bytes(),
        );
        Self {
            version: MIN_VERSION,
            raw,
            initrd_max: initrd_max.into(),
            command_line_max: command_line_max as usize,
            preferred_address,
            init_size,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A bzImage with one setup sector around `payload`.
    pub(crate) fn sample(payload: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 1024];
        let mut put = |at: usize, value: &[u8]| file[at..at + value.len()].copy_from_slice(value);
        put(0x1f1, &[1]);
        put(0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
        put(0x202, b"HdrS\x0f\x02");
        put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
        put(0x236, &[1, 0]);
        put(0x238, &2047_u32.to_le_bytes());
        put(0x248, &16_u32.to_le_bytes());
        put(0x24c, &u32::try_from(payload.len()).unwrap().to_le_bytes());
        put(0x258, &0x100_0000_u64.to_le_bytes());
        put(0x260, &0x10_0000_u32.to_le_bytes());
        file.extend_from_slice(&[0; 16]);
        file.extend_from_slice(payload);
        file
    }

    #[test]
    fn the_payload_is_found() {
        let file = sample(b"payload");
        let image = parse(&file).unwrap();
        assert_eq!(image.payload, b"payload");
        assert_eq!(image.header.preferred_address, 0x100_0000);
        assert_eq!(image.header.raw.len(), 0x202 + 0x66 - 0x1f1);
    }

    #[test]
    fn old_and_32_bit_kernels_are_refused() {
        let mut file = sample(b"payload");
        file[0x236] = 0;
        assert!(matches!(
            parse(&file),
            Err(FormatError::OldProtocol { version: 0x20f })
        ));
        let mut file = sample(b"payload");
        file[0x206] = 0x0b;
        assert!(matches!(
            parse(&file),
            Err(FormatError::OldProtocol { version: 0x20b })
        ));
    }

    #[test]
    fn every_cut_is_refused() {
        let file = sample(b"payload");
        for len in 0..file.len() {
            assert!(parse(&file[..len]).is_err(), "{len}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(changes in proptest::collection::vec((0_usize..1040, any::<u8>()), 0..16)) {
            let mut file = sample(b"payload");
            for (at, value) in changes {
                file[at] = value;
            }
            let _ = parse(&file);
        }
    }
}
