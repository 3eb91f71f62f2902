//! How far an operation is: `-p`, and the answer to SIGUSR1.
//!
//! With `-p`, and unless `-q` forbids it, percentages are written to standard output as the original does, each over the
//! one before; where standard output is a terminal there is a bar with rate and remaining time instead. Without `-p` the
//! signal SIGUSR1 has one line written to standard error.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::out::Console;
use crate::signals;

/// Shows progress from its making until it is dropped.
#[derive(Debug)]
pub struct Progress<'a> {
    console: &'a Console,
    display: Display,
    asked: &'static AtomicBool,
}

#[derive(Debug)]
enum Display {
    /// Only when a signal asks.
    Silent,
    /// The percentage shown last, if any.
    Lines(Mutex<Option<f64>>),
    Bar(ProgressBar),
}

impl<'a> Progress<'a> {
    /// Shows progress if `enabled`, and answers the signal in any case.
    pub fn new(enabled: bool, console: &'a Console) -> Self {
        let display = match (enabled, std::io::stdout().is_terminal()) {
            (false, _) => Display::Silent,
            (true, true) => Display::Bar(bar()),
            (true, false) => Display::Lines(Mutex::new(None)),
        };
        Self::with_display(display, signals::asked(), console)
    }

    fn with_display(display: Display, asked: &'static AtomicBool, console: &'a Console) -> Self {
        Self {
            console,
            display,
            asked,
        }
    }

    /// Tells that `done` of `total` is done. May be called from any thread.
    pub fn set(&self, done: u64, total: u64) {
        let percent = percent(done, total);
        match &self.display {
            Display::Silent => {
                if self.asked.swap(false, Ordering::Relaxed) {
                    self.console.print_error(&format!("    ({percent:.2}/100%)\n"));
                }
            }
            Display::Lines(shown) => {
                let mut shown = lock(shown);
                if is_worth_showing(*shown, percent) {
                    *shown = Some(percent);
                    self.console.print(&line(percent));
                    self.console.flush();
                }
            }
            Display::Bar(bar) => {
                bar.set_length(total);
                bar.set_position(done);
            }
        }
    }

    /// Has the next report shown whatever was shown before.
    pub fn restart(&self) {
        if let Display::Lines(shown) = &self.display {
            *lock(shown) = None;
        }
    }

    /// Tells that everything is done; the original always shows 100 % here, even if it did before.
    pub fn complete(&self) {
        match &self.display {
            Display::Silent => (),
            Display::Lines(shown) => {
                *lock(shown) = Some(100.0);
                self.console.print(&line(100.0));
                self.console.flush();
            }
            Display::Bar(bar) => bar.finish(),
        }
    }

    /// Runs `write`, which prints something, without a bar in the way.
    pub fn suspend<T>(&self, write: impl FnOnce() -> T) -> T {
        match &self.display {
            Display::Bar(bar) => bar.suspend(write),
            _ => write(),
        }
    }
}

impl Drop for Progress<'_> {
    fn drop(&mut self) {
        match &self.display {
            Display::Silent => (),
            Display::Lines(_) => self.console.print("\n"),
            Display::Bar(bar) if bar.is_finished() => (),
            Display::Bar(bar) if bar.position() == 0 => bar.finish_and_clear(),
            // Where an error stopped it.
            Display::Bar(bar) => bar.abandon(),
        }
    }
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stdout());
    let style = ProgressStyle::with_template(
        "  {bar:40} {percent:>3}%  {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left",
    );
    match style {
        Ok(style) => bar.with_style(style.progress_chars("=> ")),
        Err(_) => bar,
    }
}

fn percent(done: u64, total: u64) -> f64 {
    if total == 0 {
        0.0
    } else {
        done as f64 * 100.0 / total as f64
    }
}

/// The first report, each further percent, and the end.
fn is_worth_showing(shown: Option<f64>, percent: f64) -> bool {
    match shown {
        None => true,
        Some(shown) => percent >= shown + 1.0 || (percent >= 100.0 && shown < 100.0),
    }
}

fn line(percent: f64) -> String {
    format!("    ({percent:.2}/100%)\r")
}

/// A thread that panicked while it held the lock left nothing half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_each_percent_and_the_end_are_shown() {
        let mut shown = None;
        let mut text = String::new();
        for done in [0, 0, 5, 9, 10, 995, 999, 1000, 1000] {
            let percent = percent(done, 1000);
            if is_worth_showing(shown, percent) {
                shown = Some(percent);
                text.push_str(&line(percent));
            }
        }
        assert_eq!(
            text,
            "    (0.00/100%)\r    (1.00/100%)\r    (99.50/100%)\r    (100.00/100%)\r"
        );
    }

    #[test]
    fn an_empty_disk_starts_at_zero() {
        assert_eq!(percent(0, 0), 0.0);
    }

    #[test]
    fn progress_can_be_told_from_threads() {
        let console = Console::new("test".as_ref());
        static ASKED: AtomicBool = AtomicBool::new(false);
        let display = Display::Lines(Mutex::new(Some(100.0)));
        let progress = Progress::with_display(display, &ASKED, &console);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| progress.set(1, 2));
            }
        });
    }
}
