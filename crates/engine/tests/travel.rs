//! A processor's state goes from one backend to another and back.
//!
//! Where `/dev/kvm` can't be opened there is no second backend; the test says so.

use skerry_hypervisor::Hypervisor;
use skerry_hypervisor::conformance::travel;
use skerry_hypervisor_kvm::Kvm;
use skerry_hypervisor_soft::Soft;

#[test]
fn states_travel_between_kvm_and_soft() {
    let soft = Soft::open().expect("a processor in software works anywhere");
    match Kvm::open() {
        Ok(kvm) => {
            travel::there_and_back(&kvm, &soft);
            travel::there_and_back(&soft, &kvm);
        }
        Err(why) => println!("skipped states_travel_between_kvm_and_soft: {why}"),
    }
}

#[test]
fn states_travel_between_machines_of_one_backend() {
    let soft = Soft::open().expect("a processor in software works anywhere");
    travel::there_and_back(&soft, &soft);
}
