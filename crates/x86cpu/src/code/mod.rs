//! Decoded code: ops, blocks of them, and how guest bytes become blocks.

mod arena;
mod cache;
mod decode;
mod directory;
mod execute;
mod found;
mod fuse;
mod lower;
mod op;
mod pool;

pub use cache::CodeCache;
pub use lower::{Family, Lowering, nop};
pub use op::{Handler, Op, op_flag};

pub(crate) use arena::populate;
pub(crate) use cache::{Block, BlockEnd, BlockIndex, BlockRef, Indexer};
pub(crate) use fuse::{Window, apart, last_part_failed};
pub(crate) use pool::Pool;
