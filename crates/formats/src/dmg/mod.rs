//! Disk images of macOS (UDIF), which are only ever read.
//!
//! ```text
//!   file      |------ data fork ------|-- property list or resource fork --|trailer, 512 bytes|
//!   mish      |header, 204 bytes|chunk|chunk|...            one for each partition, inside the second part
//!   chunk     type, sectors of the disk, bytes of the data fork
//! ```
//!
//! Numbers are big-endian. The trailer (`koly`) says where the other parts are; [`source`] finds the `mish` blocks there,
//! [`chunk`] is their list, sorted by sectors.

mod chunk;
mod source;
#[cfg(test)]
mod tests;
mod trailer;

use std::sync::Arc;

use diskimage_core::{
    DecodedBlockCache, Device, Error, Format, FormatProperties, Layer, Note, OpenRequest, Probe, Result,
    Score, errno,
};

use crate::codec::{bzip2, deflate, lzfse, xz};
use crate::layer_kit::read_only_layer::{self, Disk};
use chunk::{Chunk, Chunks, Codec, Kind, SECTOR};
use trailer::Trailer;

/// The format's entry in the table.
#[derive(Debug)]
pub struct Dmg;

const NAME: &str = "dmg";
const SUFFIX: &str = ".dmg";

impl Format for Dmg {
    fn name(&self) -> &'static str {
        NAME
    }

    fn properties(&self) -> &'static FormatProperties {
        &FormatProperties::READ_ONLY
    }

    fn probe(&self, probe: &Probe<'_>) -> Score {
        // The trailer is at the end, where probing does not look.
        let is_named = probe.name.len() > SUFFIX.len() && probe.name.ends_with(SUFFIX);
        if is_named { 2 } else { 0 }
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Arc<dyn Layer>> {
        read_only_layer::refuse_writing(&request)?;
        let trailer = Trailer::find(&*request.file, request.name)?;
        let mut chunks = Chunks::new(trailer.data_offset, request.budget);
        source::read(&*request.file, &trailer, request.name, &mut chunks)?;
        let unknown = chunks.warning();
        let disk = Udif {
            file: request.file,
            len: trailer.len()?,
            chunks: chunks.sorted(),
            last: DecodedBlockCache::default(),
            unknown,
        };
        Ok(read_only_layer::layer(disk))
    }
}

/// What the original says where the parts of the file do not fit together.
fn invalid(name: &str) -> Error {
    Error::from_errno(errno::EINVAL).context(format!("Could not open '{name}'"))
}

#[derive(Debug)]
struct Udif {
    file: Arc<dyn Device>,
    len: u64,
    chunks: Chunks,
    last: DecodedBlockCache<u64>,
    /// That there are chunks of a kind that nobody knows.
    unknown: Option<Note>,
}

impl Udif {
    /// Reads from inside `chunk`; `at` is the offset there.
    fn read_chunk(&self, chunk: &Chunk, buf: &mut [u8], at: u64) -> Result<()> {
        match chunk.kind {
            Kind::Zero => buf.fill(0),
            Kind::Raw => {
                // A chunk may be stored in part: the rest is zeroes.
                let there = usize::try_from(chunk.stored.saturating_sub(at)).unwrap_or(usize::MAX);
                let (head, tail) = buf.split_at_mut(there.min(buf.len()));
                tail.fill(0);
                if !head.is_empty() {
                    self.file.read_whole(head, chunk.offset + at)?;
                }
            }
            Kind::Encoded(codec) => {
                let at = usize::try_from(at).unwrap_or(usize::MAX);
                self.last.read_with(
                    chunk.sector,
                    |block| self.decode(chunk, codec, block),
                    |block| buf.copy_from_slice(&block[at..at + buf.len()]),
                )?;
            }
        }
        Ok(())
    }

    fn decode(&self, chunk: &Chunk, codec: Codec, block: &mut Vec<u8>) -> Result<()> {
        let damaged = || Error::from_errno(errno::EIO);
        // The stream ends by itself: a length that reaches beyond the file is none to go by.
        let stored = chunk.stored.min(self.file.len().saturating_sub(chunk.offset));
        let mut bytes = vec![0; usize::try_from(stored).map_err(|_| damaged())?];
        if !bytes.is_empty() {
            self.file.read_at(&mut bytes, chunk.offset)?;
        }
        block.resize(usize::try_from(chunk.sectors * SECTOR).map_err(|_| damaged())?, 0);
        match codec {
            Codec::Zlib => deflate::decode_zlib(&bytes, block),
            Codec::Bzip2 => bzip2::decode(&bytes, block),
            Codec::Lzfse => lzfse::decode(&bytes, block),
            Codec::Lzma => xz::decode(&bytes, block),
        }
        .map_err(|_| damaged())
    }
}

impl Disk for Udif {
    const FORMAT: &'static str = NAME;

    fn len(&self) -> u64 {
        self.len
    }

    fn file(&self) -> &Arc<dyn Device> {
        &self.file
    }

    fn notes(&self) -> &[Note] {
        self.unknown.as_slice()
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let (mut buf, mut offset) = (buf, offset);
        while !buf.is_empty() {
            // The original does not read what no chunk has.
            let chunk = self
                .chunks
                .at(offset / SECTOR)
                .ok_or_else(|| Error::from_errno(errno::EIO))?;
            let at = offset - chunk.sector * SECTOR;
            let rest = chunk.sectors.saturating_mul(SECTOR) - at;
            let len = usize::try_from(rest).unwrap_or(usize::MAX).min(buf.len());
            let (head, tail) = buf.split_at_mut(len);
            self.read_chunk(chunk, head, at)?;
            (buf, offset) = (tail, offset + len as u64);
        }
        Ok(())
    }
}
