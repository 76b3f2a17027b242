//! Bodies of the fuzz targets, kept here so that plain tests run them too.

use serde::de::IgnoredAny;

use crate::manifest::{self, Manifest};
use crate::pages::{FOOTER_BYTES, Footer, PAGE_SIZE};
use crate::seal::Seal;
use crate::working_set::WorkingSet;

/// Any bytes as the table of a page image, with its footer as it is and one that fits.
pub fn page_table(bytes: &[u8]) {
    let table_bytes = |footer: &Footer| footer.data_pages.checked_mul(PAGE_SIZE);
    let Some((_, last)) = bytes.split_last_chunk::<{ FOOTER_BYTES as usize }>() else {
        return;
    };
    // The size that the footer itself asks for, then that of the bytes alone.
    let data_pages = u64::from_le_bytes(*last[40..].first_chunk().unwrap_or(&[0; 8]));
    let claimed = data_pages
        .wrapping_mul(PAGE_SIZE)
        .wrapping_add(bytes.len() as u64);
    for file_size in [claimed, bytes.len() as u64] {
        let Ok(footer) = Footer::decode(last, file_size) else {
            continue;
        };
        assert!(table_bytes(&footer).is_some_and(|data| data <= file_size));
        let Ok(table) = footer.table(bytes) else {
            continue;
        };
        // What is accepted is what would be written, and lies within bounds.
        assert_eq!(footer.encode(&table), bytes);
        let mut file = 0;
        let mut places = table.zeros.clone();
        for run in &table.runs {
            assert_eq!(run.file_page, file);
            file += run.pages;
            places.push(run.guest_page..run.end());
        }
        places.sort_by_key(|place| place.start);
        let mut guest = 0;
        for place in places {
            assert!(place.start >= guest && place.end > place.start);
            guest = place.end;
        }
        assert!(guest <= footer.size.div_ceil(PAGE_SIZE) && file == footer.data_pages);
    }
}

/// Any bytes as each of the JSON documents.
pub fn documents(bytes: &[u8]) {
    let _ = manifest::check_layout("fuzz", bytes);
    if let Ok(found) = manifest::manifests_of_index("fuzz", bytes) {
        assert!(!found.is_empty() && found.len() <= crate::CHAIN_MAX);
        let one = manifest::manifest_of_index("fuzz", bytes);
        assert_eq!(one.is_ok(), found.len() == 1);
    }
    let _ = manifest::envelope::<IgnoredAny>("fuzz", bytes);
    if let Ok(manifest) = Manifest::decode("fuzz", bytes) {
        let again = manifest
            .encode()
            .map(|bytes| Manifest::decode("fuzz", &bytes));
        assert!(matches!(again, Ok(Ok(again)) if again == manifest));
    }
}

/// Any bytes as a seal.
pub fn seal(bytes: &[u8]) {
    if let Some(seal) = Seal::decode(bytes) {
        let again = serde_json::to_vec(&seal)
            .ok()
            .and_then(|b| Seal::decode(&b));
        assert_eq!(again, Some(seal));
    }
}

/// Any bytes as a working set.
pub fn working_set(bytes: &[u8]) {
    for pages in [0, 1000, u64::MAX] {
        if let Ok(set) = WorkingSet::decode(bytes, pages) {
            assert_eq!(set.encode(), bytes);
            assert!(set.ranges().iter().all(|range| !range.is_empty()));
            assert!(
                set.ranges()
                    .windows(2)
                    .all(|pair| pair[0].end < pair[1].start)
            );
            assert!(set.ranges().last().is_none_or(|range| range.end <= pages));
        }
    }
}

#[cfg(test)]
mod tests {
    //! The short form of fuzzing: seeds and random changes of them, for a moment on each run of
    //! the tests. `fuzz/` has the long form.

    use std::collections::BTreeMap;
    use std::time::Duration;

    use super::*;
    use crate::manifest::{Descriptor, Envelope};
    use crate::pages::{Content, Run, Table};
    use crate::{Digest, seal};
    use skerry_test_support::fuzz_briefly;

    fn run(seeds: &[Vec<u8>], target: impl Fn(&[u8])) {
        let tokens = b"0123456789{}[]\",:\0\xff";
        fuzz_briefly(seeds, tokens, Duration::from_secs(1), target);
    }

    #[test]
    fn tables_briefly() {
        let run_at = |guest_page, file_page| Run {
            guest_page,
            pages: 2,
            file_page,
        };
        let three = [run_at(1, 0), run_at(4, 2), run_at(7, 4)];
        let kinds = [
            (Content::Full, vec![], vec![]),
            (Content::Full, three.to_vec(), vec![]),
            (Content::Diff, three.to_vec(), vec![0..1, 3..4]),
        ];
        let seeds = kinds.map(|(content, runs, zeros)| {
            let table = Table { runs, zeros };
            let footer = Footer {
                content,
                zeros: !table.zeros.is_empty(),
                runs: table.len(),
                size: 9 * PAGE_SIZE,
                data_pages: 2 * table.runs.len() as u64,
            };
            let bytes = footer.encode(&table);
            assert_eq!(footer.table(&bytes), Ok(table));
            bytes
        });
        run(&seeds, page_table);
    }

    #[test]
    fn documents_briefly() {
        let blob = |media_type| {
            Descriptor::new(media_type, Digest::of(b"x"), 1).with_table(Digest::of(b"t"))
        };
        let manifest = Manifest {
            config: blob(manifest::CONFIG_TYPE),
            state: blob(manifest::STATE_TYPE),
            memory: blob(manifest::MEMORY_TYPE),
            disks: BTreeMap::from([("root".into(), blob(manifest::DISK_TYPE).with_name("root"))]),
            extras: BTreeMap::from([("log".into(), blob(manifest::EXTRA_TYPE).with_name("log"))]),
        };
        let envelope = Envelope {
            version: 1,
            created_ms: 1,
            memory_size: 4096,
            parent: Some(Digest::of(b"p")),
            config: "c",
        };
        let seeds = [
            manifest::LAYOUT.to_vec(),
            manifest::index([(Digest::of(b"m"), 7), (Digest::of(b"n"), 8)].into_iter()).unwrap(),
            manifest.encode().unwrap(),
            serde_json::to_vec(&envelope).unwrap(),
        ];
        assert_eq!(Manifest::decode("seed", &seeds[2]).unwrap(), manifest);
        run(&seeds, documents);
    }

    #[test]
    fn seals_briefly() {
        let stamp = seal::Stamp::of(&tempfile::tempfile().unwrap()).unwrap();
        let blobs = BTreeMap::from([(Digest::of(b"x"), stamp)]);
        let seeds = [true, false].map(|durable| {
            let seal = Seal::new(Digest::of(b"m"), blobs.clone(), durable);
            serde_json::to_vec(&seal).unwrap()
        });
        assert!(
            Seal::decode(&seeds[0])
                .unwrap()
                .covers(Digest::of(b"m"), &blobs)
        );
        run(&seeds, super::seal);
    }
    #[test]
    fn working_sets_briefly() {
        let ranges = [1..4, 200..900, 901..902, 100_000..200_000];
        let seeds = [&ranges[..0], &ranges[..3], &ranges[..]]
            .map(|ranges| WorkingSet::new(ranges.to_vec()).unwrap().encode());
        run(&seeds, working_set);
    }
}
