//! Packs a freshly made file system into the template of scratch disks: `pack-template IN OUT`.
//!
//! The output is one zlib stream of little-endian numbers and blocks:
//! magic `skscr01\n`, u32 block size, u32 blocks in the disk, u32 blocks stored, then for each
//! stored block its u32 number and its bytes. Blocks of zeros aren't stored.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

const BLOCK: usize = 4096;

fn main() -> io::Result<()> {
    let mut args = std::env::args_os().skip(1);
    let (Some(input), Some(output)) = (args.next(), args.next()) else {
        return Err(io::Error::other("usage: pack-template IN OUT"));
    };
    let mut input = File::open(input)?;
    let blocks = u32::try_from(input.metadata()?.len() / BLOCK as u64).map_err(io::Error::other)?;
    let mut stored = Vec::new();
    let mut at = 0;
    // Only what the host's file system stores is looked at; the rest is holes.
    while let Ok(data) = rustix::fs::seek(&input, rustix::fs::SeekFrom::Data(at)) {
        let number = data / BLOCK as u64;
        let mut block = [0; BLOCK];
        input.seek(SeekFrom::Start(number * BLOCK as u64))?;
        input.read_exact(&mut block)?;
        if block.iter().any(|byte| *byte != 0) {
            stored.push((u32::try_from(number).map_err(io::Error::other)?, block));
        }
        at = (number + 1) * BLOCK as u64;
    }
    let mut out =
        flate2::write::ZlibEncoder::new(File::create(output)?, flate2::Compression::best());
    out.write_all(b"skscr01\n")?;
    for number in [BLOCK as u32, blocks, stored.len() as u32] {
        out.write_all(&number.to_le_bytes())?;
    }
    for (number, block) in &stored {
        out.write_all(&number.to_le_bytes())?;
        out.write_all(block)?;
    }
    out.finish()?;
    println!("{} of {blocks} blocks stored", stored.len());
    Ok(())
}
