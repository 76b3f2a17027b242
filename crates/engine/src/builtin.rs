//! What Skerry carries with it: the guest's kernel and agent, and the demo image.

/// The guest kernel, a bzImage (GPL-2.0; sources: `guest/kernel/README.md`).
pub const KERNEL: &[u8] = include_bytes!("../../../guest/kernel/bzImage-x86_64");

/// The guest's agent, a static program (sources: `guest/agent`).
pub const AGENT: &[u8] = include_bytes!("../../../guest/agent/agent-x86_64");

/// The demo image, an OCI archive (sources and licences: `guest/demo/README.md`).
pub const DEMO: &[u8] = include_bytes!("../../../guest/demo/demo.oci.tar");

/// Name of the demo image in the store.
pub const DEMO_NAME: &str = "demo";

/// What the kernel was built from, and its checksum.
pub const KERNEL_MANIFEST: &str = include_str!("../../../guest/kernel/MANIFEST");

/// The checksum of what the agent was built from.
pub const AGENT_SOURCES: &str = include_str!("../../../guest/agent/agent.sources.sha256");
