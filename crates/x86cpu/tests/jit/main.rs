//! What compiled code must get right beyond single programs: other processors, code that changes,
//! requests at any moment, addresses at every edge. Each test runs interpreted and compiled.
#![expect(unsafe_code, reason = "assembled guest code")]

#[path = "../common/apic.rs"]
mod apic;
#[path = "../common/assemble.rs"]
mod assemble;
mod atomics;
mod budget;
mod changes;
mod cross;
mod edges;
mod eviction;
mod litmus;
mod loops;
mod machine;
mod remap;
mod requests;
mod system;
