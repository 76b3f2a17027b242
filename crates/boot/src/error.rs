//! What can be wrong with a kernel or an initrd.

use thiserror::Error;

/// What is wrong with the bytes of a kernel file.
#[derive(Debug, Error)]
pub enum FormatError {
    /// None of the formats that we know.
    #[error("It is neither a bzImage nor an x86 ELF file nor a multiboot kernel")]
    Unknown,
    /// A structure lies outside the file.
    #[error("The file ends before its {0} does")]
    Truncated(&'static str),
    /// A field has a value that makes no sense.
    #[error("Its {field} is {value:#x}, which {why}")]
    BadField {
        /// The field, named as its specification does.
        field: &'static str,
        /// What it holds.
        value: u64,
        /// What is wrong with that.
        why: &'static str,
    },
    /// A bzImage from before boot protocol 2.12, or without a 64-bit kernel.
    #[error("Its boot protocol is {}.{:02}, and a 64-bit kernel of 2.12 or later is needed", version >> 8, version & 0xff)]
    OldProtocol {
        /// Version as the setup header has it.
        version: u16,
    },
    /// Compressed with something that we can't read.
    #[error(
        "Its payload starts with bytes {0:02x?}, which is no compression known here (gzip, xz, LZMA, bzip2, LZ4, Zstandard)"
    )]
    UnknownCompression([u8; 4]),
    /// The compressed payload is damaged.
    #[error("Its {method} payload can't be decompressed")]
    Decompress {
        /// Name of the method.
        method: &'static str,
        /// What the decoder said.
        source: std::io::Error,
    },
    /// The payload decompresses to more than any kernel is.
    #[error("Its payload decompresses to more than {limit} bytes")]
    TooLarge {
        /// The most that is accepted.
        limit: u64,
    },
    /// Nothing to load.
    #[error("It has no loadable segment")]
    NoSegments,
    /// A 32-bit ELF file without multiboot header or PVH note.
    #[error("It is a 32-bit ELF file with neither a multiboot header nor a PVH note")]
    NoEntry,
    /// Multiboot features that are demanded and that we don't have.
    #[error("Its multiboot header demands features {0:#x} that Skerry does not have")]
    MultibootDemands(u32),
}

/// Loading a kernel or an initrd into guest memory failed.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The kernel file is not one.
    #[error("Can't boot {name}: give a bzImage, a vmlinux or a multiboot kernel for x86-64")]
    BadKernel {
        /// The file.
        name: String,
        /// What is wrong with it.
        source: FormatError,
    },
    /// A part of the kernel lies outside guest memory.
    #[error(
        "{name} needs memory from {start:#x} to {end:#x}, and the guest has {memory} MiB: give it more with --memory"
    )]
    KernelDoesNotFit {
        /// The file.
        name: String,
        /// First address.
        start: u64,
        /// Address after the last.
        end: u64,
        /// Size of guest memory, in MiB.
        memory: u64,
    },
    /// The kernel wants the memory that holds tables of ours.
    #[error(
        "{name} wants to be loaded at {start:#x}, where the boot tables are: link it at 0x1000 or above, outside 0x9f000 to 0xfffff"
    )]
    KernelTooLow {
        /// The file.
        name: String,
        /// The address that it wants.
        start: u64,
    },
    /// No room for the initrd.
    #[error(
        "Initrd {name} of {size} bytes does not fit beside the kernel in {memory} MiB: give the guest more with --memory"
    )]
    InitrdDoesNotFit {
        /// The file.
        name: String,
        /// Its size.
        size: u64,
        /// Size of guest memory, in MiB.
        memory: u64,
    },
    /// The kernel's limit for its command line.
    #[error("The kernel command line has {len} bytes, and {name} takes {limit}: shorten it")]
    CommandLineTooLong {
        /// The kernel file.
        name: String,
        /// What was given.
        len: usize,
        /// What is possible.
        limit: usize,
    },
    /// A NUL inside.
    #[error("The kernel command line holds a NUL byte: remove it")]
    CommandLineHasNul,
    /// Tables or structures could not be put where they must be.
    #[error("Can't write the {what} at {address:#x} of guest memory")]
    Write {
        /// What was written.
        what: &'static str,
        /// Where.
        address: u64,
        /// The cause.
        source: vm_memory::GuestMemoryError,
    },
    /// Tables grew past the place that they have.
    #[error(
        "The {what} for this machine take {size} bytes, and {limit} is their place: use fewer CPUs or devices"
    )]
    TablesTooLarge {
        /// Which tables.
        what: &'static str,
        /// Their size.
        size: usize,
        /// Their place.
        limit: usize,
    },
}
