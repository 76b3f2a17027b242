//! Imports that are cut short: by a kill, by a full disk. Whatever happens, a store holds whole
//! images only.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use skerry_oci::{Digest, Error, ImageRef, Store};

/// An image of one file of `size` bytes that don't compress.
fn image(dir: &Path, size: usize) -> ImageRef {
    let mut state = 1u64;
    let data: Vec<u8> = std::iter::repeat_with(|| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 56) as u8
    })
    .take(size)
    .collect();
    let mut header = tar::Header::new_gnu();
    header.set_size(size as u64);
    header.set_mode(0o644);
    let mut layer = tar::Builder::new(Vec::new());
    layer.append_data(&mut header, "data", &data[..]).unwrap();
    let layer = layer.into_inner().unwrap();
    let blobs = dir.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let blob = |bytes: &[u8]| {
        let digest = Digest::of(bytes);
        std::fs::write(blobs.join(digest.hex()), bytes).unwrap();
        digest.to_string()
    };
    let layer = blob(&layer);
    let config = blob(
        format!(r#"{{"os":"linux","architecture":"amd64","rootfs":{{"diff_ids":["{layer}"]}}}}"#)
            .as_bytes(),
    );
    let manifest = blob(
        format!(r#"{{"config":{{"digest":"{config}"}},"layers":[{{"digest":"{layer}"}}]}}"#)
            .as_bytes(),
    );
    let index = format!(r#"{{"manifests":[{{"digest":"{manifest}"}}]}}"#);
    std::fs::write(dir.join("index.json"), index).unwrap();
    ImageRef::OciLayout {
        dir: dir.to_owned(),
        tag: None,
    }
}

fn entries(path: PathBuf) -> usize {
    std::fs::read_dir(path).map_or(0, Iterator::count)
}

const CHILD: &str = "SKERRY_TEST_CHILD";

/// Not a test of its own: what the next one starts and kills.
#[test]
fn child() {
    if let Ok(args) = std::env::var(CHILD) {
        let (store, image) = args.split_once('\n').unwrap();
        Store::open(store)
            .unwrap()
            .import(&image.parse().unwrap(), &mut |_| ())
            .unwrap();
    }
}

#[test]
fn killed_in_the_middle() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("store");
    let image = image(&dir.path().join("layout"), 96 << 20);
    Store::open(&root).unwrap();
    let mut caught = 0;
    // At several moments: with nothing written yet, amid unpacking, amid writing.
    for delay in [0, 20, 60, 120] {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child"])
            .env(CHILD, format!("{}\n{image}", root.display()))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let start = Instant::now();
        while entries(root.join("tmp")) == 0 && child.try_wait().unwrap().is_none() {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "the import doesn't begin"
            );
            std::thread::sleep(Duration::from_micros(200));
        }
        std::thread::sleep(Duration::from_millis(delay));
        child.kill().unwrap();
        child.wait().unwrap();
        if entries(root.join("images")) > 0 {
            break; // It was quicker than we.
        }
        caught += 1;
        let store = Store::open(&root).unwrap();
        assert_eq!(entries(root.join("tmp")), 0, "swept");
        let listing = store.list().unwrap();
        assert!(listing.images.is_empty() && listing.damaged.is_empty());
    }
    assert!(caught > 0, "no import was caught in the middle");
    let store = Store::open(&root).unwrap();
    let image = store.import(&image, &mut |_| ()).unwrap();
    store.verify(&image).unwrap();
}

/// A small file system of its own, where this process may mount one.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn new(path: PathBuf, size: &str) -> Option<Self> {
        std::fs::create_dir(&path).unwrap();
        let size = format!("size={size}");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&path);
        let mount = mount.stderr(Stdio::null()).status();
        mount
            .is_ok_and(|status| status.success())
            .then_some(SmallDisk(path))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn the_disk_is_full() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(&dir.path().join("layout"), 12 << 20);
    // Too small for the data; then for the data a second time, in the image.
    for size in ["8m", "20m"] {
        let Some(disk) = SmallDisk::new(dir.path().join(size), size) else {
            println!("skipped: this process can't mount a tmpfs");
            return;
        };
        let root = disk.0.join("store");
        let store = Store::open(&root).unwrap();
        let error = store.import(&image, &mut |_| ()).unwrap_err();
        assert!(matches!(error, Error::StoreFull { .. }), "{error}");
        assert!(
            error.to_string().contains(&root.display().to_string()),
            "{error}"
        );
        assert_eq!(
            (entries(root.join("tmp")), entries(root.join("images"))),
            (0, 0)
        );
        let remount = Command::new("mount")
            .args(["-o", "remount,size=64m"])
            .arg(&disk.0)
            .status();
        assert!(remount.unwrap().success());
        let image = store.import(&image, &mut |_| ()).unwrap();
        store.verify(&image).unwrap();
    }
}
