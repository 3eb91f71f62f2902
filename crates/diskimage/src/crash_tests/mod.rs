//! Crashes and failing requests in the middle of whole commands, on images in memory.
//!
//! A command is everything that the program does from opening the files to closing them. It runs once to record the
//! views of the files before and after. Then it runs with every crash and every fault:
//!
//! ```text
//!   crash   killed, or all files lose what was not flushed            ┐
//!   fault   every request to every file fails in turn                 ├──▶ judge the files ──▶ run again ──▶ judge
//!   full    no file grows beyond a length, for several lengths        ┘
//! ```
//!
//! After each of them
//!
//! * all images open, and a check finds nothing but leaked clusters, which it can repair;
//! * every disk, snapshot and bitmap is as before or as after (`judge`);
//! * the same command run again completes the change.

mod amend;
mod bitmap;
mod check;
mod commit;
mod crash;
mod disks;
mod every_format;
mod fault;
mod full;
mod judge;
mod rebase;
mod resize;
mod snapshot;
mod tally;

use std::ops::Range;
use std::sync::{Arc, Mutex};

use diskimage_core::Result;

use self::disks::{Cast, Disks, Files};
use self::judge::{Expected, View};
use self::tally::{Found, Verdict};

/// A command on the files of a chain.
struct Command {
    name: String,
    cast: Arc<Cast>,
    /// The files before the command.
    files: Files,
    run: Box<Run>,
    /// How the disks change.
    change: Change,
    /// Whether the guest data of the topmost disk is the same before and after.
    guest_data_unchanged: bool,
    /// Whether the files are damaged before, and the command repairs them.
    damaged: bool,
    /// Whether it completes what a run that was cut off has begun.
    repeatable: bool,
    /// A range of the first image's disk that has arbitrary bytes until the command ends.
    arbitrary: Range<usize>,
    /// The files that the command only reads.
    sources: Vec<usize>,
    /// The files from this one on are new: they get their names when the command ends.
    nameless_from: usize,
}

type Run = dyn Fn(&Disks) -> Result<()> + Send + Sync;

/// How the disks of a command change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// Atomically: a crash leaves the disk as before or as after.
    Atomic,
    /// Byte by byte: a crash leaves each byte as before or as after.
    Gradual,
    /// In the same way, and with a mark meanwhile where there is a place for one: the bit of the format, or zeroes in the
    /// head of a disk without clusters.
    Marked,
}

impl Command {
    fn new(
        name: impl Into<String>,
        files: Files,
        run: impl Fn(&Disks) -> Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            cast: Cast::usual(),
            files,
            run: Box::new(run),
            change: Change::Atomic,
            guest_data_unchanged: false,
            damaged: false,
            repeatable: true,
            arbitrary: 0..0,
            sources: Vec::new(),
            nameless_from: usize::MAX,
        }
    }

    fn guest_data_unchanged(self) -> Self {
        Self {
            guest_data_unchanged: true,
            ..self
        }
    }

    fn gradual(self) -> Self {
        Self {
            change: Change::Gradual,
            ..self
        }
    }

    fn marked(self) -> Self {
        Self {
            change: Change::Marked,
            ..self
        }
    }

    /// The views of the files before, at each moment that a run without faults acknowledges, and after it.
    fn expected(&self) -> Expected {
        let named = self.nameless_from.min(self.files.len());
        let view = |files: &[Vec<u8>], count| View::of(&self.cast, files, count).expect("readable");
        let mut states = vec![view(&self.files, named)];
        let moments: Arc<Mutex<Vec<Files>>> = Arc::default();
        let disks = Disks::of(&self.cast, &self.files).hearing({
            let moments = Arc::clone(&moments);
            move |disks| moments.lock().expect("no test has failed").push(disks.contents())
        });
        (self.run)(&disks).expect(&self.name);
        disks.acknowledge();
        let moments = moments.lock().expect("no test has failed");
        states.extend(moments.iter().map(|files| view(files, files.len())));
        let (before, after) = (&states[0], &states[states.len() - 1]);
        assert!(self.damaged || before != after, "{} does nothing", self.name);
        assert!(
            !self.guest_data_unchanged || before.top() == after.top(),
            "{} changes the disk",
            self.name
        );
        Expected {
            cast: Arc::clone(&self.cast),
            before: self.files.clone(),
            states,
            change: self.change,
            damaged: self.damaged,
            arbitrary: self.arbitrary.clone(),
            sources: self.sources.clone(),
            nameless_from: self.nameless_from,
        }
    }

    /// Judges the files that a cut-off run has left after it had acknowledged `acknowledged` of its states, and those
    /// after the command has run on them again. A defect is the error.
    fn judge_cut_off(
        &self,
        left: &[Vec<u8>],
        expected: &Expected,
        acknowledged: usize,
    ) -> std::result::Result<Verdict, String> {
        let verdict = expected.judge(left, acknowledged)?;
        let is_new = self.nameless_from < left.len();
        if is_new || !self.repeatable || (verdict == Verdict::New && !self.damaged) {
            return Ok(verdict);
        }
        let disks = Disks::of(&self.cast, left);
        (self.run)(&disks).map_err(|error| format!("fails when run again: {}", error.chain()))?;
        expected
            .judge_finished(&disks.contents())
            .map_err(|defect| format!("after it has run again: {defect}"))?;
        Ok(verdict)
    }
}

/// How many crashes and faults are tried.
#[derive(Clone, Copy, Debug)]
struct Effort {
    /// The largest number of each kind of crash of a command, and of faults of each file.
    most: usize,
}

impl Effort {
    const ALL: Self = Self { most: usize::MAX };
}

/// The least number of crashes and faults that a test must try; it fails if a change of the code makes it try fewer.
struct Least {
    crashes: usize,
    faults: usize,
}

/// Runs `commands` with all crashes, faults and full disks, and fails with the defects found.
fn try_all(name: &str, commands: &[Command], least: &Least) {
    let (mut crashes, mut faults, mut full, mut found) = (0, 0, 0, Found::default());
    for command in commands {
        let expected = command.expected();
        crashes += crash::everywhere(command, &expected, Effort::ALL, &mut found);
        faults += fault::everywhere(command, &expected, Effort::ALL, &mut found);
        full += full::everywhere(command, &expected, &mut found);
    }
    println!(
        "{name}: {} commands, {crashes} crashes, {faults} faults, {full} full disks",
        commands.len()
    );
    found.require_none();
    assert!(crashes >= least.crashes, "only {crashes} crashes");
    assert!(faults >= least.faults, "only {faults} faults");
}
