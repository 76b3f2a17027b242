//! Prints the checksum of the agent's sources and of the committed program, for `build.sh`.

#[path = "../tests/common/sources.rs"]
mod sources;

use sha2::{Digest, Sha256};

fn main() {
    let program = std::fs::read(sources::repository().join("guest/agent/agent-x86_64"));
    let digest = Sha256::digest(program.expect("agent-x86_64"));
    let program: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    println!("sources {}\nprogram {program}", sources::checksum());
}
