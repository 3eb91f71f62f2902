//! The constants of the protocol, and a cursor over bytes that a server sent.
//!
//! All of them are as in the NetworkBlockDevice project's `doc/proto.md`.

use diskimage_core::{Error, Result};

/// The first eight bytes of every server, `NBDMAGIC`.
pub(super) const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// The magic of newstyle negotiation, `IHAVEOPT`; also the magic of each option.
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// The magic of oldstyle negotiation: a single export without options.
pub(super) const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// The magic of a reply to an option.
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// The magic of a request.
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
/// The magic of a request with extended headers.
pub(super) const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// The magic of a simple reply.
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// The magic of a chunk of a structured reply.
pub(super) const CHUNK_MAGIC: u32 = 0x668e_33ef;
/// The magic of a chunk with extended headers.
pub(super) const EXTENDED_CHUNK_MAGIC: u32 = 0x6e8a_278c;

/// Handshake flags of both sides.
pub(super) mod handshake {
    pub(in super::super) const FIXED_NEWSTYLE: u16 = 1 << 0;
    pub(in super::super) const NO_ZEROES: u16 = 1 << 1;
}

/// Transmission flags of an export.
pub(super) mod export {
    pub(in super::super) const HAS_FLAGS: u16 = 1 << 0;
    pub(in super::super) const READ_ONLY: u16 = 1 << 1;
    pub(in super::super) const FLUSH: u16 = 1 << 2;
    pub(in super::super) const TRIM: u16 = 1 << 5;
    pub(in super::super) const WRITE_ZEROES: u16 = 1 << 6;
    pub(in super::super) const MULTI_CONN: u16 = 1 << 8;
    pub(in super::super) const FAST_ZERO: u16 = 1 << 11;
}

/// Options.
pub(super) mod option {
    pub(in super::super) const EXPORT_NAME: u32 = 1;
    pub(in super::super) const ABORT: u32 = 2;
    pub(in super::super) const STARTTLS: u32 = 5;
    pub(in super::super) const GO: u32 = 7;
    pub(in super::super) const STRUCTURED_REPLY: u32 = 8;
    pub(in super::super) const SET_META_CONTEXT: u32 = 10;
    pub(in super::super) const EXTENDED_HEADERS: u32 = 11;
}

/// Types of replies to options.
pub(super) mod option_reply {
    pub(in super::super) const ACK: u32 = 1;
    pub(in super::super) const INFO: u32 = 3;
    pub(in super::super) const META_CONTEXT: u32 = 4;
    /// The bit of all error replies.
    pub(in super::super) const ERROR: u32 = 1 << 31;
    pub(in super::super) const ERR_UNSUP: u32 = ERROR | 1;
    pub(in super::super) const ERR_POLICY: u32 = ERROR | 2;
    pub(in super::super) const ERR_INVALID: u32 = ERROR | 3;
    pub(in super::super) const ERR_PLATFORM: u32 = ERROR | 4;
    pub(in super::super) const ERR_TLS_REQD: u32 = ERROR | 5;
    pub(in super::super) const ERR_UNKNOWN: u32 = ERROR | 6;
    pub(in super::super) const ERR_SHUTDOWN: u32 = ERROR | 7;
    pub(in super::super) const ERR_BLOCK_SIZE_REQD: u32 = ERROR | 8;
}

/// Types of information in an [`option_reply::INFO`].
pub(super) mod info {
    pub(in super::super) const EXPORT: u16 = 0;
    pub(in super::super) const BLOCK_SIZE: u16 = 3;
}

/// Types of chunks.
pub(super) mod chunk {
    /// The flag of the last chunk.
    pub(in super::super) const DONE: u16 = 1 << 0;
    pub(in super::super) const NONE: u16 = 0;
    pub(in super::super) const OFFSET_DATA: u16 = 1;
    pub(in super::super) const OFFSET_HOLE: u16 = 2;
    pub(in super::super) const BLOCK_STATUS: u16 = 5;
    pub(in super::super) const BLOCK_STATUS_EXT: u16 = 6;
    /// The bit of all error chunks.
    pub(in super::super) const ERROR: u16 = 1 << 15;
}

/// A cursor over bytes that a server sent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wire<'a>(pub(super) &'a [u8]);

impl<'a> Wire<'a> {
    /// The next `len` bytes.
    pub(super) fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len).ok_or_else(too_short)?;
        self.0 = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>().ok_or_else(too_short)?;
        self.0 = tail;
        Ok(*head)
    }

    pub(super) fn u16(&mut self) -> Result<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_be_bytes)
    }
}

fn too_short() -> Error {
    Error::corrupt("The server sent less than it announced")
}
