//! A guest of a few instructions, without file or runtime library: for probing a backend, and for fuzzing.

use skerry_hypervisor::PAGE_SIZE;

use crate::builder::Config;
use crate::elf::{Program, Rights};
use crate::error::BuildError;
use crate::layout::{IMAGE_BASE, Layout};
use crate::processor::{self, Backend, Processor};
use crate::region::Region;
use crate::sandbox::slot;
use crate::tables;

/// A machine before its first instruction. The processor goes before its memory.
pub(crate) struct Bare {
    pub(crate) processor: Box<dyn Processor>,
    pub(crate) region: Region,
    pub(crate) layout: Layout,
}

impl Bare {
    /// Bytes of the program.
    pub(crate) const SIZE: u64 = PAGE_SIZE as u64;

    /// With code of at most a page, which runs from its beginning in ring 3, and areas of a page each.
    pub(crate) fn new(backend: Backend, code: &[u8]) -> Result<Self, BuildError> {
        let mut bytes = code.to_vec();
        bytes.resize(PAGE_SIZE, 0);
        let program = Program {
            base: IMAGE_BASE,
            bytes,
            pages: vec![Some(Rights {
                write: false,
                execute: true,
            })],
            entry: IMAGE_BASE,
        };
        let config = Config {
            heap: Self::SIZE,
            stack: Self::SIZE,
            input: Self::SIZE,
            output: Self::SIZE,
            log: Self::SIZE,
        };
        let layout = Layout::new(&config, program.base, Self::SIZE)?;
        let mut region = Region::new(layout.size).map_err(BuildError::Memory)?;
        tables::build(&mut region, &layout, &program)?;
        let mut processor = processor::make(backend, slot(&region, &layout))?;
        processor.set_registers(&tables::entry_registers(&layout, program.entry))?;
        Ok(Self {
            processor,
            region,
            layout,
        })
    }
}
