//! WebAssembly modules, in the guest that comes with Skerry; and what components share with them.

use std::io::{Read, Write};

use anyhow::{Context, Result, bail};
use skerry_sandbox::wasm::{self, Exported, Grants, Kind, Wasm, WasmError};
use skerry_sandbox::{Description, Function, Parameter, Value};

use super::{FUNCTION_FAILED, backend, failed, print};
use crate::args::{GrantArg, SandboxCallArgs, SandboxGuestArgs, SandboxLimitArgs};
use crate::output;

/// What a program starts with; of a component, its `wasi:cli/run`.
pub(super) const PROGRAM: &str = "_start";

/// What a module or component may do by the command line's word.
pub(super) fn grants(args: &SandboxCallArgs) -> Grants {
    // The module's own output: where it can't be written the module has lost its reader, as any program.
    let grants = Grants::new()
        .stdout(|bytes| drop(std::io::stdout().write_all(&bytes)))
        .stderr(|bytes| drop(std::io::stderr().write_all(&bytes)));
    let words = std::iter::once(args.guest.guest.to_string_lossy().into_owned());
    let grants = grants.args(words.chain(args.arguments.iter().cloned()));
    args.grants
        .iter()
        .fold(grants, |grants, grant| match grant {
            GrantArg::Clock => grants.clock(),
            GrantArg::Random => grants.random(),
            GrantArg::Env => grants.env(std::env::vars()),
            GrantArg::Stdin => grants.stdin(|len| {
                let mut bytes = Vec::new();
                // An error is the end, as far as the module is told.
                let _ = std::io::stdin().take(len.into()).read_to_end(&mut bytes);
                bytes
            }),
        })
}

/// Refuses what is for programs only.
pub(super) fn no_debugging(args: &SandboxCallArgs) -> Result<()> {
    if args.gdb.is_some() || args.core_dumps.is_some() {
        bail!("--gdb and --core-dumps are for programs: WebAssembly isn't x86 code");
    }
    Ok(())
}

/// Refuses what is for programs only.
pub(super) fn no_sizes(args: &SandboxGuestArgs) -> Result<()> {
    if args.stack.is_some() || args.buffers.is_some() {
        bail!(
            "--stack and --buffers are for programs: those of the guest that runs WebAssembly are fixed"
        );
    }
    Ok(())
}

/// Says what went wrong with a call, and which exit status that is.
pub(super) fn refused(error: WasmError) -> u8 {
    let status = match &error {
        WasmError::Call(error) => failed(error),
        _ => FUNCTION_FAILED,
    };
    output::error(&error.into());
    status
}

/// Makes a builder's limits those of the command line.
macro_rules! limited {
    ($builder:ident, $args:expr, $limits:expr) => {{
        let mut builder = $builder;
        if let Some(heap) = &$args.heap {
            builder = builder.heap(heap.0);
        }
        if let Some(timeout) = $limits.and_then(|limits| limits.timeout.as_ref()) {
            builder = builder.call_timeout(timeout.0);
        }
        if let Some(time) = $limits.and_then(|limits| limits.cpu_time.as_ref()) {
            builder = builder.call_cpu_time(time.0);
        }
        builder
    }};
}
pub(super) use limited;

pub(super) fn wasm(
    args: &SandboxGuestArgs,
    limits: Option<&SandboxLimitArgs>,
    grants: &Grants,
) -> Result<Wasm> {
    no_sizes(args)?;
    let builder = Wasm::builder()
        .module(args.guest.as_path())
        .grants(grants)
        .backend(backend(args.hypervisor));
    let mut wasm = limited!(builder, args, limits).build()?;
    if let Some(limits) = limits {
        wasm.sandbox().set_call_instructions(limits.instructions)?;
    }
    Ok(wasm)
}

/// A function of a module's.
pub(super) fn exported(wasm: &mut Wasm, name: &str) -> Result<Exported> {
    let exports = wasm.exports()?;
    if let Some(function) = exports.iter().find(|function| function.name == name) {
        return Ok(function.clone());
    }
    let names: Vec<_> = exports.iter().map(|f| f.name.as_str()).collect();
    bail!(
        "The module exports no function {name:?}; it has: {}",
        names.join(", ")
    )
}

/// The numbers that a module's function takes.
pub(super) fn numbers(function: &Exported, words: &[String]) -> Result<Vec<wasm::Value>> {
    if words.len() != function.parameters.len() {
        let wanted = function.parameters.len();
        bail!(
            "{} takes {wanted} arguments, and {} were given",
            function.name,
            words.len()
        );
    }
    let each = function.parameters.iter().zip(words);
    each.map(|(kind, word)| {
        let value = match kind {
            Kind::I32 => word.parse().ok().map(wasm::Value::I32),
            Kind::I64 => word.parse().ok().map(wasm::Value::I64),
            Kind::F32 => word.parse().ok().map(wasm::Value::F32),
            Kind::F64 => word.parse().ok().map(wasm::Value::F64),
        };
        value.with_context(|| format!("{word:?} is no {kind}, which {} takes", function.name))
    })
    .collect()
}

/// Calls a module's function, or runs it as a program.
pub(super) fn call(args: &SandboxCallArgs, function: &str) -> Result<u8> {
    no_debugging(args)?;
    let mut wasm = wasm(&args.guest, Some(&args.limits), &grants(args))?;
    let ended = match function {
        PROGRAM => wasm.run().map(|code| (Vec::new(), code as u8)),
        name => {
            let function = exported(&mut wasm, name)?;
            let values = numbers(&function, &args.arguments)?;
            wasm.call_values(name, &values).map(|values| (values, 0))
        }
    };
    match ended {
        Ok((values, status)) => {
            let values = values.iter().map(|value| match value {
                wasm::Value::I32(value) => Value::I32(*value),
                wasm::Value::I64(value) => Value::I64(*value),
                wasm::Value::F32(value) => Value::F32(*value),
                wasm::Value::F64(value) => Value::F64(*value),
            });
            for value in values {
                print(&value, args.json)?;
            }
            Ok(status)
        }
        Err(error) => Ok(refused(error)),
    }
}

/// A module's functions, as those of any guest are told.
pub(super) fn describe(args: &SandboxGuestArgs) -> Result<Description> {
    let function = |function: Exported| {
        let results: Vec<_> = function.results.iter().map(ToString::to_string).collect();
        let parameter = |kind: &Kind| Parameter {
            name: String::new(),
            kind: kind.to_string(),
        };
        Function {
            name: function.name,
            parameters: function.parameters.iter().map(parameter).collect(),
            returns: match results.as_slice() {
                [one] => one.clone(),
                all => format!("({})", all.join(", ")),
            },
        }
    };
    let exports = wasm(args, None, &Grants::new())?.exports()?;
    Ok(Description {
        runtime: "WebAssembly".into(),
        exports: exports.into_iter().map(function).collect(),
        imports: Vec::new(),
    })
}
