//! The commands. Each has a file with its option table, its arguments and its function.

pub mod amend;
pub mod bench;
pub mod bitmap;
pub mod check;
pub mod commit;
pub mod compare;
pub mod convert;
pub mod create;
pub mod dd;
pub mod info;
pub mod map;
pub mod measure;
pub mod rebase;
pub mod resize;
pub mod snapshot;

use std::ffi::OsString;

use crate::out::Console;
use crate::words::{Command, Parser, Policy, Stop, help};

/// A command and its function.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The table of the command.
    pub command: &'static Command,
    /// Parses the command line, runs the command, and returns the exit status.
    pub run: fn(Parser, &Console) -> Result<u8, Stop>,
}

impl Entry {
    /// Runs the command with the words after its name, and returns the exit status.
    pub fn start(&self, words: Vec<OsString>, console: &Console) -> u8 {
        let operands_end_options = std::env::var_os("POSIXLY_CORRECT").is_some();
        let parser = Parser::new(self.command, words, operands_end_options);
        let parser = parser.with_policy(Policy::of_environment());
        match (self.run)(parser, console) {
            Ok(status) => status,
            Err(stop) => console.stop(stop, self.command.name, || help::command(self.command)),
        }
    }
}

/// All commands, in the order of the help text.
pub static ALL: &[Entry] = &[
    Entry {
        command: &amend::COMMAND,
        run: amend::run,
    },
    Entry {
        command: &bench::COMMAND,
        run: bench::run,
    },
    Entry {
        command: &bitmap::COMMAND,
        run: bitmap::run,
    },
    Entry {
        command: &check::COMMAND,
        run: check::run,
    },
    Entry {
        command: &commit::COMMAND,
        run: commit::run,
    },
    Entry {
        command: &compare::COMMAND,
        run: compare::run,
    },
    Entry {
        command: &convert::COMMAND,
        run: convert::run,
    },
    Entry {
        command: &create::COMMAND,
        run: create::run,
    },
    Entry {
        command: &dd::COMMAND,
        run: dd::run,
    },
    Entry {
        command: &info::COMMAND,
        run: info::run,
    },
    Entry {
        command: &map::COMMAND,
        run: map::run,
    },
    Entry {
        command: &measure::COMMAND,
        run: measure::run,
    },
    Entry {
        command: &rebase::COMMAND,
        run: rebase::run,
    },
    Entry {
        command: &resize::COMMAND,
        run: resize::run,
    },
    Entry {
        command: &snapshot::COMMAND,
        run: snapshot::run,
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_consistent() {
        for Entry { command, .. } in ALL {
            let names: Vec<_> = command.flags.iter().flat_map(|flag| flag.longs).collect();
            let letters: Vec<_> = command.flags.iter().filter_map(|flag| flag.short).collect();
            for (at, name) in names.iter().enumerate() {
                assert!(!names[..at].contains(name), "{} has two --{name}", command.name);
            }
            for (at, letter) in letters.iter().enumerate() {
                assert!(
                    !letters[..at].contains(letter),
                    "{} has two -{letter}",
                    command.name
                );
            }
            for name in command.qemu_longs {
                assert!(names.contains(&name), "{} misses --{name}", command.name);
            }
            assert!(
                command
                    .flags
                    .iter()
                    .all(|flag| !flag.name().is_empty() && !flag.help.is_empty())
            );
            assert!(!command.summary.ends_with('.'));
        }
    }

    #[test]
    fn commands_are_listed_by_name() {
        assert!(ALL.is_sorted_by_key(|entry| entry.command.name));
    }
}
