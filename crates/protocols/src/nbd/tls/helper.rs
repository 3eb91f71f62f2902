//! What `qemu-img` and the program `qemu-img-tls` say to each other before the handshake and after it.
//!
//! ```text
//!   qemu-img ── Setup ──► qemu-img-tls ── handshake ──► server
//!            ◄── Answer ──             ◄──────────────
//!            ◄═ plain ══►              ◄═ encrypted ══►        until either side ends
//! ```

use std::io::{self, Read, Write};

use diskimage_core::Error;
use zeroize::Zeroizing;

use super::messages::{
    ALERT, FAREWELL, INSUFFICIENT, LENGTH, UNCLEAN_END, UNCLEAN_PUSH, UNDECODABLE, UNEXPECTED,
    handshake_failed,
};

/// How the own side authenticates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Setup {
    /// With a key that both sides have.
    Key(NamedKey),
    /// Not at all.
    Anonymous,
}

/// A pre-shared key. It is wiped from memory on drop.
#[derive(Clone, PartialEq, Eq)]
pub struct NamedKey {
    /// Its name, in bytes that the server compares with its own.
    pub name: Vec<u8>,
    /// The key.
    pub bytes: Zeroizing<Vec<u8>>,
}

impl std::fmt::Debug for NamedKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NamedKey")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

const ANONYMOUS: u8 = 0;
const KEY: u8 = 1;

impl Setup {
    /// Writes it: a byte for the kind; for a key the lengths of name and key, two bytes each, and both.
    ///
    /// # Errors
    /// Those of `to`, and a name or a key of 64 KiB and more.
    pub fn write(&self, mut to: impl Write) -> io::Result<()> {
        match self {
            Self::Anonymous => to.write_all(&[ANONYMOUS]),
            Self::Key(NamedKey { name, bytes }) => {
                let mut message = Zeroizing::new(Vec::with_capacity(5 + name.len() + bytes.len()));
                message.push(KEY);
                message.extend(length(name)?);
                message.extend(length(bytes)?);
                message.extend(name);
                message.extend(bytes.iter());
                to.write_all(&message)
            }
        }
    }

    /// Reads what [`Setup::write`] has written.
    ///
    /// # Errors
    /// Those of `from`, and `InvalidData`.
    pub fn read(mut from: impl Read) -> io::Result<Self> {
        let [kind] = array(&mut from)?;
        match kind {
            ANONYMOUS => Ok(Self::Anonymous),
            KEY => {
                let lengths = [array(&mut from)?, array(&mut from)?].map(u16::from_be_bytes);
                let [mut name, mut bytes] = lengths.map(|len| vec![0; usize::from(len)]);
                from.read_exact(&mut name)?;
                from.read_exact(&mut bytes)?;
                Ok(Self::Key(NamedKey {
                    name,
                    bytes: Zeroizing::new(bytes),
                }))
            }
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// The outcome of a handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Plain bytes follow, in both directions.
    Secured,
    /// The peer authenticates with a method for which the client has no credentials.
    Insufficient,
    /// The connection ended with a close alert.
    Farewell,
    /// The peer sent a fatal alert.
    Alert,
    /// A message out of sequence, or no TLS at all.
    Unexpected,
    /// A message that is too short or too long.
    Undecodable,
    /// A record with an invalid length.
    Length,
    /// The connection ended before the server had answered.
    EndedUnanswered,
    /// The connection ended later.
    Ended,
    /// Another cause, in words.
    Failed(String),
    /// TLS cannot be used at all, in words.
    Unusable(String),
}

impl Answer {
    /// Those without words, by their code.
    const WORDLESS: [Self; 9] = [
        Self::Secured,
        Self::Insufficient,
        Self::Farewell,
        Self::Alert,
        Self::Unexpected,
        Self::Undecodable,
        Self::Length,
        Self::EndedUnanswered,
        Self::Ended,
    ];
    const FAILED: u8 = 0x80;
    const UNUSABLE: u8 = 0x81;

    /// Writes it: a byte for the kind, and for words their length in two bytes and the words.
    ///
    /// # Errors
    /// Those of `to`, and words of 64 KiB and more.
    pub fn write(&self, mut to: impl Write) -> io::Result<()> {
        let (code, words) = match self {
            Self::Failed(words) => (Self::FAILED, words),
            Self::Unusable(words) => (Self::UNUSABLE, words),
            wordless => {
                let code = (0..).zip(&Self::WORDLESS).find(|(_, each)| *each == wordless);
                return to.write_all(&[code.map_or(Self::FAILED, |(code, _)| code)]);
            }
        };
        to.write_all(&[&[code][..], &length(words.as_bytes())?, words.as_bytes()].concat())
    }

    /// Reads what [`Answer::write`] has written.
    ///
    /// # Errors
    /// Those of `from`, and `InvalidData`.
    pub fn read(mut from: impl Read) -> io::Result<Self> {
        let [code] = array(&mut from)?;
        if let Some(wordless) = Self::WORDLESS.get(usize::from(code)) {
            return Ok(wordless.clone());
        }
        let mut words = vec![0; usize::from(u16::from_be_bytes(array(&mut from)?))];
        from.read_exact(&mut words)?;
        let words = String::from_utf8_lossy(&words).into_owned();
        match code {
            Self::FAILED => Ok(Self::Failed(words)),
            Self::UNUSABLE => Ok(Self::Unusable(words)),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// The error of a failed handshake in the words of `qemu-img`; `None` if it did not fail.
    pub fn error(&self) -> Option<Error> {
        Some(handshake_failed(match self {
            Self::Secured => return None,
            Self::Unusable(words) => return Some(Error::unsupported(format!("Cannot use TLS: {words}"))),
            Self::Insufficient => INSUFFICIENT,
            Self::Farewell => FAREWELL,
            Self::Alert => ALERT,
            Self::Unexpected => UNEXPECTED,
            Self::Undecodable => UNDECODABLE,
            Self::Length => LENGTH,
            Self::EndedUnanswered => UNCLEAN_END,
            // `qemu-img` replies to the first message of the server at once, so after that it is a write that fails.
            Self::Ended => UNCLEAN_PUSH,
            Self::Failed(words) => words,
        }))
    }
}

fn length(bytes: &[u8]) -> io::Result<[u8; 2]> {
    let len = u16::try_from(bytes.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    Ok(len.to_be_bytes())
}

fn array<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn setups_and_answers_are_read_as_written() {
        let key = NamedKey {
            name: b"n\xff".to_vec(),
            bytes: Zeroizing::new(vec![1, 2, 3]),
        };
        for setup in [Setup::Anonymous, Setup::Key(key)] {
            let mut bytes = Vec::new();
            setup.write(&mut bytes).unwrap();
            assert_eq!(Setup::read(&bytes[..]).unwrap(), setup);
            assert!(Setup::read(&bytes[..bytes.len() - 1]).is_err());
        }
        let words = [Answer::Failed("a".to_owned()), Answer::Unusable(String::new())];
        for answer in Answer::WORDLESS.iter().chain(&words) {
            let mut bytes = Vec::new();
            answer.write(&mut bytes).unwrap();
            assert_eq!(Answer::read(&bytes[..]).unwrap(), *answer);
            assert!(Answer::read(&bytes[..bytes.len() - 1]).is_err());
        }
        assert!(Setup::read(&[2][..]).is_err());
        assert!(Answer::read(&[0x82, 0, 0][..]).is_err());
    }
}
