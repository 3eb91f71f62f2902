#![expect(clippy::cast_possible_truncation, reason = "the numbers are small")]

use proptest::prelude::*;
use zlib_rs::{Inflate, InflateFlush, Status};

use super::symbols::{DISTANCE_BASE, LENGTH_BASE, distance_extra, distance_symbol, length_symbol};
use super::*;

const LEVELS: std::ops::RangeInclusive<u8> = 1..=9;

/// Pseudorandom numbers.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % limit
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.below(256) as u8).collect()
    }

    /// Literals and copies of what is up to `window` bytes back.
    fn repeats(&mut self, len: usize, window: usize) -> Vec<u8> {
        let mut bytes = self.bytes(20);
        while bytes.len() < len {
            if self.below(3) == 0 {
                let count = self.below(12);
                bytes.extend(self.bytes(count));
            } else {
                let distance = 1 + self.below(window.min(bytes.len()));
                for _ in 0..3 + self.below(300) {
                    bytes.push(bytes[bytes.len() - distance]);
                }
            }
        }
        bytes.truncate(len);
        bytes
    }
}

/// Encodes with the narrow window and with the wide one, and decodes each with two decoders.
#[track_caller]
fn assert_round_trip(bytes: &[u8], level: u8) {
    let mut out = Vec::new();
    assert!(Narrow::new(level).encode(bytes, &mut out, usize::MAX));
    assert_decodes(&out, bytes, 12);
    out.clear();
    assert!(Wide::new(level).encode(bytes, &mut out, usize::MAX));
    assert_decodes(&out, bytes, 15);
    // The longest stored form.
    assert!(
        out.len() <= bytes.len() + bytes.len() / 65535 * 5 + 16,
        "{} bytes became {}",
        bytes.len(),
        out.len()
    );
}

/// Decodes by pieces, so that the decoder has nothing but its window to copy from.
#[track_caller]
fn assert_decodes(encoded: &[u8], bytes: &[u8], window_bits: u8) {
    let mut inflate = Inflate::new(false, window_bits);
    let mut back = Vec::new();
    let mut piece = [0; 700];
    loop {
        let (read, written) = (inflate.total_in() as usize, inflate.total_out());
        let status = inflate.decompress(&encoded[read..], &mut piece, InflateFlush::NoFlush);
        let status = status.expect("the window is large enough");
        back.extend_from_slice(&piece[..(inflate.total_out() - written) as usize]);
        if status == Status::StreamEnd {
            break;
        }
        assert!(inflate.total_out() > written, "the stream has no end");
    }
    assert_eq!(inflate.total_in(), encoded.len() as u64, "bytes behind the end");
    assert!(back == bytes, "zlib-rs decodes other bytes");
    let other = miniz_oxide::inflate::decompress_to_vec(encoded).expect("miniz_oxide decodes");
    assert!(other == bytes, "miniz_oxide decodes other bytes");
}

#[test]
fn clusters_of_all_kinds_and_lengths_decode() {
    let mut random = Random(42);
    for level in LEVELS {
        for len in [0, 1, 2, 3, 4, 7, 8, 9, 11, 12, 258, 512, 4096, 65536, 200_000] {
            assert_round_trip(&vec![7; len], level);
            assert_round_trip(&random.bytes(len), level);
            assert_round_trip(&random.repeats(len, 40), level);
            assert_round_trip(&random.repeats(len, 40000), level);
        }
    }
}

#[test]
fn clusters_of_two_mebibytes_decode() {
    let mut random = Random(43);
    let mut bytes = random.repeats(1 << 20, 33000);
    bytes.extend(random.bytes(1 << 19));
    bytes.extend(vec![0; 1 << 19]);
    for level in [1, 4, 6, 9] {
        assert_round_trip(&bytes, level);
    }
}

#[test]
fn one_encoder_encodes_many_clusters_alike() {
    let mut random = Random(44);
    let (mut out, mut again) = (Vec::new(), Vec::new());
    for level in LEVELS {
        let mut used = Narrow::new(level);
        for _ in 0..10 {
            let bytes = random.repeats(30000, 5000);
            out.clear();
            again.clear();
            assert!(used.encode(&bytes, &mut out, usize::MAX));
            assert!(Narrow::new(level).encode(&bytes, &mut again, usize::MAX));
            assert!(
                out == again,
                "level {level}: what was encoded before changes the output"
            );
        }
    }
}

#[test]
fn a_limit_is_kept_to_the_byte() {
    let bytes = Random(45).repeats(65536, 3000);
    let mut out = Vec::new();
    assert!(Narrow::new(6).encode(&bytes, &mut out, usize::MAX));
    let len = out.len();
    out.clear();
    assert!(Narrow::new(6).encode(&bytes, &mut out, len), "it fits");
    out.clear();
    assert!(
        !Narrow::new(6).encode(&bytes, &mut out, len - 1),
        "it does not fit"
    );
}

#[test]
fn higher_levels_are_shorter() {
    let mut random = Random(46);
    // Words, each of which differs a little each time.
    let words: Vec<Vec<u8>> = (0..300)
        .map(|_| {
            let len = 3 + random.below(12);
            random.bytes(len)
        })
        .collect();
    let mut bytes = Vec::new();
    while bytes.len() < 65536 {
        bytes.extend_from_slice(&words[random.below(300)]);
        if random.below(4) == 0 {
            bytes.push(random.below(256) as u8);
        }
    }
    let lens: Vec<usize> = [1, 3, 6, 7]
        .into_iter()
        .map(|level| {
            let mut out = Vec::new();
            assert!(Narrow::new(level).encode(&bytes, &mut out, usize::MAX));
            out.len()
        })
        .collect();
    assert!(lens.is_sorted_by(|a, b| a > b), "{lens:?}");
}

#[test]
fn blocks_end_where_the_data_changes() {
    // Halves with different bytes: with codes for both, each symbol would take a bit more.
    let mut random = Random(47);
    let low: Vec<u8> = (0..32768).map(|_| random.below(32) as u8).collect();
    let high: Vec<u8> = (0..32768).map(|_| 128 + random.below(32) as u8).collect();
    let mut out = Vec::new();
    assert!(Narrow::new(6).encode(&[low, high].concat(), &mut out, usize::MAX));
    // Five bits for each byte, and the tables.
    assert!(out.len() < 65536 * 5 / 8 + 400, "{}", out.len());
}

#[test]
fn symbols_are_those_of_the_specification() {
    for length in 3..=258_u16 {
        let symbol = length_symbol(length);
        let is_next = LENGTH_BASE.get(symbol + 1).is_some_and(|next| length >= *next);
        assert!(length >= LENGTH_BASE[symbol] && !is_next, "length {length}");
    }
    for distance in 1..=32768_u16 {
        let symbol = distance_symbol(distance);
        let extra = distance - DISTANCE_BASE[symbol];
        assert!(
            u32::from(extra) >> distance_extra(symbol) == 0,
            "distance {distance}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_bytes_decode(
        parts in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..40), 0..400_usize), 0..60),
        level in LEVELS,
    ) {
        let bytes: Vec<u8> = parts
            .iter()
            .flat_map(|(part, times)| part.iter().copied().cycle().take(part.len() + times))
            .collect();
        assert_round_trip(&bytes, level);
    }
}
