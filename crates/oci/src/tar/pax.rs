//! Extended headers: records `LENGTH KEY=VALUE\n` (POSIX.1-2017 pax, "pax Extended Header").

use super::{Extent, Time};

/// What the records of one extended header say.
#[derive(Default)]
pub(super) struct Pax {
    pub path: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub mtime: Option<Time>,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub sparse: PaxSparse,
}

/// The `GNU.sparse.*` records (GNU tar manual, "Storing Sparse Files").
#[derive(Default)]
pub(super) struct PaxSparse {
    pub major: Option<u64>,
    pub minor: Option<u64>,
    pub name: Option<Vec<u8>>,
    pub real_size: Option<u64>,
    /// From `offset`/`numbytes` pairs (0.0) or from `map` (0.1).
    pub extents: Option<Vec<Extent>>,
    offset: Option<u64>,
}

pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// `[-]SECONDS[.FRACTION]`; digits past the nanoseconds are dropped.
pub(super) fn time(text: &[u8]) -> Option<Time> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |b| *b == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let fraction = parts.next().unwrap_or(b"");
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digit = |i: usize| fraction.get(i).map_or(0, |d| u32::from(d - b'0'));
    let nanoseconds = (0..9).fold(0, |value, i| value * 10 + digit(i));
    Some(match (negative, nanoseconds) {
        (false, _) => Time {
            seconds,
            nanoseconds,
        },
        (true, 0) => Time {
            seconds: -seconds,
            nanoseconds,
        },
        // Nanoseconds always count forwards.
        (true, _) => Time {
            seconds: -seconds - 1,
            nanoseconds: 1_000_000_000 - nanoseconds,
        },
    })
}

impl Pax {
    /// `None` when the bytes aren't records.
    pub(super) fn parse(mut bytes: &[u8], most_extents: usize) -> Option<Self> {
        let mut pax = Pax::default();
        while !bytes.is_empty() {
            let space = bytes.iter().take(20).position(|b| *b == b' ')?;
            let len = usize::try_from(decimal(bytes.get(..space)?)?).ok()?;
            let record = bytes.get(space + 1..len)?.strip_suffix(b"\n")?;
            let equals = record.iter().position(|b| *b == b'=')?;
            let (key, value) = (record.get(..equals)?, record.get(equals + 1..)?);
            pax.record(key, value, most_extents)?;
            bytes = bytes.get(len..)?;
        }
        Some(pax)
    }

    fn record(&mut self, key: &[u8], value: &[u8], most_extents: usize) -> Option<()> {
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            self.xattrs.push((name.to_vec(), value.to_vec()));
            return Some(());
        }
        if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
            return self.sparse.record(key, value, most_extents);
        }
        // An empty value takes back what the header says, which is then the plain header's.
        let text = || (!value.is_empty()).then(|| value.to_vec());
        let id = || {
            if value.is_empty() {
                Some(None)
            } else {
                u32::try_from(decimal(value)?).ok().map(Some)
            }
        };
        match key {
            b"path" => self.path = text(),
            b"linkpath" => self.link = text(),
            b"size" => {
                self.size = if value.is_empty() {
                    None
                } else {
                    Some(decimal(value)?)
                }
            }
            b"uid" => self.uid = id()?,
            b"gid" => self.gid = id()?,
            b"mtime" => {
                self.mtime = if value.is_empty() {
                    None
                } else {
                    Some(time(value)?)
                }
            }
            // atime, ctime, uname, comment, charset, vendor records: nothing that an image keeps.
            _ => {}
        }
        Some(())
    }
}

impl PaxSparse {
    fn record(&mut self, key: &[u8], value: &[u8], most_extents: usize) -> Option<()> {
        match key {
            b"major" => self.major = Some(decimal(value)?),
            b"minor" => self.minor = Some(decimal(value)?),
            b"name" => self.name = Some(value.to_vec()),
            b"realsize" | b"size" => self.real_size = Some(decimal(value)?),
            b"offset" => self.offset = Some(decimal(value)?),
            b"numbytes" => {
                let extent = Extent {
                    offset: self.offset.take()?,
                    len: decimal(value)?,
                };
                let extents = self.extents.get_or_insert_default();
                if extents.len() >= most_extents {
                    return None;
                }
                extents.push(extent);
            }
            b"map" => {
                let mut numbers = value.split(|b| *b == b',').map(decimal);
                let mut extents = Vec::new();
                while let Some(offset) = numbers.next() {
                    let extent = Extent {
                        offset: offset?,
                        len: numbers.next()??,
                    };
                    if extents.len() >= most_extents {
                        return None;
                    }
                    extents.push(extent);
                }
                self.extents = Some(extents);
            }
            _ => {}
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        let t = |seconds, nanoseconds| {
            Some(Time {
                seconds,
                nanoseconds,
            })
        };
        assert_eq!(time(b"1700000000"), t(1_700_000_000, 0));
        assert_eq!(time(b"1.5"), t(1, 500_000_000));
        assert_eq!(time(b"1.0000000019"), t(1, 1));
        assert_eq!(time(b"-1.25"), t(-2, 750_000_000));
        assert_eq!(time(b"-3"), t(-3, 0));
        for bad in [
            &b""[..],
            b"-",
            b".5",
            b"1.x",
            b"1e3",
            b"99999999999999999999",
        ] {
            assert_eq!(time(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn records() {
        let pax = Pax::parse(b"12 path=a/b\n20 SCHILY.xattr.a=\n\n", 9).unwrap();
        assert_eq!(pax.path.as_deref(), Some(&b"a/b"[..]));
        assert_eq!(pax.xattrs, [(b"a".to_vec(), b"\n".to_vec())]);
        for bad in [
            &b"5"[..],
            b"0 a=b\n",
            b"6 ab\n",
            b"99 a=b\n",
            b"6 a=b ",
            b"x a=b\n",
        ] {
            assert!(Pax::parse(bad, 9).is_none(), "{bad:?}");
        }
        assert!(
            Pax::parse(b"29 GNU.sparse.map=0,1,2,3,4\n", 9).is_none(),
            "odd"
        );
        assert!(
            Pax::parse(b"27 GNU.sparse.map=0,1,2,3\n", 1).is_none(),
            "too many"
        );
    }
}
