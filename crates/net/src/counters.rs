//! What a network has done.

use serde::{Deserialize, Serialize};

/// Counts since the network was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(default)]
pub struct Counters {
    /// Frames that the guest sent.
    pub frames_from_guest: u64,
    /// Frames for the guest.
    pub frames_to_guest: u64,
    /// Bytes of the frames that the guest sent.
    pub bytes_from_guest: u64,
    /// Bytes of the frames for the guest.
    pub bytes_to_guest: u64,
    /// TCP connections that the guest opened and the policy let through.
    pub tcp_opened: u64,
    /// TCP connections to published ports.
    pub tcp_accepted: u64,
    /// Flows of datagrams: UDP and echo.
    pub datagram_flows: u64,
    /// Questions for the name server.
    pub dns_queries: u64,
    /// Packets to machines that share a network with this one.
    pub to_neighbours: u64,
    /// Packets from them.
    pub from_neighbours: u64,
    /// TCP connections that the policy denied.
    pub denied_tcp: u64,
    /// UDP packets that it denied.
    pub denied_udp: u64,
    /// Echo requests that it denied.
    pub denied_icmp: u64,
    /// Names that the guest may not ask for.
    pub denied_names: u64,
    /// Of these denials, those of what the network doesn't reach.
    pub denied_by_reach: u64,
    /// Those of what a rule denies.
    pub denied_by_rule: u64,
    /// Those of what no rule allows.
    pub denied_unlisted: u64,
    /// Those of addresses that may not be reached behind names that may.
    pub denied_rebinding: u64,
    /// Connections and flows that were refused for want of room or of the host's means.
    pub refused: u64,
    /// Packets that the guest sent in fragments, and that came to be whole.
    pub reassembled: u64,
    /// Packets of no use: malformed, of unknown protocols, fragments without their rest.
    pub dropped: u64,
}
