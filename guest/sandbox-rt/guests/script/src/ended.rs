//! Why the engine gave up, as the host is told.

use alloc::collections::VecDeque;
use alloc::string::{String, ToString};

use rhai::{Dynamic, EvalAltResult, ParseError, ParseErrorType};
use skerry_sandbox_rt::abi::script::{Ended, Granted, Limit, Position, Refusal, Value};

use crate::host::HostFailure;
use crate::values::from_engine;

/// So many of the calls that an error came through are told, the innermost.
const CALLS: usize = 32;

fn position(at: rhai::Position) -> Option<Position> {
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Some(Position {
        line: number(at.line()?),
        column: at.position().map_or(1, number),
    })
}

fn refused(kind: &ParseErrorType) -> Refusal {
    match kind {
        ParseErrorType::ExprTooDeep => Refusal::Limit(Limit::Nesting),
        ParseErrorType::TooManyFunctions => Refusal::Limit(Limit::Functions),
        ParseErrorType::LiteralTooLarge(..) => Refusal::Limit(Limit::Size),
        other => Refusal::Parse(other.to_string()),
    }
}

/// Of a text that is no script.
pub(crate) fn unparsed(error: &ParseError) -> Ended {
    Ended {
        position: position(error.position()),
        ..refused(error.err_type()).into()
    }
}

/// Of a script that was running; a value where it has only left by another way. `granted` are the host's
/// functions, `called` the function that the host called.
pub(crate) fn ended(
    mut error: EvalAltResult,
    granted: &[Granted],
    called: Option<&str>,
) -> Result<Dynamic, Ended> {
    let mut calls: VecDeque<String> = called.map(String::from).into_iter().collect();
    let mut known = None;
    let innermost = loop {
        let at = error.position();
        known = position(at).or(known);
        match error {
            EvalAltResult::ErrorInFunctionCall(name, _, inner, _) => {
                calls.push_front(name);
                calls.truncate(CALLS);
                error = *inner;
            }
            other => break other,
        }
    };
    let why = match innermost {
        EvalAltResult::Exit(value, _) | EvalAltResult::Return(value, _) => return Ok(value),
        EvalAltResult::ErrorRuntime(value, _) => thrown(value),
        EvalAltResult::ErrorParsing(kind, _) => refused(&kind),
        EvalAltResult::ErrorTooManyOperations(_) | EvalAltResult::ErrorTerminated(..) => {
            Refusal::Limit(Limit::Operations)
        }
        EvalAltResult::ErrorTooManyVariables(_) => Refusal::Limit(Limit::Variables),
        EvalAltResult::ErrorStackOverflow(_) => Refusal::Limit(Limit::Calls),
        EvalAltResult::ErrorDataTooLarge(..) => Refusal::Limit(Limit::Size),
        EvalAltResult::ErrorFunctionNotFound(signature, _) => not_found(signature, granted),
        mut other => {
            let _ = other.take_position();
            Refusal::Runtime(other.to_string())
        }
    };
    Err(Ended {
        why,
        position: known,
        calls: calls.into(),
    })
}

fn thrown(value: Dynamic) -> Refusal {
    if value.is::<HostFailure>() {
        let HostFailure {
            name,
            message,
            missing,
        } = value.cast();
        return match missing {
            true => Refusal::NotGranted(name),
            false => Refusal::Host { name, message },
        };
    }
    let kind = value.type_name();
    // What can't be passed is thrown all the same: its type is told.
    let value = from_engine(value);
    Refusal::Thrown(value.unwrap_or_else(|_| Value::String(alloc::format!("a {kind}"))))
}

/// The engine tells of a function that isn't there with the types of the arguments: `name (int, string)`.
fn not_found(signature: String, granted: &[Granted]) -> Refusal {
    let name = signature.split(' ').next().unwrap_or_default();
    match granted.iter().find(|granted| granted.name == name) {
        Some(Granted { name, arity }) => Refusal::Host {
            name: name.clone(),
            message: alloc::format!("it takes {arity} arguments, and was called as {signature}"),
        },
        None => Refusal::Runtime(alloc::format!("there is no function {signature}")),
    }
}
