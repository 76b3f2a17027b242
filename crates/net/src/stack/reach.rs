//! Where the guest gets to, and what its name server tells it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use smoltcp::time::Instant;

use super::neighbours::place_of;
use super::{DNS_PORT, Stack};
use crate::address::Place;
use crate::dns::{self, Question, Verdict};
use crate::outlet::Unreachable;
use crate::policy::{DenialReason, NetworkMode, Policy};
use crate::wire;

/// Hears what name servers answer.
pub(crate) struct Heard<'a> {
    policy: &'a mut Policy,
    pub(crate) now: Instant,
}

impl<'a> Heard<'a> {
    pub(crate) fn new(policy: &'a mut Policy, now: Instant) -> Self {
        Self { policy, now }
    }

    /// Notes what an answer to one of `questions` says. `false`: it answers none of them, and where names
    /// are restricted it is not for the guest.
    pub(crate) fn answer(&mut self, questions: &[Vec<u8>], answer: &[u8]) -> bool {
        let mut asked = questions.iter().filter_map(|asked| dns::question(asked));
        let Some(question) = asked.find(|question| question.is_answered_by(answer)) else {
            return !self.policy.has_names();
        };
        for (address, ttl) in question.addresses(answer) {
            self.policy.learn(&question.name, address, ttl, self.now);
        }
        true
    }
}

impl Stack {
    /// Where a packet to `peer` goes; an error is why it goes nowhere.
    pub(super) fn target(
        &mut self,
        protocol: u8,
        peer: SocketAddr,
    ) -> Result<SocketAddr, Unreachable> {
        let there = match place_of(&self.segments, peer.ip()) {
            Place::Dns if self.policy.mode() == NetworkMode::None => {
                self.deny(protocol, peer, DenialReason::Reach);
                return Err(Unreachable::Prohibited);
            }
            // Only questions in datagrams are looked into.
            Place::Dns if protocol == wire::TCP && self.policy.has_names() => {
                return Err(Unreachable::Port);
            }
            Place::Dns if peer.port() == DNS_PORT => {
                let servers = self.resolvers.servers();
                let server = servers.get(self.resolver % servers.len().max(1));
                return server.copied().ok_or(Unreachable::Host);
            }
            Place::Dns => return Err(Unreachable::Port),
            Place::Gateway => {
                let address: IpAddr = match peer.ip() {
                    IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                    IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
                };
                SocketAddr::new(address, peer.port())
            }
            Place::Remote => peer,
        };
        match self
            .policy
            .check((peer.ip(), there.ip()), Some(there.port()), self.now())
        {
            Ok(()) => Ok(there),
            Err(reason) => {
                self.deny(protocol, peer, reason);
                Err(Unreachable::Prohibited)
            }
        }
    }

    /// Counts and notes that the guest may not go somewhere.
    pub(super) fn deny(&mut self, protocol: u8, peer: SocketAddr, reason: DenialReason) {
        let counters = &mut self.counters;
        let (name, count) = match protocol {
            wire::TCP => ("tcp", &mut counters.denied_tcp),
            wire::UDP => ("udp", &mut counters.denied_udp),
            _ => ("icmp", &mut counters.denied_icmp),
        };
        *count += 1;
        match reason {
            DenialReason::Reach => counters.denied_by_reach += 1,
            DenialReason::Rule => counters.denied_by_rule += 1,
            DenialReason::Unlisted => counters.denied_unlisted += 1,
            DenialReason::Rebinding => counters.denied_rebinding += 1,
            DenialReason::Name => counters.denied_names += 1,
        }
        self.policy.note(name, peer, reason);
    }

    /// The answer to a message for the name server that goes no further.
    pub(super) fn own_answer(&mut self, message: &[u8]) -> Option<Vec<u8>> {
        let Some(question) = dns::question(message) else {
            // What isn't understood could ask for anything.
            let restricted = self.policy.has_names();
            return restricted.then(|| dns::not_understood(message))?;
        };
        let neighbours = self.neighbours(&question.name);
        if !neighbours.is_empty() {
            return Some(question.reply(Verdict::Found, &neighbours));
        }
        if self.policy.mode() != NetworkMode::None && self.policy.allows_name(&question.name) {
            return None;
        }
        self.deny_name(&question);
        Some(question.reply(Verdict::NoSuchName, &[]))
    }

    fn deny_name(&mut self, question: &Question) {
        self.counters.denied_names += 1;
        self.policy.note_name(&question.name);
    }
}
