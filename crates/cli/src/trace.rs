//! `-T`: tracing. This program has no trace events and prints a warning for each one that is given by name.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::Read;

use diskimage::{Error, name};

use crate::out::Console;
use crate::words::{Stop, text};

/// Handles the value of one `-T`.
///
/// # Errors
/// A parameter is unknown, or a file cannot be read or created. [`Stop::Text`] for `help`: the list of events, which is
/// empty.
pub(crate) fn add(value: OsString, console: &Console) -> Result<(), Stop> {
    let value = text(value).replace(",,", "\0");
    for (at, item) in value.split(',').enumerate() {
        let item = item.replace('\0', ",");
        match item.split_once('=') {
            _ if item.is_empty() => (),
            Some(("enable", pattern)) => warn_missing(pattern, "", console),
            Some(("events", file)) => read_events(file, console)?,
            Some(("file", file)) => make_log(file)?,
            None if at == 0 && matches!(item.as_str(), "help" | "?") => {
                return Err(Stop::Text(String::new()));
            }
            None if at == 0 => warn_missing(&item, "", console),
            Some((name, _)) => return Err(Stop::wrong(format!("Invalid parameter '{name}'"))),
            None => return Err(Stop::wrong(format!("Invalid parameter '{item}'"))),
        }
    }
    Ok(())
}

/// Warns that no event is called `pattern`. A pattern with `*` may match nothing without a warning. `position` is the
/// file and line of the pattern, or empty.
fn warn_missing(pattern: &str, position: &str, console: &Console) {
    // A minus turns an event off, which has to exist too.
    let name = pattern.strip_prefix('-').unwrap_or(pattern);
    if name.contains('*') || name.is_empty() {
        return;
    }
    let message = format!("warning: trace event '{name}' does not exist");
    let space = if position.is_empty() { " " } else { "" };
    console.error_line(&format!("{}:{space}{position}{message}", console.name()));
}

fn read_events(file: &str, console: &Console) -> Result<(), Stop> {
    let mut text = String::new();
    name::open(&name::to_path(file))
        .and_then(|file| file.take(LARGEST_LIST).read_to_string(&mut text))
        .map_err(|error| Stop::wrong(format!("{file}: {}", Error::from(error))))?;
    for (number, line) in (1..).zip(text.lines()) {
        if !line.starts_with('#') {
            warn_missing(line, &format!("{file}:{number}: "), console);
        }
    }
    Ok(())
}

/// The largest size of a list of events; a limit of this program, so that reading a device file ends.
const LARGEST_LIST: u64 = 1 << 20;

/// Creates the log file, as qemu-img does, although nothing will be written to it.
fn make_log(file: &str) -> Result<(), Stop> {
    let mut new = OpenOptions::new();
    new.write(true).create(true).truncate(true);
    name::open_with(&name::to_path(file), &new)
        .map(drop)
        .map_err(|error| Stop::wrong(format!("Error opening logfile {file}: {}", Error::from(error))))
}
