//! Disk images of macOS (UDIF), read only.
//!
//! ```text
//!   file      |------ data fork ------|-- property list or resource fork --|trailer, 512 bytes|
//!   mish      |header, 204 bytes|chunk|chunk|...            one for each partition, inside the second part
//!   chunk     type, sectors of the disk, bytes of the data fork
//! ```
//!
//! Numbers are big-endian. The trailer (`koly`) has the offsets of the other parts; [`source`] finds the `mish` blocks
//! in them, [`chunk`] lists their chunks sorted by sector.
//!
//! A read/write image (`UDRW`) has no trailer: it is the disk itself ([`raw_disk`]). Either kind may be the contents of
//! an encrypted container ([`encrypted`]).

mod chunk;
mod encrypted;
mod raw_disk;
mod source;
#[cfg(test)]
mod tests;
mod trailer;

use std::sync::Arc;

use diskimage_core::options::{OptionDef, OptionKind};
use diskimage_core::{
    ByteRange, Device, Error, Format, FormatProperties, Info, Layer, Note, OpenRequest, Probe, Result, Score,
    errno, resize, to_index, zeroed,
};

use crate::codec::{adc, bzip2, deflate, lzfse, xz};
use crate::layer_kit::decoded_blocks::DecodedBlocks;
use crate::layer_kit::read_only_layer::{self, Disk};
use chunk::{Chunk, ChunkKind, Chunks, Codec, SECTOR};
use raw_disk::RawDisk;
use trailer::Trailer;

/// The format's entry in the table.
#[derive(Debug)]
pub struct Dmg;

/// The options of a node.
const NODE_OPTIONS: &[OptionDef] = &[OptionDef::new(
    "key-secret",
    OptionKind::Text,
    "ID of the secret that provides the passphrase",
)];

const NAME: &str = "dmg";
const SUFFIX: &str = ".dmg";

impl Format for Dmg {
    fn name(&self) -> &'static str {
        NAME
    }

    fn properties(&self) -> &'static FormatProperties {
        const {
            &FormatProperties {
                strong_options: &["key-secret"],
                ..FormatProperties::READ_ONLY
            }
        }
    }

    fn probe(&self, probe: &Probe<'_>) -> Score {
        // The trailer is at the end of the file, which probing does not read: only the name can match.
        let is_named = probe.name.len() > SUFFIX.len() && probe.name.ends_with(SUFFIX);
        if is_named { 2 } else { 0 }
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Arc<dyn Layer>> {
        read_only_layer::refuse_writing(&request)?;
        let options = request.options.take_known(NODE_OPTIONS)?;
        let plain = encrypted::open(
            &request.file,
            options.text("key-secret"),
            &request.context.objects,
        )?;
        let contents = Contents {
            is_encrypted: plain.is_some(),
            data: plain.unwrap_or_else(|| Arc::clone(&request.file)),
            file: request.file,
        };
        let Some(trailer) = Trailer::find(&*contents.data, request.name)? else {
            return Ok(read_only_layer::layer(RawDisk::new(contents)?));
        };
        let mut chunks = Chunks::new(trailer.data_offset, request.context.budget.clone());
        source::read(&*contents.data, &trailer, request.name, &mut chunks)?;
        let unknown = chunks.warning();
        let disk = Udif {
            contents,
            len: trailer.len()?,
            chunks: chunks.sorted(),
            blocks: DecodedBlocks::new(request.context.budget.clone()),
            unknown,
        };
        Ok(read_only_layer::layer(disk))
    }
}

/// qemu-img's message for parts of the file that do not fit together.
fn invalid(name: &str) -> Error {
    Error::from_errno(errno::EINVAL).context(format!("Could not open '{name}'"))
}

/// The bytes of an image.
#[derive(Debug)]
struct Contents {
    /// The image's file.
    file: Arc<dyn Device>,
    /// The bytes, decrypted if the file is an encrypted container.
    data: Arc<dyn Device>,
    is_encrypted: bool,
}

impl Contents {
    fn info(&self) -> Info {
        Info {
            encrypted: self.is_encrypted,
            ..Info::default()
        }
    }
}

/// A chunk as it is stored: offset, stored bytes, sectors and codec. Chunks of a crafted image share what is stored.
type StoredBlock = (u64, u64, u64, Codec);

/// An image with a trailer.
#[derive(Debug)]
struct Udif {
    contents: Contents,
    len: u64,
    chunks: Chunks,
    blocks: DecodedBlocks<StoredBlock>,
    /// The warning about chunks of unknown type.
    unknown: Option<Note>,
}

impl Udif {
    /// Reads from `chunk`, from offset `at` inside it.
    fn read_chunk(&self, chunk: &Chunk, buf: &mut [u8], at: u64) -> Result<()> {
        match chunk.kind {
            ChunkKind::Zero => buf.fill(0),
            ChunkKind::Raw => {
                // A chunk may have fewer stored bytes than sectors: the rest reads as zeroes.
                let stored = chunk.stored.saturating_sub(at).min(buf.len() as u64);
                let (head, tail) = buf.split_at_mut(to_index(stored)?);
                tail.fill(0);
                if !head.is_empty() {
                    self.contents.data.read_whole(head, chunk.offset + at)?;
                }
            }
            ChunkKind::Encoded(codec) => {
                // Both numbers are limited when the chunks are listed.
                let stored = self.present(chunk);
                let room = chunk.sectors * SECTOR + stored + self.dictionary(chunk, codec)?;
                let decode = |block: &mut Vec<u8>| self.decode(chunk, codec, block);
                let key = (chunk.offset, chunk.stored, chunk.sectors, codec);
                self.blocks.read(key, room, buf, to_index(at)?, decode)?;
            }
        }
        Ok(())
    }

    /// The stored bytes of a chunk that the file has. The stream marks its own end, so a stored length that reaches beyond the
    /// file is cut to the file.
    fn present(&self, chunk: &Chunk) -> u64 {
        chunk
            .stored
            .min(self.contents.data.len().saturating_sub(chunk.offset))
    }

    /// The memory that the decoder needs besides the bytes.
    fn dictionary(&self, chunk: &Chunk, codec: Codec) -> Result<u64> {
        if codec != Codec::Lzma {
            return Ok(0);
        }
        let mut head = [0; xz::HEAD];
        self.contents.data.read_padded(&mut head, chunk.offset)?;
        Ok(xz::dictionary(&head))
    }

    fn decode(&self, chunk: &Chunk, codec: Codec, block: &mut Vec<u8>) -> Result<()> {
        let damaged = || Error::from_errno(errno::EIO);
        let mut bytes = zeroed(to_index(self.present(chunk))?)?;
        if !bytes.is_empty() {
            self.contents.data.read_at(&mut bytes, chunk.offset)?;
        }
        resize(block, to_index(chunk.sectors * SECTOR)?)?;
        match codec {
            Codec::Adc => adc::decode(&bytes, block),
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
        &self.contents.file
    }

    fn info(&self) -> Info {
        self.contents.info()
    }

    fn notes(&self) -> &[Note] {
        self.unknown.as_slice()
    }

    fn status(&self, range: ByteRange) -> Result<(bool, u64)> {
        let end_of = |chunk: &Chunk| chunk.sector.saturating_add(chunk.sectors).saturating_mul(SECTOR);
        let mut at = range.start();
        while at < range.end() {
            at = match self.chunks.at(at / SECTOR) {
                Some(chunk) if chunk.kind == ChunkKind::Zero && at == range.start() => {
                    return Ok((true, end_of(chunk) - at));
                }
                Some(chunk) if chunk.kind == ChunkKind::Zero => break,
                Some(chunk) => end_of(chunk),
                // Reading what no chunk contains is an error.
                None => self.chunks.next(at / SECTOR).saturating_mul(SECTOR),
            };
        }
        Ok((false, at - range.start()))
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let (mut buf, mut offset) = (buf, offset);
        while !buf.is_empty() {
            // As in qemu-img: a sector that no chunk contains is an I/O error.
            let chunk = self
                .chunks
                .at(offset / SECTOR)
                .ok_or_else(|| Error::from_errno(errno::EIO))?;
            let at = offset - chunk.sector * SECTOR;
            let rest = chunk.sectors.saturating_mul(SECTOR) - at;
            let len = to_index(rest.min(buf.len() as u64))?;
            let (head, tail) = buf.split_at_mut(len);
            self.read_chunk(chunk, head, at)?;
            (buf, offset) = (tail, offset + len as u64);
        }
        Ok(())
    }
}
