//! `skerry sandbox`: functions in virtual machines of their own.

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;
use skerry_sandbox::{Backend, Builder, CallError, Function, HostFunctions, Sandbox, Value};

use crate::args::{
    Format, HypervisorArg, SandboxArgs, SandboxBenchArgs, SandboxCallArgs, SandboxGuestArgs,
    SandboxInspectArgs, SandboxLimitArgs, SandboxVerb,
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

fn builder(args: &SandboxGuestArgs) -> Builder {
    let backend = match args.hypervisor {
        HypervisorArg::Auto => Backend::Auto,
        HypervisorArg::Kvm => Backend::Kvm,
        HypervisorArg::Soft => Backend::Soft,
    };
    Sandbox::builder()
        .guest(args.guest.as_path())
        .backend(backend)
        .heap(args.heap.0)
        .stack(args.stack.0)
        .buffers(args.buffers.0)
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
    let names: Vec<_> = description
        .exports
        .iter()
        .map(|f| f.name.as_str())
        .collect();
    bail!(
        "The guest has no function {name:?}; it has: {}",
        names.join(", ")
    )
}

fn call(args: &SandboxCallArgs) -> Result<u8> {
    let mut sandbox = limited(builder(&args.guest), &args.limits).build()?;
    let function = signature(&sandbox, &args.function)?;
    let arguments = arguments(&function, &args.arguments)?;
    match sandbox.call_dynamic(&args.function, &arguments) {
        Ok(value) => {
            print(&value, args.json)?;
            Ok(0)
        }
        Err(error) => {
            let status = match error {
                CallError::TimedOut(_) | CallError::CpuTime(_) | CallError::BudgetSpent(_) => {
                    OUT_OF_TIME
                }
                _ => FUNCTION_FAILED,
            };
            output::error(&error.into());
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
    let description = builder(&args.guest).describe()?;
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
    for row in &rows {
        let (p10, median, p90) = (row.at(0.1), row.at(0.5), row.at(0.9));
        writeln!(out, "{:<24}{p10:>12.2}{median:>12.2}{p90:>12.2}", row.name)?;
    }
    Ok(0)
}
