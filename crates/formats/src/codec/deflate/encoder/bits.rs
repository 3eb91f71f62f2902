//! Writes bits, the least significant first.

/// Appends codes of bits to a buffer.
pub(super) struct BitWriter<'a> {
    out: &'a mut Vec<u8>,
    /// Bits that are not in `out` yet; those above `count` are zero.
    pending: u64,
    /// The number of bits in `pending`. At most seven after [`BitWriter::flush`].
    count: u32,
}

impl<'a> BitWriter<'a> {
    pub(super) fn new(out: &'a mut Vec<u8>) -> Self {
        Self {
            out,
            pending: 0,
            count: 0,
        }
    }

    /// Adds the `len` low bits of `bits`; the others are zero. Between two calls of [`BitWriter::flush`] at most 56 bits
    /// are added.
    #[inline(always)]
    pub(super) fn add(&mut self, bits: u32, len: u32) {
        self.pending |= u64::from(bits) << (self.count & 63);
        self.count = self.count.wrapping_add(len);
    }

    /// Moves whole bytes to the buffer.
    #[inline(always)]
    pub(super) fn flush(&mut self) {
        let at = self.out.len();
        self.out.extend_from_slice(&self.pending.to_le_bytes());
        self.out.truncate(at + (self.count as usize >> 3));
        self.pending >>= self.count & 56;
        self.count &= 7;
    }

    /// Adds zero bits up to a whole byte, and moves all bytes to the buffer.
    pub(super) fn align(&mut self) {
        self.count = self.count.next_multiple_of(8);
        self.flush();
    }

    /// Appends bytes. No bits are pending.
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    /// The number of bits in the buffer and pending.
    pub(super) fn bits(&self) -> u64 {
        self.out.len() as u64 * 8 + u64::from(self.count)
    }
}
