//! Makes archives and images for tests, the wrong ones too.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use crate::digest::Digest;
use crate::erofs::{self, Inode, InodeKind, Reader};
use crate::layer::{LayerError, Limits, Unpacker};
use crate::spool::{Spool, SpoolWriter};
use crate::tree::{Tree, Xattrs};

/// Writes headers byte by byte, so that any of them can be wrong.
#[derive(Default)]
pub(crate) struct Archive(pub Vec<u8>);

impl Archive {
    pub(crate) fn raw(mut self, kind: u8, name: &[u8], link: &[u8], data: &[u8]) -> Self {
        self.header(kind, name, link, data.len() as u64, 0o644);
        self.0.extend(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn header(&mut self, kind: u8, name: &[u8], link: &[u8], size: u64, mode: u32) {
        let mut h = [0u8; 512];
        h[..name.len()].copy_from_slice(name);
        h[100..108].copy_from_slice(format!("{mode:07o}\0").as_bytes());
        h[108..116].copy_from_slice(b"0000000\0");
        h[116..124].copy_from_slice(b"0000000\0");
        h[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
        h[136..148].copy_from_slice(b"00000000000\0");
        h[156] = kind;
        h[157..157 + link.len()].copy_from_slice(link);
        h[257..265].copy_from_slice(b"ustar\x0000");
        h[329..337].copy_from_slice(b"0000012\0");
        h[337..345].copy_from_slice(b"0000310\0");
        self.0.extend(seal(h));
    }

    pub(crate) fn file(self, name: &str, data: &[u8]) -> Self {
        self.raw(b'0', name.as_bytes(), b"", data)
    }

    pub(crate) fn dir(mut self, name: &str) -> Self {
        self.header(b'5', name.as_bytes(), b"", 0, 0o755);
        self
    }

    pub(crate) fn link(self, name: &str, target: &str) -> Self {
        self.raw(b'1', name.as_bytes(), target.as_bytes(), b"")
    }

    pub(crate) fn symlink(self, name: &str, target: &str) -> Self {
        self.raw(b'2', name.as_bytes(), target.as_bytes(), b"")
    }

    pub(crate) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut data = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let len = (1..).find(|digits| (rest + digits).to_string().len() == *digits);
            data.extend(format!("{} {key}=", rest + len.unwrap()).into_bytes());
            data.extend(*value);
            data.push(b'\n');
        }
        self.raw(b'x', b"pax", b"", &data)
    }

    pub(crate) fn end(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }
}

pub(crate) use crate::fuzz::seal;

/// What a reader sees of one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub kind: InodeKind,
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub links: u32,
    pub mtime: (i64, u32),
    pub xattrs: Xattrs,
    pub data: Vec<u8>,
}

pub(crate) type Listing = BTreeMap<String, Seen>;

/// Everything in an image, by path; also checks what must hold for each directory.
pub(crate) fn list(file: &File) -> Listing {
    let reader = Reader::new(file).unwrap();
    let root = reader.root().unwrap();
    let mut seen = Listing::new();
    let mut todo = vec![(String::new(), root.clone(), root.nid)];
    while let Some((path, inode, parent)) = todo.pop() {
        let mut data = Vec::new();
        match inode.kind {
            InodeKind::Directory => {
                let names = reader.names(&inode).unwrap();
                assert!(names.is_sorted(), "{path}: names in order");
                let find = |name: &[u8]| names.iter().find(|(n, _)| n == name).unwrap().1;
                assert_eq!((find(b"."), find(b"..")), (inode.nid, parent), "{path}");
                for (name, nid) in names.iter().filter(|(n, _)| n != b"." && n != b"..") {
                    let child = format!("{path}/{}", String::from_utf8_lossy(name));
                    todo.push((child, reader.inode(*nid).unwrap(), inode.nid));
                }
            }
            InodeKind::File | InodeKind::Symlink => data = reader.read(&inode, 1 << 30).unwrap(),
            _ => {}
        }
        let Inode {
            kind,
            mode,
            uid,
            gid,
            links,
            mtime,
            xattrs,
            ..
        } = inode;
        seen.insert(
            path,
            Seen {
                kind,
                mode,
                uid,
                gid,
                links,
                mtime,
                xattrs,
                data,
            },
        );
    }
    seen
}

/// Writes a tree as an image.
pub(crate) fn image_of(tree: &Tree, spool: &Spool) -> File {
    let mut file = tempfile::tempfile().unwrap();
    let written = erofs::write(tree, spool, [7; 16], &mut file).unwrap();
    assert_eq!(written.size, file.metadata().unwrap().len());
    erofs::check_superblock(&file).unwrap();
    file
}

/// Applies unpacked layers and lists the result.
pub(crate) fn apply(layers: &[Vec<u8>]) -> Result<Listing, LayerError> {
    apply_within(layers, Limits::default())
}

pub(crate) fn apply_within(layers: &[Vec<u8>], limits: Limits) -> Result<Listing, LayerError> {
    let spool = SpoolWriter::new(&std::env::temp_dir()).unwrap();
    let mut unpacker = Unpacker::new(spool, limits);
    for layer in layers {
        assert_eq!(unpacker.apply(&layer[..])?, Digest::of(layer));
    }
    let Unpacker { tree, spool, .. } = unpacker;
    Ok(list(&image_of(&tree, &spool.finish().unwrap())))
}

/// An OCI image layout in the making.
pub(crate) struct Layout<'a>(pub &'a Path);

impl Layout<'_> {
    pub(crate) fn blob(&self, bytes: &[u8]) -> (String, usize) {
        let digest = Digest::of(bytes);
        let dir = self.0.join("blobs/sha256");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join(digest.hex()), bytes).unwrap();
        (digest.to_string(), bytes.len())
    }

    pub(crate) fn config(&self, os: &str, arch: &str, layers: &[&[u8]]) -> Vec<u8> {
        let diff_ids: Vec<_> = layers.iter().map(|l| Digest::of(l).to_string()).collect();
        serde_json::to_vec(&serde_json::json!({
            "architecture": arch, "os": os, "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "config": {"Cmd": ["/bin/x"], "Env": ["A=b"]},
        }))
        .unwrap()
    }

    /// A manifest from a configuration and the layers as stored, with their media types.
    pub(crate) fn manifest(&self, config: &[u8], layers: &[(&str, &[u8])]) -> (String, usize) {
        let (digest, size) = self.blob(config);
        let layers: Vec<_> = layers
            .iter()
            .map(|(media_type, bytes)| {
                let (digest, size) = self.blob(bytes);
                serde_json::json!({"mediaType": media_type, "digest": digest, "size": size})
            })
            .collect();
        self.blob(
            &serde_json::to_vec(&serde_json::json!({
                "schemaVersion": 2, "layers": layers, "config": {
                    "mediaType": "application/vnd.oci.image.config.v1+json",
                    "digest": digest, "size": size},
            }))
            .unwrap(),
        )
    }

    pub(crate) fn index(&self, manifests: serde_json::Value) {
        let index = serde_json::json!({"schemaVersion": 2, "manifests": manifests});
        std::fs::write(
            self.0.join("oci-layout"),
            r#"{"imageLayoutVersion":"1.0.0"}"#,
        )
        .unwrap();
        std::fs::write(self.0.join("index.json"), index.to_string()).unwrap();
    }

    /// A whole image with plain layers under the tag `latest`.
    pub(crate) fn simple(&self, layers: &[&[u8]]) {
        let config = self.config("linux", "amd64", layers);
        let typed: Vec<_> = layers.iter().map(|layer| (TAR, *layer)).collect();
        let (digest, size) = self.manifest(&config, &typed);
        self.index(serde_json::json!([{
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest,
            "size": size, "annotations": {"org.opencontainers.image.ref.name": "latest"}}]));
    }
}

pub(crate) const TAR: &str = "application/vnd.oci.image.layer.v1.tar";

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}
