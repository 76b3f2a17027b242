//! Keeps an overlay that is frozen again and again from holding ever more files.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::Stack;
use crate::layer::Extent;
use crate::sys;

/// Files that lie under an overlay before some are made one.
pub(super) const FILES_MAX: usize = 64;
/// As many are too many whatever it costs to make them fewer.
const FILES_LIMIT: usize = 4 * FILES_MAX;
/// Bytes that are copied for it at a time; a machine may be waiting.
const COPY_MAX: u64 = 64 << 20;

impl Stack {
    /// Lets go of files that show nothing, and makes one of those that show the least if there are
    /// too many. Without space for that they stay: it is tried again at the next freeze.
    pub(super) fn compact(&mut self, folder: &Path) {
        let bytes = self.index.bytes_by_file(self.files.len());
        self.keep(|file| bytes.get(file).is_some_and(|bytes| *bytes > 0));
        if self.files.len() <= FILES_MAX {
            return;
        }
        let bytes = self.index.bytes_by_file(self.files.len());
        let mut order: Vec<_> = (0..self.files.len()).collect();
        order.sort_by_key(|file| bytes.get(*file));
        let mut merge = vec![false; self.files.len()];
        let mut room = match self.files.len() {
            ..=FILES_LIMIT => COPY_MAX,
            _ => u64::MAX,
        };
        for file in order.into_iter().take(self.files.len() - FILES_MAX / 2) {
            match room.checked_sub(bytes[file]) {
                Some(rest) => room = rest,
                None => break,
            }
            merge[file] = true;
        }
        if merge.iter().filter(|merge| **merge).count() < 2 {
            return;
        }
        let Ok(merged) = self.merge(&merge, folder) else {
            return;
        };
        let number = self.files.len();
        self.files.push(Arc::new(merged));
        self.index = self.index.relocate(|extent| match merge.get(extent.file) {
            Some(true) => (number, extent.at),
            _ => (extent.file, extent.offset),
        });
        self.keep(|file| !merge.get(file).is_some_and(|merge| *merge));
    }

    /// Drops the files for which `keep` doesn't hold, and which nothing refers to.
    fn keep(&mut self, keep: impl Fn(usize) -> bool) {
        let mut numbers = Vec::with_capacity(self.files.len());
        let mut kept = Vec::with_capacity(self.files.len());
        for (number, file) in self.files.iter().enumerate() {
            numbers.push(kept.len());
            if keep(number) {
                kept.push(file.clone());
            }
        }
        self.files = kept;
        let number = |file: usize| numbers.get(file).copied().unwrap_or(usize::MAX);
        self.index = self.index.relocate(|e| (number(e.file), e.offset));
    }

    /// Copies what the chosen files show to one new file, each byte to its place on the disk.
    fn merge(&self, chosen: &[bool], folder: &Path) -> io::Result<File> {
        let to = sys::unnamed_file(folder)?;
        let chosen = |e: &&Extent| chosen.get(e.file).is_some_and(|chosen| *chosen);
        let mut buffer = vec![0; 256 << 10];
        let mut end = 0;
        for extent in self.index.extents().iter().filter(chosen) {
            let Some(from) = self.files.get(extent.file) else {
                continue;
            };
            let mut done = 0;
            while done < extent.len {
                let len = (extent.len - done).min(buffer.len() as u64) as usize;
                let bytes = &mut buffer[..len];
                from.read_exact_at(bytes, extent.offset + done)?;
                if bytes.iter().any(|byte| *byte != 0) {
                    to.write_all_at(bytes, extent.at + done)?;
                }
                done += len as u64;
            }
            end = extent.end();
        }
        // What is zero at the end has to be there too.
        to.set_len(end)?;
        Ok(to)
    }
}
