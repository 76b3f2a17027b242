//! What a WebAssembly module and a component cost, in one run: the same function as a module, which the
//! guest's wasmi compiles and runs, and as a component, which the host compiles and the guest's Pulley runs.
//!
//! ```text
//! cargo run --release -p skerry-sandbox --example webassembly -- [soft | kvm]
//! ```

use std::error::Error;
use std::time::{Duration, Instant};

use skerry_sandbox::Backend;
use skerry_sandbox::component::{self, Component, Grants};
use skerry_sandbox::wasm::Wasm;

const CORE: &str = r#"
    (func $fib (export "fib") (param i32) (result i32)
        (if (result i32) (i32.lt_u (local.get 0) (i32.const 2))
            (then (local.get 0))
            (else (i32.add
                (call $fib (i32.sub (local.get 0) (i32.const 1)))
                (call $fib (i32.sub (local.get 0) (i32.const 2)))))))"#;

/// Median of so many.
fn median<T>(
    count: usize,
    mut what: impl FnMut() -> Result<T, Box<dyn Error>>,
) -> Result<Duration, Box<dyn Error>> {
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let began = Instant::now();
        let made = what()?;
        times.push(began.elapsed());
        drop(made);
    }
    times.sort_unstable();
    Ok(times[count / 2])
}

fn main() -> Result<(), Box<dyn Error>> {
    let backend: Backend = match std::env::args().nth(1) {
        Some(name) => name.parse()?,
        None => Backend::Soft,
    };
    let grants = Grants::new();
    let module = wat::parse_str(format!("(module {CORE})"))?;
    let whole = wat::parse_str(format!(
        r#"(component (core module $m {CORE}) (core instance $i (instantiate $m))
        (func (export "fib") (param "n" u32) (result u32) (canon lift (core func $i "fib"))))"#
    ))?;
    let artifact = component::compile(&whole, false)?;
    let make_module = || Wasm::builder().module(module.as_slice()).backend(backend);
    let make_component = || {
        Component::builder()
            .compiled(artifact.as_slice())
            .backend(backend)
    };

    let mut rows = Vec::new();
    let compiled = median(20, || Ok(component::compile(&whole, false)?))?;
    rows.push(("compile on the host", None, compiled));
    rows.push((
        "create, without that",
        Some(median(20, || Ok(make_module().build()?))?),
        median(20, || Ok(make_component().build()?))?,
    ));
    let (mut wasm, mut component) = (make_module().build()?, make_component().build()?);
    wasm.call::<u32>("fib", (20_u32,))?;
    component.call::<u32>("fib", (20_u32,))?;
    let (wasm_kept, component_kept) = (wasm.snapshot()?, component.snapshot()?);
    rows.push((
        "create from a snapshot",
        Some(median(100, || {
            Ok(Wasm::from_snapshot_on(&wasm_kept, &grants, backend)?)
        })?),
        median(100, || {
            Ok(Component::from_snapshot_on(
                &component_kept,
                &grants,
                backend,
            )?)
        })?,
    ));
    for (name, count, n) in [("call, fib(1)", 2000, 1_u32), ("call, fib(25)", 15, 25)] {
        rows.push((
            name,
            Some(median(count, || Ok(wasm.call::<u32>("fib", (n,))?))?),
            median(count, || Ok(component.call::<u32>("fib", (n,))?))?,
        ));
    }
    println!(
        "{:<28}{:>14}{:>14}",
        format!("on {backend}, µs"),
        "module",
        "component"
    );
    let micros = |time: Duration| format!("{:.1}", time.as_nanos() as f64 / 1000.0);
    for (name, module, component) in rows {
        let module = module.map_or("-".into(), micros);
        println!("{name:<28}{module:>14}{:>14}", micros(component));
    }
    Ok(())
}
