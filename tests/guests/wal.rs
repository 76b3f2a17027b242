//! A guest program: a write-ahead log, as a database has it, that says what it has promised to keep.
//!
//! ```text
//!  wal write FILE     replays FILE, drops a torn end, goes on: append a record, fdatasync, and only
//!                     then print its number
//!  wal check FILE     the last number, if every record before is whole, in order and without gaps
//!
//!  FILE               records; cut to nothing once they are many and what they say is kept in
//!  FILE.base          the number of the last record that FILE need not have any more
//! ```
//! A record: length and checksum of what follows (32 bits each), its number (64 bits), a payload that
//! follows from the number.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::ExitCode;

const HEADER: usize = 8;
const NUMBER: usize = 8;
const LONGEST: usize = 4096;
/// A log of this length is cut.
const MANY: u64 = 512 << 10;

/// Numbers that look random (xorshift, Marsaglia 2003).
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// CRC-32 (ISO-HDLC), by table.
const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

fn checksum(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| (crc >> 8) ^ TABLE[usize::from(crc as u8 ^ byte)];
    !bytes.iter().fold(u32::MAX, step)
}

/// The record with this number, whole.
fn record(number: u64) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    // Mostly small, now and then more than a page.
    let length = match number % 16 {
        0 => LONGEST as u64 + next(&mut state) % LONGEST as u64,
        _ => next(&mut state) % 200,
    };
    let mut body = number.to_le_bytes().to_vec();
    for _ in 0..length.div_ceil(8) {
        body.extend(next(&mut state).to_le_bytes());
    }
    let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
    bytes.extend(checksum(&body).to_le_bytes());
    bytes.extend(body);
    bytes
}

/// What a log holds.
struct Replay {
    /// The number of its last record.
    last: u64,
    /// Where that ends.
    end: u64,
    /// Bytes behind it.
    torn: u64,
}

fn base_path(path: &str) -> String {
    format!("{path}.base")
}

fn broken(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// The number of the record that begins there, and its length, if it is whole.
fn whole(bytes: &[u8]) -> Option<(u64, usize)> {
    let word = |at: usize| -> Option<u32> {
        let bytes = bytes.get(at..at + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    };
    let (length, sum) = (word(0)? as usize, word(4)?);
    let body = bytes.get(HEADER..HEADER.checked_add(length)?)?;
    let number = u64::from_le_bytes(body.get(..NUMBER)?.try_into().ok()?);
    let good = checksum(body) == sum && bytes.get(..HEADER + length)? == record(number);
    good.then_some((number, HEADER + length))
}

/// The number of the last record that the log need not have.
fn read_base(path: &str) -> io::Result<u64> {
    match std::fs::read_to_string(base_path(path)) {
        Ok(text) => {
            let number = text.trim().parse();
            number.map_err(|_| broken(format!("the base is {text:?}")))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error),
    }
}

/// Reads the log; `Err` where something lacks that was said to be kept.
fn replay(path: &str) -> io::Result<Replay> {
    // Whoever cuts the log meanwhile has changed the base before.
    let (base, bytes) = loop {
        let base = read_base(path)?;
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        if read_base(path)? == base {
            break (base, bytes);
        }
    };
    let (mut last, mut end) = (None, 0);
    while let Some((number, length)) = whole(bytes.get(end..).unwrap_or_default()) {
        match last {
            None if number <= base + 1 => {}
            Some(last) if number == last + 1 => {}
            _ => {
                return Err(broken(format!(
                    "record {number} comes after {last:?}, the base is {base}"
                )));
            }
        }
        last = Some(number);
        end += length;
    }
    // Only the one record that was being written may be incomplete.
    let torn = bytes.len() - end;
    if torn > HEADER + NUMBER + 2 * LONGEST {
        return Err(broken(format!(
            "{torn} more bytes after record {last:?}, the base is {base}"
        )));
    }
    match last {
        Some(last) if last < base => Err(broken(format!(
            "the base is {base} and the last record {last}"
        ))),
        last => Ok(Replay {
            last: last.unwrap_or(base),
            end: end as u64,
            torn: torn as u64,
        }),
    }
}

/// Has the log begin anew after record `last`.
fn cut(path: &str, file: &mut File, last: u64) -> io::Result<()> {
    let base = base_path(path);
    let staged = format!("{base}.new");
    let mut new = File::create(&staged)?;
    writeln!(new, "{last}")?;
    new.sync_all()?;
    std::fs::rename(&staged, &base)?;
    let folder = Path::new(path).parent().filter(|folder| folder.is_dir());
    let folder = folder.unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()?;
    file.set_len(0)?;
    file.seek(SeekFrom::Start(0))?;
    file.sync_data()
}

fn write(path: &str) -> io::Result<()> {
    let Replay { mut last, end, .. } = replay(path)?;
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    file.set_len(end)?;
    let mut length = file.seek(SeekFrom::Start(end))?;
    let mut out = io::stdout();
    loop {
        last += 1;
        let record = record(last);
        file.write_all(&record)?;
        file.sync_data()?;
        writeln!(out, "{last}")?;
        out.flush()?;
        length += record.len() as u64;
        if length > MANY {
            cut(path, &mut file, last)?;
            length = 0;
        }
    }
}

fn check(path: &str) -> io::Result<()> {
    // One that is cut meanwhile is read again.
    let mut tries = 0;
    let found = loop {
        tries += 1;
        match replay(path) {
            Err(_) if tries < 5 => {}
            found => break found?,
        }
    };
    println!("{}", found.last);
    if found.torn > 0 {
        eprintln!("wal: {} bytes of the next", found.torn);
    }
    Ok(())
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["write", path] => write(path),
        ["check", path] => check(path),
        _ => Err(io::Error::other("wal write FILE | wal check FILE")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("wal: {error}");
            ExitCode::FAILURE
        }
    }
}
