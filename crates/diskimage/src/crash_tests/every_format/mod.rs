//! Every command that writes, on every form of images, with a sample of kills, power cuts and faults.
//!
//! ```text
//!   FORMS × VERBS ──▶ Command ──▶ crash, fault ──▶ judge ──▶ tally, one row for each pair
//! ```
//!
//! New images are written into files without names, which count from the end of the command on only: then nothing of
//! them may be pending. The environment variable `CRASH_TESTS=all` tries every crash and every fault, and the name of a
//! command there those of that command.

mod forms;
mod verbs;

use std::ops::Add;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use self::forms::{FORMS, Form};
use self::verbs::{VERBS, Verb};
use super::tally::{Found, Tally};
use super::{Effort, crash, fault};

/// The largest number of kills, of power cuts, and of faults of each file for each pair.
const SAMPLE: usize = 16;

/// The only command to try.
fn only() -> Option<String> {
    std::env::var("CRASH_TESTS").ok().filter(|word| word != "all")
}

fn effort(form: &Form) -> Effort {
    match std::env::var("CRASH_TESTS") {
        Ok(_) => Effort::ALL,
        // Opening takes long with a key.
        Err(_) => Effort {
            most: if form.key.is_some() { SAMPLE / 2 } else { SAMPLE },
        },
    }
}

/// A command on images of a form, with what has been found; `None` if that form cannot do it.
struct Row {
    verb: &'static Verb,
    form: &'static Form,
    found: Option<Found>,
}

fn row(verb: &'static Verb, form: &'static Form) -> Row {
    let found = (verb.on)(form).map(|mut command| {
        command.name = format!("{} ({})", verb.name, form.name);
        command.repeatable &= form.key.is_none();
        let expected = command.expected();
        let mut found = Found::default();
        crash::everywhere(&command, &expected, effort(form), &mut found);
        fault::everywhere(&command, &expected, effort(form), &mut found);
        found
    });
    Row { verb, form, found }
}

/// The rows of all commands on all forms, in order.
fn rows() -> Vec<Row> {
    let only = only();
    let pairs: Vec<_> = VERBS
        .iter()
        .filter(|verb| only.as_ref().is_none_or(|only| verb.name == only))
        .flat_map(|verb| FORMS.iter().map(move |form| (verb, form)))
        .collect();
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::new());
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some((verb, form)) = pairs.get(number) else {
                        break;
                    };
                    let row = row(verb, form);
                    done.lock().expect("no test has failed").push((number, row));
                }
            });
        }
    });
    let mut rows = done.into_inner().expect("no test has failed");
    rows.sort_by_key(|(number, _)| *number);
    rows.into_iter().map(|(_, row)| row).collect()
}

/// Prints the numbers of each pair.
fn print_pairs(rows: &[Row]) {
    println!("| command | form | cut off | old | new | mixed | lost | faults | old | new | mixed | lost |");
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
    for Row { verb, form, found } in rows {
        if let Some(found) = found {
            let cut_off = found.kills + found.power_cuts;
            println!("| {} | {} | {cut_off} | {} |", verb.name, form.name, found.faults);
        }
    }
}

/// Prints what is left of all crashes and faults of each command in each format: old, new, mixed, lost.
fn print_formats(rows: &[Row]) {
    let mut formats: Vec<&str> = FORMS.iter().map(|form| form.format).collect();
    formats.dedup();
    println!("| command | {} |", formats.join(" | "));
    println!("|{}", "---|".repeat(formats.len() + 1));
    for verb in &VERBS {
        let cell = |format: &&str| {
            let here = rows
                .iter()
                .filter(|row| row.verb.name == verb.name && row.form.format == *format);
            let found = here.filter_map(|row| row.found.as_ref());
            let tally = found
                .map(|found| found.kills + found.power_cuts + found.faults)
                .reduce(Tally::add);
            tally.map_or_else(
                || "-".to_owned(),
                |tally| format!("{} {} {} {}", tally.old, tally.new, tally.mixed, tally.lost),
            )
        };
        let cells: Vec<String> = formats.iter().map(cell).collect();
        println!("| {} | {} |", verb.name, cells.join(" | "));
    }
}

#[test]
fn nothing_is_lost() {
    let rows = rows();
    print_pairs(&rows);
    print_formats(&rows);
    let pairs = rows.iter().filter(|row| row.found.is_some()).count();
    let found = rows.into_iter().filter_map(|row| row.found);
    let mut all = found.reduce(Found::add).expect("some commands");
    println!("| of {pairs} pairs | tried | old | new | mixed | lost |");
    println!("|---|---|---|---|---|---|");
    for (what, tally) in [
        ("kills", all.kills),
        ("power cuts", all.power_cuts),
        ("faults", all.faults),
    ] {
        println!("| {what} | {tally} |");
    }
    all.require_none();
    if only().is_none() {
        assert_eq!(
            pairs, 318,
            "a form can do a command that it could not do before, or the reverse"
        );
    }
}
