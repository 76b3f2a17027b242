//! Bodies of the fuzz targets, kept here so that plain tests run them too.

/// Any bytes as a message of the domain name system, and as the answer to one.
pub fn net_dns(bytes: &[u8]) {
    crate::dns::any_message(bytes);
}

/// Any bytes as fragments of packets.
pub fn net_fragments(bytes: &[u8]) {
    crate::fragments::any_fragments(bytes);
}
