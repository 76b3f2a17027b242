//! Packets to and from machines that share a network with this one.

use std::net::IpAddr;

use rustix::event::epoll::EventFlags;

use super::{SEGMENT_SHIFT, SEGMENTS, Stack};
use crate::address::{Place, place};
use crate::segment::{Segment, Watch};
use crate::wire::Packet;

/// What epoll calls the links of a segment; the link's number is added.
pub(super) fn segment_base(number: usize) -> u64 {
    SEGMENTS | (number as u64) << SEGMENT_SHIFT
}

/// The segment that an address is of, but for its gateway's.
pub(super) fn segment_of(segments: &[Segment], address: IpAddr) -> Option<usize> {
    let of = |segment: &Segment| segment.contains(address) && !segment.is_gateway(address);
    segments.iter().position(of)
}

/// Whether an address is of a shared network and not the guest's own: the gateway answers for it.
pub(super) fn is_of_neighbour(segments: &[Segment], address: IpAddr) -> bool {
    let segment = segments.iter().find(|segment| segment.contains(address));
    segment.is_some_and(|segment| !segment.is_own(address))
}

/// What an address stands for: each shared network has one more for the gateway.
pub(super) fn place_of(segments: &[Segment], address: IpAddr) -> Place {
    let mut segments = segments.iter();
    match segments.any(|segment| segment.is_gateway(address)) {
        true => Place::Gateway,
        false => place(address),
    }
}

impl Stack {
    pub(super) fn note_segment(&mut self, token: u64, flags: EventFlags) {
        let number = usize::try_from((token & !SEGMENTS) >> SEGMENT_SHIFT).ok();
        if let Some(segment) = number.and_then(|number| self.segments.get_mut(number)) {
            // The lower half is the link's number.
            segment.note(token as u32, flags);
        }
    }

    /// Sends a packet of the guest's to the machine that has its target.
    pub(super) fn pass_to_neighbour(&mut self, number: usize, packet: &Packet<'_>) {
        let watch = Watch {
            epoll: &self.epoll,
            base: segment_base(number),
        };
        let Some(segment) = self.segments.get_mut(number) else {
            return;
        };
        match segment.send(packet, &watch) {
            Ok(true) => self.counters.to_neighbours += 1,
            Ok(false) => self.counters.dropped += 1,
            Err(why) => self.outlet.unreachable(packet, why),
        }
    }

    /// Passes what neighbours sent to the guest; whether there may be more.
    pub(super) fn serve_segments(&mut self) -> bool {
        let mut more = false;
        for (number, segment) in self.segments.iter_mut().enumerate() {
            let watch = Watch {
                epoll: &self.epoll,
                base: segment_base(number),
            };
            let passed = segment.serve(&mut self.buffer, &self.outlet, &watch);
            self.counters.from_neighbours += passed.packets;
            self.counters.dropped += passed.dropped;
            more |= passed.more;
        }
        more
    }

    /// The addresses of neighbours with this name.
    pub(super) fn neighbours(&mut self, name: &str) -> Vec<IpAddr> {
        let segments = self.segments.iter_mut();
        segments.flat_map(|segment| segment.find(name)).collect()
    }
}
