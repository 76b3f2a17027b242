//! Times writing and opening a snapshot: `timing DIR [MIB]`.

use std::path::Path;
use std::time::{Duration, Instant};

use skerry_snapshot::{
    Error, PAGE_SIZE, SnapshotStore, Trust, WriteOptions, merged_disks, merged_memory,
};

/// The shortest and the median.
fn figures(mut times: Vec<Duration>) -> String {
    times.sort();
    format!("{:.1?} ({:.1?})", times[0], times[times.len() / 2])
}

fn main() -> Result<(), Error> {
    let mut args = std::env::args().skip(1);
    let dir = args.next().unwrap_or_else(|| "timing.tmp".to_owned());
    let mib: usize = args.next().and_then(|mib| mib.parse().ok()).unwrap_or(64);
    let store = SnapshotStore::open(Path::new(&dir))?;
    // Data in 1 MiB pieces with as much zero between them.
    let mut data = vec![0; (2 * mib) << 20];
    for (i, bytes) in data.chunks_exact_mut(8).enumerate() {
        if (i >> 17).is_multiple_of(2) {
            bytes.copy_from_slice(&(i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
        }
    }
    for durable in [false, true] {
        let (mut writes, mut trusted, mut verified) = (Vec::new(), Vec::new(), Vec::new());
        let mut pages_only = Vec::new();
        for _ in 0..9 {
            let parent = None;
            let start = Instant::now();
            let mut writer = store.writer(WriteOptions { durable, parent })?;
            let size = data.len() as u64;
            writer.memory::<Error>(size, |out| {
                (0..)
                    .zip(data.chunks(64 << 10))
                    .try_for_each(|(i, chunk)| out.write(i * ((64 << 10) / PAGE_SIZE), chunk))
            })?;
            pages_only.push(start.elapsed());
            writer.state(&[b' '; 100_000])?;
            let id = writer.commit(&"configuration")?;
            writes.push(start.elapsed());
            for (trust, times) in [(Trust::Seal, &mut trusted), (Trust::Nothing, &mut verified)] {
                for _ in 0..if trust == Trust::Seal { 100 } else { 3 } {
                    let start = Instant::now();
                    let snapshot = store.get(&id, trust)?;
                    times.push(start.elapsed());
                    assert_eq!(snapshot.was_sealed(), trust == Trust::Seal);
                }
            }
            store.remove(&id)?;
        }
        println!(
            "{mib} MiB of data, durable {durable}: pages {}, all {}, open sealed {}, open verifying {}",
            figures(pages_only),
            figures(writes),
            figures(trusted),
            figures(verified)
        );
    }
    chains(&store, data.len() as u64)
}

/// Opens longer and longer chains of differences of 500 pages, in a store with all of them.
fn chains(store: &SnapshotStore, size: u64) -> Result<(), Error> {
    let (mut parent, mut ids) = (None, Vec::new());
    for length in 1..=64u64 {
        let mut writer = store.writer(WriteOptions {
            durable: false,
            parent,
        })?;
        writer.memory::<Error>(size, |out| {
            let pages = (0..500).map(|n| (n * 8 + length % 8) * PAGE_SIZE);
            let page = [length as u8; PAGE_SIZE as usize];
            pages.into_iter().try_for_each(|at| out.write_at(at, &page))
        })?;
        writer.state(&[b' '; 100_000])?;
        let id = writer.commit(&"configuration")?;
        parent = Some(id);
        ids.push(id);
        if length.is_power_of_two() {
            let (mut opens, mut merges, mut sweeps) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..50 {
                let start = Instant::now();
                let chain = store.open_chain(&id, Trust::Seal)?;
                opens.push(start.elapsed());
                merged_memory(&chain)?;
                merged_disks(&chain)?;
                merges.push(start.elapsed());
                let start = Instant::now();
                store.sweep()?;
                sweeps.push(start.elapsed());
            }
            println!(
                "chain of {length}: open {}, with merging {}, sweep {}",
                figures(opens),
                figures(merges),
                figures(sweeps)
            );
        }
    }
    ids.iter().rev().try_for_each(|id| store.remove(id))
}
