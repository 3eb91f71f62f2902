//! The text of `--help`, generated from the tables.

use std::fmt::Write;

use super::Command;

/// The help for a command.
pub fn command(command: &Command) -> String {
    let mut text = format!(
        "{}.  Usage:\n\n  qemu-img {} {}\n\nArguments:\n",
        command.summary, command.name, command.usage
    );
    for flag in command.flags {
        let value = flag.value.map(|value| format!(" {value}")).unwrap_or_default();
        let short = flag.short.map(|short| format!("-{short}, ")).unwrap_or_default();
        entry(&mut text, &format!("{short}--{}{value}", flag.name()), flag.help);
    }
    for operand in command.operands {
        entry(&mut text, operand.name, operand.help);
    }
    text.push('\n');
    text
}

/// The text of `--version`, in the format that programs parse.
pub fn version() -> String {
    format!(
        "qemu-img version {COMPATIBLE} (qemu-img-rs {})\nCopyright (c) 2026 the qemu-img-rs authors, MIT OR Apache-2.0\n",
        env!("CARGO_PKG_VERSION")
    )
}

/// The help for the program itself, which has these commands.
pub fn program<'a>(commands: impl Iterator<Item = &'a Command>) -> String {
    let mut text = version();
    text.push_str(
        "QEMU disk image utility.  Usage:

  qemu-img [standard options] COMMAND [--help | command options]

Standard options:
  -h, --help
     display this help and exit
  -V, --version
     display version info and exit
  -T,--trace TRACE
     specify tracing options:
        [[enable=]<pattern>][,events=<file>][,file=<file>]

Recognized commands (run qemu-img COMMAND --help for command-specific help):

",
    );
    for command in commands {
        // Writing to a string does not fail.
        let _ = writeln!(text, "  {} - {}", command.name, command.summary);
    }
    text.push_str("\nSupported image formats:\n\n");
    let protocols = diskimage::PROTOCOLS.iter().map(|protocol| protocol.name());
    let filters = diskimage::FILTERS.iter().map(|filter| filter.name());
    let formats = diskimage::FORMATS.iter().map(|format| format.name());
    let mut names: Vec<_> = protocols.chain(filters).chain(formats).collect();
    names.sort_unstable();
    text.push_str(&filled(&names));
    let _ = writeln!(
        text,
        "\nSee <{}> for the source and how to report bugs.",
        env!("CARGO_PKG_REPOSITORY")
    );
    text
}

/// The version of qemu-img that this program behaves like. Programs parse it to find out which features they can use.
const COMPATIBLE: &str = "10.0.2";

fn entry(text: &mut String, head: &str, lines: &[&str]) {
    let _ = writeln!(text, "  {head}");
    for line in lines {
        let _ = writeln!(text, "     {line}");
    }
}

/// Breaks a list of names into lines of up to 80 characters, as `fmt` does.
fn filled(names: &[&str]) -> String {
    let mut text = String::new();
    let mut line = String::from(" ");
    for name in names {
        if line.len() + 1 + name.len() > 75 {
            text.push_str(&line);
            text.push('\n');
            line = String::from(" ");
        }
        line.push(' ');
        line.push_str(name);
    }
    text + &line + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands;

    #[test]
    fn the_help_of_a_command_has_usage_options_and_operands() {
        assert_eq!(
            command(&commands::create::COMMAND),
            "Create and format new image file.  Usage:

  qemu-img create [-f FMT] [-o FMT_OPTS] [-b BACKING_FILENAME [-F BACKING_FMT]]
        [--untrusted] [--deny-references]
        [--object OBJDEF] [-u] FILENAME [SIZE[bkKMGTPE]]

Arguments:
  -h, --help
     print this help and exit
  -q, --quiet
     quiet operations
  -f, --format FMT
     specifies format of the new image, default is raw
  -o, --options FMT_OPTS
     format-specific options ('-o help' for list)
  -b, --backing BACKING_FILENAME
     stack new image on top of BACKING_FILENAME
     (for formats which support stacking)
  -F, --backing-format BACKING_FMT
     specify format of BACKING_FILENAME
  -u, --backing-unsafe
     do not fail if BACKING_FMT can not be read
  --object OBJDEF
     QEMU user-creatable object (eg encryption key)
  --untrusted
     images come from strangers: they may refer to plain files beneath
     their directory only, and the process confines itself
  --deny-references
     refuse images that refer to other files
  FILENAME
     image file to create.  It will be overridden if exists
  SIZE
     image size with optional suffix (multiplies in 1024)
     SIZE is required unless BACKING_IMG is specified,
     in which case it will be the same as size of BACKING_IMG

"
        );
    }

    #[test]
    fn the_version_has_the_form_that_programs_parse() {
        let version = version();
        let line = version.lines().next().unwrap();
        assert_eq!(
            line,
            format!(
                "qemu-img version 10.0.2 (qemu-img-rs {})",
                env!("CARGO_PKG_VERSION")
            )
        );
    }

    #[test]
    fn long_lists_are_broken_into_lines() {
        let names = ["abcdefghij"; 8];
        assert_eq!(
            filled(&names),
            "  abcdefghij abcdefghij abcdefghij abcdefghij abcdefghij abcdefghij\n  abcdefghij abcdefghij\n"
        );
    }
}
