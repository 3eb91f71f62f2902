//! The command line of `qemu-img`: parses the arguments, runs one operation of the library, prints its result and
//! returns the exit status.
//!
//! ```text
//!   run ──▶ standard options ──▶ commands::ALL ──▶ Args::parse ──▶ run(Args)
//!                words/                            commands/<name>.rs
//! ```
//!
//! All output goes through [`out::Console`]. This crate is for the executable; the library for programs is `diskimage`.
#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

pub mod commands;
mod confinement;
mod facts;
pub mod objects;
pub mod out;
mod policy;
pub mod printable;
pub mod progress;
mod report;
mod signals;
mod source;
mod trace;
pub mod words;

use std::ffi::OsString;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use diskimage::name;
use out::Console;
use signal_hook::consts::SIGXFSZ;
use words::{Command, Flag, Parser, Stop, help};

/// Runs the program with its command line, whose first word is the name that it was called by.
pub fn run(words: impl IntoIterator<Item = OsString>) -> ExitCode {
    signals::block();
    // With a handler for SIGXFSZ a write beyond the file size limit (`ulimit -f`) fails with an error, and does not end
    // the program. If the handler cannot be installed, the signal keeps its default action.
    let _ = signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false)));
    let mut words = words.into_iter();
    let console = Console::new(&words.next().unwrap_or_default());
    let status = match standard_options(words.collect(), &console) {
        Ok((entry, words)) => entry.start(words, &console),
        Err(stop) => console.stop(stop, PROGRAM.name, || {
            help::program(commands::ALL.iter().map(|entry| entry.command))
        }),
    };
    ExitCode::from(console.finish(status))
}

/// Parses the options before the command, and finds the command.
fn standard_options(
    words: Vec<OsString>,
    console: &Console,
) -> Result<(&'static commands::Entry, Vec<OsString>), Stop> {
    let mut parser = Parser::new(&PROGRAM, words, true);
    while let Some((name, value)) = parser.next_flag()? {
        match name {
            "version" => return Err(Stop::Text(help::version())),
            _ => trace::add(value, console)?,
        }
    }
    let mut words = parser.operands().into_iter();
    let Some(name) = words.next() else {
        return Err(Stop::misused("Not enough arguments"));
    };
    match commands::ALL.iter().find(|entry| name == entry.command.name) {
        Some(entry) => Ok((entry, words.collect())),
        None => Err(Stop::misused(format!(
            "Command not found: {}",
            name::from_os(&name)
        ))),
    }
}

/// The options before a command.
pub static PROGRAM: Command = Command {
    name: "",
    summary: "QEMU disk image utility",
    usage: "[standard options] COMMAND [--help | command options]",
    flags: &[
        Flag::switch(Some('h'), &["help"], &["display this help and exit"]),
        Flag::switch(Some('V'), &["version"], &["display version info and exit"]),
        Flag::option(
            Some('T'),
            &["trace"],
            "TRACE",
            &[
                "specify tracing options:",
                "[[enable=]<pattern>][,events=<file>][,file=<file>]",
            ],
        ),
    ],
    operands: &[],
    qemu_longs: &["help", "version", "trace"],
    negative_operand: None,
};
