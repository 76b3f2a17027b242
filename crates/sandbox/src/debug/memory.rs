//! The guest's memory as the guest sees it, but without its rights: a debugger writes to code too.

use vm_memory::VolatileMemory;
use vm_memory::bitmap::Bitmap;

use crate::layout::{LARGE, PAGE};
use crate::sandbox::Sandbox;
use crate::tables::Entry;

/// The end of the lower half of the address space (Intel SDM 1 §3.3.7.1): the guest's half.
pub(super) const USER_END: u64 = 1 << 47;

/// Where a page of the guest's is, and what the guest may do with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Page {
    /// Guest-physical address.
    pub(crate) gpa: u64,
    pub(crate) write: bool,
    pub(crate) execute: bool,
}

/// Memory that lies together, with the same rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) gva: u64,
    pub(crate) len: u64,
    pub(crate) write: bool,
    pub(crate) execute: bool,
}

impl Range {
    fn joins(&self, next: &Self) -> bool {
        self.gva + self.len == next.gva && (self.write, self.execute) == (next.write, next.execute)
    }
}

impl Sandbox {
    fn entry(&self, table: u64, index: u64) -> Option<Entry> {
        let bytes = self.region.bytes(table.checked_add(index * 8)?, 8)?;
        Entry::of(u64::from_le_bytes(*bytes.first_chunk()?))
    }

    /// The page of the sandbox's own memory that the guest has at `gva`.
    pub(crate) fn page_at(&self, gva: u64) -> Option<Page> {
        if gva >= USER_END {
            return None;
        }
        let mut table = self.layout.tables.at;
        for level in (0..4).rev() {
            let entry = self.entry(table, gva >> (12 + 9 * level) & 0x1ff)?;
            if level == 0 || (level == 1 && entry.large) {
                let within = gva & ((PAGE << (9 * level)) - 1) & !(PAGE - 1);
                return Some(Page {
                    gpa: entry.address.checked_add(within)?,
                    write: entry.write,
                    execute: entry.execute,
                });
            }
            table = entry.address;
        }
        None
    }

    /// All that the guest has, ascending.
    pub(crate) fn ranges(&self) -> Vec<Range> {
        let mut ranges: Vec<Range> = Vec::new();
        let mut add = |next: Range| match ranges.last_mut() {
            Some(last) if last.joins(&next) => last.len += next.len,
            _ => ranges.push(next),
        };
        let root = self.layout.tables.at;
        let tables = |table: u64| (0..512).filter_map(move |n| Some((n, self.entry(table, n)?)));
        // The lower half of the root.
        for (a, entry) in tables(root).take_while(|(n, _)| *n < 256) {
            for (b, entry) in tables(entry.address) {
                for (c, entry) in tables(entry.address) {
                    let gva = a << 39 | b << 30 | c << 21;
                    if entry.large {
                        add(range(gva, LARGE, &entry));
                        continue;
                    }
                    for (d, entry) in tables(entry.address) {
                        add(range(gva | d << 12, PAGE, &entry));
                    }
                }
            }
        }
        for (mapped, write) in self.mappings.places() {
            add(Range {
                gva: mapped.address,
                len: mapped.len.next_multiple_of(PAGE),
                write,
                execute: false,
            });
        }
        ranges
    }

    /// Reads what is there from `gva` on; says how much that is.
    pub(crate) fn read_guest(&self, gva: u64, into: &mut [u8]) -> usize {
        let mut done = 0;
        while done < into.len() {
            let Some(at) = gva.checked_add(done as u64) else {
                break;
            };
            let len = (into.len() - done).min((PAGE - at % PAGE) as usize);
            let room = &mut into[done..done + len];
            if self.read_page(at, room).is_none() {
                break;
            }
            done += len;
        }
        done
    }

    /// Reads within a page.
    fn read_page(&self, at: u64, room: &mut [u8]) -> Option<()> {
        if let Some((ram, offset)) = self.mappings.data_at(at) {
            ram.get_slice(offset, room.len()).ok()?.copy_to(room);
            return Some(());
        }
        let page = self.page_at(at)?;
        let bytes = self.region.bytes(page.gpa + at % PAGE, room.len() as u64)?;
        room.copy_from_slice(bytes);
        Some(())
    }

    /// As [`Sandbox::write_guest`], to stay: snapshots and restores know of it.
    pub(super) fn change_guest(&mut self, gva: u64, bytes: &[u8]) -> Option<()> {
        self.write_guest(gva, bytes)?;
        for page in gva / PAGE..(gva + bytes.len() as u64).div_ceil(PAGE) {
            if let Some(page) = self.page_at(page * PAGE) {
                self.remember_page(page.gpa / PAGE);
            }
        }
        Some(())
    }

    /// Writes all of `bytes` at `gva`, or nothing: not all is there.
    pub(super) fn write_guest(&mut self, gva: u64, bytes: &[u8]) -> Option<()> {
        let end = gva.checked_add(bytes.len() as u64)?;
        let pages = (gva / PAGE..end.div_ceil(PAGE)).map(|page| page * PAGE);
        for page in pages.clone() {
            if self.mappings.data_at(page).is_none() {
                self.page_at(page)?;
            }
        }
        for page in pages {
            let at = gva.max(page);
            let from = (at - gva) as usize;
            let to = (end.min(page + PAGE) - gva) as usize;
            self.write_page(at, bytes.get(from..to)?)?;
        }
        Some(())
    }

    fn write_page(&mut self, at: u64, bytes: &[u8]) -> Option<()> {
        let len = bytes.len();
        if let Some((ram, offset)) = self.mappings.data_at(at) {
            ram.get_slice(offset, len).ok()?.copy_from(bytes);
            ram.bitmap().mark_dirty(offset, len);
            return Some(());
        }
        let gpa = self.page_at(at)?.gpa + at % PAGE;
        let room = self.region.bytes_mut(gpa, len as u64)?;
        room.copy_from_slice(bytes);
        self.region.wrote_code(gpa, len as u64);
        Some(())
    }
}

fn range(gva: u64, len: u64, entry: &Entry) -> Range {
    Range {
        gva,
        len,
        write: entry.write,
        execute: entry.execute,
    }
}
