//! Crashes and failing requests in the middle of whole commands, on images in memory.
//!
//! A command is everything that the program does from opening the files to closing them. It runs once to record the
//! views of the files before and after. Then it runs with every crash and every fault:
//!
//! ```text
//!   crash   all files lose what was not flushed, at every request     ┐
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
mod fault;
mod full;
mod judge;
mod rebase;
mod resize;
mod snapshot;

use diskimage_core::Result;

use self::disks::{Disks, Files};
use self::judge::{Expected, View};

/// A command on the files of a chain.
struct Command {
    name: &'static str,
    /// The files before the command.
    files: Files,
    run: Box<Run>,
    /// How the disks change.
    change: Change,
    /// Whether the guest data of the topmost disk is the same before and after.
    guest_data_unchanged: bool,
    /// Whether the files are damaged before, and the command repairs them.
    damaged: bool,
}

type Run = dyn Fn(&Disks) -> Result<()>;

/// How the disks of a command change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// Atomically: a crash leaves the disk as before or as after.
    Atomic,
    /// Byte by byte: a crash leaves each byte as before or as after.
    Gradual,
}

impl Command {
    fn new(name: &'static str, files: Files, run: impl Fn(&Disks) -> Result<()> + 'static) -> Self {
        Self {
            name,
            files,
            run: Box::new(run),
            change: Change::Atomic,
            guest_data_unchanged: false,
            damaged: false,
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

    /// The views of the files before and after a run without faults.
    fn expected(&self) -> Expected {
        let before = View::of(&self.files).expect("readable");
        let disks = Disks::holding(&self.files);
        (self.run)(&disks).expect(self.name);
        let after = View::of(&disks.contents()).expect("readable");
        assert!(self.damaged || before != after, "{} does nothing", self.name);
        assert!(
            !self.guest_data_unchanged || before.top() == after.top(),
            "{} changes the disk",
            self.name
        );
        Expected {
            before,
            after,
            change: self.change,
            damaged: self.damaged,
        }
    }

    /// Judges the files that a cut-off run has left, and those after the command has run on them again. Returns the
    /// defect.
    fn find_defect(&self, left: &[Vec<u8>], expected: &Expected) -> Option<String> {
        let view = match expected.judge(left) {
            Ok(view) => view,
            Err(defect) => return Some(defect),
        };
        if view == expected.after && !self.damaged {
            return None;
        }
        let disks = Disks::holding(left);
        if let Err(error) = (self.run)(&disks) {
            return Some(format!("fails when run again: {}", error.chain()));
        }
        expected
            .judge_finished(&disks.contents())
            .err()
            .map(|defect| format!("after it has run again: {defect}"))
    }
}

/// The least number of crashes and faults that a test must try; it fails if a change of the code makes it try fewer.
struct Least {
    crashes: usize,
    faults: usize,
}

/// Runs `commands` with all crashes, faults and full disks, and fails with the defects found.
fn try_all(name: &str, commands: &[Command], least: &Least) {
    let (mut crashes, mut faults, mut full, mut defects) = (0, 0, 0, Vec::new());
    for command in commands {
        let expected = command.expected();
        crashes += crash::everywhere(command, &expected, &mut defects);
        faults += fault::everywhere(command, &expected, &mut defects);
        full += full::everywhere(command, &expected, &mut defects);
    }
    println!(
        "{name}: {} commands, {crashes} crashes, {faults} faults, {full} full disks",
        commands.len()
    );
    let all = defects.len();
    defects.truncate(20);
    assert!(all == 0, "{all} defects\n{}", defects.join("\n"));
    assert!(crashes >= least.crashes, "only {crashes} crashes");
    assert!(faults >= least.faults, "only {faults} faults");
}
