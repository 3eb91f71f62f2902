//! `-T`: tracing. This program has no trace events, and says so for each that is asked for by name.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::Read;

use diskimage::{Error, name};

use crate::out::Console;
use crate::words::{Stop, text};

/// Takes the value of one `-T`.
///
/// # Errors
/// Unknown parameters; files that cannot be read or made; and [`Stop::Text`] where the list of events is asked for,
/// which is empty.
pub(crate) fn add(value: OsString, console: &Console) -> Result<(), Stop> {
    let value = text(value).replace(",,", "\0");
    for (at, item) in value.split(',').enumerate() {
        let item = item.replace('\0', ",");
        match item.split_once('=') {
            _ if item.is_empty() => (),
            Some(("enable", pattern)) => missing(pattern, "", console),
            Some(("events", file)) => read_events(file, console)?,
            Some(("file", file)) => make_log(file)?,
            None if at == 0 && matches!(item.as_str(), "help" | "?") => {
                return Err(Stop::Text(String::new()));
            }
            None if at == 0 => missing(&item, "", console),
            Some((name, _)) => return Err(Stop::wrong(format!("Invalid parameter '{name}'"))),
            None => return Err(Stop::wrong(format!("Invalid parameter '{item}'"))),
        }
    }
    Ok(())
}

/// Warns that there is no such event; a pattern with `*` may match none in silence.
fn missing(pattern: &str, place: &str, console: &Console) {
    // A minus turns an event off, which needs one as well.
    let name = pattern.strip_prefix('-').unwrap_or(pattern);
    if name.contains('*') || name.is_empty() {
        return;
    }
    let message = format!("warning: trace event '{name}' does not exist\n");
    let space = if place.is_empty() { " " } else { "" };
    console.print_error(&format!("{}:{space}{place}{message}", console.name()));
}

fn read_events(file: &str, console: &Console) -> Result<(), Stop> {
    let mut text = String::new();
    name::open(&name::to_path(file))
        .and_then(|file| file.take(LARGEST_LIST).read_to_string(&mut text))
        .map_err(|error| Stop::wrong(format!("{file}: {}", Error::from(error))))?;
    for (number, line) in (1..).zip(text.lines()) {
        if !line.starts_with('#') {
            missing(line, &format!("{file}:{number}: "), console);
        }
    }
    Ok(())
}

/// Keeps a device file from being read for ever.
const LARGEST_LIST: u64 = 1 << 20;

/// Events would be written to this file; that it can be made is worth knowing although none will be.
fn make_log(file: &str) -> Result<(), Stop> {
    let mut new = OpenOptions::new();
    new.write(true).create(true).truncate(true);
    name::open_with(&name::to_path(file), &new)
        .map(drop)
        .map_err(|error| Stop::wrong(format!("Error opening logfile {file}: {}", Error::from(error))))
}
