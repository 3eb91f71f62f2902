//! Every command that writes, on every form of images, with a sample of kills, power cuts and faults.
//!
//! ```text
//!   FORMS × VERBS ──▶ Command ──▶ crash, fault ──▶ judge ──▶ tally, one row for each pair
//! ```
//!
//! New images are written into files without names, which count from the end of the command on only: then nothing of
//! them may be pending. The environment variable `CRASH_TESTS=all` tries every crash and every fault.

mod forms;
mod verbs;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use self::forms::{FORMS, Form, LUKS};
use self::verbs::{VERBS, Verb};
use super::tally::{Found, Tally};
use super::{Effort, crash, fault};

/// The largest number of kills, of power cuts, and of faults of each file for each pair.
const SAMPLE: usize = 16;

fn effort(form: &Form) -> Effort {
    match std::env::var("CRASH_TESTS") {
        Ok(word) if word == "all" => Effort::ALL,
        // Opening takes long with a key.
        _ => Effort {
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

/// The rows of all commands on `forms`, in order.
fn rows(forms: &[&'static Form]) -> Vec<Row> {
    let pairs: Vec<_> = VERBS
        .iter()
        .flat_map(|verb| forms.iter().map(move |form| (verb, *form)))
        .collect();
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::new());
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((verb, form)) = pairs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let row = row(verb, form);
                    done.lock().expect("no test has failed").push(row);
                }
            });
        }
    });
    let mut rows = done.into_inner().expect("no test has failed");
    let is_of =
        |row: &Row, verb: &Verb, form: &Form| row.verb.name == verb.name && row.form.name == form.name;
    rows.sort_by_key(|row| pairs.iter().position(|(verb, form)| is_of(row, verb, form)));
    rows
}

/// Prints a table of `rows`, and fails with the defects.
fn report(rows: Vec<Row>, pairs: usize) {
    println!("| command | form | cut off | old | new | mixed | lost | faults | old | new | mixed | lost |");
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
    let mut all = Found::default();
    let mut crashes = Tally::default();
    let mut count = 0;
    for Row { verb, form, found } in rows {
        let Some(found) = found else { continue };
        count += 1;
        let mut cut_off = found.kills;
        cut_off += found.power_cuts;
        println!("| {} | {} | {cut_off} | {} |", verb.name, form.name, found.faults);
        crashes += cut_off;
        all.kills += found.kills;
        all.power_cuts += found.power_cuts;
        all.faults += found.faults;
        all.defects.extend(found.defects);
    }
    println!("| all | {count} pairs | {crashes} | {} |", all.faults);
    println!(
        "{} kills, {} power cuts",
        all.kills.tried(),
        all.power_cuts.tried()
    );
    all.require_none();
    assert_eq!(count, pairs, "commands on forms");
}

#[test]
fn nothing_is_lost() {
    report(rows(&FORMS.each_ref()), 237);
}

#[test]
fn nothing_is_lost_of_luks() {
    report(rows(&[&LUKS]), 10);
}
