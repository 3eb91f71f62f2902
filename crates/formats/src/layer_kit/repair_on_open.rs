//! Repairs that are made while an image is opened.

use std::sync::{Mutex, PoisonError};

use diskimage_core::{Note, Progress, Result};

/// The most bytes of notes that are kept.
const MOST: usize = 1 << 20;

/// Repairs an image that is being opened, and returns the notes of `repair`. If it fails, the error has them as its
/// notice, which is printed first.
///
/// # Errors
/// That of `repair`.
pub(crate) fn run(repair: impl FnOnce(&Progress<'_>) -> Result<()>) -> Result<Vec<Note>> {
    let kept = Mutex::new((Vec::new(), 0));
    let keep = |note: &Note| {
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.1 += note.text().len();
        if kept.1 <= MOST {
            kept.0.push(note.clone());
        }
    };
    let outcome = repair(&Progress::none().with_notes(&keep));
    let (notes, _) = kept.into_inner().unwrap_or_else(PoisonError::into_inner);
    match outcome {
        Ok(()) => Ok(notes),
        Err(error) if notes.is_empty() => Err(error),
        Err(error) => Err(error.notice(Note::Several(notes))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use diskimage_core::Error;

    #[test]
    fn notes_are_returned_or_precede_the_error() {
        let line = |text: &str| Note::Line(text.to_owned());
        let note = |progress: &Progress<'_>| ["a", "b"].map(|text| progress.note(&line(text)));
        let kept = run(|progress| {
            note(progress);
            Ok(())
        });
        assert_eq!(kept.expect("is repaired"), [line("a"), line("b")]);
        let failed = run(|progress| {
            note(progress);
            Err(Error::corrupt("c"))
        });
        let notes = Note::Several(vec![line("a"), line("b")]);
        assert_eq!(failed.expect_err("is not").preceding_note(), Some(&notes));
    }

    #[test]
    fn the_length_of_kept_notes_is_bounded() {
        let note = Note::Line("x".repeat(MOST / 2));
        let kept = run(|progress| {
            (0..5).for_each(|_| progress.note(&note));
            Ok(())
        });
        assert_eq!(kept.expect("is repaired").len(), 2);
    }
}
