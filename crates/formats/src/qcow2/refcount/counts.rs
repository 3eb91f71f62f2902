//! Counts per cluster in sparse pages. A page is allocated when a cluster of it is first counted, and its counters are
//! as wide as its largest count: a hole of the image needs no memory.

use diskimage_core::{Budget, Error, ErrorKind, Reservation, Result, saturating_index};

use crate::layer_kit::offset::{ClusterIndex, ClusterRange};

/// The clusters of one page.
const PAGE: usize = 4096;
/// Memory is reserved from the budget in steps of this many bytes.
const BATCH: u64 = 256 << 10;

/// The number of references to each cluster of a file.
#[derive(Debug)]
pub(in crate::qcow2) struct ClusterCounts {
    pages: Vec<Page>,
    /// The count at which counting saturates.
    max: u64,
    budget: Budget,
    memory: Vec<Reservation>,
    /// Bytes that are reserved and not used yet.
    spare: u64,
}

/// The counts of [`PAGE`] clusters. Most are below 256: only clusters that many snapshots share have more references.
#[derive(Debug, Default)]
enum Page {
    #[default]
    Zero,
    Bytes(Box<[u8; PAGE]>),
    Words(Box<[u16; PAGE]>),
    Longs(Box<[u64; PAGE]>),
}

impl ClusterCounts {
    pub(in crate::qcow2) fn new(max: u64, budget: Budget) -> Self {
        Self {
            pages: Vec::new(),
            max,
            budget,
            memory: Vec::new(),
            spare: 0,
        }
    }

    /// The end of the counted clusters.
    pub(in crate::qcow2) fn end(&self) -> ClusterIndex {
        ClusterIndex::new((self.pages.len() * PAGE) as u64)
    }

    /// The count of `cluster`.
    #[inline]
    pub(in crate::qcow2) fn of(&self, cluster: ClusterIndex) -> u64 {
        let (page, slot) = position(cluster);
        match self.pages.get(page) {
            None | Some(Page::Zero) => 0,
            Some(Page::Bytes(counts)) => u64::from(counts[slot]),
            Some(Page::Words(counts)) => u64::from(counts[slot]),
            Some(Page::Longs(counts)) => counts[slot],
        }
    }

    /// Whether all counts of the page of `cluster` are zero.
    pub(in crate::qcow2) fn is_page_zero(&self, cluster: ClusterIndex) -> bool {
        matches!(self.pages.get(position(cluster).0), None | Some(Page::Zero))
    }

    /// Adds `times` references to `cluster`. Returns how many of them were not counted because the count is at its
    /// maximum.
    ///
    /// # Errors
    /// The memory budget is used up.
    #[inline]
    pub(in crate::qcow2) fn add(&mut self, cluster: ClusterIndex, times: u64) -> Result<u64> {
        let (page, slot) = position(cluster);
        if times == 1
            && self.max >= u64::from(u8::MAX)
            && let Some(Page::Bytes(counts)) = self.pages.get_mut(page)
            && let Some(more) = counts[slot].checked_add(1)
        {
            counts[slot] = more;
            return Ok(0);
        }
        let old = self.of(cluster);
        let new = old.saturating_add(times).min(self.max).max(old);
        self.set(cluster, new)?;
        Ok(times - (new - old))
    }

    /// Adds a reference to each of `clusters`.
    ///
    /// # Errors
    /// The memory budget is used up.
    pub(in crate::qcow2) fn add_run(&mut self, clusters: ClusterRange) -> Result<()> {
        for part in page_runs(clusters) {
            if !self.add_small_run(part)? {
                part.into_iter()
                    .try_for_each(|cluster| self.add(cluster, 1).map(|_| ()))?;
            }
        }
        Ok(())
    }

    /// Adds a reference to each of `clusters`, which are in one page, if that is possible with counters of one byte and
    /// reaches no maximum. Otherwise no count is changed and the result is `false`.
    ///
    /// # Errors
    /// The memory budget is used up.
    pub(in crate::qcow2) fn add_small_run(&mut self, clusters: ClusterRange) -> Result<bool> {
        if self.is_page_zero(clusters.start) {
            // Any count but zero makes a page of bytes.
            self.set(clusters.start, 1)?;
            self.set(clusters.start, 0)?;
        }
        let saturates = self.max < u64::from(u8::MAX);
        match self.bytes_mut(clusters) {
            Some(counts) if !saturates && is_below_limit(counts) => {
                counts.iter_mut().for_each(|count| *count += 1);
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Removes a reference from each of `clusters`. A count of zero stays.
    ///
    /// # Errors
    /// The memory budget is used up.
    pub(in crate::qcow2) fn remove_run(&mut self, clusters: ClusterRange) -> Result<()> {
        for part in page_runs(clusters) {
            match self.bytes_mut(part) {
                Some(counts) => counts
                    .iter_mut()
                    .for_each(|count| *count = count.saturating_sub(1)),
                None => part
                    .into_iter()
                    .try_for_each(|cluster| self.set(cluster, self.of(cluster).saturating_sub(1)))?,
            }
        }
        Ok(())
    }

    /// The counts of `clusters`, which are in one page, if the page has counters of one byte.
    pub(in crate::qcow2) fn bytes(&self, clusters: ClusterRange) -> Option<&[u8]> {
        let (page, slot) = position(clusters.start);
        match self.pages.get(page)? {
            Page::Bytes(counts) => counts.get(slot..)?.get(..saturating_index(clusters.len())),
            _ => None,
        }
    }

    /// The same counts, to be changed.
    fn bytes_mut(&mut self, clusters: ClusterRange) -> Option<&mut [u8]> {
        let (page, slot) = position(clusters.start);
        match self.pages.get_mut(page)? {
            Page::Bytes(counts) => counts
                .get_mut(slot..)?
                .get_mut(..saturating_index(clusters.len())),
            _ => None,
        }
    }

    /// Replaces a count.
    ///
    /// # Errors
    /// The memory budget is used up.
    pub(in crate::qcow2) fn set(&mut self, cluster: ClusterIndex, count: u64) -> Result<()> {
        let (page, slot) = position(cluster);
        if page >= self.pages.len() {
            if count == 0 {
                return Ok(());
            }
            let more = (page + 1).saturating_sub(self.pages.len());
            self.reserve((more * size_of::<Page>()) as u64)?;
            self.pages.resize_with(page + 1, Page::default);
        }
        loop {
            match &mut self.pages[page] {
                Page::Zero if count == 0 => return Ok(()),
                Page::Bytes(counts) if count <= u64::from(u8::MAX) => {
                    // The guard has compared it.
                    counts[slot] = u8::try_from(count).unwrap_or(u8::MAX);
                    return Ok(());
                }
                Page::Words(counts) if count <= u64::from(u16::MAX) => {
                    // The guard has compared it.
                    counts[slot] = u16::try_from(count).unwrap_or(u16::MAX);
                    return Ok(());
                }
                Page::Longs(counts) => {
                    counts[slot] = count;
                    return Ok(());
                }
                _ => self.widen(page)?,
            }
        }
    }

    fn widen(&mut self, page: usize) -> Result<()> {
        let wider = match &self.pages[page] {
            Page::Zero => {
                self.reserve(PAGE as u64)?;
                Page::Bytes(Box::new([0; PAGE]))
            }
            Page::Bytes(counts) => {
                let wide = Box::new(counts.map(u16::from));
                self.reserve(2 * PAGE as u64)?;
                Page::Words(wide)
            }
            Page::Words(counts) => {
                let wide = Box::new(counts.map(u64::from));
                self.reserve(8 * PAGE as u64)?;
                Page::Longs(wide)
            }
            Page::Longs(_) => return Ok(()),
        };
        self.pages[page] = wider;
        Ok(())
    }

    fn reserve(&mut self, bytes: u64) -> Result<()> {
        if self.spare < bytes {
            let batch = (bytes - self.spare).next_multiple_of(BATCH);
            let reservation = self.budget.reserve(batch).map_err(|_| too_large())?;
            self.memory.push(reservation);
            self.spare += batch;
        }
        self.spare -= bytes;
        Ok(())
    }

    /// The first cluster from `from` on with a count above zero.
    pub(in crate::qcow2) fn next_used(&self, from: ClusterIndex) -> Option<ClusterIndex> {
        let mut at = from;
        while at < self.end() {
            if self.is_page_zero(at) {
                at = at.unit_end(PAGE as u64);
            } else if self.of(at) > 0 {
                return Some(at);
            } else {
                at = at.plus(1);
            }
        }
        None
    }

    /// The end of the last cluster before `end` with a count above zero.
    pub(in crate::qcow2) fn used_end(&self, end: ClusterIndex) -> ClusterIndex {
        let mut at = end.min(self.end());
        while let Some(last) = at.before() {
            if self.is_page_zero(last) {
                at = last.align_down(PAGE as u64);
            } else if self.of(last) > 0 {
                break;
            } else {
                at = last;
            }
        }
        at
    }

    /// The first run of `count` clusters with a count of zero from `from` on.
    pub(in crate::qcow2) fn first_free(&self, from: ClusterIndex, count: u64) -> ClusterIndex {
        let (mut start, mut at) = (from, from);
        while at.since(start) < count && at < self.end() {
            if self.is_page_zero(at) {
                at = at.unit_end(PAGE as u64);
            } else {
                let used = self.of(at) > 0;
                at = at.plus(1);
                if used {
                    start = at;
                }
            }
        }
        start
    }
}

/// Whether all counts are below the largest. No early end, so that the compiler compares many at once.
fn is_below_limit(counts: &[u8]) -> bool {
    counts
        .iter()
        .fold(true, |below, count| below & (*count < u8::MAX))
}

/// The page of a cluster and the slot in it. A cluster number beyond `usize` saturates to a page that no budget allows.
#[inline]
fn position(cluster: ClusterIndex) -> (usize, usize) {
    let cluster = saturating_index(cluster.get());
    (cluster / PAGE, cluster % PAGE)
}

/// The parts of a run that lie in one page each.
pub(in crate::qcow2) fn page_runs(clusters: ClusterRange) -> impl Iterator<Item = ClusterRange> {
    let mut rest = clusters;
    std::iter::from_fn(move || {
        let part = ClusterRange::new(rest.start, rest.start.unit_end(PAGE as u64).min(rest.end));
        rest.start = part.end;
        (part.len() > 0).then_some(part)
    })
}

fn too_large() -> Error {
    Error::new(ErrorKind::Limit, "Cannot allocate memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(index: u64) -> ClusterIndex {
        ClusterIndex::new(index)
    }

    fn clusters(first: u64, count: u64) -> ClusterRange {
        ClusterRange::at(cluster(first), count)
    }

    #[test]
    fn counts_of_any_width_are_stored() {
        let mut counts = ClusterCounts::new(u64::MAX, Budget::default());
        for (index, times) in [
            (0, 1),
            (5, 255),
            (6, 256),
            (4095, 70_000),
            (1 << 20, 3),
            (7, u64::MAX),
        ] {
            assert_eq!(counts.add(cluster(index), times).ok(), Some(0));
            assert_eq!(counts.of(cluster(index)), times);
        }
        assert_eq!(counts.of(cluster(0)), 1);
        assert_eq!(counts.of(cluster(5)), 255);
        assert_eq!(counts.of(cluster(6)), 256);
        assert_eq!(counts.of(cluster(8)), 0);
        assert_eq!(counts.of(cluster(1 << 30)), 0);
    }

    #[test]
    fn the_last_count_is_found_from_behind() {
        let mut counts = ClusterCounts::new(u64::MAX, Budget::default());
        assert_eq!(counts.used_end(cluster(u64::MAX)), cluster(0));
        for index in [0, 7, 4096, 1 << 20] {
            counts.add(cluster(index), 1).unwrap();
        }
        for (end, expected) in [
            (0, 0),
            (1, 1),
            (7, 1),
            (8, 8),
            (4096, 8),
            (1 << 20, 4097),
            (1 << 40, (1 << 20) + 1),
        ] {
            assert_eq!(counts.used_end(cluster(end)), cluster(expected), "{end}");
        }
    }

    #[test]
    fn counting_saturates_at_the_maximum() {
        let mut counts = ClusterCounts::new(3, Budget::default());
        assert_eq!(counts.add(cluster(1), 2).ok(), Some(0));
        assert_eq!(counts.add(cluster(1), 4).ok(), Some(3));
        assert_eq!(counts.of(cluster(1)), 3);
    }

    #[test]
    fn runs_change_as_single_clusters_do() {
        for max in [3, 255, 300, u64::MAX] {
            let mut runs = ClusterCounts::new(max, Budget::default());
            let mut single = ClusterCounts::new(max, Budget::default());
            assert!(runs.add(cluster(4100), 254).is_ok() && single.add(cluster(4100), 254).is_ok());
            for (first, count) in [(5, 0), (4000, 200), (4000, 200), (4000, 9000), (0, 1)] {
                assert!(runs.add_run(clusters(first, count)).is_ok());
                assert!(
                    clusters(first, count)
                        .into_iter()
                        .all(|at| single.add(at, 1).is_ok())
                );
            }
            assert!(runs.remove_run(clusters(4090, 5000)).is_ok());
            for at in clusters(4090, 5000) {
                let less = single.of(at).saturating_sub(1);
                assert!(single.set(at, less).is_ok());
            }
            let counts = |counts: &ClusterCounts| {
                clusters(0, 14_000)
                    .into_iter()
                    .map(|at| counts.of(at))
                    .collect::<Vec<_>>()
            };
            assert_eq!(counts(&runs), counts(&single), "at most {max}");
        }
    }

    #[test]
    fn used_and_free_clusters_are_found() {
        let mut counts = ClusterCounts::new(255, Budget::default());
        for used in [1, 2, 4, 9000] {
            assert!(counts.add(cluster(used), 1).is_ok());
        }
        assert_eq!(counts.next_used(cluster(0)), Some(cluster(1)));
        assert_eq!(counts.next_used(cluster(5)), Some(cluster(9000)));
        assert_eq!(counts.next_used(cluster(9001)), None);
        assert_eq!(counts.first_free(cluster(0), 1), cluster(0));
        assert_eq!(counts.first_free(cluster(1), 1), cluster(3));
        assert_eq!(counts.first_free(cluster(1), 2), cluster(5));
        assert_eq!(counts.first_free(cluster(8990), 20), cluster(9001));
    }

    #[test]
    fn memory_is_reserved_from_the_budget() {
        let mut counts = ClusterCounts::new(255, Budget::new(1 << 20));
        assert!(counts.add(cluster(1 << 40), 1).is_err());
        assert!((0..10).all(|i| counts.add(cluster(i * 4096), 1).is_ok()));
        assert!((0..1000).any(|i| counts.add(cluster(i * 4096), 1).is_err()));
    }
}
