//! Any kernel that we can boot: told apart by content, never by name.

use std::borrow::Cow;

use crate::bzimage::{self, SetupHeader};
use crate::elf::{self, Elf};
use crate::entry::Entry;
use crate::load::BootInputs;
use crate::multiboot::{self, Multiboot};
use crate::{FormatError, LoadError, decompress, linux, pvh};

#[derive(Debug)]
enum Protocol {
    Linux64 { elf: Elf, header: SetupHeader },
    Pvh { elf: Elf, entry: u32 },
    Multiboot(Multiboot),
}

/// A parsed kernel, ready to be loaded any number of times.
#[derive(Debug)]
pub struct Kernel<'a> {
    name: String,
    image: Cow<'a, [u8]>,
    protocol: Protocol,
}

impl<'a> Kernel<'a> {
    /// Recognises and parses a kernel; the payload of a bzImage is decompressed here. `name` is
    /// for messages.
    pub fn parse(name: &str, bytes: &'a [u8]) -> Result<Self, LoadError> {
        let bad = |source| LoadError::BadKernel {
            name: name.to_owned(),
            source,
        };
        let (image, protocol) = recognise(bytes).map_err(bad)?;
        Ok(Self {
            name: name.to_owned(),
            image,
            protocol,
        })
    }

    /// What the kernel is, for a log.
    pub fn format(&self) -> &'static str {
        match (&self.protocol, &self.image) {
            (Protocol::Linux64 { .. }, Cow::Owned(_)) => "bzImage",
            (Protocol::Linux64 { .. }, Cow::Borrowed(_)) => "64-bit ELF",
            (Protocol::Pvh { .. }, _) => "PVH ELF",
            (Protocol::Multiboot(_), _) => "multiboot",
        }
    }

    /// The command line when nobody gives one: Linux writes to the serial port and ends the run after
    /// a panic; what other kernels make of words is anybody's guess.
    pub fn usual_command_line(&self) -> &'static str {
        match &self.protocol {
            Protocol::Linux64 { .. } | Protocol::Pvh { .. } => "console=ttyS0 panic=-1",
            Protocol::Multiboot(_) => "",
        }
    }

    /// Writes the kernel and what its protocol demands into guest memory.
    pub fn load(&self, inputs: &BootInputs<'_>) -> Result<Entry, LoadError> {
        let entry = match &self.protocol {
            Protocol::Linux64 { elf, header } => {
                linux::load(inputs, &self.name, &self.image, elf, header)
            }
            Protocol::Pvh { elf, entry } => pvh::load(inputs, &self.name, &self.image, elf, *entry),
            Protocol::Multiboot(kernel) => multiboot::load(inputs, &self.name, &self.image, kernel),
        }?;
        tracing::debug!(
            kernel = self.name,
            format = self.format(),
            ?entry,
            "kernel loaded"
        );
        Ok(entry)
    }
}

fn recognise(bytes: &[u8]) -> Result<(Cow<'_, [u8]>, Protocol), FormatError> {
    if bzimage::is_bzimage(bytes) {
        let image = bzimage::parse(bytes)?;
        let vmlinux = decompress::payload(image.payload)?;
        let elf = elf::parse(&vmlinux)?;
        if !elf.is_64 {
            return Err(FormatError::OldProtocol {
                version: image.header.version,
            });
        }
        let header = image.header;
        return Ok((Cow::Owned(vmlinux), Protocol::Linux64 { elf, header }));
    }
    if let Some(kernel) = multiboot::parse(bytes)? {
        return Ok((Cow::Borrowed(bytes), Protocol::Multiboot(kernel)));
    }
    let elf = elf::parse(bytes)?;
    let protocol = match elf.pvh_entry {
        Some(entry) => Protocol::Pvh { elf, entry },
        None if elf.is_64 => {
            let extent = elf.extent();
            let header = SetupHeader::for_vmlinux(extent.start, extent.len());
            Protocol::Linux64 { elf, header }
        }
        None => return Err(FormatError::NoEntry),
    };
    Ok((Cow::Borrowed(bytes), protocol))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{bzimage, elf};

    #[test]
    fn each_format_is_told_apart() {
        let plain = elf::tests::sample(0x100_0000, &[0x90; 8], 0, None);
        let noted = elf::tests::sample(0x100_0000, &[0x90; 8], 0, Some(1));
        let wrapped = bzimage::tests::sample(&noted);
        let format = |bytes: &[u8]| Kernel::parse("k", bytes).unwrap().format();
        assert_eq!(format(&plain), "64-bit ELF");
        assert_eq!(format(&noted), "PVH ELF");
        assert_eq!(format(&wrapped), "bzImage");
    }

    #[test]
    fn a_refusal_names_file_reason_and_remedy() {
        let error = Kernel::parse("/tmp/notes.txt", b"hello").unwrap_err();
        assert_eq!(
            error.to_string(),
            "Can't boot /tmp/notes.txt: give a bzImage, a vmlinux or a multiboot kernel for x86-64"
        );
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert_eq!(
            cause,
            "It is neither a bzImage nor an x86 ELF file nor a multiboot kernel"
        );
    }
}
