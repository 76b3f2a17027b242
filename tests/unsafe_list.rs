//! The book lists every module with `unsafe` code, and why it needs it: this compares the list with
//! the sources. `SKERRY_BLESS=1 cargo test -p skerry --test unsafe_list` writes it anew.

use std::fs;
use std::path::{Path, PathBuf};

const HEAD: &str = "# Where `unsafe` is\n\n\
    `unsafe_code` is denied for the whole workspace; these modules opt in, each for a reason of its \
    own, and every block in them says why it is sound. A test compares this page with the sources.\n\n\
    | module | why |\n|---|---|\n";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            if !path.ends_with("target") {
                sources(&path, found);
            }
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// The reason that a file gives for its `unsafe`, from `expect(unsafe_code, reason = "…")`.
fn reason(text: &str) -> Option<String> {
    let at = text.find("unsafe_code")?;
    let rest = text.get(at..)?;
    let start = rest.find("reason = \"")? + "reason = \"".len();
    let rest = rest.get(start..)?;
    let end = rest.find('"')?;
    let words: Vec<_> = rest.get(..end)?.split_whitespace().collect();
    Some(words.join(" ").replace(" \\ ", " "))
}

fn list() -> String {
    let mut files = Vec::new();
    for folder in ["crates", "guest", "benches"] {
        sources(&root().join(folder), &mut files);
    }
    files.sort();
    let mut text = HEAD.to_owned();
    for path in files {
        let source = fs::read_to_string(&path).expect("a source file");
        // What a line says, without its comments.
        let has_unsafe = source
            .lines()
            .map(|line| line.split("//").next().unwrap_or(line))
            .any(|line| line.contains("unsafe ") && !line.contains("unsafe_code"));
        if !has_unsafe {
            continue;
        }
        let name = path.strip_prefix(root()).expect("below the root");
        let reason = reason(&source)
            .or_else(|| inherited(&path))
            .or_else(|| of_a_guest(name))
            .unwrap_or_else(|| panic!("{} has unsafe code without a reason", name.display()));
        text += &format!("| `{}` | {reason} |\n", name.display());
    }
    text
}

/// A module inside another that opted in: `x/tests.rs` under `x.rs`, or a folder's `mod.rs`.
fn inherited(path: &Path) -> Option<String> {
    let folder = path.parent()?;
    [folder.with_extension("rs"), folder.join("mod.rs")]
        .iter()
        .filter(|above| above.as_path() != path)
        .find_map(|above| reason(&fs::read_to_string(above).ok()?))
}

/// Programs that run in a function sandbox, and their runtime: a workspace of its own, whose lints don't
/// ask for a reason.
fn of_a_guest(name: &Path) -> Option<String> {
    let guest = name.starts_with("guest/sandbox-rt");
    guest.then(|| "inside a function sandbox: the virtual machine holds it".to_owned())
}

#[test]
fn the_book_lists_every_module_with_unsafe_code() {
    let path = root().join("docs/src/unsafe.md");
    let text = list();
    if std::env::var_os("SKERRY_BLESS").is_some() {
        fs::write(&path, &text).expect("the book");
    }
    let book = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        book == text,
        "docs/src/unsafe.md is not what the sources say; read the difference, then run with \
         SKERRY_BLESS=1.\n{text}"
    );
}
