//! Directory entries in the format of the disk.

use diskimage_core::{Error, Result};

/// The length of an entry in bytes.
pub(super) const ENTRY: usize = 32;

const DIRECTORY: u8 = 0x10;
const ARCHIVE: u8 = 0x20;
const VOLUME_ID: u8 = 0x08;
const LONG_NAME: u8 = 0x0f;

/// A name in 8.3 format: eight characters and three of the extension, without the dot.
pub(super) type ShortName = [u8; 11];

/// The volume label, padded with spaces.
#[derive(Clone, Debug)]
pub(super) struct Label(ShortName);

impl Label {
    /// The label `given`, or the default one.
    ///
    /// # Errors
    /// A name that is too long.
    pub(super) fn parse(given: Option<&str>) -> Result<Self> {
        let text = given.unwrap_or("QEMU VVFAT").as_bytes();
        let mut label = [b' '; 11];
        label
            .get_mut(..text.len())
            .ok_or_else(|| Error::invalid("vvfat label cannot be longer than 11 bytes"))?
            .copy_from_slice(text);
        Ok(Self(label))
    }

    pub(super) fn bytes(&self) -> &ShortName {
        &self.0
    }

    /// The root directory's first entry.
    pub(super) fn entry(&self) -> [u8; ENTRY] {
        let mut entry = [0; ENTRY];
        entry[..11].copy_from_slice(&self.0);
        entry[11] = VOLUME_ID | ARCHIVE;
        entry
    }
}

/// A FAT timestamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    date: u16,
    time: u16,
}

impl Stamp {
    /// `seconds` since 1970, in local time. Years outside of 1980 to 2107 wrap modulo 128, as in qemu-img.
    pub(super) fn new(seconds: i64) -> Self {
        let (days, second) = (seconds.div_euclid(86400), seconds.rem_euclid(86400));
        let (year, month, day) = civil(days);
        Self {
            date: low16(((year - 1980) << 9) | (month << 5) | day),
            time: low16(((second / 3600) << 11) | ((second / 60 % 60) << 5) | (second % 60 / 2)),
        }
    }
}

/// Year, month and day in the Gregorian calendar of a day counted from 1970-01-01.
fn civil(days: i64) -> (i64, i64, i64) {
    // Counted from 0000-03-01: in years that begin in March the leap day is the last one.
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let of_era = days.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    (era * 400 + year_of_era + i64::from(month <= 2), month, day)
}

fn low16(value: i64) -> u16 {
    let [low, high, ..] = value.to_le_bytes();
    u16::from_le_bytes([low, high])
}

/// The timestamps of an entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    pub(super) created: Stamp,
    pub(super) accessed: Stamp,
    pub(super) written: Stamp,
}

/// The entry of a file or directory, without its first cluster.
pub(super) fn entry(name: ShortName, times: &Times, size: Option<u32>) -> [u8; ENTRY] {
    let mut entry = [0; ENTRY];
    let mut put = |at: usize, bytes: &[u8]| entry[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &name);
    put(11, &[if size.is_some() { ARCHIVE } else { DIRECTORY }]);
    put(14, &times.created.time.to_le_bytes());
    put(16, &times.created.date.to_le_bytes());
    put(18, &times.accessed.date.to_le_bytes());
    put(22, &times.written.time.to_le_bytes());
    put(24, &times.written.date.to_le_bytes());
    put(28, &size.unwrap_or(0).to_le_bytes());
    entry
}

/// Sets the first cluster of an entry.
pub(super) fn set_cluster(entry: &mut [u8], cluster: u32) {
    let [a, b, c, d] = cluster.to_le_bytes();
    entry[26..28].copy_from_slice(&[a, b]);
    entry[20..22].copy_from_slice(&[c, d]);
}

/// The entries of a long name, which precede the entry of `short`: the last part comes first.
pub(super) fn long_name(name: &str, short: &ShortName) -> Vec<[u8; ENTRY]> {
    let units: Vec<u16> = name.encode_utf16().collect();
    let checksum = short
        .iter()
        .fold(0_u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte));
    let mut entries: Vec<[u8; ENTRY]> = (1_u8..)
        .zip(units.chunks(UNITS))
        .map(|(number, part)| {
            let mut entry = [0xff; ENTRY];
            let ended = part.iter().copied().chain([0]);
            for (at, unit) in UNIT_OFFSETS.into_iter().zip(ended) {
                entry[at..at + 2].copy_from_slice(&unit.to_le_bytes());
            }
            entry[0] = number;
            entry[11..14].copy_from_slice(&[LONG_NAME, 0, checksum]);
            entry[26..28].fill(0);
            entry
        })
        .collect();
    if let Some(last) = entries.last_mut() {
        last[0] |= LAST_PART;
    }
    entries.reverse();
    entries
}

/// The number of UTF-16 code units in an entry of a long name.
const UNITS: usize = 13;
/// The offsets of these units.
const UNIT_OFFSETS: [usize; UNITS] = [1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30];
const LAST_PART: u8 = 0x40;

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(seconds: i64) -> (u16, u16) {
        let Stamp { date, time } = Stamp::new(seconds);
        (date, time)
    }

    /// The expected values are those that `qemu-img` gives files with these dates.
    #[test]
    fn dates_are_those_of_qemu_img() {
        assert_eq!(stamp(1), (0xec21, 0));
        assert_eq!(stamp(315_532_800), (0x0021, 0));
        assert_eq!(stamp(315_532_799), (0xff9f, 0xbf7d));
        assert_eq!(stamp(1_709_251_199), (0x585d, 0xbf7d));
        assert_eq!(stamp(4_354_819_200), (0x0021, 0));
        assert_eq!(stamp(-304_819_200), (0xd8a5, 0));
    }

    #[test]
    fn a_long_name_of_whole_entries_has_no_end_mark() {
        let entries = long_name("exactly13char", b"EXACTL~1   ");
        assert_eq!(entries.len(), 1);
        assert_eq!((entries[0][0], entries[0][30]), (0x41, b'r'));
        assert_eq!(long_name("exactly13chars", b"EXACTL~1   ").len(), 2);
    }

    #[test]
    fn the_checksum_is_that_of_the_specification() {
        assert_eq!(long_name("emptydir", b"EMPTYDIR   ")[0][13], 0x8a);
    }
}
