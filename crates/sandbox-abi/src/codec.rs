//! Values in an area: a tag, then the value, little-endian, packed.

use alloc::string::String;
use core::fmt;

/// What kind of value follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Tag {
    /// Nothing.
    Unit = 0,
    /// One byte, 0 or 1.
    Bool = 1,
    /// Four bytes.
    I32 = 2,
    /// Four bytes.
    U32 = 3,
    /// Eight bytes.
    I64 = 4,
    /// Eight bytes.
    U64 = 5,
    /// Four bytes, the bits of it.
    F32 = 6,
    /// Eight bytes, the bits of it.
    F64 = 7,
    /// Length as `u32`, UTF-8.
    String = 8,
    /// Length as `u32`, bytes.
    Bytes = 9,
    /// Count as `u32`, then so many values.
    List = 10,
    /// Absent.
    None = 11,
    /// A value follows.
    Some = 12,
    /// Length as `u32`, one CBOR item (RFC 8949).
    Struct = 13,
}

impl Tag {
    /// The tag of this number.
    pub fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            0 => Self::Unit,
            1 => Self::Bool,
            2 => Self::I32,
            3 => Self::U32,
            4 => Self::I64,
            5 => Self::U64,
            6 => Self::F32,
            7 => Self::F64,
            8 => Self::String,
            9 => Self::Bytes,
            10 => Self::List,
            11 => Self::None,
            12 => Self::Some,
            13 => Self::Struct,
            _ => return None,
        })
    }

    /// Its name, as signatures have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unit => "()",
            Self::Bool => "bool",
            Self::I32 => "i32",
            Self::U32 => "u32",
            Self::I64 => "i64",
            Self::U64 => "u64",
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::String => "String",
            Self::Bytes => "bytes",
            Self::List => "Vec",
            Self::None | Self::Some => "Option",
            Self::Struct => "struct",
        }
    }
}

/// Why bytes aren't the value that was wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// Another number of values.
    Arity {
        /// What is wanted.
        expected: u32,
        /// What there is.
        found: u32,
    },
    /// A value of another type.
    Type {
        /// Which argument.
        index: u32,
        /// What is wanted.
        expected: String,
        /// What there is.
        found: &'static str,
    },
    /// The bytes end too early, go on too long, or are none of this interface's.
    Malformed(&'static str),
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Arity { expected, found } => {
                write!(f, "takes {expected} arguments, and {found} were given")
            }
            Self::Type {
                index,
                expected,
                found,
            } => write!(f, "value {index} is {found}, and {expected} is wanted"),
            Self::Malformed(why) => write!(f, "malformed: {why}"),
        }
    }
}

impl core::error::Error for DecodeError {}

/// Writes values to a fixed area. What does not fit is counted, so that [`Writer::finish`] can say how
/// much there would have been.
#[derive(Debug)]
pub struct Writer<'a> {
    area: &'a mut [u8],
    at: usize,
}

impl<'a> Writer<'a> {
    /// Begins at the start of `area`.
    pub fn new(area: &'a mut [u8]) -> Self {
        Self { area, at: 0 }
    }

    /// Appends bytes.
    #[inline]
    pub fn put(&mut self, bytes: &[u8]) {
        let end = self.at.saturating_add(bytes.len());
        if let Some(room) = self.area.get_mut(self.at..end) {
            room.copy_from_slice(bytes);
        }
        self.at = end;
    }

    /// Appends a tag.
    #[inline]
    pub fn tag(&mut self, tag: Tag) {
        self.put(&[tag as u8]);
    }

    /// Appends a tag and `N` bytes in one piece.
    #[inline]
    pub fn scalar<const N: usize>(&mut self, tag: Tag, value: [u8; N]) {
        match self.area.get_mut(self.at..).and_then(|rest| {
            let (first, rest) = rest.split_first_mut()?;
            Some((first, rest.first_chunk_mut::<N>()?))
        }) {
            Some((first, rest)) => {
                *first = tag as u8;
                *rest = value;
                self.at += 1 + N;
            }
            None => self.at = self.at.saturating_add(1 + N),
        }
    }

    /// Appends a tag, a length and bytes.
    pub fn block(&mut self, tag: Tag, bytes: &[u8]) {
        // A length that is cut belongs to a block that fits no area: areas are below 4 GiB.
        self.scalar(tag, (bytes.len() as u32).to_le_bytes());
        self.put(bytes);
    }

    /// How many bytes were written, or `Err` with how many there would have been.
    #[inline]
    pub fn finish(self) -> Result<usize, usize> {
        match self.at <= self.area.len() {
            true => Ok(self.at),
            false => Err(self.at),
        }
    }

    /// Forgets what was written.
    pub fn restart(&mut self) {
        self.at = 0;
    }
}

/// Reads values, checking all.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    index: u32,
}

impl<'a> Reader<'a> {
    /// Begins at the start of `bytes`.
    #[inline]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, index: 0 }
    }

    /// What is left.
    pub fn rest(&self) -> &'a [u8] {
        self.bytes
    }

    /// Says that the next value is argument `index`, for errors.
    #[inline]
    pub fn at_argument(&mut self, index: u32) {
        self.index = index;
    }

    /// The next `N` bytes.
    #[inline]
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (first, rest) = self
            .bytes
            .split_first_chunk::<N>()
            .ok_or(DecodeError::Malformed("it ends too early"))?;
        self.bytes = rest;
        Ok(*first)
    }

    /// The next `u32`, without tag.
    #[inline]
    pub fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_le_bytes)
    }

    /// The next `len` bytes.
    #[inline]
    pub fn take(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let (first, rest) = self
            .bytes
            .split_at_checked(len)
            .ok_or(DecodeError::Malformed("it ends too early"))?;
        self.bytes = rest;
        Ok(first)
    }

    /// The tag of the next value, which stays.
    #[inline]
    pub fn peek(&self) -> Result<Tag, DecodeError> {
        let byte = *self
            .bytes
            .first()
            .ok_or(DecodeError::Malformed("it ends too early"))?;
        Tag::from_byte(byte).ok_or(DecodeError::Malformed("unknown tag"))
    }

    /// Takes the tag of the next value, which must be `tag`.
    #[inline]
    pub fn expect(&mut self, tag: Tag) -> Result<(), DecodeError> {
        match self.bytes.split_first() {
            Some((byte, rest)) if *byte == tag as u8 => {
                self.bytes = rest;
                Ok(())
            }
            _ => Err(self.unexpected(tag.name())),
        }
    }

    /// A value with its tag, of a fixed size.
    #[inline]
    pub fn scalar<const N: usize>(&mut self, tag: Tag) -> Result<[u8; N], DecodeError> {
        self.expect(tag)?;
        self.array()
    }

    /// A value with its tag and length.
    #[inline]
    pub fn block(&mut self, tag: Tag) -> Result<&'a [u8], DecodeError> {
        self.expect(tag)?;
        let len = self.u32()?;
        self.take(len as usize)
    }

    /// The error for a next value that isn't of type `expected`.
    #[cold]
    pub fn unexpected(&self, expected: &str) -> DecodeError {
        match self.peek() {
            Ok(found) => DecodeError::Type {
                index: self.index,
                expected: expected.into(),
                found: found.name(),
            },
            Err(error) => error,
        }
    }

    /// Checks that nothing is left.
    #[inline]
    pub fn end(&self) -> Result<(), DecodeError> {
        match self.bytes.is_empty() {
            true => Ok(()),
            false => Err(DecodeError::Malformed("it goes on too long")),
        }
    }
}
