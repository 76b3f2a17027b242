//! Changes to documents, as damage and malice would make them.

use serde_json::{Map, Number, Value};

/// What a fuzzer, or a generator of random numbers, decides. After its end all is zero.
#[derive(Clone, Copy, Debug)]
pub struct Choices<'a>(&'a [u8]);

impl<'a> Choices<'a> {
    /// The choices that some bytes stand for.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether none are left.
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    fn word(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// A number below `below`; zero when there is none.
    pub fn below(&mut self, below: usize) -> usize {
        let bits = usize::from(self.byte()) | usize::from(self.byte()) << 8;
        bits % below.max(1)
    }
}

/// Changes `document` in one place.
pub fn change(document: &mut Value, choices: &mut Choices<'_>) {
    let donor = pick(document, choices).clone();
    let node = pick(document, choices);
    match choices.below(12) {
        0 => *node = donor,
        1 => *node = Value::Null,
        _ => change_node(node, choices),
    }
}

/// Changes bytes of a document's text in one to four places.
pub fn change_text(text: &mut Vec<u8>, choices: &mut Choices<'_>) {
    for _ in 0..=choices.below(4) {
        let at = choices.below(text.len());
        match choices.below(4) {
            0 => text.truncate(at),
            1 => {
                let end = (at + choices.below(200)).min(text.len());
                let part = text[at..end].to_vec();
                text.splice(at..at, part);
            }
            kind => {
                if let Some(byte) = text.get_mut(at) {
                    *byte = match kind {
                        2 => choices.byte(),
                        _ => b"0123456789{}[]\",:-e.ntf\\"[choices.below(24)],
                    };
                }
            }
        }
    }
}

/// A place in the document: at each level any of the children, however much is below them, so that
/// a register is as likely as an array of a thousand bytes.
fn pick<'a>(node: &'a mut Value, choices: &mut Choices<'_>) -> &'a mut Value {
    let children = match &*node {
        Value::Array(items) => items.len(),
        Value::Object(fields) => fields.len(),
        _ => 0,
    };
    if children == 0 || choices.below(10) == 0 {
        return node;
    }
    let index = choices.below(children);
    let child = match node {
        Value::Array(items) => items.get_mut(index),
        Value::Object(fields) => fields.values_mut().nth(index),
        _ => None,
    };
    match child {
        Some(child) => pick(child, choices),
        None => unreachable!("one of as many children as there are"),
    }
}

fn change_node(node: &mut Value, choices: &mut Choices<'_>) {
    match node {
        Value::Null => *node = number(choices),
        Value::Bool(value) => *value ^= true,
        Value::Number(old) => match (choices.below(3), old.as_u64()) {
            (0, Some(old)) => *node = near(old, choices).into(),
            _ => *node = number(choices),
        },
        Value::String(text) => change_string(text, choices),
        Value::Array(items) => change_array(items, choices),
        Value::Object(fields) => change_object(fields, choices),
    }
}

fn near(old: u64, choices: &mut Choices<'_>) -> u64 {
    match choices.below(4) {
        0 => old.wrapping_add(1),
        1 => old.wrapping_sub(1),
        _ => old ^ 1 << choices.below(64),
    }
}

fn number(choices: &mut Choices<'_>) -> Value {
    let bit = 1_u64 << choices.below(64);
    match choices.below(16) {
        0 => bit.into(),
        1 => (bit - 1).into(),
        2 => bit.wrapping_neg().into(),
        3 => u64::MAX.into(),
        4 => i64::MIN.into(),
        5 => (-1).into(),
        6 => Number::from_f64(0.5).map_or(Value::Null, Value::Number),
        7 => choices.word().into(),
        8 => (choices.word() as u16).into(),
        9 => (choices.word() as u32).into(),
        _ => choices.byte().into(),
    }
}

fn change_string(text: &mut String, choices: &mut Choices<'_>) {
    // Other variants of the enumerations that there are.
    const WORDS: [&str; 14] = [
        "",
        "Runnable",
        "Uninitialized",
        "InitReceived",
        "Halted",
        "Low",
        "High",
        "LowThenHigh",
        "Done",
        "Icw2",
        "Icw4",
        "Rng",
        "../../../../../etc/passwd",
        "/dev/zero",
    ];
    match choices.below(WORDS.len() + 2) {
        0 => *text = text.repeat(choices.below(1000)),
        1 => text.push('\u{1b}'),
        word => text.replace_range(.., WORDS[word - 2]),
    }
}

fn change_array(items: &mut Vec<Value>, choices: &mut Choices<'_>) {
    let at = choices.below(items.len());
    match choices.below(6) {
        0 => items.clear(),
        1 => items.truncate(at),
        2 if !items.is_empty() => drop(items.remove(at)),
        3 => items.reverse(),
        4 if !items.is_empty() => items.insert(at, items[at].clone()),
        _ => {
            if let Some(item) = items.get(at).cloned() {
                let more = 1 + choices.below(2000);
                items.extend(std::iter::repeat_n(item, more));
            }
        }
    }
}

fn change_object(fields: &mut Map<String, Value>, choices: &mut Choices<'_>) {
    let names: Vec<String> = fields.keys().cloned().collect();
    let mut name = || names.get(choices.below(names.len())).cloned();
    let (Some(one), Some(other)) = (name(), name()) else {
        return;
    };
    let taken = fields.remove(&one);
    match (choices.below(4), taken) {
        // Gone.
        (0, _) | (_, None) => {}
        // Of another name.
        (1, Some(value)) => drop(fields.insert(format!("{one}_"), value)),
        // In place of another.
        (2, Some(value)) => drop(fields.insert(other, value)),
        // Exchanged.
        (_, Some(value)) => {
            if let Some(value) = fields.insert(other, value) {
                fields.insert(one, value);
            }
        }
    }
}
