use super::*;
use crate::erofs::InodeKind;
use crate::testing::{Archive, Listing, apply, apply_within, gzip, seal};
use proptest::prelude::*;
use std::collections::BTreeMap;

fn tar_error(archive: Vec<u8>) -> TarError {
    match apply(&[archive]) {
        Err(LayerError::Tar(error)) => error,
        other => panic!("{other:?}"),
    }
}

fn names(listing: &Listing) -> Vec<&str> {
    listing.keys().map(String::as_str).collect()
}

#[test]
fn every_kind_of_entry() {
    let layer = Archive::default()
        .dir("./")
        .file("./a", b"hello")
        .link("b", "a")
        .symlink("c", "a")
        .raw(b'3', b"tty", b"", b"")
        .raw(b'4', b"sda", b"", b"")
        .raw(b'6', b"pipe", b"", b"")
        .raw(b'7', b"contiguous", b"", b"x")
        .raw(0, b"old", b"", b"y")
        .raw(0, b"olddir/", b"", b"")
        .end();
    let seen = apply(&[layer]).unwrap();
    assert_eq!((&seen["/a"].data[..], seen["/a"].links), (&b"hello"[..], 2));
    assert_eq!(seen["/a"], seen["/b"]);
    assert_eq!(
        (seen["/c"].kind, &seen["/c"].data[..]),
        (InodeKind::Symlink, &b"a"[..])
    );
    assert_eq!(
        seen["/tty"].kind,
        InodeKind::CharDevice {
            major: 10,
            minor: 200
        }
    );
    assert_eq!(
        seen["/sda"].kind,
        InodeKind::BlockDevice {
            major: 10,
            minor: 200
        }
    );
    assert_eq!(seen["/pipe"].kind, InodeKind::Fifo);
    assert_eq!(seen["/contiguous"].data, b"x");
    assert_eq!(seen["/old"].data, b"y");
    assert_eq!(seen["/olddir"].kind, InodeKind::Directory);
}

#[test]
fn pax_attributes() {
    let long = "d/".repeat(100) + &"n".repeat(200);
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let layer = Archive::default()
        .pax(&[
            ("path", long.as_bytes()),
            ("uid", b"4000000000"),
            ("gid", b"70000"),
            ("mtime", b"-1.5"),
            ("SCHILY.xattr.user.k", b"v\n=\0"),
            ("SCHILY.xattr.security.capability", &capability),
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
            ("SCHILY.xattr.com.example", b"left out"),
        ])
        .file("short", b"x")
        .file("plain", b"y")
        .end();
    let seen = apply(&[layer]).unwrap();
    let file = &seen[&format!("/{long}")];
    assert_eq!((file.uid, file.gid), (4_000_000_000, 70_000));
    assert_eq!(file.mtime, (-2, 500_000_000));
    let xattrs: Vec<_> = file.xattrs.iter().map(|(n, v)| (&n[..], &v[..])).collect();
    assert_eq!(
        xattrs,
        [
            (&b"security.capability"[..], &capability[..]),
            (b"user.k", b"v\n=\0")
        ]
    );
    assert!(
        seen["/plain"].xattrs.is_empty(),
        "an extended header is for one entry"
    );
}

#[test]
fn gnu_long_names() {
    let (name, target) = ("n".repeat(150), "t/".repeat(100));
    let nul = |text: &str| [text.as_bytes(), b"\0"].concat();
    let layer = Archive::default()
        .raw(b'L', b"././@LongLink", b"", &nul(&name))
        .raw(b'K', b"././@LongLink", b"", &nul(&target))
        .symlink("short", "short")
        .end();
    let seen = apply(&[layer]).unwrap();
    assert_eq!(seen[&format!("/{name}")].data, target.as_bytes());
}

#[test]
fn sparse_files_of_all_formats() {
    let mut expected = vec![0; 5000];
    expected[512..1024].fill(b'a');
    expected[4096..4100].fill(b'b');
    let stored = [vec![b'a'; 512], vec![b'b'; 4]].concat();
    let pairs = [("512", "512"), ("4096", "4")];
    let pax00: Vec<(&str, &[u8])> = std::iter::once(("GNU.sparse.size", &b"5000"[..]))
        .chain(pairs.iter().flat_map(|(offset, len)| {
            [
                ("GNU.sparse.offset", offset.as_bytes()),
                ("GNU.sparse.numbytes", len.as_bytes()),
            ]
        }))
        .collect();
    let mut map = b"2\n512\n512\n4096\n4\n".to_vec();
    map.resize(512, 0);
    let layer = Archive::default()
        .pax(&pax00)
        .file("v00", &stored)
        .pax(&[
            ("GNU.sparse.size", b"5000"),
            ("GNU.sparse.map", b"512,512,4096,4"),
        ])
        .file("v01", &stored)
        .pax(&[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"v10"),
            ("GNU.sparse.realsize", b"5000"),
        ])
        .file("GNUSparseFile.1/v10", &[map, stored.clone()].concat());
    let mut old = Archive::default().raw(b'S', b"old", b"", &stored).0;
    let mut header: [u8; 512] = old[..512].try_into().unwrap();
    for (i, number) in [512, 512, 4096, 4].into_iter().enumerate() {
        header[386 + 12 * i..][..12].copy_from_slice(format!("{number:011o}\0").as_bytes());
    }
    header[483..495].copy_from_slice(format!("{:011o}\0", 5000).as_bytes());
    old[..512].copy_from_slice(&seal(header));
    let seen = apply(&[[layer.0, old, vec![0; 1024]].concat()]).unwrap();
    for name in ["/v00", "/v01", "/v10", "/old"] {
        assert!(seen[name].data == expected, "{name}");
    }
}

#[test]
fn hostile_sparse_maps() {
    for map in [
        "0,600",
        "512,512",
        "0,256,128,256",
        "18446744073709551615,512",
        "0",
        "x,y",
    ] {
        let pax = [
            ("GNU.sparse.size", &b"1000"[..]),
            ("GNU.sparse.map", map.as_bytes()),
        ];
        let error = tar_error(Archive::default().pax(&pax).file("f", &[1; 512]).end());
        assert!(
            matches!(error, TarError::Sparse { .. } | TarError::Pax { .. }),
            "{map}: {error}"
        );
    }
    let pax = [
        ("GNU.sparse.size", &b"9223372036854775807"[..]),
        ("GNU.sparse.map", b"0,512"),
    ];
    let huge = apply(&[Archive::default().pax(&pax).file("f", &[1; 512]).end()]);
    assert!(matches!(huge, Err(LayerError::TooLarge { .. })));
}

#[test]
fn damaged_archives() {
    let whole = Archive::default().file("a", &[1; 700]).end();
    assert!(matches!(
        tar_error(whole[..100].to_vec()),
        TarError::Truncated
    ));
    assert!(matches!(
        tar_error(whole[..600].to_vec()),
        TarError::Truncated
    ));
    // Only the end marker missing is what some writers do.
    apply(&[whole[..1536].to_vec()]).unwrap();
    let mut bad = whole.clone();
    bad[0] = b'b';
    assert!(matches!(tar_error(bad), TarError::Checksum { offset: 0 }));
    let unknown = Archive::default().raw(b'Z', b"z", b"", b"").end();
    assert!(matches!(
        tar_error(unknown),
        TarError::Type { kind: 'Z', .. }
    ));
    let dangling = Archive::default().pax(&[("path", b"x")]).0;
    assert!(matches!(tar_error(dangling), TarError::Truncated));
    let pax = Archive::default()
        .raw(b'x', b"p", b"", b"garbage")
        .file("a", b"")
        .end();
    assert!(matches!(tar_error(pax), TarError::Pax { .. }));
    let uid = Archive::default()
        .pax(&[("uid", b"99999999999")])
        .file("a", b"")
        .end();
    assert!(matches!(tar_error(uid), TarError::Pax { .. }));
}

#[test]
fn claims_of_size_cost_nothing() {
    let mut huge = Archive::default().raw(b'L', b"x", b"", b"").0;
    let mut header: [u8; 512] = huge[..512].try_into().unwrap();
    header[124..136].copy_from_slice(b"77777777777\0");
    huge[..512].copy_from_slice(&seal(header));
    assert!(matches!(tar_error(huge.clone()), TarError::Extended { .. }));
    header[156] = b'0';
    // 2^62 bytes in base 256.
    header[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0]);
    assert!(matches!(
        apply(&[seal(header).to_vec()]),
        Err(LayerError::TooLarge { .. })
    ));
}

#[test]
fn limits_name_themselves() {
    let small = Limits {
        unpacked_bytes: 1000,
        entries: 3,
        metadata_bytes: 10_000,
    };
    let two = Archive::default()
        .file("a", &[1; 600])
        .file("b", &[1; 600])
        .end();
    assert!(matches!(
        apply_within(&[two], small),
        Err(LayerError::TooLarge { limit: 1000 })
    ));
    let many = (0..4)
        .fold(Archive::default(), |a, i| a.file(&i.to_string(), b""))
        .end();
    assert!(matches!(
        apply_within(&[many], small),
        Err(LayerError::TooManyEntries { .. })
    ));
    let deep = Archive::default()
        .file(&"d/".repeat(45), b"")
        .file("x", b"")
        .end();
    assert!(matches!(
        apply_within(&[deep], small),
        Err(LayerError::TooMuchMetadata { .. })
    ));
    // Zeros behind the end of an archive aren't read for ever.
    let endless = std::io::repeat(0);
    let spool = SpoolWriter::new(&std::env::temp_dir()).unwrap();
    let limits = Limits {
        unpacked_bytes: 1,
        ..small
    };
    Unpacker::new(spool, limits).apply(endless).unwrap();
}

#[test]
fn whiteouts_in_archives() {
    let base = Archive::default()
        .file("keep", b"1")
        .file("gone", b"1")
        .file("d/a", b"1")
        .file("d/b", b"1")
        .file("e/a", b"1")
        .end();
    let top = Archive::default()
        .file(".wh.gone", b"")
        .file("d/c", b"2")
        .file("d/.wh..wh..opq", b"")
        .file("e/.wh.a", b"")
        .file(".wh..wh.plnk/1.2", b"")
        .file(".wh..wh.aufs", b"")
        .end();
    let seen = apply(&[base.clone(), top]).unwrap();
    assert_eq!(names(&seen), ["", "/d", "/d/c", "/e", "/keep"]);
    for bad in [".wh.", "d/.wh..", ".wh..."] {
        let layer = Archive::default().file(bad, b"").end();
        let result = apply(&[base.clone(), layer]);
        assert!(
            matches!(result, Err(LayerError::Tree(TreeError::Whiteout(_)))),
            "{bad}"
        );
    }
    let root = Archive::default()
        .file(".wh..wh..opq", b"")
        .file("x", b"")
        .end();
    assert_eq!(names(&apply(&[base, root]).unwrap()), ["", "/x"]);
}

#[test]
fn escapes_are_refused_by_name() {
    for name in ["../x", "a/../../x", "/../x", "a/.."] {
        let error = apply(&[Archive::default().file(name, b"").end()]).unwrap_err();
        assert!(error.to_string().contains(&format!("'{name}'")), "{error}");
    }
    let seen = apply(&[Archive::default().file("/abs/./x", b"").end()]).unwrap();
    assert_eq!(names(&seen), ["", "/abs", "/abs/x"]);
}

#[test]
fn link_targets() {
    let empty = apply(&[Archive::default().symlink("l", "").end()]);
    assert!(matches!(empty, Err(LayerError::LinkTarget { .. })));
    let layer = Archive::default()
        .pax(&[("linkpath", &[b'x'; 4096])])
        .symlink("l", "y")
        .end();
    assert!(matches!(
        apply(&[layer]),
        Err(LayerError::LinkTarget { .. })
    ));
}

#[test]
fn too_many_attributes() {
    let value = vec![b'v'; 60_000];
    let names: Vec<_> = (0..5).map(|i| format!("SCHILY.xattr.user.{i}")).collect();
    let records: Vec<_> = names
        .iter()
        .map(|name| (name.as_str(), &value[..]))
        .collect();
    let fits = apply(&[Archive::default()
        .pax(&records[..4])
        .file("f", b"data")
        .end()])
    .unwrap();
    assert_eq!(fits["/f"].xattrs.len(), 4);
    assert_eq!(fits["/f"].data, b"data");
    let layer = Archive::default().pax(&records).file("f", b"").end();
    assert!(matches!(
        apply(&[layer]),
        Err(LayerError::TooManyXattrs { .. })
    ));
}

fn unpack(bytes: &[u8], said: Option<Compression>) -> Result<Vec<u8>, LayerError> {
    let mut out = Vec::new();
    decompress(bytes, said)?
        .read_to_end(&mut out)
        .map_err(LayerError::Decompress)?;
    Ok(out)
}

#[test]
fn compressions_by_type_and_by_magic() {
    let text = b"some text that is long enough".repeat(100);
    let (gz, zst) = (gzip(&text), zstd::encode_all(&text[..], 1).unwrap());
    for said in [None, Some(Compression::Gzip), Some(Compression::Zstd)] {
        assert_eq!(unpack(&gz, said).unwrap(), text);
        assert_eq!(unpack(&zst, said).unwrap(), text);
    }
    assert_eq!(unpack(&text, None).unwrap(), text);
    let wrong = unpack(&text, Some(Compression::Gzip));
    assert!(matches!(wrong, Err(LayerError::Compression("gzip"))));
    assert_eq!(
        unpack(&[gz.clone(), gz.clone()].concat(), None)
            .unwrap()
            .len(),
        2 * text.len()
    );
    let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 9, 9][..], &zst].concat();
    assert_eq!(unpack(&skippable, None).unwrap(), text);
    assert!(unpack(&gz[..gz.len() / 2], None).is_err());
    assert!(unpack(&zst[..zst.len() / 2], None).is_err());
    assert_eq!(unpack(b"", None).unwrap(), b"");
}

/// What a layer may say about a small set of names.
#[derive(Debug, Clone)]
enum Say {
    File(usize, u8),
    Dir(usize),
    Whiteout(usize),
    Opaque(usize),
}

const PATHS: [&str; 9] = [
    "a", "b", "a/a", "a/b", "b/a", "a/a/a", "a/a/b", "a/b/a", "b/a/b",
];

fn says() -> impl Strategy<Value = Vec<Vec<Say>>> {
    let path = 0..PATHS.len();
    let say = prop_oneof![
        3 => (path.clone(), any::<u8>()).prop_map(|(p, v)| Say::File(p, v)),
        2 => path.clone().prop_map(Say::Dir),
        2 => path.clone().prop_map(Say::Whiteout),
        1 => path.prop_map(Say::Opaque),
    ];
    proptest::collection::vec(proptest::collection::vec(say, 0..6), 1..5)
}

/// The specification word for word: a layer's whiteouts act on what is below it, and come before
/// what the layer itself has. `None` for a directory.
type Model = BTreeMap<String, Option<u8>>;

fn remove_below(model: &mut Model, path: &str) {
    let prefix = format!("{path}/");
    model.retain(|name, _| !name.starts_with(&prefix));
}

fn model_layer(model: &mut Model, layer: &[Say]) -> bool {
    for say in layer {
        match say {
            Say::Whiteout(path) => {
                model.remove(PATHS[*path]);
                remove_below(model, PATHS[*path]);
            }
            Say::Opaque(path) => remove_below(model, PATHS[*path]),
            _ => {}
        }
    }
    for say in layer {
        let (path, value) = match say {
            Say::File(path, value) => (PATHS[*path], Some(*value)),
            Say::Dir(path) => (PATHS[*path], None),
            _ => continue,
        };
        let parents = path.match_indices('/').map(|(at, _)| &path[..at]);
        for parent in parents {
            if model.entry(parent.to_owned()).or_insert(None).is_some() {
                return false;
            }
        }
        if value.is_some() || model.get(path).is_some_and(Option::is_some) {
            remove_below(model, path);
        }
        model.insert(path.to_owned(), value);
    }
    true
}

fn archive_of(layer: &[Say]) -> Vec<u8> {
    let whiteout = |path: &str, name: &str| match path.rsplit_once('/') {
        Some((dir, _)) => format!("{dir}/{name}"),
        None => name.to_owned(),
    };
    layer
        .iter()
        .fold(Archive::default(), |archive, say| match say {
            Say::File(path, value) => archive.file(PATHS[*path], &[*value]),
            Say::Dir(path) => archive.dir(PATHS[*path]),
            Say::Whiteout(path) => {
                let last = PATHS[*path].rsplit('/').next().unwrap();
                archive.file(&whiteout(PATHS[*path], &format!(".wh.{last}")), b"")
            }
            Say::Opaque(path) => archive.file(&format!("{}/.wh..wh..opq", PATHS[*path]), b""),
        })
        .end()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn layers_merge_as_the_specification_says(mut layers in says(), last in any::<bool>()) {
        for layer in &mut layers {
            // Whiteouts all first or all last: it must not matter.
            layer.sort_by_key(|s| matches!(s, Say::Whiteout(_) | Say::Opaque(_)) == last);
        }
        let mut model = Model::new();
        let sound = layers.iter().all(|layer| model_layer(&mut model, layer));
        let archives: Vec<_> = layers.iter().map(|layer| archive_of(layer)).collect();
        match apply(&archives) {
            Ok(seen) => {
                let seen: Model = seen
                    .into_iter()
                    .filter(|(path, _)| !path.is_empty())
                    .map(|(path, seen)| {
                        let data = seen.data.first().copied();
                        (path[1..].to_owned(), data)
                    })
                    .collect();
                prop_assert!(sound);
                prop_assert_eq!(seen, model);
            }
            // A name below what is a file then can't be: with whiteouts last it may be one that
            // they would have removed.
            Err(LayerError::Tree(TreeError::NotADirectory { .. })) => prop_assert!(!sound || last),
            Err(error) => return Err(TestCaseError::fail(error.to_string())),
        }
    }
}
