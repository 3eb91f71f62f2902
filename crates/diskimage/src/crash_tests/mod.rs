//! Crashes and failing requests in the middle of whole commands, on images in memory.
//!
//! A command is what the program does from opening the files to closing them. It is run once to see how things look
//! before and after. Then it is cut short at every moment, as a power failure does to all files at once, every request
//! to every file fails in turn, and each file in turn cannot grow beyond some length, as on a full disk. Each time
//!
//! * all images open, and a check finds leaked clusters at worst, which can be mended;
//! * every disk, snapshot and bitmap is as before or as after (`judge`);
//! * the same command again does what is left to do.

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
    /// What the files hold before.
    files: Files,
    run: Box<Run>,
    /// How its disks change.
    change: Change,
    /// Whether the disk on top stays as it is all the time.
    keeps_disk: bool,
    /// Whether the files are damaged before, and the command mends them.
    damaged: bool,
}

type Run = dyn Fn(&Disks) -> Result<()>;

/// How the disks of a command get from before to after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// At once.
    Whole,
    /// Byte by byte.
    Gradual,
}

impl Command {
    fn new(name: &'static str, files: Files, run: impl Fn(&Disks) -> Result<()> + 'static) -> Self {
        Self {
            name,
            files,
            run: Box::new(run),
            change: Change::Whole,
            keeps_disk: false,
            damaged: false,
        }
    }

    fn guest_data_unchanged(self) -> Self {
        Self {
            keeps_disk: true,
            ..self
        }
    }

    fn gradual(self) -> Self {
        Self {
            change: Change::Gradual,
            ..self
        }
    }

    /// What it does when nothing gets in its way.
    fn expected(&self) -> Expected {
        let before = View::of(&self.files).expect("readable");
        let disks = Disks::holding(&self.files);
        (self.run)(&disks).expect(self.name);
        let after = View::of(&disks.contents()).expect("readable");
        assert!(self.damaged || before != after, "{} does nothing", self.name);
        assert!(
            !self.keeps_disk || before.top() == after.top(),
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

    /// Says what is wrong with what was left of the files, or with doing it all over again.
    fn find_wrong(&self, left: &[Vec<u8>], expected: &Expected) -> Option<String> {
        let seen = match expected.judge(left) {
            Ok(seen) => seen,
            Err(wrong) => return Some(wrong),
        };
        if seen == expected.after && !self.damaged {
            return None;
        }
        let disks = Disks::holding(left);
        if let Err(error) = (self.run)(&disks) {
            return Some(format!("does not work again: {}", error.chain()));
        }
        expected
            .judge_finished(&disks.contents())
            .err()
            .map(|wrong| format!("after doing it again: {wrong}"))
    }
}

/// Tries all crashes and all faults on some commands, and says how many there were.
fn try_all(name: &str, commands: &[Command], least: (usize, usize)) {
    let (mut crashes, mut faults, mut full, mut complaints) = (0, 0, 0, Vec::new());
    for command in commands {
        let expected = command.expected();
        crashes += crash::everywhere(command, &expected, &mut complaints);
        faults += fault::everywhere(command, &expected, &mut complaints);
        full += full::everywhere(command, &expected, &mut complaints);
    }
    println!(
        "{name}: {} commands, {crashes} crashes, {faults} faults, {full} full disks",
        commands.len()
    );
    let all = complaints.len();
    complaints.truncate(20);
    assert!(all == 0, "{all} complaints\n{}", complaints.join("\n"));
    assert!(
        crashes >= least.0 && faults >= least.1,
        "few: {crashes} crashes, {faults} faults"
    );
}
