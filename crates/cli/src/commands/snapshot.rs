//! `snapshot`: lists and changes internal snapshots.

use std::sync::Arc;
use std::time::SystemTime;

use diskimage::{
    Image, Objects, SnapshotSelector, ambiguous_snapshot, apply_snapshot, create_snapshot, delete_snapshot,
    list_readable_snapshots, repeated_names,
};

use crate::facts::snapshot_lines;
use crate::objects::define;
use crate::out::Console;
use crate::source::open_source;
use crate::words::{Command, Flag, Operand, Parser, Policy, Source, Stop, only_image, text};

/// The table of `snapshot`.
pub static COMMAND: Command = Command {
    name: "snapshot",
    summary: "List or manipulate snapshots within image",
    usage: "[-f FMT | --image-opts] [-l | -a|-c|-d SNAPSHOT]
        [--untrusted] [--deny-references]
        [-U] [--object OBJDEF] FILENAME",
    flags: &[
        Flag::HELP,
        Flag::QUIET_ALL,
        Flag::FILE_FORMAT,
        Flag::IMAGE_OPTS,
        Flag::FORCE_SHARE,
        Flag::OBJECT,
        Flag::switch(
            Some('l'),
            &["list"],
            &["list snapshots in FILENAME (the default)"],
        ),
        Flag::option(Some('c'), &["create"], "SNAPSHOT", &["create named snapshot"]),
        Flag::option(
            Some('a'),
            &["apply"],
            "SNAPSHOT",
            &["apply named snapshot to the base"],
        ),
        Flag::option(Some('d'), &["delete"], "SNAPSHOT", &["delete named snapshot"]),
        Flag::UNTRUSTED,
        Flag::DENY_REFERENCES,
    ],
    operands: &[Operand {
        name: "FILENAME",
        help: &["image file name (or specification with --image-opts)"],
    }],
    qemu_longs: &[
        "help",
        "quiet",
        "object",
        "format",
        "image-opts",
        "force-share",
        "list",
        "apply",
        "create",
        "delete",
    ],
    negative_operand: None,
};

/// An action on the snapshots of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// List all snapshots.
    List,
    /// Take a snapshot with this name.
    Create(String),
    /// Revert the disk to the snapshot with this identifier or name.
    Apply(String),
    /// Delete the snapshot with this name.
    Delete(String),
}

/// The arguments of `snapshot`.
#[derive(Debug)]
pub struct Args {
    /// The image.
    pub image: Source,
    /// The action.
    pub action: Action,
    /// Open the image without locks (`-U`).
    pub force_share: bool,
    /// Print no warnings (`-q`).
    pub quiet: bool,
    /// The objects of `--object`, such as secrets.
    pub objects: Arc<Objects>,
    /// What the images may bring about.
    pub policy: Policy,
}

impl Args {
    /// Parses the command line.
    ///
    /// # Errors
    /// An option is unknown or has an invalid value, options contradict each other, or an operand is missing.
    pub fn parse(mut words: Parser) -> Result<Self, Stop> {
        let (mut format, mut image_opts) = (None, false);
        let (mut force_share, mut quiet) = (false, false);
        let mut action = None;
        let mut objects = Objects::default();
        while let Some((flag, value)) = words.next_flag()? {
            let wanted = match flag {
                "list" => Action::List,
                "create" => Action::Create(text(value)),
                "apply" => Action::Apply(text(value)),
                "delete" => Action::Delete(text(value)),
                other => {
                    match other {
                        // As in qemu-img, the list is printed with `-q` too.
                        "quiet" => quiet = true,
                        "format" => format = Some(text(value)),
                        "image-opts" => image_opts = true,
                        "force-share" => force_share = true,
                        "object" => define(&mut objects, value)?,
                        _ => unreachable!("every option of the table is listed"),
                    }
                    continue;
                }
            };
            if action.replace(wanted).is_some() {
                return Err(Stop::misused("Cannot mix '-l', '-a', '-c', '-d'"));
            }
        }
        let policy = words.policy();
        Ok(Self {
            image: Source::new(only_image(words)?, format, image_opts)?,
            action: action.unwrap_or(Action::List),
            force_share,
            quiet,
            objects: objects.into(),
            policy,
        })
    }
}

/// Parses the command line of `snapshot` and runs the command.
///
/// # Errors
/// The command line is wrong, the image cannot be opened, the snapshot does not exist, or changing the image fails.
pub fn run(words: Parser, console: &Console) -> Result<u8, Stop> {
    let args = Args::parse(words)?;
    let confinement = args.policy.confine(&args.objects, |reach| {
        reach.with(&args.image, args.action != Action::List)
    })?;
    let options = args
        .policy
        .opening()
        .objects(Arc::clone(&args.objects))
        .force_share(args.force_share)
        .write(args.action != Action::List);
    let image = open_source(&args.image, options, console)?;
    confinement.all_open()?;
    match &args.action {
        Action::List => {
            let (snapshots, damage) = list_readable_snapshots(&image);
            for warning in repeated_names(&snapshots) {
                warn(&args, console, &warning);
            }
            if !snapshots.is_empty() {
                for line in snapshot_lines(&snapshots) {
                    console.line(&line);
                }
            }
            if let Some(damage) = damage {
                return Err(damage.into());
            }
        }
        Action::Create(name) => {
            create_snapshot(&image, name, SystemTime::now())
                .map_err(|error| failed("create", name, error))?;
        }
        Action::Apply(word) => {
            warn_if_ambiguous(&args, &image, word, console);
            apply_snapshot(&image, word).map_err(|error| failed("apply", word, error))?;
        }
        Action::Delete(name) => {
            warn_if_ambiguous(&args, &image, name, console);
            delete_snapshot(&image, name).map_err(|error| failed("delete", name, error))?;
        }
    }
    Ok(0)
}

fn warn_if_ambiguous(args: &Args, image: &Image, word: &str, console: &Console) {
    let selector = SnapshotSelector::Either(word.to_owned());
    if let Some(warning) = ambiguous_snapshot(image, &selector) {
        warn(args, console, &warning);
    }
}

fn warn(args: &Args, console: &Console, warning: &str) {
    if !args.quiet {
        console.warning(warning);
    }
}

fn failed(verb: &str, name: &str, error: diskimage::Error) -> diskimage::Error {
    error.context(format!("Could not {verb} snapshot '{}'", name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn action(words: &[&str]) -> Result<Action, Stop> {
        let words = words.iter().map(std::ffi::OsString::from).collect();
        Args::parse(Parser::new(&COMMAND, words, false)).map(|args| args.action)
    }

    #[test]
    fn there_is_one_action_and_the_default_is_the_list() {
        assert_eq!(action(&["x"]), Ok(Action::List));
        assert_eq!(action(&["x", "-c", "s"]), Ok(Action::Create("s".to_owned())));
        for words in [["-l", "-l", "x"], ["-ca", "-db", "x"]] {
            assert_eq!(
                action(&words),
                Err(Stop::misused("Cannot mix '-l', '-a', '-c', '-d'"))
            );
        }
    }
}
