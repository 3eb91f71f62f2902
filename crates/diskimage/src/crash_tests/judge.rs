//! Judges the files that a command has left which was cut off: each image is compared with its view before and after.

use std::sync::atomic::{AtomicU64, Ordering};

use diskimage_core::{
    Backing, BitmapInfo, ByteRange, CheckReport, Detail, ErrorKind, Image, Note, Progress, Repair, Result,
};

use super::Change;
use super::disks::{Disks, NAMES};
use crate::testing::contents;
use crate::{OpenOptions, SnapshotSelector, list_snapshots, open_snapshot};

/// The result of a command without faults.
#[derive(Debug)]
pub(super) struct Expected {
    pub(super) before: View,
    pub(super) after: View,
    pub(super) change: Change,
    pub(super) damaged: bool,
}

/// The views of all images.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct View(Vec<ImageView>);

/// Everything that a user can read from one image.
#[derive(Debug, PartialEq, Eq)]
struct ImageView {
    /// The guest data on its chain.
    disk: Vec<u8>,
    backing: Option<Backing>,
    /// Identifier, name and guest data of each snapshot.
    snapshots: Vec<(String, String, Vec<u8>)>,
    /// The bitmaps with their dirty ranges; without ranges if inconsistent.
    bitmaps: Vec<(BitmapInfo, Vec<ByteRange>)>,
    facts: Option<Vec<Detail>>,
}

impl View {
    pub(super) fn of(files: &[Vec<u8>]) -> Result<Self> {
        let disks = Disks::holding(files);
        let names = NAMES.iter().take(files.len());
        Ok(Self(
            names
                .map(|name| ImageView::of(&disks, name))
                .collect::<Result<_>>()?,
        ))
    }

    /// The guest data of the topmost image.
    pub(super) fn top(&self) -> &[u8] {
        &self.0[0].disk
    }
}

impl ImageView {
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
    /// Returns the view of the files that a cut-off command has left. A defect is the error.
    pub(super) fn judge(&self, left: &[Vec<u8>]) -> std::result::Result<View, String> {
        if !self.damaged {
            check_all(left)?;
        }
        let view = View::of(left).map_err(|error| format!("cannot be read: {}", error.chain()))?;
        for (index, now) in view.0.iter().enumerate() {
            let (before, after) = (&self.before.0[index], &self.after.0[index]);
            compare(now, before, after, self.change)
                .map_err(|defect| format!("{}: {defect}", NAMES[index]))?;
        }
        Ok(view)
    }

    /// Judges files that a command has left which succeeded. A defect is the error.
    pub(super) fn judge_finished(&self, left: &[Vec<u8>]) -> std::result::Result<(), String> {
        check_all(left)?;
        let view = View::of(left).map_err(|error| format!("cannot be read: {}", error.chain()))?;
        for (index, now) in view.0.iter().enumerate() {
            let after = &self.after.0[index];
            compare(now, after, after, Change::Atomic)
                .map_err(|defect| format!("{}: {defect}", NAMES[index]))?;
        }
        if view == self.after {
            Ok(())
        } else {
            Err("differs from a run without faults".to_owned())
        }
    }
}

fn compare(
    now: &ImageView,
    before: &ImageView,
    after: &ImageView,
    change: Change,
) -> std::result::Result<(), String> {
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
        Change::Atomic => [before.len(), after.len()].contains(&now.len()),
        // A raw file that is written gradually may have any length between the two.
        Change::Gradual => {
            (before.len().min(after.len())..=before.len().max(after.len())).contains(&now.len())
        }
    };
    if !known {
        return Err(format!("has {} bytes", now.len()));
    }
    // A disk counts as zero beyond its end.
    let byte = |disk: &[u8], at: usize| disk.get(at).copied().unwrap_or(0);
    let differing = now
        .iter()
        .enumerate()
        .find(|(at, now)| **now != byte(before, *at) && **now != byte(after, *at));
    match differing {
        Some((at, now)) => Err(format!(
            "byte {at:#x} is {now:#x}, was {:#x}, becomes {:#x}",
            byte(before, at),
            byte(after, at)
        )),
        None if change == Change::Atomic => Err("is partly as before and partly as after".to_owned()),
        None => Ok(()),
    }
}

/// Reports corruption, and leaked clusters that cannot be repaired.
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
        if again.leaks > 0 || again.corruptions > 0 {
            return Err(format!("{name}: leaks cannot be repaired: {again:?}"));
        }
    }
    Ok(())
}

/// The report of a check without one harmless corruption: a cluster with a refcount of 1 whose entry has no COPIED
/// flag. A crash during a change of snapshots may leave that; the next write of the cluster copies it.
fn check(disks: &Disks, name: &str, repair: Repair) -> std::result::Result<CheckReport, String> {
    let options = OpenOptions::new()
        .for_check(true)
        .no_backing(true)
        .write(repair != Repair::No);
    let unchecked = |error: diskimage_core::Error| format!("{name}: cannot be checked: {}", error.chain());
    let image = disks.open(name, options).map_err(unchecked)?;
    let harmless = AtomicU64::new(0);
    let notes = |note: &Note| {
        let text = note.text();
        let numbers = text
            .split(['=', ' '])
            .filter_map(|word| u64::from_str_radix(word, 16).ok());
        let flag_off = numbers.max().is_some_and(|entry| entry >> 63 == 0);
        if text.contains("OFLAG_COPIED") && text.ends_with("refcount=1") && flag_off {
            harmless.fetch_add(1, Ordering::Relaxed);
        }
    };
    match image.layer().check(repair, &Progress::none().with_notes(&notes)) {
        Err(error) if error.kind() == ErrorKind::Unsupported => Ok(CheckReport::default()),
        other => {
            let mut found = other.map_err(unchecked)?;
            found.corruptions = found.corruptions.saturating_sub(harmless.into_inner());
            Ok(found)
        }
    }
}
