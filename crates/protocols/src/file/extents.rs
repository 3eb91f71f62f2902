//! Extents of a file: data or a hole.

use std::sync::atomic::Ordering;

use diskimage_core::{ByteRange, Extent, ExtentKind, Result, StatusDetail};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::{File, FileKind};
use crate::holes::CachedExtent;

impl File {
    /// The extent at the start of `range`.
    pub(super) fn extent(&self, range: ByteRange, detail: StatusDetail) -> Result<Extent> {
        let answer = |len, kind| Extent {
            len,
            kind,
            depth: 0,
            host: None,
        };
        if detail == StatusDetail::Allocation || self.kind != FileKind::Regular {
            return Ok(answer(range.len(), ExtentKind::Data));
        }
        let offset = range.start();
        let found = match self.holes.cached(offset) {
            Some(found) if !self.lent.load(Ordering::Acquire) => found,
            _ => {
                let found = self.seek_extent(range)?;
                self.holes.keep(found);
                found
            }
        };
        let kind = if found.hole {
            ExtentKind::FileHole
        } else {
            ExtentKind::Data
        };
        Ok(answer((found.range.end() - offset).min(range.len()), kind))
    }

    /// The extent at the start of `range`, at least one byte long.
    fn seek_extent(&self, range: ByteRange) -> Result<CachedExtent> {
        let start = range.start();
        let found = CachedExtent {
            changes: self.holes.changes(),
            range,
            hole: false,
            before_data: false,
        };
        // Where data begins behind a hole was found together with the hole.
        if !self.holes.begins_data(start) || self.lent.load(Ordering::Acquire) {
            let data = match rustix::fs::seek(&self.file, SeekFrom::Data(start)) {
                Ok(data) => data,
                // No data from here to the end.
                Err(Errno::NXIO) => {
                    let end = self.refresh_len()?.max(range.end());
                    let (range, hole) = (ByteRange::new(start, end), true);
                    return Ok(CachedExtent { range, hole, ..found });
                }
                // The file system does not support SEEK_DATA.
                Err(_) => return Ok(found),
            };
            if data > start {
                return Ok(CachedExtent {
                    range: ByteRange::new(start, data),
                    hole: true,
                    before_data: true,
                    ..found
                });
            }
        }
        match rustix::fs::seek(&self.file, SeekFrom::Hole(start)) {
            Ok(hole) if hole > start => Ok(CachedExtent {
                range: ByteRange::new(start, hole),
                ..found
            }),
            // The file was truncated meanwhile, or the result is invalid.
            _ => Ok(found),
        }
    }
}

#[cfg(test)]
mod tests {
    use diskimage_core::{Device, ZeroMode};

    use super::super::tests::scratch;
    use super::*;

    fn kinds(file: &File) -> Vec<(u64, bool)> {
        let mut rest = ByteRange::new(0, file.len());
        let mut found = Vec::new();
        while !rest.is_empty() {
            let extent = file.status(rest, StatusDetail::Zeroes).expect("can be asked");
            found.push((extent.len, extent.kind == ExtentKind::FileHole));
            rest = rest.skip(extent.len);
        }
        found
    }

    #[test]
    fn holes_are_found_and_changes_are_seen() {
        let (_dir, file) = scratch(true);
        file.resize(1 << 20, diskimage_core::Preallocation::Off)
            .expect("grows");
        file.write_zeroes(ByteRange::new(0, 1 << 20), ZeroMode::Unmap)
            .expect("punches");
        if kinds(&file) != [(1 << 20, true)] {
            eprintln!("skipped: the file system of the temporary directory does not tell holes");
            return;
        }
        file.write_at(&[1; 65536], 65536).expect("writes");
        assert_eq!(
            kinds(&file),
            [(65536, true), (65536, false), ((1 << 20) - 131_072, true)]
        );
        file.write_zeroes(ByteRange::at(65536, 65536), ZeroMode::Unmap)
            .expect("punches");
        assert_eq!(kinds(&file), [(1 << 20, true)]);
        file.write_at(&[1; 4096], 1 << 20).expect("grows");
        assert_eq!(kinds(&file), [(1 << 20, true), (4096, false)]);
        for at in [3 << 19, 5 << 19] {
            file.write_at(&[1; 4096], at).expect("grows");
        }
        let hole = (1 << 19) - 4096;
        let small = [(1 << 20, true), (4096, false), (hole, true), (4096, false)];
        assert_eq!(kinds(&file)[..4], small);
        assert_eq!(kinds(&file)[4..], [((1 << 20) - 4096, true), (4096, false)]);
        assert!(file.holes.begins_data(5 << 19), "found with the hole before it");
    }

    #[test]
    fn the_kernel_is_asked_once_for_an_extent() {
        let (_dir, file) = scratch(true);
        file.write_at(&[1; 65536], 0).expect("writes");
        let first = file
            .status(ByteRange::new(0, 512), StatusDetail::Zeroes)
            .expect("can be asked");
        assert_eq!(first.len, 512);
        let cached = file.holes.cached(60000).expect("was cached");
        assert_eq!(cached.range, ByteRange::new(0, 65536));
    }
}
