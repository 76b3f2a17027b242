//! The committed program belongs to the sources beside it.

#[path = "common/sources.rs"]
mod sources;

use sha2::{Digest, Sha256};

#[test]
fn the_committed_agent_was_built_from_these_sources() {
    let directory = sources::repository().join("guest/agent");
    let record = std::fs::read_to_string(directory.join("agent.sources.sha256")).unwrap();
    let field = |name: &str| {
        let line = record.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_default().trim().to_owned()
    };
    let program = std::fs::read(directory.join("agent-x86_64")).unwrap();
    let digest = Sha256::digest(&program);
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(
        field("program "),
        digest,
        "agent-x86_64 is not the one that build.sh recorded"
    );
    assert_eq!(
        field("sources "),
        sources::checksum(),
        "the agent's sources changed: run guest/agent/build.sh and commit agent-x86_64 with it"
    );
    assert!(program.starts_with(b"\x7fELF"));
}
