//! The conformance suite on this machine's KVM.
//!
//! Where `/dev/kvm` can't be opened every case is skipped by name; where it only emulates, those
//! that it can't run. To run all of it on a machine without real KVM:
//!
//! ```text
//! cargo test -p skerry-hypervisor-kvm --test conformance --no-run
//! ../shared/tools/kvm-testbed.sh --mem 1500 -- target/debug/deps/conformance-…
//! ```

use std::process::ExitCode;

use skerry_hypervisor::Hypervisor;
use skerry_hypervisor::conformance::{self, Needs};
use skerry_hypervisor_kvm::Kvm;

fn main() -> ExitCode {
    let kvm = match Kvm::open() {
        Ok(kvm) => kvm,
        Err(why) => {
            for case in conformance::cases::<Kvm>() {
                println!("skipped {}: {why}", case.name);
            }
            return ExitCode::SUCCESS;
        }
    };
    match Kvm::probe() {
        Ok(_) => conformance::main(kvm, &[]),
        Err(why) => {
            let beyond = Needs::SSE | Needs::AVX | Needs::SPEED | Needs::EXACT;
            conformance::main(kvm, &[(beyond, why.reason.as_str())])
        }
    }
}
