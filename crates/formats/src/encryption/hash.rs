//! Hash algorithms and their digests.

use md5::digest::Digest;
use zeroize::Zeroizing;

/// A hash algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HashAlg {
    /// MD5.
    Md5,
    /// SHA-1.
    Sha1,
    /// SHA-224.
    Sha224,
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
    /// RIPEMD-160.
    Ripemd160,
    /// SM3.
    Sm3,
}

impl HashAlg {
    /// All algorithms.
    pub(crate) const ALL: [Self; 8] = [
        Self::Md5,
        Self::Sha1,
        Self::Sha224,
        Self::Sha256,
        Self::Sha384,
        Self::Sha512,
        Self::Ripemd160,
        Self::Sm3,
    ];

    /// The name in options and in headers.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Md5 => "md5",
            Self::Sha1 => "sha1",
            Self::Sha224 => "sha224",
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
            Self::Ripemd160 => "ripemd160",
            Self::Sm3 => "sm3",
        }
    }

    /// The algorithm with this name.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|alg| alg.name() == name)
    }

    /// The length of a digest in bytes.
    pub(crate) fn digest_len(self) -> usize {
        match self {
            Self::Md5 => 16,
            Self::Sha1 | Self::Ripemd160 => 20,
            Self::Sha224 => 28,
            Self::Sha256 | Self::Sm3 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    /// The digest of the concatenated `parts`.
    pub(crate) fn digest(self, parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
        match self {
            Self::Md5 => digest_with::<md5::Md5>(parts),
            Self::Sha1 => digest_with::<sha1::Sha1>(parts),
            Self::Sha224 => digest_with::<sha2::Sha224>(parts),
            Self::Sha256 => digest_with::<sha2::Sha256>(parts),
            Self::Sha384 => digest_with::<sha2::Sha384>(parts),
            Self::Sha512 => digest_with::<sha2::Sha512>(parts),
            Self::Ripemd160 => digest_with::<ripemd::Ripemd160>(parts),
            Self::Sm3 => digest_with::<sm3::Sm3>(parts),
        }
    }
}

fn digest_with<D: Digest>(parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
    let mut hash = D::new();
    for part in parts {
        hash.update(part);
    }
    Zeroizing::new(hash.finalize().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_of_abc_match_the_specifications() {
        // RFC 1321, FIPS 180-4's examples, the RIPEMD-160 paper and GB/T 32905.
        for (alg, start) in [
            (HashAlg::Md5, [0x90, 0x01, 0x50, 0x98]),
            (HashAlg::Sha1, [0xa9, 0x99, 0x3e, 0x36]),
            (HashAlg::Sha224, [0x23, 0x09, 0x7d, 0x22]),
            (HashAlg::Sha256, [0xba, 0x78, 0x16, 0xbf]),
            (HashAlg::Sha384, [0xcb, 0x00, 0x75, 0x3f]),
            (HashAlg::Sha512, [0xdd, 0xaf, 0x35, 0xa1]),
            (HashAlg::Ripemd160, [0x8e, 0xb2, 0x08, 0xf7]),
            (HashAlg::Sm3, [0x66, 0xc7, 0xf0, 0xf4]),
        ] {
            let digest = alg.digest(&[b"a", b"bc"]);
            assert_eq!(digest.len(), alg.digest_len(), "{alg:?}");
            assert_eq!(digest[..4], start, "{alg:?}");
            assert_eq!(HashAlg::from_name(alg.name()), Some(alg));
        }
    }
}
