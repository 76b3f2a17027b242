//! The conformance suite on the software processor: all of it, in each way to run code.

use std::process::ExitCode;

use skerry_hypervisor::conformance;
use skerry_hypervisor::{Hypervisor, Unusable};
use skerry_hypervisor_soft::{Soft, Tuning};

fn ways() -> Result<Vec<(Option<&'static str>, Soft)>, Unusable> {
    [
        ("interpreter", Tuning::INTERPRETER),
        ("jit", Tuning::JIT),
        ("jit-stress", Tuning::STRESS),
    ]
    .into_iter()
    .map(|(name, tuning)| Ok((Some(name), Soft::open()?.with_tuning(tuning))))
    .collect()
}

fn main() -> ExitCode {
    match ways() {
        Ok(ways) => conformance::main_of_each(ways, &[]),
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}
