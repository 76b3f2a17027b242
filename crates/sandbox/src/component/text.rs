//! Values as text: WAVE, the notation that belongs to WIT, and JSON.
//!
//! Both are read by one parser, which is told the type: JSON's quoted names of fields, cases and flags, its
//! `null`, `["a", "tuple"]` and `{"case": value}` are read where WAVE has `{field: …}`, `case`, `none`,
//! `("a", "tuple")` and `case(value)`.

use std::str::FromStr;

use serde_json::{Map, Value as Json, json};
use skerry_sandbox_abi::component::{Type, Val};

use crate::dynamic::NotAValue;

/// A value of type `wanted` from a word of a command line. A text that is no more than a `string` or a
/// `char` needs no quotes.
pub fn parse(text: &str, wanted: &Type) -> Result<Val, NotAValue> {
    let mut parser = Parser { rest: text };
    let quoted = |quote: char| text.trim_start().starts_with(quote);
    let value = match wanted {
        Type::String if !quoted('"') => Some(Val::String(text.into())),
        Type::Char if !quoted('\'') && !quoted('"') => text.parse().ok().map(Val::Char),
        _ => parser.value(wanted).filter(|_| parser.at_end()),
    };
    value.ok_or_else(|| NotAValue {
        text: text.into(),
        wanted: wanted.to_string(),
    })
}

/// A value as JSON. Numbers that JSON has none for are their names; a variant's case with a value is an
/// object of one field.
pub fn to_json(value: &Val) -> Json {
    let payload = |value: &Option<Box<Val>>| value.as_deref().map_or(Json::Null, to_json);
    let all = |values: &[Val]| values.iter().map(to_json).collect::<Vec<_>>();
    match value {
        Val::Bool(value) => json!(value),
        Val::S8(value) => json!(value),
        Val::U8(value) => json!(value),
        Val::S16(value) => json!(value),
        Val::U16(value) => json!(value),
        Val::S32(value) => json!(value),
        Val::U32(value) => json!(value),
        Val::S64(value) => json!(value),
        Val::U64(value) => json!(value),
        Val::F32(number) if !number.is_finite() => json!(value.to_string()),
        Val::F64(number) if !number.is_finite() => json!(value.to_string()),
        Val::F32(value) => json!(value),
        Val::F64(value) => json!(value),
        Val::Char(value) => json!(value),
        Val::String(value) | Val::Enum(value) => json!(value),
        Val::Bytes(value) => json!(value),
        Val::Flags(names) => json!(names),
        Val::List(values) | Val::Tuple(values) => json!(all(values)),
        Val::Record(fields) => {
            let each = fields.iter();
            let each = each.map(|(name, value)| (name.clone(), to_json(value)));
            Json::Object(each.collect::<Map<_, _>>())
        }
        Val::Variant(name, None) => json!(name),
        Val::Variant(name, value) => json!({ name: payload(value) }),
        Val::Option(value) => payload(value),
        Val::Result(Ok(value)) => json!({ "ok": payload(value) }),
        Val::Result(Err(value)) => json!({ "err": payload(value) }),
    }
}

struct Parser<'a> {
    rest: &'a str,
}

impl<'a> Parser<'a> {
    fn skip(&mut self) {
        self.rest = self.rest.trim_start();
    }

    fn at_end(&mut self) -> bool {
        self.skip();
        self.rest.is_empty()
    }

    fn eat(&mut self, wanted: &str) -> bool {
        self.skip();
        match self.rest.strip_prefix(wanted) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    /// The letters at the front that are `of` a kind; at least one.
    fn run(&mut self, of: impl Fn(char) -> bool) -> Option<&'a str> {
        self.skip();
        let len = self.rest.find(|letter| !of(letter));
        let (run, rest) = self.rest.split_at(len.unwrap_or(self.rest.len()));
        self.rest = rest;
        (!run.is_empty()).then_some(run)
    }

    fn number<T: FromStr>(&mut self) -> Option<T> {
        let number = self.run(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'));
        number?.parse().ok()
    }

    /// A name of a field, case or flag: a word, or in quotes.
    fn name(&mut self) -> Option<String> {
        self.skip();
        match self.rest.starts_with('"') {
            true => self.quoted('"'),
            false => {
                // WAVE escapes words of its own by `%`.
                self.eat("%");
                let word = self.run(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'));
                word.map(str::to_owned)
            }
        }
    }

    /// What `one` reads, until `end`, with commas between.
    fn until(&mut self, end: &str, mut one: impl FnMut(&mut Self) -> Option<()>) -> Option<()> {
        while !self.eat(end) {
            one(self)?;
            if !self.eat(",") {
                return self.eat(end).then_some(());
            }
        }
        Some(())
    }

    /// A text in quotes, with the escapes of WAVE and of JSON.
    fn quoted(&mut self, quote: char) -> Option<String> {
        self.skip();
        let mut letters = self.rest.strip_prefix(quote)?.chars();
        let mut text = String::new();
        loop {
            let letter = match letters.next()? {
                letter if letter == quote => break,
                '\\' => match letters.next()? {
                    'n' => '\n',
                    't' => '\t',
                    'r' => '\r',
                    'b' => '\u{8}',
                    'f' => '\u{c}',
                    'u' => escaped(&mut letters)?,
                    letter @ ('"' | '\'' | '\\' | '/') => letter,
                    _ => return None,
                },
                letter => letter,
            };
            text.push(letter);
        }
        self.rest = letters.as_str();
        Some(text)
    }

    fn value(&mut self, wanted: &Type) -> Option<Val> {
        Some(match wanted {
            Type::Bool => Val::Bool(self.run(|c| c.is_ascii_alphabetic())?.parse().ok()?),
            Type::S8 => Val::S8(self.number()?),
            Type::U8 => Val::U8(self.number()?),
            Type::S16 => Val::S16(self.number()?),
            Type::U16 => Val::U16(self.number()?),
            Type::S32 => Val::S32(self.number()?),
            Type::U32 => Val::U32(self.number()?),
            Type::S64 => Val::S64(self.number()?),
            Type::U64 => Val::U64(self.number()?),
            Type::F32 => Val::F32(self.number()?),
            Type::F64 => Val::F64(self.number()?),
            Type::Char => Val::Char(self.char()?),
            Type::String => Val::String(self.quoted('"')?),
            Type::List(item) => self.list(item)?,
            Type::Tuple(items) => self.tuple(items)?,
            Type::Record(fields) => self.record(fields)?,
            Type::Variant(cases) => self.variant(cases)?,
            Type::Enum(names) => Val::Enum(self.name().filter(|name| names.contains(name))?),
            Type::Flags(names) => self.flags(names)?,
            Type::Option(item) => self.option(item)?,
            Type::Result(ok, err) => self.result(ok.as_deref(), err.as_deref())?,
            Type::Resource | Type::Other(_) => return None,
        })
    }

    fn char(&mut self) -> Option<char> {
        self.skip();
        let quote = self.rest.chars().next()?;
        let text = match quote {
            '\'' | '"' => self.quoted(quote)?,
            _ => return None,
        };
        text.parse().ok()
    }

    fn list(&mut self, item: &Type) -> Option<Val> {
        if !self.eat("[") {
            return None;
        }
        if *item == Type::U8 {
            let mut bytes = Vec::new();
            self.until("]", |parser| {
                bytes.push(parser.number()?);
                Some(())
            })?;
            return Some(Val::Bytes(bytes));
        }
        let mut values = Vec::new();
        self.until("]", |parser| {
            values.push(parser.value(item)?);
            Some(())
        })?;
        Some(Val::List(values))
    }

    fn tuple(&mut self, items: &[Type]) -> Option<Val> {
        let end = match self.eat("(") {
            true => ")",
            false if self.eat("[") => "]",
            false => return None,
        };
        let mut kinds = items.iter();
        let mut values = Vec::new();
        self.until(end, |parser| {
            values.push(parser.value(kinds.next()?)?);
            Some(())
        })?;
        (values.len() == items.len()).then_some(Val::Tuple(values))
    }

    fn record(&mut self, fields: &[(String, Type)]) -> Option<Val> {
        let mut given: Vec<Option<Val>> = vec![None; fields.len()];
        if !self.eat("{") {
            return None;
        }
        self.until("}", |parser| {
            let name = parser.name()?;
            let at = fields.iter().position(|(field, _)| *field == name)?;
            if !parser.eat(":") {
                return None;
            }
            let value = parser.value(&fields[at].1)?;
            given[at].replace(value).is_none().then_some(())
        })?;
        let each = fields.iter().zip(given);
        let values = each.map(|((name, kind), value)| {
            // An option that isn't given is none.
            let absent = || matches!(kind, Type::Option(_)).then_some(Val::Option(None));
            Some((name.clone(), value.or_else(absent)?))
        });
        Some(Val::Record(values.collect::<Option<_>>()?))
    }

    /// `name`, `name(value)` or `{"name": value}`; what `kind_of` says of the name has a value or not.
    fn case<'t>(
        &mut self,
        kind_of: impl Fn(&str) -> Option<Option<&'t Type>>,
    ) -> Option<(String, Option<Box<Val>>)> {
        let (end, between) = match self.eat("{") {
            true => ("}", ":"),
            false => (")", "("),
        };
        let name = self.name()?;
        let kind = kind_of(&name)?;
        let has_value = self.eat(between);
        let value = match kind {
            Some(kind) if has_value => Some(Box::new(self.value(kind)?)),
            // JSON has to have something there.
            None if has_value => (end == "}" && self.eat("null")).then_some(None)?,
            None => None,
            Some(_) => return None,
        };
        if (has_value || end == "}") && !self.eat(end) {
            return None;
        }
        Some((name, value))
    }

    fn variant(&mut self, cases: &[(String, Option<Type>)]) -> Option<Val> {
        let (name, value) = self.case(|name| {
            let case = cases.iter().find(|(case, _)| case == name);
            case.map(|(_, kind)| kind.as_ref())
        })?;
        Some(Val::Variant(name, value))
    }

    fn result(&mut self, ok: Option<&Type>, err: Option<&Type>) -> Option<Val> {
        let (name, value) = self.case(|name| match name {
            "ok" => Some(ok),
            "err" => Some(err),
            _ => None,
        })?;
        Some(Val::Result(match name.as_str() {
            "ok" => Ok(value),
            _ => Err(value),
        }))
    }

    fn option(&mut self, item: &Type) -> Option<Val> {
        for none in ["none", "null"] {
            let before = self.rest;
            if self.run(|c| c.is_ascii_alphanumeric() || c == '-') == Some(none) {
                return Some(Val::Option(None));
            }
            self.rest = before;
        }
        let value = match self.eat("some(") {
            true => self.value(item).filter(|_| self.eat(")"))?,
            false => self.value(item)?,
        };
        Some(Val::Option(Some(Box::new(value))))
    }

    fn flags(&mut self, known: &[String]) -> Option<Val> {
        let end = match self.eat("{") {
            true => "}",
            false if self.eat("[") => "]",
            false => return None,
        };
        let mut names = Vec::new();
        self.until(end, |parser| {
            names.push(parser.name().filter(|name| known.contains(name))?);
            Some(())
        })?;
        Some(Val::Flags(names))
    }
}

/// What follows `\u`: `{hex}`, or four digits as JSON has them, two times for what is beyond.
fn escaped(letters: &mut std::str::Chars<'_>) -> Option<char> {
    if let Some(rest) = letters.as_str().strip_prefix('{') {
        let (number, rest) = rest.split_once('}')?;
        *letters = rest.chars();
        return char::from_u32(u32::from_str_radix(number, 16).ok()?);
    }
    let four = |letters: &mut std::str::Chars<'_>| {
        let (number, rest) = letters.as_str().split_at_checked(4)?;
        *letters = rest.chars();
        u16::from_str_radix(number, 16).ok()
    };
    let first = four(letters)?;
    if let Some(letter) = char::from_u32(first.into()) {
        return Some(letter);
    }
    *letters = letters.as_str().strip_prefix("\\u")?.chars();
    let pair = [first, four(letters)?];
    char::decode_utf16(pair).next()?.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn option(kind: Type) -> Type {
        Type::Option(Box::new(kind))
    }

    fn person() -> Type {
        Type::Record(vec![
            ("name".into(), Type::String),
            ("age".into(), option(Type::U8)),
        ])
    }

    /// Reads, writes and reads again.
    fn same(text: &str, kind: &Type) -> String {
        let value = parse(text, kind).unwrap_or_else(|error| panic!("{error}"));
        let told = value.to_string();
        assert_eq!(parse(&told, kind).unwrap(), value, "{told}");
        told
    }

    #[test]
    fn wave_and_json_are_read_alike() {
        for (kind, wave, json) in [
            (
                person(),
                r#"{name: "Ann", age: some(3)}"#,
                r#"{"name": "Ann", "age": 3}"#,
            ),
            (
                person(),
                r#"{name: "A\"\\\u{e9}", age: none}"#,
                r#"{"age": null, "name": "A\"\\\u00e9"}"#,
            ),
            (person(), r#"{name: ""}"#, r#"{"name": ""}"#),
            (Type::List(Box::new(Type::U8)), "[1, 255,]", "[1,255]"),
            (Type::List(Box::new(Type::S16)), "[]", " [ ] "),
            (
                Type::Tuple(vec![Type::Char, Type::F64]),
                "('x', inf)",
                r#"["x", inf]"#,
            ),
            (Type::Flags(vec!["r".into(), "w".into()]), "{w}", r#"["w"]"#),
            (Type::Enum(vec!["red".into()]), "red", r#""red""#),
            (
                Type::Variant(vec![("dot".into(), None), ("box".into(), Some(Type::U32))]),
                "box(7)",
                r#"{"box": 7}"#,
            ),
            (
                Type::Variant(vec![("dot".into(), None), ("box".into(), Some(Type::U32))]),
                "dot",
                r#"{"dot": null}"#,
            ),
            (
                Type::Result(None, Some(Box::new(Type::String))),
                "ok",
                r#"{"ok": null}"#,
            ),
            (
                Type::Result(None, Some(Box::new(Type::String))),
                r#"err("no")"#,
                r#"{"err": "no"}"#,
            ),
            (option(option(Type::Bool)), "some(none)", "some(null)"),
        ] {
            assert_eq!(same(wave, &kind), same(json, &kind), "{kind}");
        }
        assert_eq!(same(r#""\ud83d\ude00""#, &Type::String), "\"😀\"");
    }

    #[test]
    fn words_need_no_quotes_and_numbers_have_limits() {
        assert_eq!(
            parse("two words", &Type::String),
            Ok(Val::String("two words".into()))
        );
        assert_eq!(parse("é", &Type::Char), Ok(Val::Char('é')));
        assert_eq!(parse("-128", &Type::S8), Ok(Val::S8(-128)));
        assert_eq!(
            parse("18446744073709551615", &Type::U64),
            Ok(Val::U64(u64::MAX))
        );
        for (text, kind) in [
            ("256", Type::U8),
            ("-1", Type::U64),
            ("1 2", Type::U8),
            ("ab", Type::Char),
            ("", Type::Bool),
            ("[1", Type::List(Box::new(Type::U8))),
            (r#"{name: "a", name: "b"}"#, person()),
            (r#"{age: 1}"#, person()),
            (r#"{name: "a", other: 1}"#, person()),
            ("blue", Type::Enum(vec!["red".into()])),
            ("(1)", Type::Tuple(vec![Type::U8, Type::U8])),
            ("(1, 2, 3)", Type::Tuple(vec![Type::U8, Type::U8])),
            (r#""\q""#, Type::String),
            (r#""\ud83d""#, Type::String),
            (r#"""#, Type::String),
            ("ok(1)", Type::Result(None, None)),
        ] {
            assert!(parse(text, &kind).is_err(), "{text} as {kind}");
        }
    }

    #[test]
    fn json_tells_values() {
        let value = Val::Record(vec![
            (
                "a".into(),
                Val::Variant("box".into(), Some(Box::new(Val::U32(7)))),
            ),
            ("b".into(), Val::F64(f64::NAN)),
            ("c".into(), Val::Result(Err(None))),
            ("d".into(), Val::Option(None)),
        ]);
        assert_eq!(
            to_json(&value),
            json!({"a": {"box": 7}, "b": "nan", "c": {"err": null}, "d": null})
        );
    }
}
