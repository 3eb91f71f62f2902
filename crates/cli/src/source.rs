//! Opens the images that are named on the command line.

use std::sync::{Arc, Mutex, PoisonError};

use diskimage::options::short_forms;
use diskimage::{
    Image, LocalTime, NodeOptions, Note, OnNote, OpenOptions, node_of_name, open_backing, open_node,
};
use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::out::Console;
use crate::words::{ImageName, Source, Stop};

/// Opens an image, and prints the notes of the library.
///
/// # Errors
/// The image cannot be opened, or its name is invalid.
pub(crate) fn open_source(
    source: &Source,
    options: OpenOptions,
    console: &Console,
) -> Result<Arc<Image>, Stop> {
    if let ImageName::Options(list) = &source.name {
        warn_of_short_forms(list, console);
        let node = NodeOptions::from_list(list)?;
        if options.shares() && node.text("force-share").is_some_and(|share| share != "on") {
            return Err(Stop::wrong("--force-share/-U conflicts with image options"));
        }
    }
    let opened = open_bare(source, options, console)?;
    Ok(opened.map_err(|error| error.context(format!("Could not open '{}'", source.name.shown())))?)
}

/// The same; the message of the inner error does not name the image.
///
/// # Errors
/// The name is invalid.
pub(crate) fn open_bare(
    source: &Source,
    options: OpenOptions,
    console: &Console,
) -> Result<diskimage::Result<Arc<Image>>, Stop> {
    let node = match &source.name {
        ImageName::File(name) => node_of_name(name, source.format.as_deref()),
        ImageName::Options(list) => Ok(NodeOptions::from_list(list)?),
    };
    Ok(with_notes(options, console, |options| {
        node.and_then(|node| open_node(node, options))
    }))
}

/// Opens the backing image of `overlay`, which was opened without it.
///
/// # Errors
/// As [`open_bare`], and refusals of the policy.
pub(crate) fn open_below(
    overlay: &Image,
    source: &Source,
    options: OpenOptions,
    console: &Console,
) -> diskimage::Result<Arc<Image>> {
    with_notes(options, console, |options| {
        open_backing(overlay, &source.name.shown(), source.format.as_deref(), options)
    })
}

/// Prints the notes of the library while it opens an image.
fn with_notes<T>(options: OpenOptions, console: &Console, open: impl FnOnce(&OpenOptions) -> T) -> T {
    let notes = Notes::default();
    let options = options.local_time(local_time()).on_note(notes.receiver());
    let outcome = open(&options);
    notes.print(console);
    outcome
}

/// The notes of the library while it opens images.
#[derive(Default)]
pub(crate) struct Notes(Arc<Mutex<Vec<Note>>>);

impl Notes {
    /// What collects them.
    pub(crate) fn receiver(&self) -> Arc<OnNote> {
        let collected = Arc::clone(&self.0);
        Arc::new(move |note: &Note| {
            let mut notes = collected.lock().unwrap_or_else(PoisonError::into_inner);
            notes.push(note.clone());
        })
    }

    /// Prints them.
    pub(crate) fn print(&self, console: &Console) {
        for note in &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            console.note(note);
        }
    }
}

/// Local time in the time zone of the system.
fn local_time() -> LocalTime {
    LocalTime::new(|seconds| {
        Timestamp::from_second(seconds).map_or(0, |time| TimeZone::system().to_offset(time).seconds())
    })
}

/// Prints the deprecation warnings for options without a value.
fn warn_of_short_forms(list: &str, console: &Console) {
    for (word, name, value) in short_forms(list) {
        console.warning(&format!("short-form boolean option '{word}' deprecated"));
        console.error_line(&format!("Please use {name}={value} instead"));
    }
}
