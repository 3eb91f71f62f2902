//! What may be seen of the files of a command that was cut short.

use std::sync::atomic::{AtomicU64, Ordering};

use diskimage_core::{
    Backing, BitmapInfo, ByteRange, CheckReport, Detail, ErrorKind, Image, Note, Progress, Repair, Result,
};

use super::Change;
use super::disks::{Disks, NAMES};
use crate::testing::contents;
use crate::{OpenOptions, SnapshotSelector, list_snapshots, open_snapshot};

/// What a command does when nothing gets in its way, and how.
#[derive(Debug)]
pub(super) struct Expected {
    pub(super) before: View,
    pub(super) after: View,
    pub(super) change: Change,
    pub(super) damaged: bool,
}

/// What can be seen of the files.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct View(Vec<Seen>);

/// What can be seen of one image.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    /// What it reads as on top of its chain.
    disk: Vec<u8>,
    backing: Option<Backing>,
    /// By identifier and name.
    snapshots: Vec<(String, String, Vec<u8>)>,
    /// With what is marked, except where that cannot be relied on.
    bitmaps: Vec<(BitmapInfo, Vec<ByteRange>)>,
    facts: Option<Vec<Detail>>,
}

impl View {
    pub(super) fn of(files: &[Vec<u8>]) -> Result<Self> {
        let disks = Disks::holding(files);
        let names = NAMES.iter().take(files.len());
        Ok(Self(
            names.map(|name| Seen::of(&disks, name)).collect::<Result<_>>()?,
        ))
    }

    /// What the disk on top reads as.
    pub(super) fn top(&self) -> &[u8] {
        &self.0[0].disk
    }
}

impl Seen {
    fn of(disks: &Disks, name: &str) -> Result<Self> {
        let image = disks.open(name, OpenOptions::new())?;
        let mut snapshots = Vec::new();
        for snapshot in list_snapshots(&image)? {
            let selector = SnapshotSelector::Exact {
                id: Some(snapshot.id.clone()),
                name: None,
            };
            let disk = contents(&*open_snapshot(&image, &selector)?);
            snapshots.push((snapshot.id, snapshot.name, disk));
        }
        Ok(Self {
            disk: contents(&image),
            backing: image.layer().backing(),
            snapshots,
            bitmaps: bitmaps(&image)?,
            facts: image.layer().info()?.specific,
        })
    }
}

fn bitmaps(image: &Image) -> Result<Vec<(BitmapInfo, Vec<ByteRange>)>> {
    let Some(bitmaps) = image.layer().bitmaps() else {
        return Ok(Vec::new());
    };
    let marks = |info: BitmapInfo| {
        let mut marked: Vec<ByteRange> = Vec::new();
        if !info.inconsistent {
            bitmaps.marked(&info.name, &mut |range| {
                match marked.last_mut() {
                    Some(last) if last.end() == range.start() => {
                        *last = ByteRange::new(last.start(), range.end());
                    }
                    _ => marked.push(range),
                }
                Ok(())
            })?;
        }
        Ok((info, marked))
    };
    bitmaps.list()?.into_iter().map(marks).collect()
}

impl Expected {
    /// Says what is wrong with what was left of the files, or what is seen there.
    pub(super) fn judge(&self, left: &[Vec<u8>]) -> std::result::Result<View, String> {
        if !self.damaged {
            check_all(left)?;
        }
        let seen = View::of(left).map_err(|error| format!("cannot be read: {}", error.chain()))?;
        for (index, now) in seen.0.iter().enumerate() {
            let (before, after) = (&self.before.0[index], &self.after.0[index]);
            compare(now, before, after, self.change).map_err(|wrong| format!("{}: {wrong}", NAMES[index]))?;
        }
        Ok(seen)
    }

    /// Says what is wrong with files on which the command has done its work.
    pub(super) fn judge_finished(&self, left: &[Vec<u8>]) -> std::result::Result<(), String> {
        check_all(left)?;
        let seen = View::of(left).map_err(|error| format!("cannot be read: {}", error.chain()))?;
        for (index, now) in seen.0.iter().enumerate() {
            let after = &self.after.0[index];
            compare(now, after, after, Change::Whole)
                .map_err(|wrong| format!("{}: {wrong}", NAMES[index]))?;
        }
        if seen == self.after {
            Ok(())
        } else {
            Err("not what it ought to be".to_owned())
        }
    }
}

fn compare(now: &Seen, before: &Seen, after: &Seen, change: Change) -> std::result::Result<(), String> {
    compare_disk(&now.disk, &before.disk, &after.disk, change)?;
    if ![&before.backing, &after.backing].contains(&&now.backing) {
        return Err(format!("is based on {:?}", now.backing));
    }
    if now.snapshots != before.snapshots && now.snapshots != after.snapshots {
        return Err("its snapshots have changed".to_owned());
    }
    if now.bitmaps != before.bitmaps && now.bitmaps != after.bitmaps {
        return Err(format!("has the bitmaps {:?}", now.bitmaps));
    }
    Ok(())
}

fn compare_disk(now: &[u8], before: &[u8], after: &[u8], change: Change) -> std::result::Result<(), String> {
    if now == before || now == after {
        return Ok(());
    }
    let known = match change {
        Change::Whole => [before.len(), after.len()].contains(&now.len()),
        // A file without a format is as long as what was written to it.
        Change::Gradual => {
            (before.len().min(after.len())..=before.len().max(after.len())).contains(&now.len())
        }
    };
    if !known {
        return Err(format!("has {} bytes", now.len()));
    }
    // What a disk does not have yet, or no longer, is zero.
    let byte = |disk: &[u8], at: usize| disk.get(at).copied().unwrap_or(0);
    let wrong = now
        .iter()
        .enumerate()
        .find(|(at, now)| **now != byte(before, *at) && **now != byte(after, *at));
    match wrong {
        Some((at, now)) => Err(format!(
            "byte {at:#x} is {now:#x}, was {:#x}, becomes {:#x}",
            byte(before, at),
            byte(after, at)
        )),
        None if change == Change::Whole => Err("is partly as before and partly as after".to_owned()),
        None => Ok(()),
    }
}

/// Finds damage other than leaked clusters, and leaked clusters that cannot be mended.
fn check_all(files: &[Vec<u8>]) -> std::result::Result<(), String> {
    for name in NAMES.iter().take(files.len()) {
        let found = check(&Disks::holding(files), name, Repair::No)?;
        if found.corruptions > 0 || found.check_errors > 0 {
            return Err(format!("{name}: {found:?}"));
        }
        if found.leaks == 0 {
            continue;
        }
        let disks = Disks::holding(files);
        check(&disks, name, Repair::Leaks)?;
        let again = check(&disks, name, Repair::No)?;
        if (again.leaks, again.corruptions) != (0, 0) {
            return Err(format!("{name}: leaks cannot be mended: {again:?}"));
        }
    }
    Ok(())
}

/// What a check finds, apart from clusters that are used once but that a flag forbids to write in place: a crash while
/// snapshots change may leave that, and it costs a copy and nothing else.
fn check(disks: &Disks, name: &str, repair: Repair) -> std::result::Result<CheckReport, String> {
    let options = OpenOptions::new()
        .for_check(true)
        .no_backing(true)
        .write(repair != Repair::No);
    let wrong = |error: diskimage_core::Error| format!("{name}: cannot be checked: {}", error.chain());
    let image = disks.open(name, options).map_err(wrong)?;
    let harmless = AtomicU64::new(0);
    let notes = |note: &Note| {
        let numbers = note
            .text()
            .split(['=', ' '])
            .filter_map(|word| u64::from_str_radix(word, 16).ok());
        let flag_off = numbers.max().is_some_and(|entry| entry >> 63 == 0);
        if note.text().contains("OFLAG_COPIED") && note.text().ends_with("refcount=1") && flag_off {
            harmless.fetch_add(1, Ordering::Relaxed);
        }
    };
    match image.layer().check(repair, &Progress::none().with_notes(&notes)) {
        Err(error) if error.kind() == ErrorKind::Unsupported => Ok(CheckReport::default()),
        other => {
            let mut found = other.map_err(wrong)?;
            found.corruptions = found.corruptions.saturating_sub(harmless.into_inner());
            Ok(found)
        }
    }
}
