//! Makes images that claim much and hold little, runs every reading command on them under limits, and says what each of
//! them cost. `hostile [--only WORD] [--list] [--jobs N] QEMU-IMG`; `README.md` says how to add an image.

mod commands;
mod fields;
mod files;
mod images;
mod limits;
mod process;
mod streams;
mod suite;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use images::Image;

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(message) => {
            writeln!(io::stderr(), "hostile: {message}").ok();
            ExitCode::FAILURE
        }
    }
}

const USAGE: &str = "usage: hostile [--only WORD] [--list] [--jobs N] [--keep DIRECTORY] QEMU-IMG";

fn run() -> Result<bool, String> {
    let mut words = std::env::args().skip(1);
    let (mut only, mut list, mut jobs, mut keep, mut program) = (None, false, None, None, None);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| USAGE.to_owned());
        match word.as_str() {
            // What this program starts itself as.
            "--make" => return make(Path::new(&value()?), only.as_deref()).map(|()| true),
            "--only" => only = Some(value()?),
            "--list" => list = true,
            "--keep" => keep = Some(PathBuf::from(value()?)),
            "--jobs" => jobs = Some(value()?.parse().map_err(|_| USAGE.to_owned())?),
            _ if word.starts_with('-') => return Err(USAGE.to_owned()),
            _ => program = Some(PathBuf::from(word)),
        }
    }
    let chosen = chosen(only.as_deref());
    if list {
        for image in &chosen {
            say(&format!("{}: {}\n", image.name, image.attack));
        }
        say(&format!("{} images\n", chosen.len()));
        return Ok(true);
    }
    let program = program.ok_or_else(|| USAGE.to_owned())?;
    let program = program
        .canonicalize()
        .map_err(|error| format!("{}: {error}", program.display()))?;
    suite::run(&suite::Suite {
        program,
        images: chosen,
        only,
        jobs,
        keep,
    })
}

/// The images whose names begin with `only`.
fn chosen(only: Option<&str>) -> Vec<&'static Image> {
    let is_chosen = |image: &&Image| only.is_none_or(|word| image.name.starts_with(word));
    images::all().filter(is_chosen).collect()
}

/// Makes the images in a directory each. This is a process of its own: what a process has taken at most counts as taken by
/// those that it starts.
fn make(directory: &Path, only: Option<&str>) -> Result<(), String> {
    for image in chosen(only) {
        let here = directory.join(image.name);
        image
            .make(&here)
            .map_err(|error| format!("{}: {error}", here.display()))?;
    }
    Ok(())
}

fn say(text: &str) {
    io::stdout().write_all(text.as_bytes()).ok();
}
