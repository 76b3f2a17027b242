//! Bodies of the fuzz targets, kept here so that plain tests run them too.

use std::collections::HashSet;
use std::fs::File;
use std::io::Write;

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
    apply_layer(bytes);
    // Few changes keep a header's checksum right; this gets behind that check.
    let mut sealed = bytes.to_vec();
    seal_headers(&mut sealed);
    if sealed != bytes {
        apply_layer(&sealed);
    }
}

fn apply_layer(bytes: &[u8]) {
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

/// Makes the checksums of what looks like tar headers right.
fn seal_headers(bytes: &mut [u8]) {
    for block in bytes.as_chunks_mut::<512>().0 {
        if &block[257..262] == b"ustar" {
            *block = seal(*block);
        }
    }
}

/// Gives a tar header its checksum.
pub(crate) fn seal(mut header: [u8; 512]) -> [u8; 512] {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

/// Any bytes as the documents of an image: the index, the manifest, the configuration.
pub fn oci_manifest(bytes: &[u8]) {
    manifest::fuzz(bytes);
}

/// Any bytes as an EROFS image, with its checksum as it is and put right.
pub fn erofs(bytes: &[u8]) {
    let mut sealed = bytes.to_vec();
    erofs::seal_superblock(&mut sealed);
    for bytes in [bytes, &sealed] {
        let Ok(mut file) = tempfile::tempfile() else {
            return;
        };
        if file.write_all(bytes).is_ok() {
            let _ = erofs::check_superblock(&file);
            walk_image(&file);
        }
    }
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

#[cfg(test)]
mod tests {
    //! The short form of fuzzing: seeds and random changes of them, for a moment on each run of
    //! the tests. `fuzz/` has the long form.

    use super::*;
    use crate::testing::{Archive, gzip};
    use skerry_test_support::fuzz_briefly;
    use std::io::Read;
    use std::time::Duration;

    fn run(seeds: &[Vec<u8>], target: impl Fn(&[u8])) {
        let tokens = b"0123456789./\0\xff";
        fuzz_briefly(seeds, tokens, Duration::from_secs(2), target);
    }

    fn layers() -> Vec<Vec<u8>> {
        let plain = Archive::default()
            .dir("d")
            .file("d/f", &[7; 700])
            .link("d/l", "d/f")
            .symlink("s", "d")
            .file("s/.wh.f", b"")
            .file("d/.wh..wh..opq", b"")
            .end();
        let extended = Archive::default()
            .raw(b'L', b"x", b"", b"a/long/name\0")
            .pax(&[
                ("mtime", b"1.5"),
                ("SCHILY.xattr.user.a", b"b"),
                ("GNU.sparse.major", b"1"),
                ("GNU.sparse.minor", b"0"),
                ("GNU.sparse.realsize", b"900"),
            ])
            .file(
                "sparse",
                &[&b"1\n100\n8\n"[..], &[0; 503], b"12345678"].concat(),
            )
            .raw(b'3', b"c", b"", b"")
            .end();
        let zstd = zstd::encode_all(&plain[..], 1).unwrap();
        vec![gzip(&plain), zstd, plain, extended]
    }

    #[test]
    fn layers_briefly() {
        run(&layers(), oci_layer);
    }

    #[test]
    fn documents_briefly() {
        let seeds: [&[u8]; 3] = [
            br#"{"manifests":[{"digest":"sha256:00","platform":{"os":"linux"},"annotations":{"org.opencontainers.image.ref.name":"latest"}}]}"#,
            br#"{"config":{"digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},"layers":[]}"#,
            br#"[{"Config":"x.json","RepoTags":["a:latest"],"Layers":["l"]}]"#,
        ];
        run(&seeds.map(<[u8]>::to_vec), oci_manifest);
    }

    #[test]
    fn names_briefly() {
        let seeds = [
            "oci:a:b",
            "docker-archive:x.tar:a/b:c",
            "dir:/x",
            "demo",
            "docker://x",
        ];
        run(&seeds.map(|seed| seed.as_bytes().to_vec()), image_ref);
    }

    #[test]
    fn images_briefly() {
        let spool = SpoolWriter::new(&std::env::temp_dir()).unwrap();
        let mut unpacker = Unpacker::new(spool, Limits::default());
        unpacker.apply(&layers()[2][..]).unwrap();
        let Unpacker { tree, spool, .. } = unpacker;
        let file = crate::testing::image_of(&tree, &spool.finish().unwrap());
        let mut bytes = Vec::new();
        std::io::Seek::rewind(&mut &file).unwrap();
        (&file).read_to_end(&mut bytes).unwrap();
        run(&[bytes], super::erofs);
    }
}
