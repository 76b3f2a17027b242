//! The guest's program as it lies in memory: how far it was moved, and what a loader of a Unix system would
//! have told it.

use object::LittleEndian;
use object::elf::{ET_DYN, FileHeader64, Ident};
use object::read::elf::FileHeader as _;

use crate::layout::{IMAGE_BASE, PAGE};
use crate::sandbox::Sandbox;

type Header = FileHeader64<LittleEndian>;
const ENDIAN: LittleEndian = LittleEndian;

/// A program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Image {
    /// What was added to the addresses of its file.
    pub(super) moved: u64,
    /// Address of its first instruction.
    pub(super) entry: u64,
    /// Address of its program headers, their size and number.
    pub(super) headers: (u64, u64, u64),
}

impl Sandbox {
    /// What the ELF header at the start of the program says; `None` where it isn't loaded, or the guest has
    /// spoiled it.
    pub(super) fn image(&self) -> Option<Image> {
        let mut bytes = [0; size_of::<Header>()];
        let base = self.layout.image.gva;
        if self.read_guest(base, &mut bytes) != bytes.len() {
            return None;
        }
        let header = object::pod::from_bytes::<Header>(&bytes).ok()?.0;
        let Ident { magic, .. } = header.e_ident;
        if magic != object::elf::ELFMAG {
            return None;
        }
        let moved = match header.e_type(ENDIAN) {
            ET_DYN => IMAGE_BASE,
            _ => 0,
        };
        Some(Image {
            moved,
            entry: header.e_entry(ENDIAN).wrapping_add(moved),
            headers: (
                base.wrapping_add(header.e_phoff(ENDIAN)),
                header.e_phentsize(ENDIAN).into(),
                header.e_phnum(ENDIAN).into(),
            ),
        })
    }

    /// The auxiliary vector (System V ABI, AMD64 supplement §3.4.3): gdb finds by it where the program is.
    pub(super) fn auxv(&self) -> Vec<u8> {
        const AT_NULL: u64 = 0;
        const AT_PHDR: u64 = 3;
        const AT_PHENT: u64 = 4;
        const AT_PHNUM: u64 = 5;
        const AT_PAGESZ: u64 = 6;
        const AT_ENTRY: u64 = 9;
        let mut vector = vec![(AT_PAGESZ, PAGE)];
        if let Some(image) = self.image() {
            let (at, size, number) = image.headers;
            vector.extend([
                (AT_PHDR, at),
                (AT_PHENT, size),
                (AT_PHNUM, number),
                (AT_ENTRY, image.entry),
            ]);
        }
        vector.push((AT_NULL, 0));
        let words = vector.into_iter().flat_map(|(kind, value)| [kind, value]);
        words.flat_map(u64::to_le_bytes).collect()
    }
}
