//! `skerry sandbox`: functions in virtual machines of their own.

mod script;

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;
use skerry_sandbox::wasm::{self, Exported, Grants, Kind, Wasm, WasmError};
use skerry_sandbox::{
    Backend, Builder, CallError, DebugListener, Description, Function, HostFunctions, Parameter,
    Sandbox, Value,
};

use crate::args::{
    Format, GrantArg, HypervisorArg, SandboxArgs, SandboxBenchArgs, SandboxCallArgs,
    SandboxGuestArgs, SandboxInspectArgs, SandboxLimitArgs, SandboxVerb,
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
        SandboxVerb::Bench(args) => bench(args),
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

/// Whether a file is a WebAssembly module, which the guest that comes with Skerry runs.
fn is_wasm(path: &Path) -> Result<bool> {
    let mut magic = Vec::new();
    let file = File::open(path).with_context(|| format!("Can't read the guest {path:?}"))?;
    file.take(4)
        .read_to_end(&mut magic)
        .with_context(|| format!("Can't read the guest {path:?}"))?;
    Ok(magic == *b"\0asm")
}

fn grants(args: &SandboxCallArgs) -> Grants {
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

fn wasm(
    args: &SandboxGuestArgs,
    limits: Option<&SandboxLimitArgs>,
    grants: &Grants,
) -> Result<Wasm> {
    if args.stack.is_some() || args.buffers.is_some() {
        bail!(
            "--stack and --buffers are for programs: those of the guest that runs WebAssembly modules are fixed"
        );
    }
    let mut builder = Wasm::builder()
        .module(args.guest.as_path())
        .grants(grants)
        .backend(backend(args.hypervisor));
    if let Some(heap) = &args.heap {
        builder = builder.heap(heap.0);
    }
    if let Some(limits) = limits {
        if let Some(timeout) = &limits.timeout {
            builder = builder.call_timeout(timeout.0);
        }
        if let Some(time) = &limits.cpu_time {
            builder = builder.call_cpu_time(time.0);
        }
    }
    let mut wasm = builder.build()?;
    if let Some(limits) = limits {
        wasm.sandbox().set_call_instructions(limits.instructions)?;
    }
    Ok(wasm)
}

/// The numbers that a module's function takes.
fn numbers(function: &Exported, words: &[String]) -> Result<Vec<wasm::Value>> {
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

fn call_wasm(args: &SandboxCallArgs) -> Result<u8> {
    if args.gdb.is_some() || args.core_dumps.is_some() {
        bail!("--gdb and --core-dumps are for programs: a WebAssembly module isn't x86 code");
    }
    const PROGRAM: &str = "_start";
    let mut wasm = wasm(&args.guest, Some(&args.limits), &grants(args))?;
    let ended = match function_name(args)? {
        PROGRAM => wasm.run().map(|code| (Vec::new(), code as u8)),
        name => {
            let exports = wasm.exports()?;
            let function = exports.iter().find(|function| function.name == name);
            let Some(function) = function else {
                let names: Vec<_> = exports.iter().map(|f| f.name.as_str()).collect();
                bail!(
                    "The module exports no function {name:?}; it has: {}",
                    names.join(", ")
                );
            };
            let values = numbers(function, &args.arguments)?;
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
        Err(error) => {
            let status = match &error {
                WasmError::Call(error) => failed(error),
                _ => FUNCTION_FAILED,
            };
            output::error(&error.into());
            Ok(status)
        }
    }
}

/// The exit status for a call that failed.
fn failed(error: &CallError) -> u8 {
    match error {
        CallError::TimedOut(_) | CallError::CpuTime(_) | CallError::BudgetSpent(_) => OUT_OF_TIME,
        _ => FUNCTION_FAILED,
    }
}

/// The function to call: only a script can do without.
fn function_name(args: &SandboxCallArgs) -> Result<&str> {
    let name = args.function.as_deref();
    name.context("A function's name is missing: only a script (.rhai) is run without")
}

fn call(args: &SandboxCallArgs) -> Result<u8> {
    if script::is_script(&args.guest.guest) {
        return script::call(args);
    }
    if is_wasm(&args.guest.guest)? {
        return call_wasm(args);
    }
    if !args.grants.is_empty() {
        bail!(
            "--grant is for WebAssembly modules, and {:?} is none",
            args.guest.guest
        );
    }
    let name = function_name(args)?;
    let mut builder = limited(builder(&args.guest), &args.limits);
    if let Some(place) = &args.gdb {
        builder = builder.gdb(listener(place)?);
    }
    if let Some(folder) = &args.core_dumps {
        builder = builder.core_dumps(folder);
    }
    let mut sandbox = builder.build()?;
    let function = signature(&sandbox, name)?;
    let arguments = arguments(&function, &args.arguments)?;
    match sandbox.call_dynamic(name, &arguments) {
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

/// A module's functions, as those of any guest are told.
fn describe_wasm(args: &SandboxGuestArgs) -> Result<Description> {
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

fn inspect(args: &SandboxInspectArgs) -> Result<u8> {
    let guest = &args.guest;
    let description = if script::is_script(&guest.guest) {
        script::describe(guest)?
    } else if is_wasm(&guest.guest)? {
        describe_wasm(guest)?
    } else {
        builder(guest).describe()?
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

/// Durations of one thing.
struct Row {
    name: &'static str,
    times: Vec<Duration>,
}

fn measure(
    name: &'static str,
    count: u32,
    mut what: impl FnMut() -> Result<Duration>,
) -> Result<Row> {
    let mut times = (0..count).map(|_| what()).collect::<Result<Vec<_>>>()?;
    times.sort_unstable();
    Ok(Row { name, times })
}

impl Row {
    fn at(&self, part: f64) -> f64 {
        let index = (self.times.len().saturating_sub(1)) as f64 * part;
        let time = self.times.get(index as usize).copied().unwrap_or_default();
        time.as_nanos() as f64 / 1000.0
    }
}

/// How long it takes, and what it gives, which is dropped after the clock has stopped.
fn timed<T, E>(what: impl FnOnce() -> Result<T, E>) -> Result<Duration, E> {
    let started = Instant::now();
    let made = what()?;
    let took = started.elapsed();
    drop(made);
    Ok(took)
}

fn bench(args: &SandboxBenchArgs) -> Result<u8> {
    let (backend, rows) = match script::is_script(&args.guest.guest) {
        true => script::bench(args)?,
        false => bench_program(args)?,
    };
    print_rows(args, backend, &rows)
}

fn bench_program(args: &SandboxBenchArgs) -> Result<(Backend, Vec<Row>)> {
    if is_wasm(&args.guest.guest)? {
        bail!(
            "bench measures programs and scripts, and {:?} is a WebAssembly module",
            args.guest.guest
        );
    }
    let functions = Arc::new(HostFunctions::new());
    let creations = args.count.min(1000);
    let mut rows = vec![measure("create", creations, || {
        Ok(timed(|| builder(&args.guest).build())?)
    })?];
    let mut sandbox = builder(&args.guest).build()?;
    let snapshot = sandbox.snapshot()?;
    let backend = sandbox.backend();
    rows.push(measure("create from a snapshot", creations, || {
        Ok(timed(|| {
            Sandbox::from_snapshot_on(&snapshot, &functions, backend)
        })?)
    })?);
    match &args.function {
        None => rows.push(measure("restore", args.count, || {
            Ok(timed(|| sandbox.restore(&snapshot))?)
        })?),
        Some(name) => {
            let function = signature(&sandbox, name)?;
            let values = arguments(&function, &args.arguments)?;
            rows.push(measure("call", args.count, || {
                Ok(timed(|| sandbox.call_dynamic(name, &values))?)
            })?);
            rows.push(measure("restore after a call", args.count, || {
                sandbox.restore(&snapshot)?;
                sandbox.call_dynamic(name, &values)?;
                Ok(timed(|| sandbox.restore(&snapshot))?)
            })?);
        }
    }
    Ok((backend, rows))
}

fn print_rows(args: &SandboxBenchArgs, backend: Backend, rows: &[Row]) -> Result<u8> {
    let mut out = std::io::stdout().lock();
    if args.format == Format::Json {
        let rows: serde_json::Map<_, _> = rows
            .iter()
            .map(|row| {
                let (p10, median, p90) = (row.at(0.1), row.at(0.5), row.at(0.9));
                let row_json = json!({"p10_us": p10, "median_us": median, "p90_us": p90});
                (row.name.to_owned(), row_json)
            })
            .collect();
        let all = json!({"hypervisor": backend.name(), "count": args.count, "rows": rows});
        writeln!(out, "{all:#}")?;
        return Ok(0);
    }
    writeln!(
        out,
        "{:<24}{:>12}{:>12}{:>12}",
        format!("on {backend}, µs"),
        "p10",
        "median",
        "p90"
    )?;
    for row in rows {
        let (p10, median, p90) = (row.at(0.1), row.at(0.5), row.at(0.9));
        writeln!(out, "{:<24}{p10:>12.2}{median:>12.2}{p90:>12.2}", row.name)?;
    }
    Ok(0)
}
