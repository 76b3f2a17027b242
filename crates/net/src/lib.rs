//! The network of one virtual machine, in user space and without privileges: what the guest sends ends
//! here, and goes on through ordinary sockets of the host's.
//!
//! ```text
//!  virtio-net ─ NetPort ─► Stack (own thread, one epoll loop)
//!                            ├─ ARP, neighbour discovery, DHCP, echo: answered here      (wire, local)
//!                            ├─ TCP ─ Policy ─► a smoltcp socket ◄─splice─► a host socket     (tcp)
//!                            ├─ UDP, DNS, echo ─ Policy ─► a connected host socket     (datagram)
//!                            ├─ what comes in parts is put together first              (fragments)
//!                            ├─ shared networks: the processes of other machines     (segment)
//!                            └─ published ports: listeners of the host's ─► the guest   (publish)
//! ```
//! In place of all that, a network can be the host's, by a TAP device of its ([`Tap`]).
//!
//! [`Rule`]s narrow down where the guest may go, by address and by name; names are those that its name server
//! was asked for (dns).
//!
//! The guest is 10.0.2.15 on a network of its own; 10.0.2.2 is its gateway and 10.0.2.3 its name server
//! ([`address`]). Each TCP connection has an interface of its own inside, so that a packet costs the same
//! with one connection as with thousands. All buffers are bounded: who can't get rid of data takes none.
//!
//! Called by `engine`, which plugs a [`Network`] into the machine's network card.

pub mod address;
mod counters;
mod datagram;
mod dhcp;
mod dns;
mod fragments;
#[doc(hidden)]
pub mod fuzz;
mod local;
mod network;
mod outlet;
mod policy;
mod publish;
mod resolvers;
mod rules;
mod segment;
mod stack;
mod tap;
mod tcp;
mod wire;

pub use counters::Counters;
pub use network::{Network, NetworkError, Options};
pub use policy::{Denial, DenialReason, NetworkMode};
pub use publish::{Mapping, Protocol, Published};
pub use resolvers::of_host as resolvers_of_host;
pub use rules::{Destination, NamePattern, Rule, RuleError, parse_network};
pub use segment::{Attached, Lease, Member, Segment, Subnets, members};
pub use tap::{OnTap, Tap, TapError, TapProbe, probe_taps};
