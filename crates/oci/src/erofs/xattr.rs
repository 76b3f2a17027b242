//! Extended attributes, stored behind their inode.

use crate::tree::Xattrs;

/// Name prefixes and their numbers; the ACL ones are whole names.
const PREFIXES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];
const HEADER: usize = 12;
const ENTRY: usize = 4;

fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    let (rest, index) = PREFIXES
        .iter()
        .find_map(|(prefix, index)| Some((name.strip_prefix(*prefix)?, *index)))?;
    let whole = matches!(index, 2 | 3);
    (whole == rest.is_empty() && rest.len() <= 255).then_some((index, rest))
}

/// Whether EROFS can hold an attribute, and Linux would show it.
pub(crate) fn is_storable(name: &[u8], value: &[u8]) -> bool {
    split(name).is_some() && u16::try_from(value.len()).is_ok() && !name.contains(&0)
}

/// The full name of a stored attribute.
pub(super) fn full_name(index: u8, rest: &[u8]) -> Option<Vec<u8>> {
    let (prefix, _) = PREFIXES.iter().find(|(_, number)| *number == index)?;
    Some([prefix, rest].concat())
}

/// The most bytes that one inode's attributes take: `i_xattr_icount` has 16 bits.
pub(crate) const MOST: usize = HEADER + 4 * (u16::MAX as usize - 1);

/// The stored form, a multiple of 4 long; nothing when there are none.
pub(crate) fn encode(xattrs: &Xattrs) -> Vec<u8> {
    if xattrs.is_empty() {
        return Vec::new();
    }
    let mut bytes = vec![0; HEADER];
    for (name, value) in xattrs {
        let Some((index, rest)) = split(name) else {
            continue;
        };
        let Ok(len) = u16::try_from(value.len()) else {
            continue;
        };
        bytes.extend([rest.len() as u8, index]);
        bytes.extend(len.to_le_bytes());
        bytes.extend(rest);
        bytes.extend(&value[..]);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// `i_xattr_icount` for so many bytes.
pub(super) fn count_of(len: usize) -> u16 {
    match len {
        0 => 0,
        len => u16::try_from((len - HEADER) / 4 + 1).unwrap_or(u16::MAX),
    }
}

/// The bytes behind an `i_xattr_icount`.
pub(super) fn len_of(count: u16) -> usize {
    match usize::from(count) {
        0 => 0,
        count => HEADER + 4 * (count - 1),
    }
}

/// Reads the stored form; `None` when it is damaged.
pub(super) fn decode(bytes: &[u8]) -> Option<Xattrs> {
    let mut xattrs = Xattrs::new();
    let mut rest = match bytes {
        [] => return Some(xattrs),
        // Shared attributes are never written by us.
        _ if *bytes.get(4)? != 0 => return None,
        _ => bytes.get(HEADER..)?,
    };
    while rest.len() >= ENTRY {
        let (name_len, index) = (usize::from(rest[0]), rest[1]);
        let value_len = usize::from(u16::from_le_bytes([rest[2], rest[3]]));
        let name = full_name(index, rest.get(ENTRY..ENTRY + name_len)?)?;
        let end = ENTRY + name_len + value_len;
        let value = rest.get(ENTRY + name_len..end)?;
        xattrs.insert(name.into(), value.into());
        rest = rest.get(end.next_multiple_of(4)..)?;
    }
    rest.is_empty().then_some(xattrs)
}
