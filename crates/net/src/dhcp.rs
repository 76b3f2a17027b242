//! A DHCP server for one client (RFC 2131, 2132): it gives what the agent sets up anyway, for guests that
//! would rather ask.

use std::net::{Ipv4Addr, SocketAddr};

use crate::address::{DNS_V4, GATEWAY_V4, GUEST_V4, MTU};
use crate::outlet::Outlet;

pub(crate) const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;
/// Up to the options: fixed fields, then the magic number.
const FIXED: usize = 236;
const MAGIC: [u8; 4] = [99, 130, 83, 99];
/// Clients take no shorter messages.
const LEAST: usize = 300;
const BOOT_REQUEST: u8 = 1;
const BOOT_REPLY: u8 = 2;
const NETMASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
const LEASE: u32 = 86_400;

const PAD: u8 = 0;
const REQUESTED: u8 = 50;
const MESSAGE: u8 = 53;
const SERVER: u8 = 54;
const END: u8 = 255;

const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACKNOWLEDGE: u8 = 5;
const REFUSE: u8 = 6;
const INFORM: u8 = 8;

/// The value of an option, if the message has it.
fn option(options: &[u8], wanted: u8) -> Option<&[u8]> {
    let mut rest = options;
    loop {
        let (&kind, after) = rest.split_first()?;
        match kind {
            PAD => rest = after,
            END => return None,
            _ => {
                let (&len, after) = after.split_first()?;
                let (value, after) = after.split_at_checked(len.into())?;
                if kind == wanted {
                    return Some(value);
                }
                rest = after;
            }
        }
    }
}

/// The answer to a client's message, if it gets one.
fn answer(message: &[u8]) -> Option<Vec<u8>> {
    let fixed = message.get(..FIXED)?;
    let options = message.get(FIXED..)?.strip_prefix(&MAGIC)?;
    if fixed[0] != BOOT_REQUEST {
        return None;
    }
    let ours = GATEWAY_V4.octets();
    if option(options, SERVER).is_some_and(|server| server != ours) {
        // It has chosen another one.
        return None;
    }
    let kind = match option(options, MESSAGE)? {
        [DISCOVER] => OFFER,
        [REQUEST] => {
            let current = &fixed[12..16];
            let requested = option(options, REQUESTED).unwrap_or(current);
            match requested == GUEST_V4.octets() {
                true => ACKNOWLEDGE,
                false => REFUSE,
            }
        }
        [INFORM] => ACKNOWLEDGE,
        _ => return None,
    };
    let mut reply = fixed.to_vec();
    reply[0] = BOOT_REPLY;
    if kind != REFUSE {
        reply[16..20].copy_from_slice(&GUEST_V4.octets());
    }
    reply[20..24].copy_from_slice(&ours);
    // Names of a server and a file.
    reply[44..].fill(0);
    reply.extend(MAGIC);
    let mut add = |kind: u8, value: &[u8]| {
        // All of ours are short.
        reply.extend([kind, value.len() as u8]);
        reply.extend(value);
    };
    add(MESSAGE, &[kind]);
    add(SERVER, &ours);
    if kind != REFUSE {
        add(1, &NETMASK.octets());
        add(3, &ours);
        add(6, &DNS_V4.octets());
        add(26, &MTU.to_be_bytes());
        add(51, &LEASE.to_be_bytes());
    }
    reply.push(END);
    reply.resize(reply.len().max(LEAST), PAD);
    Some(reply)
}

/// Answers a client's message.
pub(crate) fn serve(message: &[u8], outlet: &Outlet) {
    if let Some(reply) = answer(message) {
        // It has no address yet to be asked for.
        let client = SocketAddr::new(Ipv4Addr::BROADCAST.into(), CLIENT_PORT);
        let server = SocketAddr::new(GATEWAY_V4.into(), SERVER_PORT);
        outlet.udp(server, client, &reply);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(options: &[u8]) -> Vec<u8> {
        let mut message = vec![0; FIXED];
        message[0] = BOOT_REQUEST;
        message[4..8].copy_from_slice(&[1, 2, 3, 4]);
        message.extend(MAGIC);
        message.extend(options);
        message
    }

    fn kind_of(options: &[u8]) -> Option<u8> {
        let reply = answer(&message(options))?;
        assert_eq!((reply[0], &reply[4..8]), (BOOT_REPLY, &[1, 2, 3, 4][..]));
        let kind = option(&reply[FIXED + 4..], MESSAGE)?[0];
        let given = reply[16..20] == GUEST_V4.octets();
        assert_eq!(given, kind != REFUSE);
        Some(kind)
    }

    #[test]
    fn there_is_one_address_to_be_had() {
        assert_eq!(kind_of(&[0, 53, 1, 1, 255]), Some(OFFER));
        assert_eq!(
            kind_of(&[53, 1, 3, 50, 4, 10, 0, 2, 15, 255]),
            Some(ACKNOWLEDGE)
        );
        assert_eq!(kind_of(&[53, 1, 3, 50, 4, 10, 0, 2, 16, 255]), Some(REFUSE));
        assert_eq!(kind_of(&[53, 1, 3, 54, 4, 10, 0, 2, 9]), None);
        assert_eq!(kind_of(&[53, 1, 7]), None);
        assert_eq!(kind_of(&[53, 9, 1]), None);
    }

    proptest! {
        #[test]
        fn nothing_panics(options in prop::collection::vec(any::<u8>(), 0..80), cut in 0_usize..400) {
            let mut message = message(&options);
            message.truncate(cut);
            let _ = answer(&message);
        }
    }
}
