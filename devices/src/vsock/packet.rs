//! `struct virtio_vsock_hdr` (virtio 1.2, 5.10.6): 44 bytes, little-endian.

/// Length of the header, in bytes.
pub(super) const HEADER_BYTES: u64 = 44;
/// VIRTIO_VSOCK_TYPE_STREAM.
pub(super) const STREAM: u16 = 1;
/// SHUTDOWN's flags: the sender receives, or sends, no more.
pub(super) const NO_RECEIVE: u32 = 1;
pub(super) const NO_SEND: u32 = 2;

/// What a packet is for (5.10.6, `enum virtio_vsock_op`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Op {
    pub(super) fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// A header's fields, those of the operation as a plain number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
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

impl Header {
    pub(super) fn parse(bytes: &[u8; HEADER_BYTES as usize]) -> Self {
        let [head @ .., l0, l1, l2, l3, t0, t1, o0, o1] =
            bytes.first_chunk::<32>().expect("a header has 44 bytes");
        let [src, dst, sp, dp] = [&head[0..8], &head[8..16], &head[16..20], &head[20..24]];
        let [flags, alloc, fwd] = [&bytes[32..36], &bytes[36..40], &bytes[40..44]];
        Self {
            src_cid: u64_at(src),
            dst_cid: u64_at(dst),
            src_port: u32_at(sp),
            dst_port: u32_at(dp),
            len: u32::from_le_bytes([*l0, *l1, *l2, *l3]),
            kind: u16::from_le_bytes([*t0, *t1]),
            op: u16::from_le_bytes([*o0, *o1]),
            flags: u32_at(flags),
            buf_alloc: u32_at(alloc),
            fwd_cnt: u32_at(fwd),
        }
    }

    pub(super) fn encode(&self) -> [u8; HEADER_BYTES as usize] {
        let mut bytes = [0; HEADER_BYTES as usize];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The reset that answers this packet.
    pub(super) fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: STREAM,
            op: Op::Reset as u16,
            ..Self::default()
        }
    }
}

fn u32_at(bytes: &[u8]) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(bytes);
    u32::from_le_bytes(word)
}

fn u64_at(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_reads_as_it_was_written() {
        let header = Header {
            src_cid: 1 << 40 | 1,
            dst_cid: 2,
            src_port: 3,
            dst_port: 4,
            len: 5,
            kind: STREAM,
            op: Op::Data as u16,
            flags: 7,
            buf_alloc: 8,
            fwd_cnt: 9,
        };
        assert_eq!(Header::parse(&header.encode()), header);
        assert_eq!(header.encode()[24..32], [5, 0, 0, 0, 1, 0, 5, 0]);
    }
}
