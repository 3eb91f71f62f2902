//! Writes the manual pages and the completions for bash, zsh and fish into a directory:
//!
//! ```text
//! cargo run -p qemu-img-rs --example manuals -- OUTDIR
//! ```
//!
//! They are generated from the same tables as parsing and `--help`. The crates for shells and troff are dependencies of
//! this example only, not of the executable.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use clap::{Arg, ArgAction, Command};
use clap_complete::{Shell, generate_to};
use clap_mangen::Man;
use qemu_img_rs::{PROGRAM, commands, words};

fn main() -> Result<(), Box<dyn Error>> {
    let directory = std::env::args_os()
        .nth(1)
        .ok_or("Expecting the directory to write to")?;
    let directory = PathBuf::from(directory);
    fs::create_dir_all(&directory)?;
    let program = program();
    write_page(&directory, &program, "qemu-img.1")?;
    for command in program.get_subcommands() {
        let name = format!("qemu-img-{}", command.get_name());
        // Each command has a page of its own; the name in the page's heading is the argument of `man`.
        let command = command
            .clone()
            .display_name(name.clone())
            .bin_name(format!("qemu-img {}", command.get_name()));
        write_page(&directory, &command, &format!("{name}.1"))?;
    }
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        generate_to(shell, &mut program.clone(), "qemu-img", &directory)?;
    }
    Ok(())
}

fn write_page(directory: &Path, command: &Command, name: &str) -> Result<(), Box<dyn Error>> {
    let mut page = Vec::new();
    let source = concat!("qemu-img-rs ", env!("CARGO_PKG_VERSION"));
    Man::new(command.clone()).source(source).render(&mut page)?;
    fs::write(directory.join(name), page)?;
    Ok(())
}

fn program() -> Command {
    let commands = commands::ALL.iter().map(|entry| command(entry.command));
    command(&PROGRAM)
        .name("qemu-img")
        .version(env!("CARGO_PKG_VERSION"))
        .subcommands(commands)
        .disable_help_subcommand(true)
}

fn command(table: &'static words::Command) -> Command {
    Command::new(table.name)
        .about(table.summary)
        .disable_help_flag(true)
        .disable_version_flag(true)
        .args(table.flags.iter().map(flag))
        .args(table.operands.iter().map(operand))
}

fn flag(flag: &'static words::Flag) -> Arg {
    let arg = Arg::new(flag.name())
        .long(flag.name())
        .visible_aliases(flag.longs[1..].iter().copied())
        .help(flag.help.join(" "));
    let arg = match flag.short {
        Some(short) => arg.short(short),
        None => arg,
    };
    match flag.value {
        Some(value) => arg.value_name(value).action(ArgAction::Append),
        None => arg.action(ArgAction::SetTrue),
    }
}

fn operand(operand: &'static words::Operand) -> Arg {
    Arg::new(operand.name)
        .value_name(operand.name)
        .help(operand.help.join(" "))
        .required(true)
        .value_hint(clap::ValueHint::AnyPath)
}
