use std::os::unix::fs::MetadataExt;

use super::*;
use crate::manifest::{Part, part};
use crate::testing::{Archive, Layout, TAR, gzip};
use crate::{Image, ImageRef};

fn layer(content: &str) -> Vec<u8> {
    Archive::default().file("name", content.as_bytes()).end()
}

struct Fixture {
    dir: tempfile::TempDir,
    store: Store,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().join("store")).unwrap();
        Fixture { dir, store }
    }

    /// Imports an image of these layers.
    fn image(&self, name: &str, layers: &[&[u8]]) -> Image {
        let layout = self.dir.path().join(name);
        std::fs::create_dir(&layout).unwrap();
        Layout(&layout).simple(layers);
        let image = ImageRef::OciLayout {
            dir: layout,
            tag: None,
        };
        self.store.import(&image, &mut |_| ()).unwrap()
    }

    fn blob(&self, image: &Image, content: &[u8]) -> PathBuf {
        let source = self.store.source(&image.digest);
        source.join(blob(&Digest::of(content)))
    }
}

#[test]
fn an_image_keeps_what_it_was_made_from() {
    let fixture = Fixture::new();
    let layer = layer("one");
    let image = fixture.image("one", &[&layer]);
    assert_eq!(std::fs::read(fixture.blob(&image, &layer)).unwrap(), layer);
    let manifest = fixture.store.manifest(&image.digest).unwrap().unwrap();
    let Part::Image(parts) = part(&manifest) else {
        panic!("no manifest");
    };
    let digests: Vec<_> = parts.iter().map(|(digest, _)| *digest).collect();
    assert_eq!(digests, [image.digest, Digest::of(&layer)]);
    // And the archive of it is the layout again.
    let mut archive = Vec::new();
    let name = image.digest.to_string();
    fixture.store.save(&[name], &mut archive).unwrap();
    let path = fixture.dir.path().join("saved.tar");
    std::fs::write(&path, archive).unwrap();
    let again = Fixture::new();
    let loaded = again.store.load_archive(&path, &mut |_| ()).unwrap();
    assert_eq!((loaded[0].digest, &loaded[0].name), (image.digest, &None));
    let copied = again.store.manifest(&image.digest).unwrap();
    assert_eq!(copied, Some(manifest));
}

#[test]
fn images_share_their_layers() {
    let fixture = Fixture::new();
    let (common, own) = (layer("common"), layer("own"));
    let one = fixture.image("one", &[&common]);
    // A layer may be in an image twice.
    let two = fixture.image("two", &[&common, &own, &common]);
    let inode = |image: &Image| {
        let metadata = std::fs::metadata(fixture.blob(image, &common)).unwrap();
        (metadata.ino(), metadata.nlink())
    };
    assert_eq!(inode(&one), inode(&two));
    assert_eq!(inode(&one).1, 2);
    fixture.store.remove(&one.digest.hex()).unwrap();
    assert_eq!(inode(&two).1, 1);
    let found = fixture.store.find_blob(&Digest::of(&common)).unwrap();
    assert!(found.is_some());
    // A damaged one is not found.
    std::fs::write(fixture.blob(&two, &common), b"damage").unwrap();
    let found = fixture.store.find_blob(&Digest::of(&common)).unwrap();
    assert!(found.is_none());
}

#[test]
fn a_file_of_somebody_else_is_copied() {
    let fixture = Fixture::new();
    let layer = layer("one");
    let image = fixture.image("one", &[&layer]);
    let theirs = fixture
        .dir
        .path()
        .join("one")
        .join(blob(&Digest::of(&layer)));
    std::fs::write(theirs, b"written over").unwrap();
    assert_eq!(std::fs::read(fixture.blob(&image, &layer)).unwrap(), layer);
}

#[test]
fn an_archive_of_dockers_gets_a_manifest() {
    let fixture = Fixture::new();
    let (plain, packed) = (layer("plain"), layer("packed"));
    let zipped = gzip(&packed);
    let config = Layout(fixture.dir.path()).config("linux", "amd64", &[&plain, &packed]);
    let manifest = r#"[{"Config":"c.json","RepoTags":["app:1"],"Layers":["a/layer.tar","b.tar"]}]"#;
    let archive = Archive::default()
        .file("manifest.json", manifest.as_bytes())
        .raw(b'0', b"c.json", b"", &config)
        .raw(b'0', b"a/layer.tar", b"", &plain)
        .raw(b'0', b"b.tar", b"", &zipped)
        .end();
    let path = fixture.dir.path().join("docker.tar");
    std::fs::write(&path, archive).unwrap();
    let loaded = fixture.store.load_archive(&path, &mut |_| ()).unwrap();
    let name = "docker.io/library/app:1";
    assert_eq!(loaded[0].name.as_deref(), Some(name));
    let manifest = fixture.store.manifest(&loaded[0].digest).unwrap().unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let layers: Vec<_> = manifest["layers"].as_array().unwrap().iter().collect();
    assert_eq!(layers[0]["mediaType"], TAR);
    assert_eq!(layers[1]["mediaType"], format!("{TAR}+gzip"));
    assert_eq!(layers[1]["digest"], Digest::of(&zipped).to_string());
    assert_eq!(layers[1]["size"], zipped.len());
    // It is found as people write it.
    for name in ["app:1", name] {
        assert_eq!(fixture.store.get(name).unwrap().digest, loaded[0].digest);
    }
    fixture.store.remove("app:1").unwrap();
    assert!(fixture.store.list().unwrap().images.is_empty());
}

#[test]
fn what_nobody_goes_on_with_is_swept() {
    let fixture = Fixture::new();
    let downloads = fixture.store.root().join(DOWNLOADS);
    let path = |text: &str, suffix: &str| {
        let path = downloads.join(format!("{}{suffix}", Digest::of(text.as_bytes()).hex()));
        std::fs::write(&path, text).unwrap();
        path
    };
    let (old, fresh, other) = (path("a", ".part"), path("b", ""), downloads.join("other"));
    std::fs::write(&other, "").unwrap();
    let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(8 * 24 * 3600);
    let file = File::options().write(true).open(&old).unwrap();
    file.set_modified(long_ago).unwrap();
    let store = Store::open(fixture.store.root()).unwrap();
    assert!(!old.exists() && fresh.exists());
    // Not while somebody receives it.
    let lock = store.lock(&format!("blob-{}", Digest::of(b"b").hex()));
    store.prune(|_| false).unwrap();
    assert!(fresh.exists());
    drop(lock);
    store.prune(|_| false).unwrap();
    assert!(!fresh.exists() && other.exists());
}
