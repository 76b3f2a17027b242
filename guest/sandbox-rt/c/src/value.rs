//! `skerry_value`.

use core::ffi::c_void;
use core::slice;

use skerry_sandbox_rt::abi::{Decode, DecodeError, Encode, Reader, Tag, Writer};

use crate::memory;

/// Bytes that something else owns.
#[repr(C)]
#[derive(Clone, Copy)]
struct Block {
    data: *const u8,
    length: usize,
}

#[repr(C)]
#[derive(Clone, Copy)]
union Contents {
    // All bits, for zeroes.
    bits: [u64; 2],
    boolean: u8,
    word: u32,
    long: u64,
    block: Block,
}

/// A value and its type. Floating point is its bits.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Value {
    kind: u32,
    contents: Contents,
}

impl Value {
    /// A zero of this type.
    pub(crate) fn empty(kind: Tag) -> Self {
        Self {
            kind: kind as u32,
            contents: Contents { bits: [0; 2] },
        }
    }

    /// The number of its type, whatever a C program has put there.
    pub(crate) fn kind(&self) -> u32 {
        self.kind
    }

    fn word(kind: Tag, word: u32) -> Self {
        let mut value = Self::empty(kind);
        value.contents.word = word;
        value
    }

    fn long(kind: Tag, long: u64) -> Self {
        let mut value = Self::empty(kind);
        value.contents.long = long;
        value
    }

    fn block(kind: Tag, bytes: &[u8]) -> Self {
        let mut value = Self::empty(kind);
        value.contents.block = Block {
            data: bytes.as_ptr(),
            length: bytes.len(),
        };
        value
    }

    /// The next value, which must be of this type; it points into the area.
    pub(crate) fn decode(from: &mut Reader<'_>, kind: Tag) -> Result<Self, DecodeError> {
        Ok(match kind {
            Tag::Bool => Self::word(kind, u32::from(bool::decode(from)?)),
            Tag::I32 | Tag::U32 | Tag::F32 => {
                Self::word(kind, u32::from_le_bytes(from.scalar(kind)?))
            }
            Tag::I64 | Tag::U64 | Tag::F64 => {
                Self::long(kind, u64::from_le_bytes(from.scalar(kind)?))
            }
            Tag::String => Self::block(kind, <&str>::decode(from)?.as_bytes()),
            Tag::Bytes => Self::block(kind, from.block(kind)?),
            _ => {
                <()>::decode(from)?;
                Self::empty(Tag::Unit)
            }
        })
    }

    /// Its bytes.
    ///
    /// # Safety
    /// It is a string or bytes, and they are there.
    unsafe fn bytes(&self) -> &[u8] {
        // SAFETY: the caller's promise.
        let block = unsafe { self.contents.block };
        match block.length {
            0 => &[],
            // SAFETY: the caller's promise.
            length => unsafe { slice::from_raw_parts(block.data, length) },
        }
    }

    /// Appends it.
    ///
    /// # Safety
    /// What it points to is there.
    pub(crate) unsafe fn encode(&self, out: &mut Writer<'_>) {
        let Some(kind) = u8::try_from(self.kind).ok().and_then(Tag::from_byte) else {
            return;
        };
        // SAFETY: every bit pattern is a number; the rest is the caller's promise.
        unsafe {
            match kind {
                Tag::Bool => (self.contents.boolean != 0).encode(out),
                Tag::I32 | Tag::U32 | Tag::F32 => {
                    out.scalar(kind, self.contents.word.to_le_bytes());
                }
                Tag::I64 | Tag::U64 | Tag::F64 => {
                    out.scalar(kind, self.contents.long.to_le_bytes());
                }
                // What isn't UTF-8 is replaced: the host takes no other string.
                Tag::String => {
                    let text = alloc::string::String::from_utf8_lossy(self.bytes());
                    text.as_ref().encode(out);
                }
                Tag::Bytes => self.bytes().encode(out),
                _ => ().encode(out),
            }
        }
    }

    /// A copy of bytes, for [`Value::release`].
    pub(crate) fn owned(kind: Tag, bytes: &[u8]) -> Self {
        let mut value = Self::empty(kind);
        let data = memory::malloc(bytes.len()).cast::<u8>();
        if data.is_null() {
            panic!("no memory for {} bytes", bytes.len());
        }
        // SAFETY: as many bytes were just allocated.
        unsafe { data.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        value.contents.block = Block {
            data,
            length: bytes.len(),
        };
        value
    }

    fn is_block(&self) -> bool {
        self.kind == Tag::String as u32 || self.kind == Tag::Bytes as u32
    }

    /// The same in memory of its own.
    ///
    /// # Safety
    /// What it points to is there.
    pub(crate) unsafe fn to_owned(self) -> Self {
        let kind = match self.is_block() {
            true if self.kind == Tag::String as u32 => Tag::String,
            true => Tag::Bytes,
            false => return self,
        };
        // SAFETY: the caller's promise.
        Self::owned(kind, unsafe { self.bytes() })
    }

    /// Frees what [`Value::owned`] has allocated.
    ///
    /// # Safety
    /// It is such a value.
    pub(crate) unsafe fn release(&mut self) {
        if self.is_block() {
            // SAFETY: the caller's promise.
            unsafe { memory::free(self.contents.block.data.cast_mut().cast::<c_void>()) };
        }
        *self = Self::empty(Tag::Unit);
    }
}
