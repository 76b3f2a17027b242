use super::*;
use crate::layer::LayerError;
use crate::testing::{Archive, Layout, TAR, gzip};
use serde_json::json;

fn files(dir: &tempfile::TempDir) -> Files {
    Files::directory("oci:x", dir.path()).unwrap()
}

fn image() -> (tempfile::TempDir, Vec<u8>) {
    (
        tempfile::tempdir().unwrap(),
        Archive::default().file("a", b"1").end(),
    )
}

fn with_annotation(digest: &str, name: &str) -> serde_json::Value {
    json!({"digest": digest, "size": 1, "annotations": {"org.opencontainers.image.ref.name": name}})
}

#[test]
fn a_plain_image() {
    let (dir, layer) = image();
    Layout(dir.path()).simple(&[&layer]);
    for tag in [None, Some("latest")] {
        let resolved = resolve_oci(&files(&dir), tag).unwrap();
        assert_eq!(resolved.config.config.cmd, ["/bin/x"]);
        assert_eq!(resolved.layers.len(), 1);
        assert_eq!(resolved.layers[0].diff_id, Digest::of(&layer));
        files(&dir).open_layer(&resolved.layers[0]).unwrap();
    }
    let error = resolve_oci(&files(&dir), Some("v2")).unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("no such tag; its tags are: latest"),
        "{error}"
    );
}

#[test]
fn the_right_platform_of_several() {
    let (dir, layer) = image();
    let layout = Layout(dir.path());
    let manifest = |os: &str, arch: &str| {
        layout
            .manifest(&layout.config(os, arch, &[&layer]), &[(TAR, &layer)])
            .0
    };
    let (amd, arm) = (manifest("linux", "amd64"), manifest("linux", "arm64"));
    let windows = manifest("windows", "amd64");
    let platform = |digest: &str, os: &str, arch: &str| json!({"digest": digest, "size": 1, "platform": {"os": os, "architecture": arch}});
    // In an index of its own, attestation and others first.
    let inner = json!({"manifests": [
        platform(&arm, "unknown", "unknown"), platform(&arm, "linux", "arm64"),
        platform(&windows, "windows", "amd64"), platform(&amd, "linux", "amd64")]});
    let (inner, _) = layout.blob(inner.to_string().as_bytes());
    layout.index(json!([with_annotation(&inner, "docker.io/library/x:1.0")]));
    for tag in [None, Some("1.0"), Some("docker.io/library/x:1.0")] {
        let resolved = resolve_oci(&files(&dir), tag).unwrap();
        assert_eq!(resolved.config.architecture, "amd64");
    }
    // Descriptors without a platform: the configurations tell.
    let bare = |digest: &str| json!({"digest": digest, "size": 1});
    layout.index(json!([bare(&arm), bare(&windows), bare(&amd)]));
    assert_eq!(resolve_oci(&files(&dir), None).unwrap().config.os, "linux");
    // None of ours.
    layout.index(json!([platform(&arm, "linux", "arm64"), bare(&windows)]));
    let error = resolve_oci(&files(&dir), None).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("for linux/arm64, windows/amd64;"),
        "{error}"
    );
}

#[test]
fn tags_that_leave_a_choice() {
    let (dir, layer) = image();
    let layout = Layout(dir.path());
    let config = layout.config("linux", "amd64", &[&layer]);
    let (digest, _) = layout.manifest(&config, &[(TAR, &layer)]);
    let other = layout.config("linux", "amd64", &[&layer, &layer]);
    let (second, _) = layout.manifest(&other, &[(TAR, &layer), (TAR, &layer)]);
    let named = with_annotation;
    layout.index(json!([named(&digest, "a"), named(&second, "b")]));
    let error = resolve_oci(&files(&dir), None).unwrap_err();
    assert!(
        error.to_string().ends_with("as `:TAG`; its tags are: a, b"),
        "{error}"
    );
    let found = resolve_oci(&files(&dir), Some("b")).unwrap();
    assert_eq!(found.digest, Digest::of(&other));
    layout.index(json!([named(&second, "a"), named(&digest, "latest")]));
    assert_eq!(
        resolve_oci(&files(&dir), None).unwrap().digest,
        Digest::of(&config)
    );
    // One image under two names leaves no choice.
    layout.index(json!([named(&digest, "a"), named(&digest, "b")]));
    resolve_oci(&files(&dir), None).unwrap();
    let annotations = json!({"org.opencontainers.image.ref.name": "1",
        "io.containerd.image.name": "docker.io/library/x:1"});
    layout.index(json!([{"digest": digest, "size": 1, "annotations": annotations}]));
    resolve_oci(&files(&dir), None).unwrap();
}

#[test]
fn what_is_missing_is_named() {
    let (dir, layer) = image();
    let error = resolve_oci(&files(&dir), None).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("lacks 'index.json'; is it an OCI image layout?"),
        "{error}"
    );
    Layout(dir.path()).simple(&[&layer]);
    let resolved = resolve_oci(&files(&dir), None).unwrap();
    let blob = dir.path().join(&resolved.layers[0].file);
    std::fs::remove_file(&blob).unwrap();
    let error = files(&dir).open_layer(&resolved.layers[0]).err().unwrap();
    assert!(matches!(error, Error::MissingPart { .. }), "{error}");
    std::fs::create_dir(&blob).unwrap();
    let error = files(&dir).open_layer(&resolved.layers[0]).err().unwrap();
    assert!(matches!(error, Error::Source { .. }), "{error}");
    assert!(Files::directory("oci:x", &dir.path().join("none")).is_err());
    assert!(Files::directory("oci:x", &dir.path().join("index.json")).is_err());
}

#[test]
fn every_blob_is_checked() {
    let (dir, layer) = image();
    Layout(dir.path()).simple(&[&layer]);
    let blobs = dir.path().join("blobs/sha256");
    for entry in std::fs::read_dir(&blobs).unwrap() {
        let path = entry.unwrap().path();
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, [&whole[..], b" "].concat()).unwrap();
        let error = resolve_oci(&files(&dir), None)
            .and_then(|resolved| files(&dir).open_layer(&resolved.layers[0]))
            .err()
            .unwrap();
        assert!(matches!(error, Error::Mismatch { .. }), "{error}");
        let hex = path.file_name().unwrap().to_str().unwrap().to_owned();
        assert!(error.to_string().contains(&hex), "{error}");
        std::fs::write(&path, whole).unwrap();
    }
}

#[test]
fn malformed_documents() {
    let (dir, layer) = image();
    let layout = Layout(dir.path());
    let config = layout.config("linux", "amd64", &[&layer]);
    let error = |index: serde_json::Value| {
        layout.index(index);
        resolve_oci(&files(&dir), None).unwrap_err()
    };
    assert!(matches!(
        error(json!([{"digest": "../../x", "size": 1}])),
        Error::Digest { .. }
    ));
    assert!(matches!(
        error(json!([{"digest": "sha512:00", "size": 1}])),
        Error::Digest { .. }
    ));
    assert!(matches!(error(json!([])), Error::Platform { .. }));
    assert!(matches!(
        error(json!([{"size": 1}])),
        Error::Document { .. }
    ));
    let indirect = |layout: &Layout<'_>, document: &[u8]| {
        let (digest, _) = layout.blob(document);
        json!([{"digest": digest, "size": 1}])
    };
    assert!(matches!(
        error(indirect(&layout, b"{}")),
        Error::MediaType { .. }
    ));
    assert!(matches!(
        error(indirect(&layout, b"[")),
        Error::Document { .. }
    ));
    let schema1 = error(indirect(&layout, br#"{"fsLayers": [], "name": "x"}"#));
    assert!(schema1.to_string().contains("schema 1"), "{schema1}");

    // An index within an index within an index, and so on.
    let mut inner = layout.manifest(&config, &[(TAR, &layer)]).0;
    for _ in 0..6 {
        let index = json!({"manifests": [{"digest": inner, "size": 1}]});
        inner = layout.blob(index.to_string().as_bytes()).0;
    }
    assert!(matches!(
        error(json!([{"digest": inner, "size": 1}])),
        Error::MediaType { .. }
    ));

    let wasm = layout.manifest(&config, &[("application/wasm", &layer)]).0;
    let refused = error(json!([{"digest": wasm, "size": 1}]));
    assert!(
        refused
            .to_string()
            .contains("layer of the type 'application/wasm'"),
        "{refused}"
    );
    let two = layout.manifest(&config, &[(TAR, &layer), (TAR, &layer)]).0;
    let refused = error(json!([{"digest": two, "size": 1}]));
    assert!(
        matches!(
            refused,
            Error::LayerCount {
                layers: 2,
                diff_ids: 1,
                ..
            }
        ),
        "{refused}"
    );

    std::fs::write(dir.path().join("index.json"), vec![b' '; 9 << 20]).unwrap();
    let refused = resolve_oci(&files(&dir), None).unwrap_err();
    assert!(matches!(refused, Error::DocumentSize { .. }), "{refused}");
}

#[test]
fn layer_types() {
    let is = |suffix: &str| layer_compression(&format!("{TAR}{suffix}"));
    assert_eq!(is(""), Some(None));
    assert_eq!(is("+gzip"), Some(Some(Compression::Gzip)));
    assert_eq!(is("+zstd"), Some(Some(Compression::Zstd)));
    assert_eq!(is("+encrypted"), None);
    let docker = "application/vnd.docker.image.rootfs.diff.tar.gzip";
    assert_eq!(layer_compression(docker), Some(Some(Compression::Gzip)));
}

/// What `docker save` writes: the newer form with blobs, or the older with a directory per layer.
fn docker_archive(config: &[u8], layer: &[u8], newer: bool) -> Vec<u8> {
    let hex = Digest::of(config).hex();
    let (config_name, layer_name) = if newer {
        (
            format!("blobs/sha256/{hex}"),
            format!("blobs/sha256/{}", Digest::of(layer).hex()),
        )
    } else {
        (format!("{hex}.json"), "0123/layer.tar".to_owned())
    };
    let manifest = json!([{"Config": config_name, "RepoTags": ["x:latest", "x:1"], "Layers":
        [layer_name, if newer { layer_name.clone() } else { "4567/layer.tar".to_owned() }]}]);
    let archive = Archive::default().file(&layer_name, layer);
    let archive = if newer {
        archive
    } else {
        archive.symlink("4567/layer.tar", "../0123/layer.tar")
    };
    archive
        .file(&config_name, config)
        .file("manifest.json", manifest.to_string().as_bytes())
        .file("index.json", b"{}")
        .end()
}

#[test]
fn docker_archives_of_both_forms_compressed_or_not() {
    let (dir, layer) = image();
    let layout = Layout(dir.path());
    let config = layout.config("linux", "amd64", &[&layer, &layer]);
    let path = dir.path().join("x.tar");
    for newer in [true, false] {
        let archive = docker_archive(&config, &layer, newer);
        for bytes in [archive.clone(), gzip(&archive)] {
            std::fs::write(&path, bytes).unwrap();
            let files = Files::archive("docker-archive:x", &path, dir.path(), 1 << 20).unwrap();
            for tag in [None, Some("x"), Some("x:1"), Some("1")] {
                let resolved = resolve_docker(&files, tag).unwrap();
                assert_eq!(resolved.digest, Digest::of(&config));
                for layer_source in &resolved.layers {
                    let mut bytes = Vec::new();
                    let mut reader = files.open_layer(layer_source).unwrap();
                    reader.read_to_end(&mut bytes).unwrap();
                    assert_eq!(bytes, layer);
                }
            }
            assert!(matches!(
                resolve_docker(&files, Some("y")),
                Err(Error::Tag { .. })
            ));
        }
    }
    let bomb = Files::archive("x", &path, dir.path(), 1000).err().unwrap();
    assert!(
        matches!(
            bomb,
            Error::Unpack {
                source: LayerError::TooLarge { .. },
                ..
            }
        ),
        "{bomb}"
    );
}

#[test]
fn a_config_that_is_not_what_its_name_says() {
    let (dir, layer) = image();
    let config = Layout(dir.path()).config("linux", "amd64", &[&layer, &layer]);
    let archive = docker_archive(&config, &layer, false);
    let at = archive.windows(6).position(|w| w == b"/bin/x").unwrap();
    let mut archive = archive;
    archive[at] = b'!';
    let path = dir.path().join("x.tar");
    std::fs::write(&path, archive).unwrap();
    let files = Files::archive("docker-archive:x", &path, dir.path(), 1 << 20).unwrap();
    assert!(matches!(
        resolve_docker(&files, None),
        Err(Error::Mismatch { .. })
    ));
}

#[test]
fn archives_that_are_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.tar");
    let error = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        Files::archive("oci-archive:x", &path, dir.path(), 1 << 20).err()
    };
    assert!(matches!(error(&[b'x'; 2000]), Some(Error::Archive { .. })));
    assert!(matches!(error(b"short"), Some(Error::Archive { .. })));
    let cut = Archive::default().file("index.json", &[b' '; 5000]).end();
    assert!(matches!(error(&cut[..2000]), Some(Error::Archive { .. })));
    assert!(matches!(
        error(&gzip(&cut)[..50]),
        Some(Error::Unpack { .. })
    ));
    assert!(error(b"").is_none());
    let files = Files::archive("oci-archive:x", &path, dir.path(), 1 << 20).unwrap();
    let error = resolve_oci(&files, None).unwrap_err();
    assert!(matches!(error, Error::MissingPart { .. }), "{error}");
    assert!(Files::archive("x", dir.path(), dir.path(), 1).is_err());
    assert!(Files::archive("x", &dir.path().join("none"), dir.path(), 1).is_err());
}

#[test]
fn links_in_a_circle_are_missing_files() {
    let bytes = Archive::default()
        .symlink("index.json", "a")
        .symlink("a", "index.json")
        .end();
    let files = Files::embedded("x", Box::leak(bytes.into_boxed_slice())).unwrap();
    assert!(matches!(
        resolve_oci(&files, None),
        Err(Error::MissingPart { .. })
    ));
}
