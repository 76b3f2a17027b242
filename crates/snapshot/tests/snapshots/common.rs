//! What the tests of this crate share.

use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use skerry_snapshot::{
    Content, Error, PAGE_SIZE, PageImage, PageWriter, Snapshot, SnapshotId, SnapshotStore,
    WriteOptions,
};

pub use skerry_test_support::Random;

/// What an engine might say of a machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Config {
    pub cpus: u32,
    pub model: String,
}

pub fn config() -> Config {
    Config {
        cpus: 2,
        model: "x86-64-v3".to_owned(),
    }
}

pub const CACHE: WriteOptions = WriteOptions {
    durable: false,
    parent: None,
};

pub fn diff_to(parent: SnapshotId) -> WriteOptions {
    WriteOptions {
        durable: false,
        parent: Some(parent),
    }
}

/// A page that says which it is.
pub fn page(number: u64) -> Vec<u8> {
    let mut page = vec![number as u8 | 1; PAGE_SIZE as usize];
    page[..8].copy_from_slice(&number.to_le_bytes());
    page
}

/// Lays an image over what was there before.
pub fn lay_over(image: &PageImage, memory: &mut Vec<u8>) {
    memory.resize(image.size as usize, 0);
    for run in &image.runs {
        let at = (run.guest_page * PAGE_SIZE) as usize;
        let len = ((run.pages * PAGE_SIZE) as usize).min(memory.len() - at);
        let from = run.file_page * PAGE_SIZE;
        image
            .file
            .read_exact_at(&mut memory[at..at + len], from)
            .unwrap();
    }
    for pages in &image.zeros {
        let at = (pages.start * PAGE_SIZE) as usize;
        let end = ((pages.end * PAGE_SIZE) as usize).min(memory.len());
        memory[at..end].fill(0);
    }
}

/// A small snapshot with everything in it.
pub fn sample(store: &SnapshotStore, options: WriteOptions, seed: u64) -> SnapshotId {
    let mut random = Random::new(seed);
    let mut writer = store.writer(options).unwrap();
    writer
        .memory::<Error>(32 * PAGE_SIZE, |pages| {
            pages.write(1, &random.bytes(2 * PAGE_SIZE as usize))?;
            // Nothing in a full one; a run without data in a difference.
            pages.write(2 + 1, &[0; PAGE_SIZE as usize])?;
            pages.write(20, &random.bytes(PAGE_SIZE as usize))
        })
        .unwrap();
    writer.state(br#"{"rip":4096}"#).unwrap();
    writer.extra("log", &random.bytes(999)[..]).unwrap();
    let mut disk = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut disk, &random.bytes(5000)).unwrap();
    match options.parent {
        None => drop(writer.disk_file("root", &disk).unwrap()),
        Some(_) => {
            let mut second = random.bytes(5000 - PAGE_SIZE as usize);
            second.resize(PAGE_SIZE as usize, 0);
            let fill = |pages: &mut PageWriter| pages.write_at(PAGE_SIZE, &second);
            let written = writer.disk::<Error>("root", 5000, Content::Diff, fill);
            written.unwrap();
        }
    }
    writer.commit(&config()).unwrap()
}

/// All that a snapshot gives.
pub fn content(snapshot: &Snapshot) -> Vec<Vec<u8>> {
    let (mut memory, mut disk) = (Vec::new(), Vec::new());
    lay_over(&snapshot.memory, &mut memory);
    lay_over(&snapshot.disks["root"], &mut disk);
    let extra = &snapshot.extras["log"];
    let mut log = vec![0; extra.size as usize];
    extra.file.read_exact_at(&mut log, 0).unwrap();
    let config = format!("{:?}", snapshot.config::<Config>().unwrap());
    vec![
        memory,
        disk,
        log,
        snapshot.state().to_vec(),
        config.into_bytes(),
        format!("{:?} {:?}", snapshot.parent(), snapshot.created()).into_bytes(),
    ]
}

/// Copies a directory of plain files.
pub fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy_tree(&entry.path(), &to),
            false => drop(std::fs::copy(entry.path(), to).unwrap()),
        }
    }
}
