//! Bodies of the fuzz targets, kept here so that plain tests run them too.

use std::collections::HashSet;
use std::fs::File;

use crate::erofs::{self, InodeKind, Reader};
use crate::layer::{Limits, Unpacker, decompress};
use crate::manifest;
use crate::spool::SpoolWriter;

/// Any bytes as an image's name.
pub fn image_ref(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(image) = text.parse::<crate::ImageRef>()
    {
        assert_eq!(image.to_string(), text);
    }
}

/// Bounds so small that a run ends quickly, and all of them are met.
const SMALL: Limits = Limits {
    unpacked_bytes: 1 << 20,
    entries: 2000,
    metadata_bytes: 1 << 20,
};

/// Any bytes as a layer, compressed or not; what is accepted must become a sound image.
pub fn oci_layer(bytes: &[u8]) {
    let Ok(stream) = decompress(bytes, None) else {
        return;
    };
    let Ok(spool) = SpoolWriter::new(&std::env::temp_dir()) else {
        return;
    };
    let mut unpacker = Unpacker::new(spool, SMALL);
    if unpacker.apply(stream).is_err() {
        return;
    }
    let Unpacker { tree, spool, .. } = unpacker;
    let (Ok(spool), Ok(mut file)) = (spool.finish(), tempfile::tempfile()) else {
        return;
    };
    if erofs::write(&tree, &spool, [0; 16], &mut file).is_ok() {
        erofs::check_superblock(&file).expect("an image that was written has a superblock");
        assert!(walk_image(&file), "an image that was written can be read");
    }
}

/// Any bytes as the documents of an image: the index, the manifest, the configuration.
pub fn oci_manifest(bytes: &[u8]) {
    manifest::fuzz(bytes);
}

/// Reads all of an image that may be damaged; false when it was.
pub fn walk_image(file: &File) -> bool {
    let Ok(reader) = Reader::new(file) else {
        return false;
    };
    let Ok(root) = reader.root() else {
        return false;
    };
    let (mut todo, mut seen) = (vec![root], HashSet::new());
    let mut whole = true;
    while let Some(dir) = todo.pop() {
        let Ok(names) = reader.names(&dir) else {
            whole = false;
            continue;
        };
        for (_, nid) in names.into_iter().take(100_000) {
            if !seen.insert(nid) {
                continue;
            }
            match reader.inode(nid) {
                Ok(inode) if inode.kind == InodeKind::Directory => todo.push(inode),
                Ok(inode) => whole &= reader.read(&inode, 4 << 20).is_ok(),
                Err(_) => whole = false,
            }
        }
    }
    whole
}
