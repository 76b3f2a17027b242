//! WebAssembly components, in the guest that comes with Skerry.

use std::io::Write;

use anyhow::{Context, Result, bail};
use serde_json::json;
use skerry_sandbox::component::{Component, Func, Type, Val, WasmError, parse, to_json};

use super::backend;
use super::wasm::{PROGRAM, grants, limited, no_debugging, no_sizes, refused};
use crate::args::{
    Format, SandboxCallArgs, SandboxGuestArgs, SandboxInspectArgs, SandboxLimitArgs,
};

pub(super) fn component(
    args: &SandboxGuestArgs,
    limits: Option<&SandboxLimitArgs>,
    grants: &skerry_sandbox::component::Grants,
) -> Result<Component> {
    no_sizes(args)?;
    let builder = Component::builder()
        .component(args.guest.as_path())
        .grants(grants)
        .backend(backend(args.hypervisor));
    let mut component = limited!(builder, args, limits).build()?;
    if let Some(limits) = limits {
        component
            .sandbox()
            .set_call_instructions(limits.instructions)?;
    }
    Ok(component)
}

/// A function of a component's: by its whole name, or by its own where only one interface has it.
pub(super) fn exported(component: &mut Component, name: &str) -> Result<Func> {
    let exports = component.exports()?;
    if let Some(function) = exports.iter().find(|function| function.name == name) {
        return Ok(function.clone());
    }
    let own = |function: &&Func| function.name.rsplit('#').next() == Some(name);
    let mut found = exports.iter().filter(own);
    match (found.next(), found.next()) {
        (Some(function), None) => Ok(function.clone()),
        (None, _) => {
            let names: Vec<_> = exports.iter().map(|f| f.name.as_str()).collect();
            bail!(
                "The component exports no function {name:?}; it has: {}",
                names.join(", ")
            )
        }
        (Some(one), Some(other)) => {
            bail!("Which {name:?}: {:?} or {:?}?", one.name, other.name)
        }
    }
}

/// The values that a function takes.
pub(super) fn values(function: &Func, words: &[String]) -> Result<Vec<Val>> {
    if words.len() != function.parameters.len() {
        bail!(
            "{} takes {} arguments, and {} were given",
            function.name,
            function.parameters.len(),
            words.len()
        );
    }
    let each = function.parameters.iter().zip(words);
    each.map(|((name, kind), word)| {
        if matches!(kind, Type::List(item) if **item == Type::U8)
            && let Some(path) = word.strip_prefix('@')
        {
            let bytes = std::fs::read(path).with_context(|| format!("Can't read {path}"))?;
            return Ok(Val::Bytes(bytes));
        }
        parse(word, kind).with_context(|| format!("Bad argument {name:?} of {}", function.name))
    })
    .collect()
}

/// Calls a function, or runs the component as a program.
pub(super) fn call(args: &SandboxCallArgs) -> Result<u8> {
    no_debugging(args)?;
    let mut component = component(&args.guest, Some(&args.limits), &grants(args))?;
    let ended = match args.function.as_deref().unwrap_or(PROGRAM) {
        PROGRAM => match component.run() {
            Err(WasmError::NoExport(_)) => {
                bail!("The component is no program: it exports no `wasi:cli/run`")
            }
            ended => ended.map(|code| (None, code as u8)),
        },
        name => {
            let function = exported(&mut component, name)?;
            let values = values(&function, &args.arguments)?;
            let ended = component.call_values(&function.name, &values);
            ended.map(|value| {
                // A function that says that it failed is one that failed.
                let failed = matches!(value, Some(Val::Result(Err(_))));
                (value, u8::from(failed))
            })
        }
    };
    match ended {
        Ok((value, status)) => {
            if let Some(value) = value {
                print(&value, args.json)?;
            }
            Ok(status)
        }
        Err(error) => Ok(refused(error)),
    }
}

/// As for other guests: strings and bytes as they are, all else as a line, in WAVE.
fn print(value: &Val, json: bool) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match value {
        _ if json => writeln!(out, "{}", to_json(value)),
        Val::Bytes(bytes) => out.write_all(bytes),
        Val::String(text) => writeln!(out, "{text}"),
        other => writeln!(out, "{other}"),
    }
    .and_then(|()| out.flush())
    .context("Can't write the result")
}

/// Tells what a component has and imports, in the notation of WIT.
pub(super) fn inspect(args: &SandboxInspectArgs) -> Result<u8> {
    const RUNTIME: &str = "WebAssembly component";
    let grants = skerry_sandbox::component::Grants::new();
    let mut component = component(&args.guest, None, &grants)?;
    let (exports, imports) = (component.exports()?, component.imports()?);
    let mut out = std::io::stdout().lock();
    if args.format == Format::Json {
        let told = |functions: &[Func]| {
            let each = functions.iter().map(|function| {
                let parameters = function.parameters.iter();
                let parameters =
                    parameters.map(|(name, kind)| json!({"name": name, "kind": kind.to_string()}));
                json!({
                    "name": function.name,
                    "parameters": parameters.collect::<Vec<_>>(),
                    "returns": function.result.as_ref().map_or("()".into(), Type::to_string),
                })
            });
            each.collect::<Vec<_>>()
        };
        let all = json!({"runtime": RUNTIME, "exports": told(&exports), "imports": told(&imports)});
        writeln!(out, "{all:#}")?;
        return Ok(0);
    }
    writeln!(out, "runtime: {RUNTIME}")?;
    for (title, functions) in [("functions", &exports), ("imports", &imports)] {
        if !functions.is_empty() {
            writeln!(out, "{title}:")?;
        }
        for function in functions {
            writeln!(out, "  {function}")?;
        }
    }
    Ok(0)
}
