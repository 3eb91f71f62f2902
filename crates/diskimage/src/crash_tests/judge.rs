//! Judges the files that a command has left which was cut off: each image is compared with its view before and after.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use diskimage_core::{
    Backing, BitmapInfo, ByteRange, CheckReport, Detail, DetailValue, Device, ErrorKind, Image, Note,
    Progress, Repair, Result,
};

use super::disks::{Cast, Disks, Files, Role};
use super::{Change, Verdict};
use crate::{OpenOptions, SnapshotSelector, list_snapshots, open_snapshot};

/// The results of a command without faults.
#[derive(Debug)]
pub(super) struct Expected {
    pub(super) cast: Arc<Cast>,
    /// The files before.
    pub(super) before: Files,
    /// The views before, at each moment that the command acknowledges, and at its end.
    pub(super) states: Vec<View>,
    pub(super) change: Change,
    pub(super) damaged: bool,
    /// A range of the first image's disk that has arbitrary bytes until the command ends.
    pub(super) arbitrary: Range<usize>,
    /// The files that the command only reads.
    pub(super) sources: Vec<usize>,
    /// The files from this one on are new, and have no names before the end.
    pub(super) nameless_from: usize,
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
    /// Whether the disk has no clusters.
    is_plain: bool,
}

impl View {
    /// The images among the first `count` files.
    pub(super) fn of(cast: &Arc<Cast>, files: &[Vec<u8>], count: usize) -> Result<Self> {
        let disks = Disks::of(cast, files);
        let images = images(cast, count);
        Ok(Self(
            images
                .map(|role| ImageView::of(&disks, &role.name))
                .collect::<Result<_>>()?,
        ))
    }

    /// The guest data of the topmost image.
    pub(super) fn top(&self) -> &[u8] {
        &self.0[0].disk
    }

    fn top_mut(&mut self) -> &mut [u8] {
        self.0.first_mut().map_or(&mut [], |image| &mut image.disk)
    }
}

/// The images among the first `count` files.
fn images(cast: &Cast, count: usize) -> impl Iterator<Item = &Role> {
    cast.roles.iter().take(count).filter(|role| role.is_image)
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
            let disk = guest_data(&*open_snapshot(&image, &selector)?)?;
            snapshots.push((snapshot.id, snapshot.name, disk));
        }
        let mut disk = guest_data(&image)?;
        if !image.layer().is_zero_when_new() && !disks.has_data(name) {
            disk.fill(0);
        }
        Ok(Self {
            disk,
            backing: image.layer().backing(),
            snapshots,
            bitmaps: bitmaps(&image)?,
            facts: image.layer().info()?.specific.map(lasting),
            is_plain: image.layer().granularity() == 1,
        })
    }
}

fn guest_data(image: &Image) -> Result<Vec<u8>> {
    let mut bytes = vec![0xee; usize::try_from(image.len()).expect("small")];
    image.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// The facts without those that are random numbers, or depend on the time that something takes.
fn lasting(mut facts: Vec<Detail>) -> Vec<Detail> {
    const PASSING: [&str; 4] = ["uuid", "cid", "iters", "master-key-iters"];
    facts.retain(|fact| !PASSING.contains(&fact.name));
    for fact in &mut facts {
        keep_lasting(&mut fact.value);
    }
    facts
}

fn keep_lasting(value: &mut DetailValue) {
    match value {
        DetailValue::Group(facts) => *facts = lasting(std::mem::take(facts)),
        DetailValue::List(values) => values.iter_mut().for_each(keep_lasting),
        DetailValue::Flag(_) | DetailValue::Number(_) | DetailValue::Text(_) => {}
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
    /// Judges the files that a cut-off command has left after it had acknowledged `acknowledged` of its states: each
    /// image is in that state or in the next one. A defect is the error.
    pub(super) fn judge(
        &self,
        left: &[Vec<u8>],
        acknowledged: usize,
    ) -> std::result::Result<Verdict, String> {
        for source in &self.sources {
            if left[*source] != self.before[*source] {
                return Err(format!("{} has changed", self.cast.roles[*source].name));
            }
        }
        let last = self.states.len() - 1;
        // Files without names count for nothing.
        let is_named = acknowledged == last || self.nameless_from >= left.len();
        let count = if is_named { left.len() } else { self.nameless_from };
        if !self.damaged {
            check_all(&self.cast, left, count)?;
        }
        let mut view = View::of(&self.cast, left, count)
            .map_err(|error| format!("cannot be read: {}", error.chain()))?;
        if acknowledged < last
            && let Some(arbitrary) = view.top_mut().get_mut(self.arbitrary.clone())
        {
            let after = &self.states[last].top()[self.arbitrary.clone()];
            arbitrary.copy_from_slice(after);
        }
        let (before, after) = (
            &self.states[acknowledged],
            &self.states[last.min(acknowledged + 1)],
        );
        for ((index, now), role) in view.0.iter().enumerate().zip(images(&self.cast, count)) {
            let (Some(before), Some(after)) = (before.0.get(index), after.0.get(index)) else {
                continue;
            };
            compare(now, before, after, self.change).map_err(|defect| format!("{}: {defect}", role.name))?;
        }
        Ok(match () {
            () if view == self.states[last] => Verdict::New,
            () if !is_named || view == self.states[0] => Verdict::Old,
            () => {
                if self.change == Change::Marked {
                    self.require_mark(left, &view)?;
                }
                Verdict::Mixed
            }
        })
    }

    /// Fails if the first image is partly copied and does not show it, although its format has a place for that.
    fn require_mark(&self, left: &[Vec<u8>], view: &View) -> std::result::Result<(), String> {
        let name = &self.cast.roles[0].name;
        let image = Disks::of(&self.cast, left).open(name, OpenOptions::new());
        let image = image.map_err(|error| error.chain())?;
        if image.layer().unfinished().is_some() {
            return match image.layer().info().map(|info| info.dirty) {
                Ok(true) => Ok(()),
                other => Err(format!("{name}: is partly copied, but its mark is {other:?}")),
            };
        }
        let ends = [&self.states[0], &self.states[self.states.len() - 1], view];
        let [before, after, now] = ends.map(|view| view.top().split_at(MARKED_HEAD.min(view.top().len())));
        let is_complete = now.1 == after.1;
        let is_zero = now.0.iter().all(|byte| *byte == 0);
        match view.0[0].is_plain && !is_zero && !is_complete && now.1 != before.1 {
            true => Err(format!("{name}: is partly copied, and has a head")),
            false => Ok(()),
        }
    }

    /// Judges files that a command has left which succeeded. A defect is the error.
    pub(super) fn judge_finished(&self, left: &[Vec<u8>]) -> std::result::Result<(), String> {
        check_all(&self.cast, left, left.len())?;
        match self.judge(left, self.states.len() - 1)? {
            Verdict::New => Ok(()),
            Verdict::Old | Verdict::Mixed => Err("differs from a run without faults".to_owned()),
        }
    }
}

fn compare(
    now: &ImageView,
    before: &ImageView,
    after: &ImageView,
    change: Change,
) -> std::result::Result<(), String> {
    let zeroed = match change {
        Change::Marked if now.is_plain => MARKED_ZEROES,
        _ => 0,
    };
    compare_disk(&now.disk, &before.disk, &after.disk, change, zeroed)?;
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

/// The length in bytes of the head of a disk without clusters that comes last.
const MARKED_HEAD: usize = 4096;

/// The length in bytes of the part of such a disk that is zeroed before anything is copied.
const MARKED_ZEROES: usize = 1 << 20;

/// Compares a disk, whose first `zeroed` bytes may also be zero.
fn compare_disk(
    now: &[u8],
    before: &[u8],
    after: &[u8],
    change: Change,
    zeroed: usize,
) -> std::result::Result<(), String> {
    if now == before || now == after {
        return Ok(());
    }
    let known = match change {
        Change::Atomic => [before.len(), after.len()].contains(&now.len()),
        // A raw file that is written gradually may have any length between the two.
        Change::Gradual | Change::Marked => {
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
        .filter(|(at, now)| *at >= zeroed || **now != 0)
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

/// Formats whose clusters are never freed: a check counts the leaked ones only.
const KEEPS_LEAKS: [&str; 1] = ["qed"];

const NEEDS_REPLAY: &str = "contains a log that needs to be replayed";

/// Reports corruption of the images among the first `count` files, and leaked clusters that cannot be repaired.
fn check_all(cast: &Arc<Cast>, files: &[Vec<u8>], count: usize) -> std::result::Result<(), String> {
    for role in images(cast, count) {
        let name = &role.name;
        let disks = Disks::of(cast, files);
        let found = match check(&disks, name, Repair::No) {
            // A VHDX image that says so is as good as one that has been replayed.
            Err(error) if error.contains(NEEDS_REPLAY) => {
                check(&disks, name, Repair::All)?;
                check(&disks, name, Repair::No)?
            }
            found => found?,
        };
        if found.corruptions > 0 || found.check_errors > 0 {
            return Err(format!("{name}: {found:?}"));
        }
        if found.leaks == 0 {
            continue;
        }
        if role.format.is_some_and(|format| KEEPS_LEAKS.contains(&format)) {
            continue;
        }
        let disks = Disks::of(cast, files);
        check(&disks, name, Repair::Leaks)?;
        let again = check(&disks, name, Repair::No)?;
        if again.leaks > 0 || again.corruptions > 0 {
            return Err(format!("{name}: leaks cannot be repaired: {again:?}"));
        }
    }
    Ok(())
}

/// The report of a check without what is harmless.
pub(super) fn check(disks: &Disks, name: &str, repair: Repair) -> std::result::Result<CheckReport, String> {
    let options = OpenOptions::new()
        .for_check(true)
        .no_backing(true)
        .write(repair != Repair::No);
    let unchecked = |error: diskimage_core::Error| format!("{name}: cannot be checked: {}", error.chain());
    let image = disks.open(name, options).map_err(unchecked)?;
    let harmless = AtomicU64::new(0);
    let notes = |note: &Note| {
        if is_harmless(&note.text()) {
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

/// Whether a finding of a check harms nobody:
///
/// * in qcow2 a cluster with a refcount of 1 whose entry has no COPIED flag. A crash during a change of snapshots may
///   leave that; the next write of the cluster copies it.
/// * in VDI a count of blocks that is too large: leaked blocks.
/// * in Parallels the mark that says that there may be leaked clusters.
fn is_harmless(finding: &str) -> bool {
    let numbers = |radix| {
        finding
            .split(['=', ' ', ','])
            .filter_map(move |word| u64::from_str_radix(word, radix).ok())
    };
    if finding.contains("OFLAG_COPIED") && finding.ends_with("refcount=1") {
        return numbers(16).max().is_some_and(|entry| entry >> 63 == 0);
    }
    if finding.contains("allocated blocks mismatch") {
        return numbers(10).is_sorted();
    }
    finding == "ERROR image was not closed correctly"
}
