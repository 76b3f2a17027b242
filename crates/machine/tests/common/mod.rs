//! What tests of whole machines' memory share.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use skerry_machine::{MachineError, MachineRemote, PageSet, SavedMemory, SavedRun};

pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
pub(crate) const PAGE: u64 = 4096;

#[derive(Clone, Default)]
pub(crate) struct Output(pub(crate) Arc<Mutex<Vec<u8>>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Output {
    pub(crate) fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

pub(crate) fn all(remote: &MachineRemote, bytes: u64) -> Vec<u8> {
    let mut memory = vec![0; bytes as usize];
    remote.read_memory(0, &mut memory).unwrap();
    memory
}

/// `pages` as a layer: each at its own place of a sparse file.
pub(crate) fn layer(remote: &MachineRemote, pages: &PageSet) -> (File, Vec<SavedRun>) {
    let file = tempfile::tempfile().unwrap();
    remote
        .for_each_page_run(pages, |at, bytes| -> Result<(), MachineError> {
            file.write_all_at(bytes, at).unwrap();
            Ok(())
        })
        .unwrap();
    let runs = pages.runs().map(|run| SavedRun {
        at: run.start * PAGE,
        len: (run.end - run.start) * PAGE,
        offset: run.start * PAGE,
    });
    (file, runs.collect())
}

/// Makes what was written the machine's base.
pub(crate) fn rebase(remote: &MachineRemote) -> SavedMemory {
    let written = remote.written().unwrap();
    let wider = written.coalesce(PageSet::GAP, PageSet::RUNS);
    let (file, runs) = layer(remote, &wider);
    let copy = file.try_clone().unwrap();
    remote.rebase(file, runs.clone()).unwrap();
    assert_eq!(remote.written_count().unwrap(), 0);
    SavedMemory {
        layers: vec![(copy, runs)],
    }
}
