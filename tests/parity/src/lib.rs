//! Runs the same sequences of commands with the installed `qemu-img` and with ours, and compares the results.
//!
//! A *case* is a few lines in a `cases/*.cases` file (`README.md` documents them). It is run twice, each time in a new
//! directory of the same absolute name and with the same inputs, so that only the version line and durations are
//! normalised: exit code, stdout and stderr of every command under test must be equal to the byte.
//!
//! ```text
//! cases/*.cases -> script (parse) -> run (prepare once, execute twice) -> verdict (what differs, as text)
//!                                     |- files    generators, pokes      |- structure (images, by the stock tool)
//!                                     |- process  spawn, time limit, hold
//! ```

pub mod files;
pub mod process;
pub mod run;
pub mod script;
pub mod structure;
pub mod verdict;
