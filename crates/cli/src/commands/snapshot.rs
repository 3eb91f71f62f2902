//! `snapshot`: lists and changes internal snapshots.

use std::sync::Arc;
use std::time::SystemTime;

use diskimage::{Objects, OpenOptions, apply_snapshot, create_snapshot, delete_snapshot, list_snapshots};

use super::only_image;
use crate::facts::snapshot_lines;
use crate::objects::define;
use crate::out::Console;
use crate::printable::printable;
use crate::source::open_source;
use crate::words::{Command, Flag, Operand, Parser, Source, Stop, text};

/// The table of `snapshot`.
pub static COMMAND: Command = Command {
    name: "snapshot",
    summary: "List or manipulate snapshots within image",
    usage: "[-f FMT | --image-opts] [-l | -a|-c|-d SNAPSHOT]
        [-U] [--object OBJDEF] FILENAME",
    flags: &[
        Flag::HELP,
        Flag::QUIET_ALL,
        Flag::option(
            Some('f'),
            &["format"],
            "FMT",
            &["specify FILENAME format explicitly"],
        ),
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
    ],
    operands: &[Operand {
        name: "FILENAME",
        help: &["image file name (or specification with --image-opts)"],
    }],
    original: &[
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

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Show all snapshots.
    List,
    /// Keep the disk as it is under this name.
    Create(String),
    /// Go back to the snapshot with this identifier or name.
    Apply(String),
    /// Take the snapshot with this name away.
    Delete(String),
}

/// What to do to which image.
#[derive(Debug)]
pub struct Args {
    /// The image.
    pub image: Source,
    /// What to do.
    pub action: Action,
    /// Others may change the image at the same time.
    pub force_share: bool,
    /// Secrets.
    pub objects: Arc<Objects>,
}

impl Args {
    /// Reads the words.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn parse(mut words: Parser) -> Result<Self, Stop> {
        let (mut format, mut image_opts, mut force_share) = (None, false, false);
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
                        // Nothing is printed but the list, which the original prints all the same.
                        "quiet" => {}
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
        Ok(Self {
            image: Source::new(only_image(words)?, format, image_opts)?,
            action: action.unwrap_or(Action::List),
            force_share,
            objects: objects.into(),
        })
    }
}

/// Reads the words of `snapshot` and does it.
///
/// # Errors
/// What is wrong with the words, images that cannot be opened, snapshots that there are none of, and what keeps the
/// image from changing.
pub fn run(words: Parser, console: &Console) -> Result<u8, Stop> {
    let args = Args::parse(words)?;
    let options = OpenOptions::new()
        .objects(Arc::clone(&args.objects))
        .force_share(args.force_share)
        .write(args.action != Action::List);
    let image = open_source(&args.image, options, console)?;
    match &args.action {
        Action::List => {
            let snapshots = list_snapshots(&image)?;
            if !snapshots.is_empty() {
                console.print(&(snapshot_lines(&snapshots).join("\n") + "\n"));
            }
        }
        Action::Create(name) => {
            create_snapshot(&image, name, SystemTime::now())
                .map_err(|error| failed("create", name, error))?;
        }
        Action::Apply(word) => {
            apply_snapshot(&image, word).map_err(|error| failed("apply", word, error))?;
        }
        Action::Delete(name) => {
            delete_snapshot(&image, name).map_err(|error| failed("delete", name, error))?;
        }
    }
    Ok(0)
}

fn failed(verb: &str, name: &str, error: diskimage::Error) -> diskimage::Error {
    error.context(format!("Could not {verb} snapshot '{}'", printable(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn action(words: &[&str]) -> Result<Action, Stop> {
        let words = words.iter().map(std::ffi::OsString::from).collect();
        Args::parse(Parser::new(&COMMAND, words, false)).map(|args| args.action)
    }

    #[test]
    fn one_thing_is_done_and_that_is_the_list_if_nothing_is_said() {
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
