use super::*;

fn file() -> Kind {
    Kind::File(FileData::Empty)
}

fn meta(mode: u16) -> Metadata {
    Metadata {
        mode,
        ..Metadata::default()
    }
}

/// All paths, directories with a slash behind them.
fn paths(tree: &Tree) -> Vec<String> {
    let mut found = Vec::new();
    let mut todo = vec![(Tree::ROOT, String::new())];
    while let Some((dir, path)) = todo.pop() {
        for (name, child) in tree.children(dir).unwrap() {
            let path = format!("{path}{}", String::from_utf8_lossy(name));
            if tree.children(child.node).is_some() {
                found.push(format!("{path}/"));
                todo.push((child.node, format!("{path}/")));
            } else {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn mode_of(tree: &mut Tree, path: &str) -> u16 {
    let parts = components(path.as_bytes()).unwrap();
    let (name, parents) = parts.split_last().unwrap();
    let dir = tree
        .directory(path.as_bytes(), parents, false)
        .unwrap()
        .unwrap();
    tree.node(tree.lookup(dir, name).unwrap()).meta.mode
}

#[test]
fn names_that_are_refused() {
    let mut tree = Tree::new();
    let mut put = |path: &[u8]| tree.put(path, meta(0), file());
    assert!(matches!(put(b"a/../b"), Err(TreeError::Escapes(_))));
    assert!(matches!(put(b".."), Err(TreeError::Escapes(_))));
    assert!(matches!(put(b""), Err(TreeError::BadName(_))));
    assert!(matches!(put(b"a\0b"), Err(TreeError::BadName(_))));
    assert!(matches!(put(&[b'a'; 256]), Err(TreeError::BadName(_))));
    assert!(matches!(put(&[b'/'; 4096]), Err(TreeError::BadName(_))));
    assert!(matches!(put(b"./"), Err(TreeError::Root(_))));
    put(&[b'a'; 255]).unwrap();
    put(b"//x/./y/").unwrap();
    assert!(paths(&tree).contains(&"x/y".to_owned()));
}

#[test]
fn files_and_directories_replace_each_other() {
    let mut tree = Tree::new();
    tree.begin_layer();
    tree.put(b"a/b/c", meta(1), file()).unwrap();
    tree.put(b"d", meta(1), file()).unwrap();
    tree.begin_layer();
    tree.put(b"a", meta(2), file()).unwrap();
    tree.put_directory(b"d", meta(2)).unwrap();
    tree.put(b"d/e", meta(2), file()).unwrap();
    assert_eq!(paths(&tree), ["a", "d/", "d/e"]);
    let below = tree.put(b"a/x", meta(2), file());
    assert!(matches!(below, Err(TreeError::NotADirectory { .. })));
}

#[test]
fn a_directory_again_keeps_its_names_and_changes_its_mode() {
    let mut tree = Tree::new();
    tree.begin_layer();
    tree.put(b"a/b", meta(1), file()).unwrap();
    tree.begin_layer();
    tree.put_directory(b"a/", meta(0o700)).unwrap();
    assert_eq!(paths(&tree), ["a/", "a/b"]);
    assert_eq!(mode_of(&mut tree, "a"), 0o700);
}

#[test]
fn parents_are_followed_through_links_but_never_out() {
    let mut tree = Tree::new();
    tree.begin_layer();
    tree.put(b"lib", meta(0), Kind::Symlink((*b"usr/lib").into()))
        .unwrap();
    tree.put(b"up", meta(0), Kind::Symlink((*b"../../../usr").into()))
        .unwrap();
    tree.put(b"usr/abs", meta(0), Kind::Symlink((*b"/etc").into()))
        .unwrap();
    tree.put(b"lib/x", meta(0), file()).unwrap();
    tree.put(b"up/y", meta(0), file()).unwrap();
    tree.put(b"usr/abs/z", meta(0), file()).unwrap();
    let expected = [
        "etc/",
        "etc/z",
        "lib",
        "up",
        "usr/",
        "usr/abs",
        "usr/lib/",
        "usr/lib/x",
        "usr/y",
    ];
    assert_eq!(paths(&tree), expected);
    // The last part of a name is never followed.
    tree.put(b"lib", meta(0), file()).unwrap();
    assert!(paths(&tree).contains(&"usr/lib/x".to_owned()));
}

#[test]
fn links_in_a_circle_end() {
    let mut tree = Tree::new();
    tree.put(b"a", meta(0), Kind::Symlink((*b"b").into()))
        .unwrap();
    tree.put(b"b", meta(0), Kind::Symlink((*b"a").into()))
        .unwrap();
    assert!(matches!(
        tree.put(b"a/x", meta(0), file()),
        Err(TreeError::LinkLoop(_))
    ));
    // Each one doubles the way: it is the links that are counted.
    for i in 0..60 {
        let target = format!("l{0}/l{0}", i + 1);
        let name = format!("l{i}");
        tree.put(
            name.as_bytes(),
            meta(0),
            Kind::Symlink(target.as_bytes().into()),
        )
        .unwrap();
    }
    assert!(matches!(
        tree.put(b"l0/x", meta(0), file()),
        Err(TreeError::LinkLoop(_))
    ));
}

#[test]
fn hard_links() {
    let mut tree = Tree::new();
    tree.begin_layer();
    tree.put(b"a/f", meta(5), file()).unwrap();
    tree.begin_layer();
    tree.link(b"g", b"./a/f").unwrap();
    tree.put(b"a/f", meta(6), file()).unwrap();
    assert_eq!((mode_of(&mut tree, "g"), mode_of(&mut tree, "a/f")), (5, 6));
    assert!(matches!(
        tree.link(b"h", b"nope"),
        Err(TreeError::NoTarget { .. })
    ));
    assert!(matches!(
        tree.link(b"h", b"a"),
        Err(TreeError::LinkToDirectory { .. })
    ));
    assert!(matches!(
        tree.link(b"h", b"../f"),
        Err(TreeError::Escapes(_))
    ));
    assert!(matches!(tree.link(b"/", b"g"), Err(TreeError::Root(_))));
    // A name linked to itself is what it was.
    tree.link(b"g", b"g").unwrap();
    assert_eq!(mode_of(&mut tree, "g"), 5);
}

#[test]
fn whiteouts_hide_lower_layers_only_whatever_the_order() {
    for first in [true, false] {
        let mut tree = Tree::new();
        tree.begin_layer();
        tree.put_directory(b"d", meta(0o700)).unwrap();
        tree.put(b"d/old", meta(1), file()).unwrap();
        tree.put(b"d/sub/old", meta(1), file()).unwrap();
        tree.put(b"f", meta(1), file()).unwrap();
        tree.put(b"g", meta(1), file()).unwrap();
        tree.begin_layer();
        let whiteouts = |tree: &mut Tree| {
            for path in [&b"d"[..], b"f", b"g", b"none", b"no/ne", b"g/below"] {
                tree.whiteout(path).unwrap();
            }
        };
        if first {
            whiteouts(&mut tree);
        }
        tree.put(b"d/sub/new", meta(2), file()).unwrap();
        tree.put(b"f", meta(2), file()).unwrap();
        if !first {
            whiteouts(&mut tree);
        }
        assert_eq!(
            paths(&tree),
            ["d/", "d/sub/", "d/sub/new", "f"],
            "first: {first}"
        );
        assert_eq!(mode_of(&mut tree, "f"), 2);
        assert_eq!(
            mode_of(&mut tree, "d"),
            0o755,
            "nothing is left of the old directory"
        );
    }
}

#[test]
fn opaque_directories_show_the_current_layer_only() {
    let mut tree = Tree::new();
    tree.begin_layer();
    tree.put(b"d/old", meta(1), file()).unwrap();
    tree.put(b"d/s/old", meta(1), file()).unwrap();
    tree.begin_layer();
    tree.put_directory(b"d", meta(0o711)).unwrap();
    tree.put(b"d/s/new", meta(2), file()).unwrap();
    tree.opaque(b"d").unwrap();
    tree.opaque(b"none").unwrap();
    assert_eq!(paths(&tree), ["d/", "d/s/", "d/s/new"]);
    assert_eq!(mode_of(&mut tree, "d"), 0o711);
    tree.begin_layer();
    tree.put(b"top", meta(3), file()).unwrap();
    tree.opaque(b"").unwrap();
    assert_eq!(paths(&tree), ["top"]);
}
