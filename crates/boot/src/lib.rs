//! Loading a kernel into guest memory, saying how it is entered, and describing the machine to it.
//!
//! ```text
//!  file bytes ──► Kernel::parse ── bzimage ─► decompress ─► elf ─┐
//!   (untrusted)        └─ multiboot, elf (PVH note, 64-bit) ─────┤
//!                                                                ▼
//!  MemoryMap, command line, initrd, RSDP ──► Kernel::load ──► guest RAM + Entry ──► BootRegisters
//!  Platform (CPUs, devices) ──► acpi::write, mptable::write ──► guest RAM below 1 MiB
//! ```
//!
//! Called by `machine`, once before the first instruction and again at every reset. No kernel's
//! own decompressor runs: it is half of the work of booting a small kernel on a software processor.

pub mod acpi;
mod bytes;
pub mod bzimage;
pub mod decompress;
pub mod elf;
mod entry;
mod error;
mod kernel;
pub mod layout;
mod linux;
mod load;
pub mod mptable;
pub mod multiboot;
pub mod platform;
mod pvh;

pub use entry::{Entry, MULTIBOOT_BOOTLOADER_MAGIC};
pub use error::{FormatError, LoadError};
pub use kernel::Kernel;
pub use layout::MemoryMap;
pub use load::{BootInputs, NamedBytes};
pub use platform::Platform;
