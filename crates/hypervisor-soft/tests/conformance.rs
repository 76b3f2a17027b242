//! The conformance suite on the software processor: all of it.

use std::process::ExitCode;

use skerry_hypervisor::Hypervisor;
use skerry_hypervisor::conformance;
use skerry_hypervisor_soft::Soft;

fn main() -> ExitCode {
    match Soft::open() {
        Ok(soft) => conformance::main(soft, &[]),
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}
