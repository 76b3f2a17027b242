//! What a guest says of itself.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use serde::{Deserialize, Serialize};

use crate::codec::{DecodeError, Reader, Writer};

/// One parameter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parameter {
    /// Its name.
    pub name: String,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: String,
}

/// One function and its signature.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// Its parameters.
    pub parameters: Vec<Parameter>,
    /// The type of what it returns.
    pub returns: String,
}

impl Function {
    /// Whether the types are the same; names of parameters don't count.
    pub fn same_types(&self, other: &Self) -> bool {
        let kinds = |f: &Self| {
            f.parameters
                .iter()
                .map(|p| p.kind.clone())
                .collect::<Vec<_>>()
        };
        self.returns == other.returns && kinds(self) == kinds(other)
    }
}

impl fmt::Display for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}(", self.name)?;
        for (n, Parameter { name, kind }) in self.parameters.iter().enumerate() {
            let comma = if n == 0 { "" } else { ", " };
            match name.is_empty() {
                true => write!(f, "{comma}{kind}")?,
                false => write!(f, "{comma}{name}: {kind}")?,
            }
        }
        write!(f, ") -> {}", self.returns)
    }
}

/// The functions of a guest. The index of an export or import is its number in calls.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// What built it, for people.
    pub runtime: String,
    /// The functions that the host can call.
    pub exports: Vec<Function>,
    /// The host functions that it needs.
    pub imports: Vec<Function>,
}

/// Writes a description as it travels: texts with their length in two bytes, in front of each function the
/// number of its parameters. A guest does this once, with one buffer for the names of types.
#[derive(Debug)]
pub struct Describe<'a, 'b> {
    out: &'a mut Writer<'b>,
    kind: String,
}

impl<'a, 'b> Describe<'a, 'b> {
    /// Begins with the runtime's name; then come the exports and the imports, each with their number.
    pub fn new(out: &'a mut Writer<'b>, runtime: &str) -> Self {
        let kind = String::new();
        let mut describe = Self { out, kind };
        describe.text(runtime);
        describe
    }

    /// How many functions come.
    pub fn count(&mut self, functions: usize) {
        self.out.put(&(functions as u32).to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        put_text(self.out, text);
    }

    /// A function begins; `parameters` of them follow, then what it returns.
    pub fn function(&mut self, name: &str, parameters: u8) {
        self.text(name);
        self.out.put(&[parameters]);
    }

    /// A parameter.
    pub fn parameter(&mut self, name: &str, kind: impl FnOnce(&mut String)) {
        self.text(name);
        self.kind(kind);
    }

    /// A type: of what the function returns.
    pub fn kind(&mut self, kind: impl FnOnce(&mut String)) {
        self.kind.clear();
        kind(&mut self.kind);
        put_text(self.out, &self.kind);
    }

    /// A whole function.
    pub fn whole(&mut self, function: &Function) {
        self.function(&function.name, function.parameters.len() as u8);
        for Parameter { name, kind } in &function.parameters {
            self.parameter(name, |out| out.push_str(kind));
        }
        self.kind(|out| out.push_str(&function.returns));
    }
}

fn put_text(out: &mut Writer<'_>, text: &str) {
    // A name is not longer than that; one that is makes a description that none reads.
    out.put(&(text.len() as u16).to_le_bytes());
    out.put(text.as_bytes());
}

fn text(from: &mut Reader<'_>) -> Result<String, DecodeError> {
    let len = from.array().map(u16::from_le_bytes)?;
    let bytes = from.take(len.into())?;
    let text = core::str::from_utf8(bytes);
    Ok(text
        .map_err(|_| DecodeError::Malformed("a name is not UTF-8"))?
        .into())
}

fn functions(from: &mut Reader<'_>) -> Result<Vec<Function>, DecodeError> {
    let count = from.u32()? as usize;
    // Each takes five bytes at least: a count that lies makes no large allocation.
    let mut functions = Vec::with_capacity(count.min(from.rest().len() / 5));
    for _ in 0..count {
        let name = text(from)?;
        let [parameters] = from.array()?;
        let parameter = |_| {
            let name = text(from)?;
            Ok(Parameter {
                name,
                kind: text(from)?,
            })
        };
        let parameters: Result<_, DecodeError> = (0..parameters).map(parameter).collect();
        functions.push(Function {
            name,
            parameters: parameters?,
            returns: text(from)?,
        });
    }
    Ok(functions)
}

impl Description {
    /// Reads what [`Describe`] wrote.
    pub fn read(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            runtime: text(from)?,
            exports: functions(from)?,
            imports: functions(from)?,
        })
    }
}
