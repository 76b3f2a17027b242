//! Untrusted plug-ins in a loop: each call has a time limit, and whatever a plug-in does, the next one starts
//! clean.
//!
//! ```text
//! cargo run --release -p skerry-sandbox --example plugins -- [ROUNDS]
//! ```

mod common;

use std::time::{Duration, Instant};

use skerry_sandbox::{CallError, Sandbox};

const PLUGINS: [&str; 5] = ["word_count", "picky", "wild", "greedy", "endless"];
const TEXT: &str = "the quick brown fox jumps over the lazy dog";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let rounds: u32 = match std::env::args().nth(1) {
        Some(rounds) => rounds.parse()?,
        None => 3,
    };
    let mut sandbox = Sandbox::builder()
        .guest(common::guest()?)
        .heap(4 << 20)
        .call_timeout(Duration::from_millis(50))
        .host_fn("lookup", |_: String| None::<String>)
        .build()?;
    let clean = sandbox.snapshot()?;
    for round in 1..=rounds {
        println!("round {round}");
        for plugin in PLUGINS {
            let started = Instant::now();
            let ended = sandbox.call::<String>(plugin, (TEXT,));
            let took = started.elapsed();
            let said = match &ended {
                Ok(text) => text.clone(),
                Err(CallError::Failed(why)) => format!("refused: {why}"),
                Err(error) => format!("stopped: {error}"),
            };
            // Also after a call that went well: a plug-in may leave something for the next.
            sandbox.restore(&clean)?;
            println!(
                "  {plugin:<12}{:>10.1} µs  {said}",
                took.as_nanos() as f64 / 1000.0
            );
        }
    }
    let calls = 20_000;
    let started = Instant::now();
    for _ in 0..calls {
        sandbox.call::<String>("word_count", (TEXT,))?;
        sandbox.restore(&clean)?;
    }
    let each = started.elapsed().as_nanos() as f64 / 1000.0 / f64::from(calls);
    println!(
        "a call and a restore: {each:.1} µs, {:.0} a second",
        1e6 / each
    );
    Ok(())
}
