//! Packets in fragments (RFC 791, 3.2; RFC 8200, 4.5): what the guest sends is put together, and what is
//! longer than its card's packets taken apart.
//!
//! The guest may send any, and never the rest: what waits is bounded in number, bytes and time, and the
//! oldest goes first. Fragments that overlap make their packet void (RFC 5722), in both families.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use smoltcp::time::Instant;

use crate::wire::{self, IPV4_LEN, IPV6_LEN};

/// Packets that wait for their rest.
const MOST: usize = 64;
/// Bytes that they take, what keeps them included.
const MOST_BYTES: usize = 1 << 20;
/// Fragments of one packet.
const MOST_PIECES: usize = 1024;
/// What keeping a fragment takes besides its bytes.
const KEEPING: usize = 64;
/// How long the rest may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// The longest packet.
const LONGEST: usize = 65_535;
/// Extension headers that are looked behind.
const MOST_HEADERS: usize = 8;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;
const FRAGMENT_LEN: usize = 8;
/// Bytes that fragments are counted in.
const UNIT: usize = 8;
const MORE_V4: u16 = 0x2000;
const OFFSET_V4: u16 = 0x1fff;

/// What fragments of one packet have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    source: IpAddr,
    target: IpAddr,
    id: u32,
    protocol: u8,
}

/// A part of a packet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fragment<'a> {
    key: Key,
    offset: usize,
    more: bool,
    data: &'a [u8],
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let pair = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes(pair.try_into().ok()?))
}

impl<'a> Fragment<'a> {
    /// `None`: these bytes are no fragment; they may be a whole packet.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        match bytes.first()? >> 4 {
            4 => Self::parse_v4(bytes),
            6 => Self::parse_v6(bytes),
            _ => None,
        }
    }

    fn parse_v4(bytes: &'a [u8]) -> Option<Self> {
        let place = u16_at(bytes, 6)?;
        if place & (MORE_V4 | OFFSET_V4) == 0 {
            return None;
        }
        let header = usize::from(bytes.first()? & 15) * 4;
        let total = usize::from(u16_at(bytes, 2)?);
        if header < IPV4_LEN {
            return None;
        }
        let address = |at: usize| {
            let octets: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
            Some(Ipv4Addr::from(octets).into())
        };
        Some(Self {
            key: Key {
                source: address(12)?,
                target: address(16)?,
                id: u16_at(bytes, 4)?.into(),
                protocol: *bytes.get(9)?,
            },
            offset: usize::from(place & OFFSET_V4) * UNIT,
            more: place & MORE_V4 != 0,
            data: bytes.get(header..total)?,
        })
    }

    fn parse_v6(bytes: &'a [u8]) -> Option<Self> {
        let (mut next, mut at) = (*bytes.get(6)?, IPV6_LEN);
        for _ in 0..MOST_HEADERS {
            match next {
                HOP_BY_HOP | ROUTING | DESTINATION => {
                    next = *bytes.get(at)?;
                    let units = usize::from(*bytes.get(at.checked_add(1)?)?) + 1;
                    at = at.checked_add(units * UNIT)?;
                }
                FRAGMENT => return Self::behind(bytes, at),
                _ => return None,
            }
        }
        None
    }

    /// The fragment of an IPv6 packet whose fragment header is `at` this place.
    fn behind(bytes: &'a [u8], at: usize) -> Option<Self> {
        let address = |at: usize| {
            let octets: [u8; 16] = bytes.get(at..at + 16)?.try_into().ok()?;
            Some(Ipv6Addr::from(octets).into())
        };
        let end = IPV6_LEN + usize::from(u16_at(bytes, 4)?);
        let place = u16_at(bytes, at + 2)?;
        let id = bytes.get(at + 4..at + FRAGMENT_LEN)?;
        Some(Self {
            key: Key {
                source: address(8)?,
                target: address(24)?,
                id: u32::from_be_bytes(id.try_into().ok()?),
                protocol: *bytes.get(at)?,
            },
            offset: usize::from(place & 0xfff8),
            more: place & 1 != 0,
            data: bytes.get(at + FRAGMENT_LEN..end)?,
        })
    }
}

/// A packet that waits for its rest.
struct Partial {
    /// By where they begin; none overlaps another.
    pieces: BTreeMap<usize, Vec<u8>>,
    bytes: usize,
    /// The whole's length, once its end is there.
    total: Option<usize>,
    began: Instant,
}

impl Partial {
    fn keeps(&self) -> usize {
        self.bytes + self.pieces.len() * KEEPING
    }

    /// Takes a fragment. `false`: the packet is void.
    fn take(&mut self, fragment: &Fragment<'_>) -> bool {
        let (start, end) = (fragment.offset, fragment.offset + fragment.data.len());
        if !fragment.more && self.total.is_some_and(|total| total != end) {
            return false;
        }
        if let Some(piece) = self.pieces.get(&start)
            && piece == fragment.data
        {
            // Once more the same.
            return true;
        }
        let before = self.pieces.range(..=start).next_back();
        let after = self.pieces.range(start..).next();
        let overlaps = before.is_some_and(|(at, piece)| at + piece.len() > start)
            || after.is_some_and(|(at, _)| *at < end);
        let last = self.pieces.last_key_value();
        let reaches = last.map_or(end, |(at, piece)| end.max(at + piece.len()));
        let total = self.total.or((!fragment.more).then_some(end));
        let beyond = total.is_some_and(|total| reaches > total);
        if overlaps || beyond || self.pieces.len() == MOST_PIECES {
            return false;
        }
        self.total = total;
        self.bytes += fragment.data.len();
        self.pieces.insert(start, fragment.data.to_vec());
        true
    }

    /// The packet, if it is whole.
    fn whole(&self, key: &Key) -> Option<Vec<u8>> {
        // Without overlaps, as many bytes as there are fill it.
        let total = self.total.filter(|total| *total == self.bytes)?;
        let header = wire::ip_len(key.source);
        let mut packet = vec![0; header + total];
        for (at, piece) in &self.pieces {
            let place = packet.get_mut(header + at..header + at + piece.len())?;
            place.copy_from_slice(piece);
        }
        wire::write_ip(&mut packet, key.source, key.target, key.protocol);
        Some(packet)
    }
}

/// Packets that the guest has sent parts of.
#[derive(Default)]
pub(crate) struct Reassembly {
    partial: HashMap<Key, Partial>,
    bytes: usize,
}

impl Reassembly {
    /// Takes a part; gives the packet that it was the last of. An error is how many fragments are lost by it.
    pub(crate) fn take(
        &mut self,
        fragment: &Fragment<'_>,
        now: Instant,
    ) -> Result<Option<Vec<u8>>, u64> {
        let key = fragment.key;
        let longest = match key.source {
            IpAddr::V4(_) => LONGEST - IPV4_LEN,
            IpAddr::V6(_) => LONGEST,
        };
        let len = fragment.data.len();
        let odd = fragment.more && (len == 0 || !len.is_multiple_of(UNIT));
        if odd || fragment.offset + len > longest {
            return Err(1 + self.forget(&key));
        }
        let partial = self.partial.entry(key).or_insert_with(|| Partial {
            pieces: BTreeMap::new(),
            bytes: 0,
            total: None,
            began: now,
        });
        let before = partial.keeps();
        let good = partial.take(fragment);
        self.bytes += partial.keeps() - before;
        if !good {
            return Err(1 + self.forget(&key));
        }
        if let Some(packet) = partial.whole(&key) {
            self.forget(&key);
            return Ok(Some(packet));
        }
        let mut lost = 0;
        while self.partial.len() > MOST || self.bytes > MOST_BYTES {
            let oldest = self.partial.iter().min_by_key(|(_, partial)| partial.began);
            let Some(oldest) = oldest.map(|(key, _)| *key) else {
                break;
            };
            lost += self.forget(&oldest);
        }
        if lost > 0 { Err(lost) } else { Ok(None) }
    }

    /// Gives up packets whose rest takes too long; gives how many fragments that were.
    pub(crate) fn expire(&mut self, now: Instant) -> u64 {
        let mut lost = 0;
        while let Some((at, key)) = self.first()
            && at <= now
        {
            lost += self.forget(&key);
        }
        lost
    }

    /// When the next one is to be given up.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.first().map(|(at, _)| at)
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    fn first(&self) -> Option<(Instant, Key)> {
        let all = self.partial.iter();
        let all = all.map(|(key, partial)| (partial.began + PATIENCE.into(), *key));
        all.min_by_key(|(at, _)| *at)
    }

    /// Forgets a packet; gives how many fragments of it there were.
    fn forget(&mut self, key: &Key) -> u64 {
        let Some(partial) = self.partial.remove(key) else {
            return 0;
        };
        self.bytes -= partial.keeps();
        partial.pieces.len() as u64
    }
}

/// Takes a packet with a plain header apart into such of `mtu` bytes at most, of which there is room for
/// some behind the headers.
pub(crate) fn split(packet: &[u8], mtu: usize, id: u32, mut emit: impl FnMut(&[u8])) {
    let v6 = packet.first().is_some_and(|first| first >> 4 == 6);
    let header = if v6 { IPV6_LEN } else { IPV4_LEN };
    let own = if v6 { header + FRAGMENT_LEN } else { header };
    let Some((head, data)) = packet.split_at_checked(header) else {
        return;
    };
    let step = mtu.saturating_sub(own) / UNIT * UNIT;
    if step == 0 {
        return;
    }
    let mut fragment = Vec::with_capacity(mtu);
    for (number, part) in data.chunks(step).enumerate() {
        let offset = number * step;
        let more = offset + part.len() < data.len();
        fragment.clear();
        fragment.extend_from_slice(head);
        if v6 {
            // Neither is more than sixteen bits: the whole packet's length is not.
            let len = u16::try_from(FRAGMENT_LEN + part.len()).unwrap_or(u16::MAX);
            let place = u16::try_from(offset).unwrap_or(u16::MAX) & 0xfff8 | u16::from(more);
            let protocol = std::mem::replace(&mut fragment[6], FRAGMENT);
            fragment[4..6].copy_from_slice(&len.to_be_bytes());
            fragment.extend([protocol, 0]);
            fragment.extend(place.to_be_bytes());
            fragment.extend(id.to_be_bytes());
        } else {
            let len = u16::try_from(header + part.len()).unwrap_or(u16::MAX);
            let place = u16::try_from(offset / UNIT).unwrap_or(OFFSET_V4) & OFFSET_V4;
            let place = place | if more { MORE_V4 } else { 0 };
            fragment[2..4].copy_from_slice(&len.to_be_bytes());
            fragment[4..6].copy_from_slice(&(id as u16).to_be_bytes());
            fragment[6..8].copy_from_slice(&place.to_be_bytes());
            fragment[10..12].fill(0);
            let checksum = !wire::sum(&[&fragment]);
            fragment[10..12].copy_from_slice(&checksum.to_be_bytes());
        }
        fragment.extend_from_slice(part);
        emit(&fragment);
    }
}

/// The body of the fuzz target `net_fragments`: any bytes as packets one after the other, each behind its
/// length; and the first as one that is taken apart and comes in another order.
pub(crate) fn any_fragments(bytes: &[u8]) {
    let mut reassembly = Reassembly::default();
    let (mut rest, mut now) = (bytes, Instant::ZERO);
    while let Some((&[low, high], after)) = rest.split_first_chunk() {
        let len = usize::from(u16::from_le_bytes([low, high])).min(after.len());
        let (packet, after) = after.split_at(len);
        rest = after;
        now += Duration::from_millis(u64::from(low) * 16).into();
        reassembly.expire(now);
        if let Some(fragment) = Fragment::parse(packet)
            && let Ok(Some(whole)) = reassembly.take(&fragment, now)
        {
            assert!(whole.len() <= LONGEST + IPV6_LEN);
            assert!(
                Fragment::parse(&whole).is_none()
                    || fragment.key.protocol == FRAGMENT
                    || matches!(fragment.key.protocol, HOP_BY_HOP | ROUTING | DESTINATION)
            );
        }
        assert!(reassembly.partial.len() <= MOST && reassembly.bytes <= MOST_BYTES);
        let kept: usize = reassembly.partial.values().map(Partial::keeps).sum();
        assert_eq!(kept, reassembly.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn packet(v6: bool, body: &[u8]) -> Vec<u8> {
        let (source, target): (IpAddr, IpAddr) = match v6 {
            false => ("10.0.2.15".parse().unwrap(), "8.8.4.4".parse().unwrap()),
            true => ("fd00::1".parse().unwrap(), "2001:db8::2".parse().unwrap()),
        };
        let mut bytes = vec![0; wire::ip_len(source)];
        bytes.extend(body);
        wire::write_ip(&mut bytes, source, target, wire::UDP);
        bytes
    }

    fn parts(packet: &[u8], mtu: usize, id: u32) -> Vec<Vec<u8>> {
        let mut parts = Vec::new();
        split(packet, mtu, id, |part| parts.push(part.to_vec()));
        parts
    }

    fn take(
        reassembly: &mut Reassembly,
        part: &[u8],
        now: Instant,
    ) -> Result<Option<Vec<u8>>, u64> {
        reassembly.take(&Fragment::parse(part).expect("a fragment"), now)
    }

    proptest! {
        /// In whatever order they come, some of them twice and among those of others.
        #[test]
        fn fragments_make_what_they_were_made_of(
            v6 in any::<bool>(),
            len in prop_oneof![1300_usize..9000, 60_000_usize..65_000],
            mtu in 1280_usize..2000,
            order in any::<prop::sample::Index>(),
            twice in any::<prop::sample::Index>(),
            seed in any::<u8>(),
        ) {
            let body: Vec<u8> = (0..len).map(|at| (at as u8).wrapping_mul(31) ^ seed).collect();
            let whole = packet(v6, &body);
            let mut parts = parts(&whole, mtu, 7);
            prop_assert!(!parts.is_empty() && parts.iter().all(|part| part.len() <= mtu));
            if parts.len() < 2 {
                return Ok(());
            }
            let rotation = order.index(parts.len());
            parts.rotate_left(rotation);
            let again = parts[twice.index(parts.len())].clone();
            let position = twice.index(parts.len());
            parts.insert(position, again);
            let mut reassembly = Reassembly::default();
            let mut made = Vec::new();
            for part in &parts {
                if let Ok(Some(packet)) = take(&mut reassembly, part, Instant::ZERO) {
                    made.push(packet);
                }
            }
            prop_assert_eq!(made.len(), 1);
            prop_assert_eq!(&made[0], &whole);
        }

        #[test]
        fn nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..400), version in prop_oneof![Just(4_u8), Just(6)]) {
            let mut bytes = bytes;
            if let Some(first) = bytes.get_mut(2) {
                *first = version << 4 | 5;
            }
            any_fragments(&bytes);
        }
    }

    #[test]
    fn overlaps_make_a_packet_void() {
        for v6 in [false, true] {
            let whole = packet(v6, &[7; 4000]);
            let mut parts = parts(&whole, 1500, 1);
            // The second begins eight bytes early.
            let at = if v6 { 42 } else { 6 };
            let place = u16::from_be_bytes([parts[1][at], parts[1][at + 1]]);
            let early = place - if v6 { 8 } else { 1 };
            parts[1][at..at + 2].copy_from_slice(&early.to_be_bytes());
            let mut reassembly = Reassembly::default();
            assert_eq!(take(&mut reassembly, &parts[0], Instant::ZERO), Ok(None));
            assert_eq!(take(&mut reassembly, &parts[1], Instant::ZERO), Err(2));
            assert_eq!(take(&mut reassembly, &parts[2], Instant::ZERO), Ok(None));
            let kept: usize = reassembly.partial.values().map(Partial::keeps).sum();
            assert_eq!(reassembly.bytes, kept);
        }
    }

    #[test]
    fn what_waits_is_bounded_in_number_bytes_and_time() {
        let mut reassembly = Reassembly::default();
        let whole = packet(false, &[7; 60_000]);
        for id in 0..1000 {
            let now = Instant::from_millis(i64::from(id));
            for part in parts(&whole, 1500, id).iter().skip(1).take(30) {
                let _ = take(&mut reassembly, part, now);
                assert!(reassembly.bytes <= MOST_BYTES && reassembly.partial.len() <= MOST);
            }
        }
        assert!(!reassembly.partial.is_empty());
        let deadline = reassembly.deadline().unwrap();
        let before = deadline - smoltcp::time::Duration::from_millis(1);
        assert_eq!(reassembly.expire(before), 0);
        assert!(reassembly.expire(deadline) > 0);
        assert!(reassembly.expire(Instant::from_secs(1000)) > 0);
        assert_eq!((reassembly.bytes, reassembly.deadline()), (0, None));
        // Eight bytes each, without an end.
        for offset in 1..8000_u16 {
            let mut part = packet(false, &[1; 8]);
            part[6..8].copy_from_slice(&(MORE_V4 | offset).to_be_bytes());
            let _ = take(&mut reassembly, &part, Instant::ZERO);
        }
        assert!(reassembly.bytes < 2 * MOST_PIECES * KEEPING);
    }

    #[test]
    fn what_is_too_long_or_odd_is_no_part() {
        let mut reassembly = Reassembly::default();
        let mut part = packet(false, &[1; 100]);
        part[6..8].copy_from_slice(&MORE_V4.to_be_bytes());
        assert_eq!(take(&mut reassembly, &part, Instant::ZERO), Err(1));
        part[6..8].copy_from_slice(&0x1fff_u16.to_be_bytes());
        assert_eq!(take(&mut reassembly, &part, Instant::ZERO), Err(1));
        assert!(Fragment::parse(&packet(false, &[1; 100])).is_none());
        assert!(Fragment::parse(&packet(true, &[1; 100])).is_none());
        assert_eq!(reassembly.bytes, 0);
    }

    #[test]
    fn a_packet_in_one_fragment_is_whole() {
        let whole = packet(true, &[9; 100]);
        let mut one = whole[..40].to_vec();
        one[4..6].copy_from_slice(&108_u16.to_be_bytes());
        one[6] = FRAGMENT;
        one.extend([wire::UDP, 0, 0, 0, 0, 0, 0, 5]);
        one.extend(&whole[40..]);
        let made = take(&mut Reassembly::default(), &one, Instant::ZERO);
        assert_eq!(made, Ok(Some(whole)));
    }
}
