//! The names of ciphers and of modes of operation.

/// A block cipher and the length of its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CipherAlg {
    /// AES with a key of 16 bytes.
    Aes128,
    /// AES with a key of 24 bytes.
    Aes192,
    /// AES with a key of 32 bytes.
    Aes256,
    /// CAST5 with a key of 16 bytes and blocks of 8 bytes.
    Cast5,
    /// Serpent with a key of 16 bytes.
    Serpent128,
    /// Serpent with a key of 24 bytes.
    Serpent192,
    /// Serpent with a key of 32 bytes.
    Serpent256,
    /// Twofish with a key of 16 bytes.
    Twofish128,
    /// Twofish with a key of 24 bytes.
    Twofish192,
    /// Twofish with a key of 32 bytes.
    Twofish256,
}

impl CipherAlg {
    /// All ciphers.
    pub(crate) const ALL: [Self; 10] = [
        Self::Aes128,
        Self::Aes192,
        Self::Aes256,
        Self::Cast5,
        Self::Serpent128,
        Self::Serpent192,
        Self::Serpent256,
        Self::Twofish128,
        Self::Twofish192,
        Self::Twofish256,
    ];

    /// The name with the length of the key in bits: `aes-256`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Aes128 => "aes-128",
            Self::Aes192 => "aes-192",
            Self::Aes256 => "aes-256",
            Self::Cast5 => "cast5-128",
            Self::Serpent128 => "serpent-128",
            Self::Serpent192 => "serpent-192",
            Self::Serpent256 => "serpent-256",
            Self::Twofish128 => "twofish-128",
            Self::Twofish192 => "twofish-192",
            Self::Twofish256 => "twofish-256",
        }
    }

    /// The cipher with this name.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|alg| alg.name() == name)
    }

    /// The name without the length of the key: `aes`.
    pub(crate) fn family(self) -> &'static str {
        let name = self.name();
        name.split_once('-').map_or(name, |(family, _)| family)
    }

    /// The family's name as it is written in messages.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Aes128 | Self::Aes192 | Self::Aes256 => "AES",
            Self::Cast5 => "CAST5",
            Self::Serpent128 | Self::Serpent192 | Self::Serpent256 => "Serpent",
            Self::Twofish128 | Self::Twofish192 | Self::Twofish256 => "Twofish",
        }
    }

    /// The cipher of a family with a key of `key_len` bytes.
    pub(crate) fn from_family(family: &str, key_len: usize) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|alg| alg.family() == family && alg.key_len() == key_len)
    }

    /// The length of the key in bytes.
    pub(crate) fn key_len(self) -> usize {
        match self {
            Self::Aes128 | Self::Cast5 | Self::Serpent128 | Self::Twofish128 => 16,
            Self::Aes192 | Self::Serpent192 | Self::Twofish192 => 24,
            Self::Aes256 | Self::Serpent256 | Self::Twofish256 => 32,
        }
    }

    /// The length of a block in bytes.
    pub(crate) fn block_len(self) -> usize {
        match self {
            Self::Cast5 => 8,
            _ => 16,
        }
    }
}

/// A mode of operation: how the blocks of a sector are chained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CipherMode {
    /// Blocks are encrypted independently.
    Ecb,
    /// Each block is combined with the encrypted block before.
    Cbc,
    /// Each block is combined with a tweak made from its position; the key is twice as long.
    Xts,
    /// Each block is combined with an encrypted counter.
    Ctr,
}

impl CipherMode {
    /// All modes.
    pub(crate) const ALL: [Self; 4] = [Self::Ecb, Self::Cbc, Self::Xts, Self::Ctr];

    /// The name in options and in headers.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ecb => "ecb",
            Self::Cbc => "cbc",
            Self::Xts => "xts",
            Self::Ctr => "ctr",
        }
    }

    /// The mode with this name.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }

    /// How many keys of the cipher the mode's key consists of.
    pub(crate) fn keys(self) -> usize {
        match self {
            Self::Xts => 2,
            _ => 1,
        }
    }
}
