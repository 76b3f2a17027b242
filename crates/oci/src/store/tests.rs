use super::*;
use crate::layer::LayerError;
use crate::testing::{Archive, Layout, list};
use std::os::unix::fs::FileExt;

struct Fixture {
    dir: tempfile::TempDir,
    image: ImageRef,
}

fn layer(content: &str) -> Vec<u8> {
    Archive::default()
        .file("etc/name", content.as_bytes())
        .end()
}

impl Fixture {
    /// A store, and beside it an image whose only file holds `content`.
    fn new(content: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layout = dir.path().join("layout");
        std::fs::create_dir(&layout).unwrap();
        Layout(&layout).simple(&[&layer(content)]);
        Fixture {
            dir,
            image: ImageRef::OciLayout {
                dir: layout,
                tag: None,
            },
        }
    }

    fn other(&self, name: &str) -> ImageRef {
        let layout = self.dir.path().join(name);
        std::fs::create_dir(&layout).unwrap();
        Layout(&layout).simple(&[&layer(name)]);
        ImageRef::OciLayout {
            dir: layout,
            tag: None,
        }
    }

    fn store(&self) -> Store {
        Store::open(self.dir.path().join("store")).unwrap()
    }

    fn count(&self, dir: &str) -> usize {
        std::fs::read_dir(self.dir.path().join("store").join(dir))
            .unwrap()
            .count()
    }
}

fn import(store: &Store, image: &ImageRef) -> Result<Image, Error> {
    store.import(image, &mut |_| ())
}

fn written(store: &Store, image: &ImageRef) -> usize {
    let mut writing = 0;
    store
        .import(image, &mut |p| {
            writing += usize::from(p == Progress::Writing)
        })
        .unwrap();
    writing
}

#[test]
fn an_image_is_converted_once_and_found_by_each_of_its_names() {
    let fixture = Fixture::new("one");
    let store = fixture.store();
    assert_eq!(written(&store, &fixture.image), 1);
    assert_eq!(written(&store, &fixture.image), 0);
    let image = import(&store, &fixture.image).unwrap();
    assert_eq!(image.config.cmd, ["/bin/x"]);
    assert_eq!(
        list(&File::open(&image.rootfs).unwrap())["/etc/name"].data,
        b"one"
    );
    store.verify(&image).unwrap();
    assert_eq!(image.names, [fixture.image.to_string()]);
    let hex = image.digest.hex();
    for name in [
        &fixture.image.to_string(),
        &hex,
        &hex[..6],
        &format!("sha256:{}", &hex[..6]),
    ] {
        assert_eq!(store.get(name).unwrap().digest, image.digest, "{name}");
    }
    store.tag(&hex, "mine:latest").unwrap();
    assert_eq!(store.get("mine").unwrap().names.len(), 2);
    assert_eq!(
        import(&store, &"mine".parse().unwrap()).unwrap().digest,
        image.digest
    );
    assert_eq!(fixture.count("tmp"), 0);
}

#[test]
fn the_same_layers_give_the_same_bytes() {
    let (one, two) = (Fixture::new("same"), Fixture::new("same"));
    let read = |fixture: &Fixture| {
        std::fs::read(import(&fixture.store(), &fixture.image).unwrap().rootfs).unwrap()
    };
    assert!(read(&one) == read(&two));
}

#[test]
fn embedded_archives() {
    let fixture = Fixture::new("x");
    let layout = fixture.dir.path().join("layout");
    let mut archive = tar::Builder::new(Vec::new());
    archive.append_dir_all(".", &layout).unwrap();
    let bytes: &'static [u8] = Box::leak(archive.into_inner().unwrap().into_boxed_slice());
    let store = fixture.store();
    let image = store.import_embedded("demo", bytes, &mut |_| ()).unwrap();
    assert_eq!(image.names, ["demo"]);
    assert_eq!(
        import(&store, &fixture.image).unwrap().digest,
        image.digest,
        "the same image"
    );
    let path = fixture.dir.path().join("x.tar");
    std::fs::write(&path, bytes).unwrap();
    let archive = ImageRef::OciArchive {
        path,
        tag: Some("latest".to_owned()),
    };
    assert_eq!(import(&store, &archive).unwrap().names.len(), 3);
}

#[test]
fn removing_names_and_images() {
    let fixture = Fixture::new("one");
    let store = fixture.store();
    let image = import(&store, &fixture.image).unwrap();
    let other = import(&store, &fixture.other("two")).unwrap();
    store.tag(&image.digest.hex(), "mine").unwrap();
    let open = File::open(&image.rootfs).unwrap();
    assert_eq!(
        store.remove("mine").unwrap(),
        Removed::Name("mine".to_owned())
    );
    assert!(matches!(store.get("mine"), Err(Error::NoSuchImage { .. })));
    let removed = store.remove(&fixture.image.to_string()).unwrap();
    assert_eq!(removed, Removed::Image(image.digest));
    assert_eq!(
        list(&open)["/etc/name"].data,
        b"one",
        "who has it open keeps it"
    );
    assert_eq!(fixture.count("tmp"), 0);
    assert_eq!(store.list().unwrap().images.len(), 1);
    store.tag(&other.digest.hex(), "a").unwrap();
    assert_eq!(
        store.remove(&other.digest.hex()[..12]).unwrap(),
        Removed::Image(other.digest)
    );
    assert!(store.list().unwrap().images.is_empty());
    assert!(store.names().unwrap().is_empty());
    assert!(matches!(store.remove("a"), Err(Error::NoSuchImage { .. })));
    assert!(matches!(store.remove(""), Err(Error::NoSuchImage { .. })));
}

#[test]
fn a_prefix_of_several_is_an_error() {
    let fixture = Fixture::new("one");
    let store = fixture.store();
    // Sixteen first digits: seventeen images have two with the same.
    for i in 0..17 {
        import(&store, &fixture.other(&format!("image{i}"))).unwrap();
    }
    let mut firsts = std::collections::BTreeMap::new();
    for digest in store.digests().unwrap() {
        *firsts.entry(digest.hex()[..1].to_owned()).or_insert(0) += 1;
    }
    let (first, _) = firsts.iter().find(|(_, count)| **count > 1).unwrap();
    for result in [store.get(first).err(), store.remove(first).err()] {
        assert!(matches!(result, Some(Error::Ambiguous { .. })));
    }
    assert_eq!(store.list().unwrap().images.len(), 17);
}

#[test]
fn damaged_entries_are_named_and_the_others_work() {
    let fixture = Fixture::new("one");
    let store = fixture.store();
    let image = import(&store, &fixture.image).unwrap();
    let good = import(&store, &fixture.other("two")).unwrap();
    let entry = image.rootfs.parent().unwrap();
    let record = std::fs::read(entry.join("image.json")).unwrap();
    let whole = std::fs::read(&image.rootfs).unwrap();
    let damages: [(&str, Option<&[u8]>); 6] = [
        ("image.json", Some(b"{}")),
        ("image.json", Some(b"")),
        ("image.json", None),
        ("rootfs.erofs", Some(&whole[..whole.len() - 4096])),
        ("rootfs.erofs", Some(&vec![0; whole.len()])),
        ("rootfs.erofs", None),
    ];
    for (name, bytes) in damages {
        match bytes {
            Some(bytes) => std::fs::write(entry.join(name), bytes).unwrap(),
            None => std::fs::remove_file(entry.join(name)).unwrap(),
        }
        let error = store.get(&image.digest.hex()).unwrap_err();
        assert!(error.to_string().contains(&image.digest.hex()), "{error}");
        let listing = store.list().unwrap();
        assert_eq!(listing.images[0].digest, good.digest);
        assert_eq!((listing.images.len(), listing.damaged.len()), (1, 1));
        std::fs::write(entry.join("image.json"), &record).unwrap();
        std::fs::write(&image.rootfs, &whole).unwrap();
    }
    // One byte inside: only reading everything shows it.
    File::options()
        .write(true)
        .open(&image.rootfs)
        .unwrap()
        .write_all_at(b"!", 4095)
        .unwrap();
    assert!(store.get(&image.digest.hex()).is_err() || store.verify(&image).is_err());
    std::fs::write(entry.join("image.json"), b"").unwrap();
    assert_eq!(written(&store, &fixture.image), 1, "an import mends it");
    store.verify(&image).unwrap();
    std::fs::write(entry.join("image.json"), b"").unwrap();
    assert_eq!(
        store.remove(&image.digest.hex()).unwrap(),
        Removed::Image(image.digest)
    );
}

#[test]
fn a_failed_import_leaves_nothing() {
    let fixture = Fixture::new("one");
    let store = fixture.store().with_limits(Limits {
        unpacked_bytes: 2,
        ..Limits::default()
    });
    let error = import(&store, &fixture.image).unwrap_err();
    let Error::Layer {
        number: 1,
        count: 1,
        source: LayerError::TooLarge { .. },
        ..
    } = error
    else {
        panic!("{error}");
    };
    assert_eq!((fixture.count("tmp"), fixture.count("images")), (0, 0));
    assert!(store.names().unwrap().is_empty());

    // The unpacked stream is not what the configuration says.
    let layout = fixture.dir.path().join("wrong");
    std::fs::create_dir(&layout).unwrap();
    let made = Layout(&layout);
    let config = made.config("linux", "amd64", &[b"another"]);
    let (digest, _) = made.manifest(&config, &[(crate::testing::TAR, &layer("x"))]);
    made.index(serde_json::json!([{"digest": digest, "size": 1}]));
    let error = import(
        &fixture.store(),
        &ImageRef::OciLayout {
            dir: layout,
            tag: None,
        },
    );
    assert!(matches!(error, Err(Error::Mismatch { .. })));
    assert_eq!((fixture.count("tmp"), fixture.count("images")), (0, 0));
}

#[test]
fn two_imports_at_once_convert_once() {
    let fixture = Fixture::new("one");
    let store = fixture.store();
    let lock = store
        .lock(
            &crate::manifest::resolve_oci(
                &Files::directory("x", &fixture.dir.path().join("layout")).unwrap(),
                None,
            )
            .unwrap()
            .digest
            .hex(),
        )
        .unwrap();
    let total = std::thread::scope(|scope| {
        let (sender, receiver) = std::sync::mpsc::channel();
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let (sender, fixture) = (sender.clone(), &fixture);
                scope.spawn(move || {
                    let mut writing = 0;
                    let mut progress = |p| {
                        if p == Progress::Waiting {
                            sender.send(()).unwrap();
                        }
                        writing += usize::from(p == Progress::Writing);
                    };
                    fixture
                        .store()
                        .import(&fixture.image, &mut progress)
                        .unwrap();
                    writing
                })
            })
            .collect();
        (0..4).for_each(|_| receiver.recv().unwrap());
        drop(lock);
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .sum::<usize>()
    });
    assert_eq!(total, 1);
}

#[test]
fn a_directory_is_read_each_time_and_leaves_nothing() {
    let fixture = Fixture::new("x");
    let store = fixture.store();
    let root = fixture.dir.path().join("root");
    std::fs::create_dir(&root).unwrap();
    let reference = ImageRef::Directory { dir: root.clone() };
    for content in ["one", "two"] {
        std::fs::write(root.join("f"), content).unwrap();
        let image = import(&store, &reference).unwrap();
        // Another process opens the store meanwhile, and sweeps.
        fixture.store();
        assert_eq!(
            list(&File::open(&image.rootfs).unwrap())["/f"].data,
            content.as_bytes()
        );
        let copy = image.clone();
        drop(image);
        assert!(copy.rootfs.exists());
        drop(copy);
        assert_eq!(fixture.count("tmp"), 0);
    }
    assert!(store.list().unwrap().images.is_empty());
    let missing = ImageRef::Directory {
        dir: root.join("none"),
    };
    assert!(matches!(
        import(&store, &missing),
        Err(Error::Source { .. })
    ));
    let file = ImageRef::Directory {
        dir: root.join("f"),
    };
    assert!(matches!(import(&store, &file), Err(Error::Source { .. })));
    assert_eq!(fixture.count("tmp"), 0);
}

#[test]
fn what_killed_processes_left_is_swept_but_not_what_others_work_on() {
    let fixture = Fixture::new("x");
    let store = fixture.store();
    let (dead, live) = (Digest::of(b"dead").hex(), Digest::of(b"live").hex());
    for hex in [&dead, &live] {
        std::fs::create_dir(store.tmp(hex)).unwrap();
        std::fs::write(store.tmp(hex).join("rootfs.erofs"), b"half").unwrap();
    }
    std::fs::write(store.tmp("dir-1-0.erofs"), b"dead").unwrap();
    std::fs::write(store.tmp("dir-1-1.erofs"), b"live").unwrap();
    let _work = store.lock(&live).unwrap();
    let _use = Lock::shared(&store.tmp("dir-1-1.erofs")).unwrap();
    fixture.store();
    let mut left = store.file_names("tmp").unwrap();
    left.sort();
    let mut expected = vec!["dir-1-1.erofs".to_owned(), live.clone()];
    expected.sort();
    assert_eq!(left, expected);
}

#[test]
fn stores_that_are_none() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("format"), "skerry-images-99\n").unwrap();
    let error = Store::open(dir.path()).unwrap_err();
    assert!(error.to_string().contains("'skerry-images-99'"), "{error}");
    std::fs::write(dir.path().join("file"), "").unwrap();
    let error = Store::open(dir.path().join("file/store")).unwrap_err();
    assert!(
        matches!(error, Error::Store { action: "make", .. }),
        "{error}"
    );
    let store = Store::open(dir.path().join("s")).unwrap();
    std::fs::write(dir.path().join("s/names.json"), "[").unwrap();
    let error = store.list().err().or_else(|| store.get("x").err()).unwrap();
    assert!(error.to_string().contains("names.json"), "{error}");
}

#[test]
fn an_unknown_name_says_what_there_is_to_do() {
    let fixture = Fixture::new("x");
    let error = import(&fixture.store(), &"debian".parse().unwrap()).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("no image 'debian' in the store; `skerry images`"),
        "{error}"
    );
}

#[test]
fn nobody_else_may_look_into_the_store() {
    use std::os::unix::fs::PermissionsExt;
    let fixture = Fixture::new("x");
    let store = fixture.store();
    for dir in ["", "images", "tmp"] {
        let mode = std::fs::metadata(store.root().join(dir))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o077, 0, "{dir}");
    }
}
