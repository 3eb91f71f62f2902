//! Deterministic input files: generators, and small changes that corrupt an image.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;

use crate::script::os_word;

/// A change that the harness makes in the directory of the case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileOperation {
    /// `file NAME GENERATOR...`
    Create {
        /// File name.
        name: String,
        /// The contents.
        generator: Generator,
    },
    /// `poke NAME OFFSET HEX`
    Poke {
        /// File name.
        name: String,
        /// The offset of the bytes.
        offset: u64,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// `truncate NAME LENGTH`, shorter or longer.
    Truncate {
        /// File name.
        name: String,
        /// The new length.
        length: u64,
    },
    /// `copy FROM TO`
    Copy {
        /// An existing file.
        from: String,
        /// The new file.
        to: String,
    },
    /// `dir NAME`
    Directory(String),
    /// `symlink TARGET NAME`
    Symlink {
        /// The target of the link.
        target: String,
        /// The name of the link.
        name: String,
    },
    /// `remove NAME`
    Remove(String),
}

impl FileOperation {
    /// Makes the change in `directory`.
    ///
    /// # Errors
    /// A file does not exist, exists already, or cannot be written.
    pub fn apply(&self, directory: &Path) -> io::Result<()> {
        match self {
            FileOperation::Create { name, generator } => generator.write(&directory.join(os_word(name))),
            FileOperation::Poke { name, offset, bytes } => {
                open_for_writing(&directory.join(os_word(name)))?.write_all_at(bytes, *offset)
            }
            FileOperation::Truncate { name, length } => {
                open_for_writing(&directory.join(os_word(name)))?.set_len(*length)
            }
            FileOperation::Copy { from, to } => {
                fs::copy(directory.join(os_word(from)), directory.join(os_word(to))).map(|_length| ())
            }
            FileOperation::Directory(name) => fs::create_dir(directory.join(os_word(name))),
            FileOperation::Symlink { target, name } => {
                symlink(os_word(target), directory.join(os_word(name)))
            }
            FileOperation::Remove(name) => fs::remove_file(directory.join(os_word(name))),
        }
    }
}

/// The contents of a file that a `file` line creates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Generator {
    /// `zero SIZE`: a file that is one hole.
    Zero(u64),
    /// `fill SIZE BYTE`: one byte repeated.
    Fill(u64, u8),
    /// `random SIZE SEED`: bytes that do not compress.
    Random(u64, u64),
    /// `text SIZE`: numbered lines, which compress well.
    Text(u64),
    /// `sparse SIZE SEED OFFSET:LENGTH...`: random bytes in the ranges, holes elsewhere.
    Sparse {
        /// The length of the file.
        length: u64,
        /// Seed of the random bytes.
        seed: u64,
        /// Offset and length of each range of data.
        ranges: Vec<(u64, u64)>,
    },
    /// `hex DIGITS` or `content WORDS`: exactly these bytes.
    Bytes(Vec<u8>),
}

impl Generator {
    /// Parses the words after the file's name.
    ///
    /// # Errors
    /// A message for the author of the case.
    pub fn parse(words: &[&str]) -> Result<Self, String> {
        match words {
            ["zero", size] => Ok(Generator::Zero(parse_size(size)?)),
            ["fill", size, byte] => {
                let byte = u8::try_from(parse_size(byte)?).map_err(|_| format!("{byte} is not a byte"))?;
                Ok(Generator::Fill(parse_size(size)?, byte))
            }
            ["random", size, seed] => Ok(Generator::Random(parse_size(size)?, parse_size(seed)?)),
            ["text", size] => Ok(Generator::Text(parse_size(size)?)),
            ["sparse", size, seed, ranges @ ..] => {
                let ranges = ranges.iter().map(|range| {
                    let (offset, length) = range.split_once(':').ok_or("a range is OFFSET:LENGTH")?;
                    Ok((parse_size(offset)?, parse_size(length)?))
                });
                let ranges = ranges.collect::<Result<_, String>>()?;
                Ok(Generator::Sparse {
                    length: parse_size(size)?,
                    seed: parse_size(seed)?,
                    ranges,
                })
            }
            ["hex", digits] => Ok(Generator::Bytes(parse_hex(digits)?)),
            ["content", words @ ..] => Ok(Generator::Bytes(os_word(&words.join(" ")).into_vec())),
            _ => Err(format!("no such generator: {}", words.join(" "))),
        }
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        let file = File::create(path)?;
        match self {
            Generator::Zero(length) => file.set_len(*length),
            Generator::Fill(length, byte) => write_blocks(&file, 0, *length, |block| block.fill(*byte)),
            Generator::Random(length, seed) => {
                let mut random = SplitMix64(*seed);
                write_blocks(&file, 0, *length, |block| random.fill(block))
            }
            Generator::Text(length) => {
                let mut number = 0u64;
                let mut pending: Vec<u8> = Vec::new();
                write_blocks(&file, 0, *length, |block| {
                    while pending.len() < block.len() {
                        number += 1;
                        pending.extend_from_slice(format!("line {number} of some text\n").as_bytes());
                    }
                    let rest = pending.split_off(block.len());
                    block.copy_from_slice(&pending);
                    pending = rest;
                })
            }
            Generator::Sparse { length, seed, ranges } => {
                file.set_len(*length)?;
                let mut random = SplitMix64(*seed);
                for (offset, length) in ranges {
                    write_blocks(&file, *offset, *length, |block| random.fill(block))?;
                }
                Ok(())
            }
            Generator::Bytes(bytes) => file.write_all_at(bytes, 0),
        }
    }
}

/// Parses a number with an optional suffix `K`, `M`, `G`, `T`, a `0x` number, or a sum of them (`1M+512`).
///
/// # Errors
/// A message for the author of the case.
pub fn parse_size(word: &str) -> Result<u64, String> {
    let bad = || format!("not a size: {word}");
    word.split('+').try_fold(0u64, |sum, term| {
        let value = if let Some(digits) = term.strip_prefix("0x") {
            u64::from_str_radix(digits, 16).map_err(|_| bad())?
        } else {
            let (digits, shift) = match term.chars().last() {
                Some('K') => (&term[..term.len() - 1], 10),
                Some('M') => (&term[..term.len() - 1], 20),
                Some('G') => (&term[..term.len() - 1], 30),
                Some('T') => (&term[..term.len() - 1], 40),
                _ => (term, 0),
            };
            digits
                .parse::<u64>()
                .ok()
                .and_then(|n| n.checked_mul(1 << shift))
                .ok_or_else(bad)?
        };
        sum.checked_add(value).ok_or_else(bad)
    })
}

/// Parses pairs of hexadecimal digits.
///
/// # Errors
/// A message for the author of the case.
pub fn parse_hex(digits: &str) -> Result<Vec<u8>, String> {
    let bad = || format!("not pairs of hexadecimal digits: {digits}");
    if !digits.len().is_multiple_of(2) || !digits.is_ascii() {
        return Err(bad());
    }
    (0..digits.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&digits[at..at + 2], 16).map_err(|_| bad()))
        .collect()
}

fn open_for_writing(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).open(path)
}

fn write_blocks(file: &File, offset: u64, length: u64, mut fill: impl FnMut(&mut [u8])) -> io::Result<()> {
    let mut block = vec![0; BLOCK];
    let mut done = 0;
    while done < length {
        let count = usize::try_from(length - done).map_or(BLOCK, |left| left.min(BLOCK));
        fill(&mut block[..count]);
        file.write_all_at(&block[..count], offset + done)?;
        done += count as u64;
    }
    Ok(())
}

/// The random number generator of Steele, Lea and Flood: small, seedable, and the same on every machine.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn fill(&mut self, block: &mut [u8]) {
        for chunk in block.chunks_mut(8) {
            let bytes = self.next().to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }
}

const BLOCK: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_suffixes_and_sums() {
        assert_eq!(parse_size("1M+512"), Ok((1 << 20) + 512));
        assert_eq!(parse_size("0x10"), Ok(16));
        assert_eq!(parse_size("3T"), Ok(3 << 40));
        assert!(parse_size("").is_err());
        assert!(parse_size("K").is_err());
        assert!(parse_size("99999999999T").is_err());
    }

    #[test]
    fn hex_takes_pairs_only() {
        assert_eq!(parse_hex("00ff7A"), Ok(vec![0, 255, 0x7a]));
        assert!(parse_hex("0").is_err());
        assert!(parse_hex("xx").is_err());
    }

    #[test]
    fn generators_have_the_given_length_and_the_same_bytes_each_time() {
        let directory = tempfile::tempdir().unwrap();
        for words in [
            &["zero", "70001"][..],
            &["fill", "70001", "0xa5"],
            &["random", "70001", "7"],
            &["text", "70001"],
            &["sparse", "70001", "7", "4K:4K", "65536:100"],
        ] {
            let generator = Generator::parse(words).unwrap();
            let (a, b) = (directory.path().join("a"), directory.path().join("b"));
            generator.write(&a).unwrap();
            generator.write(&b).unwrap();
            let bytes = fs::read(&a).unwrap();
            assert_eq!(bytes.len(), 70001, "{words:?}");
            assert!(bytes == fs::read(&b).unwrap(), "{words:?}");
        }
    }
}
