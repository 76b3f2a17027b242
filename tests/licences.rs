//! Every package that Skerry is built from has a licence that `deny.toml` allows, and none that it
//! bans is among them.

use std::collections::BTreeSet;
use std::process::Command;

/// The quoted strings of a list in `deny.toml`.
fn listed(text: &str, key: &str) -> BTreeSet<String> {
    let start = text.find(&format!("{key} = [")).expect(key);
    let list = text[start..].split(']').next().unwrap_or_default();
    list.split('"')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}

/// Whether an SPDX expression (AND binds tighter than OR; the old `/` is OR) can be met.
fn allowed(expression: &str, allow: &BTreeSet<String>) -> bool {
    let spaced = expression
        .replace('(', " ( ")
        .replace(')', " ) ")
        .replace('/', " OR ");
    let mut words: Vec<String> = Vec::new();
    for word in spaced.split_whitespace() {
        match words.last_mut() {
            // "X WITH exception" is one licence.
            Some(last) if word == "WITH" || last.ends_with(" WITH") => {
                last.push(' ');
                last.push_str(word);
            }
            _ => words.push(word.to_owned()),
        }
    }
    let mut words = words.into_iter().peekable();
    any(&mut words, allow)
}

type Words = std::iter::Peekable<std::vec::IntoIter<String>>;

fn any(words: &mut Words, allow: &BTreeSet<String>) -> bool {
    let mut met = all(words, allow);
    while words.next_if(|word| word == "OR").is_some() {
        met |= all(words, allow);
    }
    met
}

fn all(words: &mut Words, allow: &BTreeSet<String>) -> bool {
    let mut met = one(words, allow);
    while words.next_if(|word| word == "AND").is_some() {
        met &= one(words, allow);
    }
    met
}

fn one(words: &mut Words, allow: &BTreeSet<String>) -> bool {
    match words.next().as_deref() {
        Some("(") => {
            let met = any(words, allow);
            words.next();
            met
        }
        Some(licence) => allow.contains(licence),
        None => false,
    }
}

#[test]
fn expressions() {
    let allow = BTreeSet::from(["MIT".to_owned(), "A WITH x".to_owned()]);
    for (expression, met) in [
        ("MIT", true),
        ("GPL-3.0", false),
        ("GPL-3.0 OR MIT", true),
        ("GPL-3.0/MIT", true),
        ("GPL-3.0 AND MIT", false),
        ("(GPL-3.0 OR MIT) AND A WITH x", true),
        ("MIT OR GPL-3.0 AND B", true),
    ] {
        assert_eq!(allowed(expression, &allow), met, "{expression}");
    }
}

/// Packages that are compiled because another names them, and of which nothing is linked.
const NOT_LINKED: [&str; 1] = [
    // Rhai uses compact_str in its place, as guest/sandbox-rt/guests/script/Cargo.toml asks it to.
    "smartstring",
];

/// The packages of a workspace that may not be used, and how many there are.
fn refused(manifest: &str, deny: &str) -> (Vec<String>, usize) {
    let (allow, banned) = (listed(deny, "allow"), listed(deny, "deny"));
    assert!(allow.len() > 5 && banned.len() > 3);
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--locked"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .args(["--manifest-path", manifest])
        .output()
        .expect("cargo metadata");
    assert!(output.status.success());
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let mut refused = Vec::new();
    for package in packages {
        let name = package["name"].as_str().expect("name");
        let licence = package["license"].as_str().unwrap_or("none");
        let met = allowed(licence, &allow) || NOT_LINKED.contains(&name);
        if !met || banned.contains(name) {
            refused.push(format!("{name}: {licence}"));
        }
    }
    (refused, packages.len())
}

#[test]
fn all_packages_may_be_used() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
    let deny = std::fs::read_to_string(format!("{root}/deny.toml")).expect("deny.toml");
    // The guests of function sandboxes are a workspace of their own, and some are part of the programs.
    for (manifest, least) in [("Cargo.toml", 50), ("guest/sandbox-rt/Cargo.toml", 20)] {
        let (refused, count) = refused(&format!("{root}/{manifest}"), &deny);
        assert!(count > least, "{manifest}: {count}");
        assert!(refused.is_empty(), "{manifest}: {refused:#?}");
    }
}
