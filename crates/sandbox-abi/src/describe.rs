//! What a guest says of itself.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use serde::{Deserialize, Serialize};

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

crate::serde_value!(Description);
