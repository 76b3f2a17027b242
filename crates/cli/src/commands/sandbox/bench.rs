//! What a guest costs.

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::json;
use skerry_sandbox::component::{Component, Val};
use skerry_sandbox::script::{self, Script};
use skerry_sandbox::wasm::{self, Grants, Wasm};
use skerry_sandbox::{Backend, HostFunctions, Sandbox, Snapshot, Value};

use super::{Form, arguments, builder, component, form, signature};
use crate::args::{Format, SandboxBenchArgs, SandboxGuestArgs};

/// A guest of one form.
trait Measured: Sized {
    /// What a function is called with.
    type Values;
    fn create(args: &SandboxGuestArgs) -> Result<Self>;
    fn copy(snapshot: &Arc<Snapshot>, backend: Backend) -> Result<Self>;
    fn sandbox(&mut self) -> &mut Sandbox;
    /// What comes before it is kept and called.
    fn begin(&mut self) -> Result<()> {
        Ok(())
    }
    fn values(&mut self, function: &str, words: &[String]) -> Result<Self::Values>;
    fn call(&mut self, function: &str, values: &Self::Values) -> Result<()>;
}

impl Measured for Sandbox {
    type Values = Vec<Value>;
    fn create(args: &SandboxGuestArgs) -> Result<Self> {
        Ok(builder(args).build()?)
    }
    fn copy(snapshot: &Arc<Snapshot>, backend: Backend) -> Result<Self> {
        let functions = Arc::new(HostFunctions::new());
        Ok(Self::from_snapshot_on(snapshot, &functions, backend)?)
    }
    fn sandbox(&mut self) -> &mut Sandbox {
        self
    }
    fn values(&mut self, function: &str, words: &[String]) -> Result<Self::Values> {
        arguments(&signature(self, function)?, words)
    }
    fn call(&mut self, function: &str, values: &Self::Values) -> Result<()> {
        self.call_dynamic(function, values)?;
        Ok(())
    }
}

impl Measured for Wasm {
    type Values = Vec<wasm::Value>;
    fn create(args: &SandboxGuestArgs) -> Result<Self> {
        super::wasm::wasm(args, None, &Grants::new())
    }
    fn copy(snapshot: &Arc<Snapshot>, backend: Backend) -> Result<Self> {
        Ok(Self::from_snapshot_on(snapshot, &Grants::new(), backend)?)
    }
    fn sandbox(&mut self) -> &mut Sandbox {
        self.sandbox()
    }
    fn values(&mut self, function: &str, words: &[String]) -> Result<Self::Values> {
        super::wasm::numbers(&super::wasm::exported(self, function)?, words)
    }
    fn call(&mut self, function: &str, values: &Self::Values) -> Result<()> {
        self.call_values(function, values)?;
        Ok(())
    }
}

impl Measured for Component {
    /// With the function's whole name.
    type Values = (String, Vec<Val>);
    fn create(args: &SandboxGuestArgs) -> Result<Self> {
        component::component(args, None, &Grants::new())
    }
    fn copy(snapshot: &Arc<Snapshot>, backend: Backend) -> Result<Self> {
        Ok(Self::from_snapshot_on(snapshot, &Grants::new(), backend)?)
    }
    fn sandbox(&mut self) -> &mut Sandbox {
        self.sandbox()
    }
    fn values(&mut self, function: &str, words: &[String]) -> Result<Self::Values> {
        let function = component::exported(self, function)?;
        let values = component::values(&function, words)?;
        Ok((function.name, values))
    }
    fn call(&mut self, _: &str, (name, values): &Self::Values) -> Result<()> {
        self.call_values(name, values)?;
        Ok(())
    }
}

impl Measured for Script {
    type Values = Vec<script::Value>;
    fn create(args: &SandboxGuestArgs) -> Result<Self> {
        Ok(super::script::builder(args, &super::script::silence()).build()?)
    }
    fn copy(snapshot: &Arc<Snapshot>, backend: Backend) -> Result<Self> {
        let silence = super::script::silence();
        Ok(Self::from_snapshot_on(snapshot, &silence, backend)?)
    }
    fn sandbox(&mut self) -> &mut Sandbox {
        self.sandbox()
    }
    fn begin(&mut self) -> Result<()> {
        self.run_value()?;
        Ok(())
    }
    fn values(&mut self, _: &str, words: &[String]) -> Result<Self::Values> {
        super::script::arguments(words)
    }
    fn call(&mut self, function: &str, values: &Self::Values) -> Result<()> {
        self.call_values(function, values)?;
        Ok(())
    }
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

/// Measures a guest, whatever it is.
pub(super) fn bench(args: &SandboxBenchArgs) -> Result<u8> {
    let (backend, rows) = match form(&args.guest.guest)? {
        Form::Program => rows::<Sandbox>(args)?,
        Form::Module => rows::<Wasm>(args)?,
        Form::Component => rows::<Component>(args)?,
        Form::Script => rows::<Script>(args)?,
    };
    tell(args, backend, &rows)
}

fn rows<M: Measured>(args: &SandboxBenchArgs) -> Result<(Backend, Vec<Row>)> {
    let creations = args.count.min(1000);
    let mut rows = vec![measure("create", creations, || {
        timed(|| M::create(&args.guest))
    })?];
    let mut guest = M::create(&args.guest)?;
    guest.begin()?;
    let snapshot = guest.sandbox().snapshot()?;
    let backend = guest.sandbox().backend();
    rows.push(measure("create from a snapshot", creations, || {
        timed(|| M::copy(&snapshot, backend))
    })?);
    match &args.function {
        None => rows.push(measure("restore", args.count, || {
            Ok(timed(|| guest.sandbox().restore(&snapshot))?)
        })?),
        Some(name) => {
            let values = guest.values(name, &args.arguments)?;
            rows.push(measure("call", args.count, || {
                timed(|| guest.call(name, &values))
            })?);
            rows.push(measure("restore after a call", args.count, || {
                guest.sandbox().restore(&snapshot)?;
                guest.call(name, &values)?;
                Ok(timed(|| guest.sandbox().restore(&snapshot))?)
            })?);
        }
    }
    Ok((backend, rows))
}

fn tell(args: &SandboxBenchArgs, backend: Backend, rows: &[Row]) -> Result<u8> {
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
