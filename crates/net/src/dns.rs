//! Questions and answers of the domain name system (RFC 1035), as far as rules on names and names of
//! neighbours need them. Both come from those who may be hostile: guests, and servers of anybody's.

use std::net::{IpAddr, Ipv4Addr};

use smoltcp::wire::{
    DnsFlags, DnsOpcode, DnsPacket, DnsQueryType, DnsQuestion, DnsRcode, DnsRecord, DnsRecordData,
};

use crate::rules::is_name;

const HEADER_LEN: usize = 12;
/// Records of an answer that are looked at, and addresses that are taken from it.
const MOST_RECORDS: usize = 128;
const MOST_ADDRESSES: usize = 64;
/// Steps from a name to the name that it stands for.
const MOST_ALIASES: usize = 16;
/// Answers to what this crate knows itself are good for so long, in seconds: neighbours come and go.
const OWN_TTL: u32 = 5;
/// The answer's name: the question's, which stands behind the header (4.1.4).
const QUESTION_NAME: [u8; 2] = [0xc0, HEADER_LEN as u8];
const CLASS_IN: u16 = 1;

/// A question to the name server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Question {
    pub(crate) id: u16,
    /// In small letters, without a dot at the end.
    pub(crate) name: String,
    kind: u16,
    recursion_desired: bool,
    /// As it was asked.
    section: Vec<u8>,
}

/// How a question is answered here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Found,
    NoSuchName,
    NotUnderstood,
}

/// The name that `bytes`, a part of `packet`, begin with.
fn name_at(packet: &DnsPacket<&[u8]>, bytes: &[u8]) -> Option<String> {
    let mut name = String::new();
    for label in packet.parse_name(bytes) {
        let label = std::str::from_utf8(label.ok()?).ok()?;
        // A dot inside a label would be taken for one between two.
        if !is_name(label) || label.contains('.') || name.len() > 255 {
            return None;
        }
        if !name.is_empty() {
            name.push('.');
        }
        name.push_str(&label.to_ascii_lowercase());
    }
    is_name(&name).then_some(name)
}

/// The one question of a message that asks one.
pub(crate) fn question(message: &[u8]) -> Option<Question> {
    let packet = DnsPacket::new_checked(message).ok()?;
    let asks = !packet.flags().contains(DnsFlags::RESPONSE);
    if !asks || packet.opcode() != DnsOpcode::Query || packet.question_count() != 1 {
        return None;
    }
    let (rest, question) = DnsQuestion::parse(packet.payload()).ok()?;
    let end = message.len() - rest.len();
    Some(Question {
        id: packet.transaction_id(),
        name: name_at(&packet, question.name)?,
        kind: question.type_.into(),
        recursion_desired: packet.flags().contains(DnsFlags::RECURSION_DESIRED),
        section: message.get(HEADER_LEN..end)?.to_vec(),
    })
}

impl Question {
    /// Whether a message answers it.
    pub(crate) fn is_answered_by(&self, message: &[u8]) -> bool {
        let Ok(packet) = DnsPacket::new_checked(message) else {
            return false;
        };
        let same = || {
            let (_, question) = DnsQuestion::parse(packet.payload()).ok()?;
            Some(
                u16::from(question.type_) == self.kind
                    && name_at(&packet, question.name)? == self.name,
            )
        };
        packet.transaction_id() == self.id
            && packet.flags().contains(DnsFlags::RESPONSE)
            && packet.question_count() == 1
            && same() == Some(true)
    }

    /// The addresses that a message has for it, each with the seconds for which that is so. Those of other
    /// names are none of them, unless the name stands for these (CNAME).
    pub(crate) fn addresses(&self, message: &[u8]) -> Vec<(IpAddr, u32)> {
        let mut found = Vec::new();
        let Ok(packet) = DnsPacket::new_checked(message) else {
            return found;
        };
        if !self.is_answered_by(message) || packet.rcode() != DnsRcode::NoError {
            return found;
        }
        let Ok((mut rest, _)) = DnsQuestion::parse(packet.payload()) else {
            return found;
        };
        let mut records = Vec::new();
        let count = usize::from(packet.answer_record_count());
        for _ in 0..count.min(MOST_RECORDS) {
            let Ok((after, record)) = DnsRecord::parse(rest) else {
                break;
            };
            rest = after;
            if let Some(name) = name_at(&packet, record.name) {
                records.push((name, record.ttl, record.data));
            }
        }
        let mut name = self.name.clone();
        let mut least = u32::MAX;
        for _ in 0..MOST_ALIASES {
            for (owner, ttl, data) in &records {
                let address: IpAddr = match data {
                    DnsRecordData::A(address) => (*address).into(),
                    DnsRecordData::Aaaa(address) => (*address).into(),
                    _ => continue,
                };
                if *owner == name && found.len() < MOST_ADDRESSES {
                    found.push((address, least.min(*ttl)));
                }
            }
            let alias = records.iter().find_map(|(owner, ttl, data)| match data {
                DnsRecordData::Cname(to) if *owner == name => Some((name_at(&packet, to)?, *ttl)),
                _ => None,
            });
            match alias {
                Some((to, ttl)) if found.is_empty() => {
                    name = to;
                    least = least.min(ttl);
                }
                _ => break,
            }
        }
        found
    }

    /// An answer with those of these addresses that were asked for.
    pub(crate) fn reply(&self, verdict: Verdict, addresses: &[IpAddr]) -> Vec<u8> {
        let (a, aaaa) = (DnsQueryType::A, DnsQueryType::Aaaa);
        let (a, aaaa) = (u16::from(a), u16::from(aaaa));
        let asked = |address: &&IpAddr| self.kind == if address.is_ipv4() { a } else { aaaa };
        let found = addresses.iter().filter(|_| verdict == Verdict::Found);
        let addresses: Vec<&IpAddr> = found.filter(asked).take(MOST_ADDRESSES).collect();
        let mut message = header(self.id, self.recursion_desired, verdict);
        message[5] = 1;
        message[7] = addresses.len() as u8;
        message.extend(&self.section);
        for address in addresses {
            message.extend(QUESTION_NAME);
            message.extend(self.kind.to_be_bytes());
            message.extend(CLASS_IN.to_be_bytes());
            message.extend(OWN_TTL.to_be_bytes());
            let octets = match address {
                IpAddr::V4(address) => address.octets().to_vec(),
                IpAddr::V6(address) => address.octets().to_vec(),
            };
            // Four or sixteen.
            message.extend([0, octets.len() as u8]);
            message.extend(octets);
        }
        message
    }
}

fn header(id: u16, recursion_desired: bool, verdict: Verdict) -> Vec<u8> {
    let code: u8 = match verdict {
        Verdict::Found => DnsRcode::NoError,
        Verdict::NoSuchName => DnsRcode::NXDomain,
        Verdict::NotUnderstood => DnsRcode::FormErr,
    }
    .into();
    let mut message = id.to_be_bytes().to_vec();
    // An answer; recursion was available.
    message.extend([0x80 | u8::from(recursion_desired), 0x80 | code]);
    message.extend([0; 8]);
    message
}

/// The answer to what is no question.
pub(crate) fn not_understood(message: &[u8]) -> Option<Vec<u8>> {
    let packet = DnsPacket::new_checked(message).ok()?;
    let asks = !packet.flags().contains(DnsFlags::RESPONSE);
    asks.then(|| header(packet.transaction_id(), false, Verdict::NotUnderstood))
}

/// The body of the fuzz target `net_dns`: any bytes as a question and as its answer.
pub(crate) fn any_message(bytes: &[u8]) {
    let (asked, answer) = bytes.split_at(bytes.len() / 2);
    let _ = not_understood(bytes);
    for message in [bytes, asked] {
        let Some(question) = question(message) else {
            continue;
        };
        for answer in [bytes, answer] {
            let found = question.addresses(answer);
            assert!(found.len() <= MOST_ADDRESSES);
            assert!(found.is_empty() || question.is_answered_by(answer));
        }
        let reply = question.reply(Verdict::Found, &[Ipv4Addr::LOCALHOST.into()]);
        assert!(question.is_answered_by(&reply));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn labels(name: &str) -> Vec<u8> {
        let label = |label: &str| [&[label.len() as u8], label.as_bytes()].concat();
        [name.split('.').flat_map(label).collect(), vec![0]].concat()
    }

    fn asked(name: &str, kind: u16) -> Vec<u8> {
        let mut message = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        message.extend(labels(name));
        message.extend(kind.to_be_bytes());
        message.extend([0, 1]);
        message
    }

    /// An answer to `asked` with records of owner, type, seconds and data.
    fn answered(asked: &[u8], records: &[(&str, u16, u32, Vec<u8>)]) -> Vec<u8> {
        let mut message = asked.to_vec();
        message[2] = 0x81;
        message[3] = 0x80;
        message[7] = records.len() as u8;
        for (owner, kind, ttl, data) in records {
            message.extend(labels(owner));
            message.extend(kind.to_be_bytes());
            message.extend([0, 1]);
            message.extend(ttl.to_be_bytes());
            message.extend((data.len() as u16).to_be_bytes());
            message.extend(data);
        }
        message
    }

    #[test]
    fn questions_are_read() {
        let found = question(&asked("WWW.Example.org", 28)).unwrap();
        assert_eq!(
            (found.id, &*found.name, found.kind),
            (0x1234, "www.example.org", 28)
        );
        let mut two = asked("a.b", 1);
        two[5] = 2;
        assert_eq!(question(&two), None);
        let mut answer = asked("a.b", 1);
        answer[2] = 0x80;
        assert_eq!(question(&answer), None);
        // A label with a dot in it, and a name that points at itself.
        let mut dotted = asked("a-b", 1);
        dotted[14] = b'.';
        assert_eq!(question(&dotted), None);
        let looped = [&asked("a", 1)[..12], &[0xc0, 12, 0, 1, 0, 1]].concat();
        assert_eq!(question(&looped), None);
    }

    #[test]
    fn only_addresses_of_the_name_count() {
        let asked = asked("www.example.org", 1);
        let question = question(&asked).unwrap();
        let records = [
            ("www.example.org", 5, 300, labels("cdn.example.net")),
            ("cdn.example.net", 1, 600, vec![192, 0, 2, 1]),
            ("CDN.example.net", 1, 100, vec![192, 0, 2, 2]),
            ("other.example.net", 1, 600, vec![192, 0, 2, 3]),
        ];
        let found = question.addresses(&answered(&asked, &records));
        let expected: [(IpAddr, u32); 2] = [
            ("192.0.2.1".parse().unwrap(), 300),
            ("192.0.2.2".parse().unwrap(), 100),
        ];
        assert_eq!(found, expected);
        let around = [
            ("www.example.org", 5, 1, labels("b.example.org")),
            ("b.example.org", 5, 1, labels("www.example.org")),
        ];
        assert_eq!(question.addresses(&answered(&asked, &around)), []);
        let mut other = answered(&asked, &records);
        other[1] ^= 1;
        assert_eq!(question.addresses(&other), [], "another question's answer");
    }

    #[test]
    fn replies_answer_their_questions() {
        let question = question(&asked("db", 1)).unwrap();
        let address = Ipv4Addr::new(10, 89, 0, 2);
        let reply = question.reply(Verdict::Found, &[address.into()]);
        assert_eq!(question.addresses(&reply), [(address.into(), OWN_TTL)]);
        let other = question.reply(Verdict::Found, &[std::net::Ipv6Addr::LOCALHOST.into()]);
        assert_eq!(other[6..8], [0, 0], "nobody asked for IPv6");
        let none = question.reply(Verdict::NoSuchName, &[]);
        assert!(question.is_answered_by(&none) && none[3] & 15 == 3);
    }

    proptest! {
        #[test]
        fn nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            any_message(&bytes);
        }

        #[test]
        fn nothing_panics_in_what_looks_right(
            name in "[a-z]{1,8}(\\.[a-z]{1,8}){0,3}",
            rest in prop::collection::vec(prop_oneof![Just(0_u8), Just(0xc0), Just(12), any::<u8>()], 0..120),
        ) {
            let asked = asked(&name, 1);
            let mut answer = answered(&asked, &[]);
            answer[7] = 4;
            answer.extend(rest);
            let question = question(&asked).unwrap();
            prop_assert_eq!(&question.name, &name);
            prop_assert!(question.addresses(&answer).len() <= 4);
        }
    }
}
