//! The block cipher Twofish, as B. Schneier and others describe it in "Twofish: A 128-Bit Block Cipher" (1998).
//!
//! The function `g` of the paper (sections 4.1 and 4.3) is four substitutions, which depend on the key, and a
//! multiplication with the MDS matrix. Both together are one table of 256 words for each byte, made once a key ("full
//! keying"). That is why this is not the crate `twofish`: it computes `g` anew for every block and takes seventy times as
//! long. The tests compare with it. Like every cipher with tables, its time tells something of the key to a program that
//! shares the processor's caches; Twofish is here to read disks that have it.

use diskimage_core::{Error, Result};
use zeroize::Zeroizing;

use super::BlockCipher;

const ROUNDS: usize = 16;
/// Four words of whitening before the rounds, four after them, two for each round.
const SUBKEYS: usize = 8 + 2 * ROUNDS;

/// The four-bit permutations that make up `q0` and `q1`.
const Q: [[[u8; 16]; 4]; 2] = [
    [
        [8, 1, 7, 13, 6, 15, 3, 2, 0, 11, 5, 9, 14, 12, 10, 4],
        [14, 12, 11, 8, 1, 2, 3, 5, 15, 4, 10, 6, 7, 0, 9, 13],
        [11, 10, 5, 14, 6, 13, 9, 0, 12, 8, 15, 3, 2, 4, 7, 1],
        [13, 7, 15, 4, 1, 2, 6, 14, 9, 11, 3, 0, 8, 5, 12, 10],
    ],
    [
        [2, 8, 11, 13, 15, 7, 6, 14, 3, 1, 9, 4, 0, 10, 12, 5],
        [1, 14, 2, 11, 4, 12, 3, 7, 6, 13, 10, 5, 15, 9, 0, 8],
        [4, 12, 7, 5, 1, 6, 9, 10, 0, 14, 13, 8, 2, 11, 3, 15],
        [11, 9, 5, 1, 12, 3, 13, 14, 6, 4, 7, 15, 2, 0, 8, 10],
    ],
];

/// Which of `q0` and `q1` each byte goes through, from the last one back to the first.
const ORDER: [[usize; 4]; 5] = [
    [1, 0, 1, 0],
    [0, 0, 1, 1],
    [0, 1, 0, 1],
    [1, 1, 0, 0],
    [1, 0, 0, 1],
];

/// The matrix that mixes the bytes of a word, over GF(2^8) modulo [`MDS_MODULUS`].
const MDS: [[u8; 4]; 4] = [
    [0x01, 0xef, 0x5b, 0x5b],
    [0x5b, 0xef, 0xef, 0x01],
    [0xef, 0x5b, 0x01, 0xef],
    [0xef, 0x01, 0xef, 0x5b],
];
const MDS_MODULUS: u16 = 0x169;

/// The matrix of a Reed-Solomon code that makes the key of `g`, over GF(2^8) modulo [`RS_MODULUS`].
const RS: [[u8; 8]; 4] = [
    [0x01, 0xa4, 0x55, 0x87, 0x5a, 0x58, 0xdb, 0x9e],
    [0xa4, 0x56, 0x82, 0xf3, 0x1e, 0xc6, 0x68, 0xe5],
    [0x02, 0xa1, 0xfc, 0xc1, 0x47, 0xae, 0x3d, 0x19],
    [0xa4, 0x55, 0x87, 0x5a, 0x58, 0xdb, 0x9e, 0x03],
];
const RS_MODULUS: u16 = 0x14d;

/// The cipher with its key. Dropping it wipes the key from memory.
pub(super) struct Twofish {
    subkeys: Zeroizing<[u32; SUBKEYS]>,
    /// What each byte of a word adds to `g`.
    g: Box<Zeroizing<[[u32; 256]; 4]>>,
}

impl Twofish {
    /// The cipher with a key of 16, 24 or 32 bytes.
    ///
    /// # Errors
    /// A key of another length.
    pub(super) fn new(key: &[u8]) -> Result<Self> {
        let (parts, []) = key.as_chunks::<8>() else {
            return Err(unfit(key));
        };
        if !(2..=4).contains(&parts.len()) {
            return Err(unfit(key));
        }
        let q = [substitution(&Q[0]), substitution(&Q[1])];
        let half = |start: usize| -> Vec<[u8; 4]> {
            let words = parts.iter().map(|part| [0, 1, 2, 3].map(|i| part[start + i]));
            words.collect()
        };
        let (even, odd) = (half(0), half(4));
        let mut subkeys = Zeroizing::new([0; SUBKEYS]);
        for (i, pair) in (0_u8..).zip(subkeys.as_chunks_mut::<2>().0) {
            let a = h(&q, [2 * i; 4], &even);
            let b = h(&q, [2 * i + 1; 4], &odd).rotate_left(8);
            pair[0] = a.wrapping_add(b);
            pair[1] = a.wrapping_add(b.wrapping_mul(2)).rotate_left(9);
        }
        // The first part of the key is used last.
        let s: Vec<[u8; 4]> = parts.iter().rev().map(reed_solomon).collect();
        let mut g = Box::new(Zeroizing::new([[0; 256]; 4]));
        for (position, table) in g.iter_mut().enumerate() {
            for (byte, entry) in (0..=u8::MAX).zip(table.iter_mut()) {
                *entry = column(position, substituted(&q, position, byte, &s));
            }
        }
        Ok(Self { subkeys, g })
    }

    fn g(&self, word: u32) -> u32 {
        let [a, b, c, d] = word.to_le_bytes().map(usize::from);
        self.g[0][a] ^ self.g[1][b] ^ self.g[2][c] ^ self.g[3][d]
    }

    /// The function `F` of a round, with its subkeys.
    fn f(&self, left: [u32; 2], subkeys: &[u32; 2]) -> [u32; 2] {
        let t0 = self.g(left[0]);
        let t1 = self.g(left[1].rotate_left(8));
        let sum = t0.wrapping_add(t1);
        [
            sum.wrapping_add(subkeys[0]),
            sum.wrapping_add(t1).wrapping_add(subkeys[1]),
        ]
    }

    fn encrypt_block(&self, block: &mut [u8; 16]) {
        let [mut a, mut b, mut c, mut d] = self.whitened(block, 0);
        for [first, second] in self.rounds().as_chunks::<2>().0 {
            let f = self.f([a, b], first);
            c = (c ^ f[0]).rotate_right(1);
            d = d.rotate_left(1) ^ f[1];
            let f = self.f([c, d], second);
            a = (a ^ f[0]).rotate_right(1);
            b = b.rotate_left(1) ^ f[1];
        }
        self.store([c, d, a, b], 4, block);
    }

    fn decrypt_block(&self, block: &mut [u8; 16]) {
        let [mut c, mut d, mut a, mut b] = self.whitened(block, 4);
        for [first, second] in self.rounds().as_chunks::<2>().0.iter().rev() {
            let f = self.f([c, d], second);
            a = a.rotate_left(1) ^ f[0];
            b = (b ^ f[1]).rotate_right(1);
            let f = self.f([a, b], first);
            c = c.rotate_left(1) ^ f[0];
            d = (d ^ f[1]).rotate_right(1);
        }
        self.store([a, b, c, d], 0, block);
    }

    /// The subkeys of the rounds, in pairs.
    fn rounds(&self) -> &[[u32; 2]] {
        self.subkeys[8..].as_chunks().0
    }

    /// The words of `block`, each combined with a subkey from `first` on.
    fn whitened(&self, block: &[u8; 16], first: usize) -> [u32; 4] {
        let (words, _) = block.as_chunks::<4>();
        [0, 1, 2, 3].map(|i| u32::from_le_bytes(words[i]) ^ self.subkeys[first + i])
    }

    fn store(&self, words: [u32; 4], first: usize, block: &mut [u8; 16]) {
        for (i, bytes) in block.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            *bytes = (words[i] ^ self.subkeys[first + i]).to_le_bytes();
        }
    }
}

impl BlockCipher for Twofish {
    fn encrypt(&self, bytes: &mut [u8]) {
        let (blocks, rest) = bytes.as_chunks_mut();
        debug_assert!(rest.is_empty(), "part of a block");
        blocks.iter_mut().for_each(|block| self.encrypt_block(block));
    }

    fn decrypt(&self, bytes: &mut [u8]) {
        let (blocks, rest) = bytes.as_chunks_mut();
        debug_assert!(rest.is_empty(), "part of a block");
        blocks.iter_mut().for_each(|block| self.decrypt_block(block));
    }
}

fn unfit(key: &[u8]) -> Error {
    Error::invalid(format!("Key of {} bytes does not fit its cipher", key.len()))
}

/// The permutation `q0` or `q1` as a table.
fn substitution(tables: &[[u8; 16]; 4]) -> [u8; 256] {
    let at = |table: usize, index: u8| tables[table][usize::from(index & 15)];
    let mix = |a: u8, b: u8| (a ^ b, a ^ (b >> 1 | b << 3) ^ (a << 3));
    let mut q = [0; 256];
    for (x, y) in (0..=u8::MAX).zip(&mut q) {
        let (a, b) = mix(x >> 4, x & 15);
        let (a, b) = mix(at(0, a), at(1, b));
        *y = at(3, b) << 4 | at(2, a);
    }
    q
}

/// The byte at `position` of a word after its substitutions by `q` and the words of `list`, of which the last is used first.
fn substituted(q: &[[u8; 256]; 2], position: usize, byte: u8, list: &[[u8; 4]]) -> u8 {
    let keyed = list.iter().zip(&ORDER[1..]).rev();
    let byte = keyed.fold(byte, |byte, (word, order)| {
        q[order[position]][usize::from(byte)] ^ word[position]
    });
    q[ORDER[0][position]][usize::from(byte)]
}

/// What a byte at `position` adds to the product with the MDS matrix.
fn column(position: usize, byte: u8) -> u32 {
    u32::from_le_bytes(MDS.map(|row| multiply(row[position], byte, MDS_MODULUS)))
}

/// The function `h` of the paper.
fn h(q: &[[u8; 256]; 2], word: [u8; 4], list: &[[u8; 4]]) -> u32 {
    let columns = (0..4).map(|i| column(i, substituted(q, i, word[i], list)));
    columns.fold(0, |sum, column| sum ^ column)
}

/// A word of the key of `g`, from eight bytes of the key.
fn reed_solomon(part: &[u8; 8]) -> [u8; 4] {
    RS.map(|row| {
        let products = row.iter().zip(part).map(|(a, b)| multiply(*a, *b, RS_MODULUS));
        products.fold(0, |sum, product| sum ^ product)
    })
}

/// The product of two elements of GF(2^8).
fn multiply(a: u8, b: u8, modulus: u16) -> u8 {
    let (mut power, mut product) = (u16::from(a), 0);
    for bit in 0..8 {
        if b >> bit & 1 == 1 {
            product ^= power;
        }
        power <<= 1;
        if power & 0x100 != 0 {
            power ^= modulus;
        }
    }
    product.to_le_bytes()[0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encryption::block::boxed;

    /// The tables of appendix B.2 ("Full Encryptions") for a key of zeroes and one of 256 bits.
    #[test]
    fn the_vectors_of_the_paper_hold() {
        let mut block = [0; 16];
        Twofish::new(&[0; 16]).unwrap().encrypt(&mut block);
        assert_eq!(
            u128::from_be_bytes(block),
            0x9f58_9f5c_f612_2c32_b6bf_ec2f_2ae8_c35a
        );
        let key = [
            0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef, 0xfe, 0xdc, 0xba, 0x98, 0x76, 0x54, 0x32, 0x10,
            0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff,
        ];
        let mut block = [0; 16];
        Twofish::new(&key).unwrap().encrypt(&mut block);
        assert_eq!(
            u128::from_be_bytes(block),
            0x3752_7be0_0523_34b8_9f0c_fcca_e87c_fa20
        );
    }

    #[test]
    fn another_implementation_agrees() {
        let mut bytes: Vec<u8> = (0..=u8::MAX).map(|n| n.wrapping_mul(167) ^ 0x3c).collect();
        for len in [16, 24, 32] {
            let key = bytes[7..7 + len].to_vec();
            let (ours, theirs) = (
                Twofish::new(&key).unwrap(),
                boxed::<::twofish::Twofish>(&key).unwrap(),
            );
            let plain = bytes.clone();
            ours.encrypt(&mut bytes);
            let mut expected = plain.clone();
            theirs.encrypt(&mut expected);
            assert_eq!(bytes, expected, "encrypted with a key of {len} bytes");
            let encrypted = bytes.clone();
            ours.decrypt(&mut bytes);
            assert_eq!(bytes, plain, "decrypted with a key of {len} bytes");
            // The next key is made of these.
            bytes = encrypted;
        }
    }

    #[test]
    fn keys_of_other_lengths_are_refused() {
        for len in [0, 8, 15, 17, 40] {
            assert!(Twofish::new(&vec![0; len]).is_err(), "{len} bytes");
        }
    }
}
