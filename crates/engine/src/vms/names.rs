//! Names of virtual machines.

use crate::EngineError;

/// The longest name.
const LONGEST: usize = 64;

/// Words of the sea: a name is a quality and a thing.
const QUALITIES: [&str; 32] = [
    "amber", "bold", "brisk", "calm", "clear", "cold", "deep", "distant", "dry", "early", "fair",
    "far", "gentle", "green", "grey", "high", "late", "lone", "low", "mild", "misty", "northern",
    "pale", "quiet", "salty", "silver", "slow", "steep", "still", "swift", "warm", "white",
];
const THINGS: [&str; 32] = [
    "anchor", "bay", "beacon", "breaker", "buoy", "cape", "cliff", "cove", "current", "dune",
    "eider", "fjord", "gannet", "gull", "harbour", "heron", "inlet", "island", "kelp", "lagoon",
    "mast", "otter", "petrel", "pier", "puffin", "reef", "sail", "seal", "shoal", "skerry", "tern",
    "tide",
];

/// Refuses what can't be a name: it starts with a letter or digit and goes on with those, `_`, `.`
/// and `-`, as other container tools have it.
pub fn check(name: &str) -> Result<(), EngineError> {
    let mut bytes = name.bytes();
    let first = bytes
        .next()
        .is_some_and(|byte| byte.is_ascii_alphanumeric());
    let rest = bytes.all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    if first && rest && name.len() <= LONGEST {
        return Ok(());
    }
    let name = name.to_owned();
    Err(EngineError::BadVmName { name })
}

/// A name that follows from an identity; others of the same with each `attempt`.
pub fn generate(id: &str, attempt: usize) -> String {
    let seed = usize::from_str_radix(id.get(..8).unwrap_or_default(), 16).unwrap_or(0);
    let quality = QUALITIES[seed % QUALITIES.len()];
    let thing = THINGS[seed / QUALITIES.len() % THINGS.len()];
    match attempt {
        0 => format!("{quality}-{thing}"),
        _ => format!("{quality}-{thing}-{}", seed / 1024 % 10_000 + attempt),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for good in ["a", "web-1", "A.b_c", "0"] {
            assert!(check(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", ".a", "a/b", "a b", "ä", &"x".repeat(65)] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn generated_names_are_names() {
        let name = generate("00000421aaaaaaaaaaaaaaaaaaaaaaaa", 0);
        assert!(check(&name).is_ok(), "{name}");
        assert_ne!(name, generate("00000421aaaaaaaaaaaaaaaaaaaaaaaa", 1));
    }
}
