//! What has come of the crashes and faults.

use std::fmt;
use std::ops::Add;

/// What a cut-off command has left, if nothing is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Everything is as before.
    Old,
    /// Everything is as after.
    New,
    /// Something in between that the command permits: each byte is as before or as after.
    Mixed,
}

/// Numbers of crashes or faults, by what they have left.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    pub(super) old: usize,
    pub(super) new: usize,
    pub(super) mixed: usize,
    pub(super) lost: usize,
}

impl Tally {
    pub(super) fn tried(self) -> usize {
        self.old + self.new + self.mixed + self.lost
    }

    /// Counts a crash or fault. A defect is described by `describe`.
    pub(super) fn count(
        &mut self,
        judged: Result<Verdict, String>,
        defects: &mut Vec<String>,
        describe: impl FnOnce(String) -> String,
    ) {
        match judged {
            Ok(Verdict::Old) => self.old += 1,
            Ok(Verdict::New) => self.new += 1,
            Ok(Verdict::Mixed) => self.mixed += 1,
            Err(defect) => {
                self.lost += 1;
                defects.push(describe(defect));
            }
        }
    }
}

impl Add for Tally {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            old: self.old + other.old,
            new: self.new + other.new,
            mixed: self.mixed + other.mixed,
            lost: self.lost + other.lost,
        }
    }
}

/// The columns of a table: tried, old, new, mixed, lost.
impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            old,
            new,
            mixed,
            lost,
        } = self;
        write!(f, "{} | {old} | {new} | {mixed} | {lost}", self.tried())
    }
}

/// All that has been found out about some commands.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) kills: Tally,
    pub(super) power_cuts: Tally,
    pub(super) faults: Tally,
    pub(super) defects: Vec<String>,
}

impl Found {
    /// Fails with the first defects, if there are any.
    pub(super) fn require_none(&mut self) {
        let all = self.defects.len();
        self.defects.truncate(20);
        assert!(all == 0, "{all} defects\n{}", self.defects.join("\n"));
    }
}

impl Add for Found {
    type Output = Self;

    fn add(mut self, other: Self) -> Self {
        self.defects.extend(other.defects);
        Self {
            kills: self.kills + other.kills,
            power_cuts: self.power_cuts + other.power_cuts,
            faults: self.faults + other.faults,
            ..self
        }
    }
}
