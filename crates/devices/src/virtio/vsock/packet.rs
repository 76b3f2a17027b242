//! The header of a virtio-vsock packet (virtio 1.3, 5.10.6).

/// Bytes of the header.
pub(super) const HEADER_LEN: usize = 44;
/// The host's context identifier.
pub const HOST_CID: u64 = 2;
/// Stream sockets.
pub(super) const TYPE_STREAM: u16 = 1;

pub(super) const OP_REQUEST: u16 = 1;
pub(super) const OP_RESPONSE: u16 = 2;
pub(super) const OP_RST: u16 = 3;
pub(super) const OP_SHUTDOWN: u16 = 4;
pub(super) const OP_RW: u16 = 5;
pub(super) const OP_CREDIT_UPDATE: u16 = 6;
pub(super) const OP_CREDIT_REQUEST: u16 = 7;

/// The sender of a SHUTDOWN will receive no more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// The sender of a SHUTDOWN will send no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;
pub(super) const SHUTDOWN_BOTH: u32 = 3;

/// A packet header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

fn take<const N: usize>(raw: &[u8; HEADER_LEN], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&raw[at..at + N]);
    bytes
}

impl Header {
    pub(super) fn from_bytes(raw: &[u8; HEADER_LEN]) -> Self {
        Self {
            src_cid: u64::from_le_bytes(take(raw, 0)),
            dst_cid: u64::from_le_bytes(take(raw, 8)),
            src_port: u32::from_le_bytes(take(raw, 16)),
            dst_port: u32::from_le_bytes(take(raw, 20)),
            len: u32::from_le_bytes(take(raw, 24)),
            kind: u16::from_le_bytes(take(raw, 28)),
            op: u16::from_le_bytes(take(raw, 30)),
            flags: u32::from_le_bytes(take(raw, 32)),
            buf_alloc: u32::from_le_bytes(take(raw, 36)),
            fwd_cnt: u32::from_le_bytes(take(raw, 40)),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut raw = [0; HEADER_LEN];
        let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.src_cid.to_le_bytes());
        put(8, &self.dst_cid.to_le_bytes());
        put(16, &self.src_port.to_le_bytes());
        put(20, &self.dst_port.to_le_bytes());
        put(24, &self.len.to_le_bytes());
        put(28, &self.kind.to_le_bytes());
        put(30, &self.op.to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buf_alloc.to_le_bytes());
        put(40, &self.fwd_cnt.to_le_bytes());
        raw
    }

    /// The answer that ends the connection this packet belongs to, or claims to.
    pub(super) fn reset_reply(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: OP_RST,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn bytes_round_trip(raw in proptest::array::uniform32(0u8..), tail in proptest::array::uniform12(0u8..)) {
            let mut bytes = [0; HEADER_LEN];
            bytes[..32].copy_from_slice(&raw);
            bytes[32..].copy_from_slice(&tail);
            proptest::prop_assert_eq!(Header::from_bytes(&bytes).to_bytes(), bytes);
        }
    }
}
