//! `skerry sandbox`: functions in virtual machines of their own.

mod bench;
mod component;
mod script;
mod wasm;

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use skerry_sandbox::component::is_component;
use skerry_sandbox::{Backend, Builder, CallError, DebugListener, Function, Sandbox, Value};

use crate::args::{
    Format, HypervisorArg, SandboxArgs, SandboxCallArgs, SandboxGuestArgs, SandboxInspectArgs,
    SandboxLimitArgs, SandboxVerb,
};
use crate::output;

/// A function that ended with an error of its own, or by one of its guest's.
const FUNCTION_FAILED: u8 = 1;
/// As `timeout` has it.
const OUT_OF_TIME: u8 = 124;

/// Does what is asked.
pub fn execute(args: &SandboxArgs) -> Result<u8> {
    match &args.verb {
        SandboxVerb::Call(args) => call(args),
        SandboxVerb::Inspect(args) => inspect(args),
        SandboxVerb::Bench(args) => bench::bench(args),
    }
}

fn backend(hypervisor: HypervisorArg) -> Backend {
    match hypervisor {
        HypervisorArg::Auto => Backend::Auto,
        HypervisorArg::Kvm => Backend::Kvm,
        HypervisorArg::Soft => Backend::Soft,
    }
}

fn builder(args: &SandboxGuestArgs) -> Builder {
    let mut builder = Sandbox::builder()
        .guest(args.guest.as_path())
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

fn limited(mut builder: Builder, limits: &SandboxLimitArgs) -> Builder {
    if let Some(timeout) = &limits.timeout {
        builder = builder.call_timeout(timeout.0).init_timeout(timeout.0);
    }
    if let Some(time) = &limits.cpu_time {
        builder = builder.call_cpu_time(time.0);
    }
    if let Some(instructions) = limits.instructions {
        builder = builder.call_instructions(instructions);
    }
    builder
}

/// The arguments, as the function's signature has them.
fn arguments(function: &Function, words: &[String]) -> Result<Vec<Value>> {
    if words.len() != function.parameters.len() {
        bail!(
            "{function} takes {} arguments, and {} were given",
            function.parameters.len(),
            words.len()
        );
    }
    let each = function.parameters.iter().zip(words);
    each.map(|(parameter, word)| {
        if parameter.kind == "bytes"
            && let Some(path) = word.strip_prefix('@')
        {
            let bytes = std::fs::read(path).with_context(|| format!("Can't read {path}"))?;
            return Ok(Value::Bytes(bytes));
        }
        Value::parse(word, &parameter.kind)
            .with_context(|| format!("Bad argument {:?} of {function}", parameter.name))
    })
    .collect()
}

fn signature(sandbox: &Sandbox, name: &str) -> Result<Function> {
    if let Some(function) = sandbox.function(name) {
        return Ok(function.clone());
    }
    let description = sandbox.description();
    let mut names: Vec<_> = description
        .exports
        .iter()
        .map(|f| f.name.as_str())
        .collect();
    // Theirs is the linker's order.
    names.sort_unstable();
    bail!(
        "The guest has no function {name:?}; it has: {}",
        names.join(", ")
    )
}

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// A guest of its own.
    Program,
    /// WebAssembly, which a guest that comes with Skerry runs.
    Module,
    /// WebAssembly, which another runs.
    Component,
    /// Text, which another runs; told by its name.
    Script,
}

fn form(path: &Path) -> Result<Form> {
    if path
        .extension()
        .is_some_and(|extension| extension == "rhai")
    {
        return Ok(Form::Script);
    }
    let mut header = Vec::new();
    let file = File::open(path).with_context(|| format!("Can't read the guest {path:?}"))?;
    file.take(8)
        .read_to_end(&mut header)
        .with_context(|| format!("Can't read the guest {path:?}"))?;
    Ok(match header.starts_with(b"\0asm") {
        true if is_component(&header) => Form::Component,
        true => Form::Module,
        false => Form::Program,
    })
}

/// Where gdb will connect.
fn listener(place: &str) -> Result<DebugListener> {
    let listener = match place.contains('/') {
        true => DebugListener::unix(place),
        false => DebugListener::tcp(place),
    };
    let listener = listener.with_context(|| format!("Can't listen for gdb at {place}"))?;
    let at = listener.local_address();
    let at = at.map_or_else(|| place.to_owned(), |address| address.to_string());
    output::note(&format!("gdb: target remote {at}"));
    Ok(listener)
}

/// The exit status for a call that failed.
fn failed(error: &CallError) -> u8 {
    match error {
        CallError::TimedOut(_) | CallError::CpuTime(_) | CallError::BudgetSpent(_) => OUT_OF_TIME,
        _ => FUNCTION_FAILED,
    }
}

fn call(args: &SandboxCallArgs) -> Result<u8> {
    let form = form(&args.guest.guest)?;
    match form {
        Form::Component => return component::call(args),
        Form::Script => return script::call(args),
        Form::Module | Form::Program => {}
    }
    let Some(function) = args.function.as_deref() else {
        bail!("Which function? Only a script (.rhai) and a component run without one");
    };
    if form == Form::Module {
        return wasm::call(args, function);
    }
    if !args.grants.is_empty() {
        bail!(
            "--grant is for WebAssembly, and {:?} is none",
            args.guest.guest
        );
    }
    let mut builder = limited(builder(&args.guest), &args.limits);
    if let Some(place) = &args.gdb {
        builder = builder.gdb(listener(place)?);
    }
    if let Some(folder) = &args.core_dumps {
        builder = builder.core_dumps(folder);
    }
    let mut sandbox = builder.build()?;
    let function = signature(&sandbox, function)?;
    let arguments = arguments(&function, &args.arguments)?;
    match sandbox.call_dynamic(&function.name, &arguments) {
        Ok(value) => {
            print(&value, args.json)?;
            Ok(0)
        }
        Err(error) => {
            let status = failed(&error);
            output::error(&error.into());
            if let Some(path) = sandbox.last_core_dump() {
                output::note(&format!("Core dump: {}", path.display()));
            }
            Ok(status)
        }
    }
}

/// The function's result, and nothing else, to stdout: bytes as they are, all else as a line.
fn print(value: &Value, json: bool) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match value {
        _ if json => writeln!(out, "{}", value.to_json()),
        Value::Unit => Ok(()),
        Value::Bytes(bytes) => out.write_all(bytes),
        Value::String(text) => writeln!(out, "{text}"),
        other => writeln!(out, "{}", other.to_json()),
    }
    .and_then(|()| out.flush())
    .context("Can't write the result")
}

fn inspect(args: &SandboxInspectArgs) -> Result<u8> {
    let description = match form(&args.guest.guest)? {
        Form::Component => return component::inspect(args),
        Form::Module => wasm::describe(&args.guest)?,
        Form::Program => builder(&args.guest).describe()?,
        Form::Script => script::describe(&args.guest)?,
    };
    let mut out = std::io::stdout().lock();
    if args.format == Format::Json {
        writeln!(out, "{}", serde_json::to_string_pretty(&description)?)?;
        return Ok(0);
    }
    writeln!(out, "runtime: {}", description.runtime)?;
    for (title, functions) in [
        ("functions", &description.exports),
        ("needs of its host", &description.imports),
    ] {
        if !functions.is_empty() {
            writeln!(out, "{title}:")?;
        }
        for function in functions {
            writeln!(out, "  {function}")?;
        }
    }
    Ok(0)
}
