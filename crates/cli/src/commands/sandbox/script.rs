//! Scripts: files that end in `.rhai`, by the guest that comes with Skerry.

use std::io::Write;

use anyhow::{Context, Result, bail};
use serde_json::Value as Json;
use skerry_sandbox::script::{Defined, Grants, Script, ScriptBuilder, ScriptError, Value};
use skerry_sandbox::script::{from_value, to_value};
use skerry_sandbox::{Description, Function, Parameter};

use super::{FUNCTION_FAILED, backend, failed, print};
use crate::args::{SandboxCallArgs, SandboxGuestArgs, SandboxLimitArgs};
use crate::output;

/// Its output is the script's own: where it can't be written the script has lost its reader, as any program.
fn grants() -> Grants {
    Grants::new()
        .print(|line| drop(writeln!(std::io::stdout(), "{line}")))
        .debug(|line| drop(writeln!(std::io::stderr(), "{line}")))
}

/// Where what is printed is measured, and not looked at.
pub(super) fn silence() -> Grants {
    Grants::new().print(drop).debug(drop)
}

pub(super) fn builder(args: &SandboxGuestArgs, grants: &Grants) -> ScriptBuilder {
    let mut builder = Script::builder()
        .path(&args.guest)
        .grants(grants)
        .backend(backend(args.hypervisor));
    if let Some(heap) = &args.heap {
        builder = builder.heap(heap.0);
    }
    if let Some(stack) = &args.stack {
        builder = builder.stack(stack.0);
    }
    if let Some(buffers) = &args.buffers {
        builder = builder.buffers(buffers.0);
    }
    builder
}

fn limited(args: &SandboxGuestArgs, limits: &SandboxLimitArgs) -> Result<Script, ScriptError> {
    let mut builder = builder(args, &grants());
    if let Some(timeout) = &limits.timeout {
        builder = builder.call_timeout(timeout.0);
    }
    if let Some(time) = &limits.cpu_time {
        builder = builder.call_cpu_time(time.0);
    }
    let mut script = builder.build()?;
    let sandbox = script.sandbox();
    sandbox.set_call_instructions(limits.instructions)?;
    Ok(script)
}

/// Values of words: JSON, or else the word as a string; the bytes of a file for `@FILE`.
pub(super) fn arguments(words: &[String]) -> Result<Vec<Value>> {
    let each = words.iter().map(|word| {
        if let Some(path) = word.strip_prefix('@') {
            let bytes = std::fs::read(path).with_context(|| format!("Can't read {path}"))?;
            return Ok(Value::Bytes(bytes));
        }
        match serde_json::from_str::<Json>(word) {
            Ok(json) => to_value(&json).with_context(|| format!("{word:?} is no script's value")),
            Err(_) => Ok(Value::String(word.clone())),
        }
    });
    each.collect()
}

/// A value as it is printed. What JSON doesn't have is as the script writes it.
fn printable(value: Value) -> skerry_sandbox::Value {
    use skerry_sandbox::Value as Out;
    match value {
        Value::Unit => Out::Unit,
        Value::Bool(value) => Out::Bool(value),
        Value::Int(value) => Out::I64(value),
        Value::Float(value) => Out::F64(value),
        Value::String(value) => Out::String(value),
        Value::Bytes(value) => Out::Bytes(value),
        value => {
            let text = value.to_string();
            Out::Struct(from_value(value).unwrap_or(Json::String(text)))
        }
    }
}

/// Runs a script, or one of its functions after it has run.
pub(super) fn call(args: &SandboxCallArgs) -> Result<u8> {
    if args.gdb.is_some() || args.core_dumps.is_some() {
        bail!("--gdb and --core-dumps are for programs: a script isn't x86 code");
    }
    if !args.grants.is_empty() {
        bail!(
            "--grant is for WebAssembly modules, and {:?} is a script",
            args.guest.guest
        );
    }
    let values = arguments(&args.arguments)?;
    let ended = limited(&args.guest, &args.limits).and_then(|mut script| {
        let value = script.run_value()?;
        match &args.function {
            None => Ok(value),
            Some(name) => script
                .call_values(name, &values)
                .map_err(|error| known(&mut script, error)),
        }
    });
    match ended {
        Ok(value) => {
            print(&printable(value), args.json)?;
            Ok(0)
        }
        Err(
            error @ (ScriptError::Build(_)
            | ScriptError::Parse { .. }
            | ScriptError::NotText
            | ScriptError::NoFunction(_)
            | ScriptError::Arity { .. }),
        ) => Err(error.into()),
        Err(error) => {
            let status = match &error {
                ScriptError::Call(error) => failed(error),
                _ => FUNCTION_FAILED,
            };
            output::error(&error.into());
            Ok(status)
        }
    }
}

/// Says what functions there are where one is missing.
fn known(script: &mut Script, error: ScriptError) -> ScriptError {
    let ScriptError::NoFunction(name) = error else {
        return error;
    };
    let functions = script.functions().unwrap_or_default();
    let names: Vec<_> = functions.iter().map(|function| &*function.name).collect();
    output::note(&format!("The script's functions: {}", names.join(", ")));
    ScriptError::NoFunction(name)
}

/// A script's functions, as those of any guest are told.
pub(super) fn describe(args: &SandboxGuestArgs) -> Result<Description> {
    const ANY: &str = "any";
    let function = |function: Defined| Function {
        name: function.name,
        parameters: function
            .parameters
            .into_iter()
            .map(|name| Parameter {
                name,
                kind: ANY.into(),
            })
            .collect(),
        returns: ANY.into(),
    };
    let functions = builder(args, &silence()).build()?.functions()?;
    Ok(Description {
        runtime: "Rhai".into(),
        exports: functions.into_iter().map(function).collect(),
        imports: Vec::new(),
    })
}
