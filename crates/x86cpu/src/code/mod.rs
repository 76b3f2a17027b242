//! Decoded code: ops, blocks of them, and how guest bytes become blocks.

mod cache;
mod decode;
mod execute;
mod fuse;
mod lower;
mod op;

pub use cache::CodeCache;
pub use lower::{Lowering, nop};
pub use op::{Handler, Op, op_flag};

pub(crate) use cache::BlockEnd;
pub(crate) use fuse::{Window, apart, last_part_failed};
