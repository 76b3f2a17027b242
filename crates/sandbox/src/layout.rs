//! What is where in a guest's memory.
//!
//! ```text
//!   guest-physical (one region)             virtual
//!   0        descriptor tables, stubs       SYSTEM        ring 0 only
//!   0x1000   exception stack                SYSTEM+0x1000 ring 0 only
//!   0x2000   page tables                    (not mapped)
//!   …        control page, log              IO            read, write
//!            input, output                  behind it     read, write
//!            program                        its addresses as its segments say
//!            stack                          ends at STACK, a guard below
//!            heap                           HEAP          read, write
//!                                           MAPPINGS      files and shared regions, slots of their own
//! ```
//! Nothing is mapped twice, nothing is both writable and executable, and page 0 is not mapped.

use serde::{Deserialize, Serialize};

use crate::builder::Config;
use crate::error::BuildError;

/// Bytes in a page.
pub(crate) const PAGE: u64 = 4096;
/// Bytes in a large page.
pub(crate) const LARGE: u64 = 2 << 20;

/// Where ring 0 is.
pub(crate) const SYSTEM: u64 = 0xffff_ff80_0000_0000;
/// Programs end below.
pub(crate) const IMAGE_END: u64 = 0x4000_0000;
/// Where a program without addresses of its own is put.
pub(crate) const IMAGE_BASE: u64 = 0x20_0000;
/// The lowest address that anything is mapped at.
pub(crate) const LOWEST: u64 = 0x1_0000;
/// Control page, log, input, output.
pub(crate) const IO: u64 = 0x4000_0000;
/// The stack's upper end.
pub(crate) const STACK: u64 = 0x1_0000_0000;
/// What is not mapped below the stack.
pub(crate) const GUARD: u64 = 16 << 20;
/// The heap.
pub(crate) const HEAP: u64 = 0x1_4000_0000;
/// Heaps end below; mappings begin.
pub(crate) const MAPPINGS: u64 = 0x10_0000_0000;
/// The exception stack's upper end, in the region and above [`SYSTEM`].
pub(crate) const EXCEPTION_STACK: u64 = 2 * PAGE;
/// The first page table.
pub(crate) const TABLES: u64 = 2 * PAGE;

/// The largest of each size.
const IO_MAX: u64 = 1 << 30;
const STACK_MAX: u64 = 256 << 20;
const HEAP_MAX: u64 = 32 << 30;

/// A range of the region, and where the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Area {
    /// Offset in the region, which is the guest-physical address.
    pub(crate) at: u64,
    /// Virtual address.
    pub(crate) gva: u64,
    /// Bytes, whole pages.
    pub(crate) len: u64,
}

impl Area {
    pub(crate) fn end(&self) -> u64 {
        self.at + self.len
    }
}

/// All of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Layout {
    /// Page tables; `gva` means nothing.
    pub(crate) tables: Area,
    /// The control page.
    pub(crate) control: Area,
    /// Log records.
    pub(crate) log: Area,
    /// Arguments, and replies of the host.
    pub(crate) input: Area,
    /// Results, and arguments of host functions.
    pub(crate) output: Area,
    /// The program.
    pub(crate) image: Area,
    /// The stack.
    pub(crate) stack: Area,
    /// The heap.
    pub(crate) heap: Area,
    /// Bytes in all.
    pub(crate) size: u64,
}

fn pages(size: u64) -> u64 {
    size.div_ceil(PAGE) * PAGE
}

fn bounded(what: &'static str, size: u64, limit: u64) -> Result<u64, BuildError> {
    match size <= limit {
        true => Ok(pages(size.max(1))),
        false => Err(BuildError::TooLarge { what, size, limit }),
    }
}

/// Tables below a third-level one for `area`: one per 1 GiB that it touches, one per 2 MiB that is
/// not mapped by a large page.
fn tables_for(area: &Area, large: bool) -> u64 {
    let (first, last) = (area.gva, area.gva + area.len - 1);
    let directories = (last >> 30) - (first >> 30) + 1;
    let leaves = match large {
        true => 1,
        false => (last >> 21) - (first >> 21) + 1,
    };
    directories + leaves
}

impl Layout {
    /// Places everything for an image of `image` bytes at `image_gva`.
    pub(crate) fn new(config: &Config, image_gva: u64, image: u64) -> Result<Self, BuildError> {
        let input = bounded("An input area", config.input, IO_MAX)?;
        let output = bounded("An output area", config.output, IO_MAX)?;
        let log = bounded("A log area", config.log, IO_MAX / 4)?;
        let stack = bounded("A stack", config.stack, STACK_MAX)?;
        let heap = bounded("A heap", config.heap, HEAP_MAX)?;
        let image = bounded("A program", image, IMAGE_END)?;
        let mut layout = Self {
            tables: Area {
                at: TABLES,
                gva: 0,
                len: 0,
            },
            control: Area {
                at: 0,
                gva: IO,
                len: PAGE,
            },
            log: Area {
                at: 0,
                gva: IO + PAGE,
                len: log,
            },
            input: Area {
                at: 0,
                gva: IO + PAGE + log,
                len: input,
            },
            output: Area {
                at: 0,
                gva: IO + PAGE + log + input,
                len: output,
            },
            image: Area {
                at: 0,
                gva: image_gva,
                len: image,
            },
            stack: Area {
                at: 0,
                gva: STACK - stack,
                len: stack,
            },
            heap: Area {
                at: 0,
                gva: HEAP,
                len: heap,
            },
            size: 0,
        };
        let io = Area {
            len: PAGE + log + input + output,
            ..layout.control
        };
        let parts = [
            (io, false),
            (layout.image, false),
            (layout.stack, false),
            (layout.heap, layout.heap_is_large()),
        ];
        // The root, and three levels of the system's pages; one third-level table of the guest's.
        let tables = 1
            + 3
            + 1
            + parts
                .iter()
                .map(|(area, large)| tables_for(area, *large))
                .sum::<u64>();
        layout.tables.len = tables * PAGE;
        let mut at = layout.tables.end();
        for area in [
            &mut layout.control,
            &mut layout.log,
            &mut layout.input,
            &mut layout.output,
            &mut layout.image,
            &mut layout.stack,
        ] {
            area.at = at;
            at = area.end();
        }
        layout.heap.at = match layout.heap_is_large() {
            true => at.next_multiple_of(LARGE),
            false => at,
        };
        layout.size = layout.heap.end();
        Ok(layout)
    }

    /// Whether the heap is mapped by large pages (and a rest by small ones).
    pub(crate) fn heap_is_large(&self) -> bool {
        self.heap.len >= 2 * LARGE
    }

    /// Whether the areas are what this module makes: a layout that comes from a file is anybody's.
    pub(crate) fn is_sound(&self) -> bool {
        let areas = [
            &self.tables,
            &self.control,
            &self.log,
            &self.input,
            &self.output,
            &self.image,
            &self.stack,
            &self.heap,
        ];
        let mut at = TABLES;
        for area in areas {
            let whole = [area.at, area.len, area.gva]
                .iter()
                .all(|n| n.is_multiple_of(PAGE));
            let Some(end) = area.at.checked_add(area.len) else {
                return false;
            };
            if !whole || area.len == 0 || area.at < at || end > self.size || area.len > HEAP_MAX {
                return false;
            }
            at = end;
        }
        self.control.len == PAGE
            && self.input.len <= IO_MAX
            && self.output.len <= IO_MAX
            && self.size.is_multiple_of(PAGE)
            && self.size <= HEAP_MAX + 4 * IO_MAX
    }
}
