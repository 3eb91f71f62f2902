//! The progress of an operation: `-p` and SIGUSR1.
//!
//! With `-p` and without `-q`, percentages are written to standard output as by qemu-img, each over the one before. If
//! standard output is a terminal, a bar with rate and remaining time is shown instead. Without `-p`, SIGUSR1 prints one
//! line to standard error.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::out::Console;
use crate::signals;

/// Shows progress until it is dropped.
#[derive(Debug)]
pub struct Progress<'a> {
    console: &'a Console,
    display: Display,
    /// Set by SIGUSR1.
    requested: &'static AtomicBool,
}

#[derive(Debug)]
enum Display {
    /// Nothing is shown until SIGUSR1 requests a line.
    Silent,
    /// Percentages.
    Lines(Mutex<Shown>),
    /// A bar on a terminal.
    Bar(ProgressBar),
}

/// What percentages have been shown. qemu-img adds up single precision numbers, and its rounding decides which of
/// them are shown.
#[derive(Debug)]
struct Shown {
    /// The percentage shown last.
    last: Option<f32>,
    /// The percentage now.
    current: f32,
    /// How much was done at the last report.
    done: u64,
    /// A percentage is shown if it is larger than the last one by more than this.
    skip: f32,
    /// Whether qemu-img adds up the reports of this command, or computes each percentage anew.
    adds: bool,
}

impl Shown {
    /// The percentage of a report, if it is shown.
    fn report(&mut self, done: u64, total: u64) -> Option<f32> {
        self.current = if self.adds && self.last.is_some() {
            let step = done.saturating_sub(self.done) as f32 / total as f32 * 100.0;
            (self.current + step).min(100.0)
        } else {
            single(percent(done, total))
        };
        self.done = done;
        let is_shown = match self.last {
            None => true,
            Some(last) => self.current > last + self.skip || self.current >= 100.0,
        };
        is_shown.then(|| {
            self.last = Some(self.current);
            self.current
        })
    }
}

impl<'a> Progress<'a> {
    /// Shows progress if `enabled`; otherwise SIGUSR1 requests a line.
    pub fn new(enabled: bool, console: &'a Console) -> Self {
        let display = match (enabled, std::io::stdout().is_terminal()) {
            (false, _) => Display::Silent,
            (true, true) => Display::Bar(bar()),
            (true, false) => Display::Lines(Mutex::new(Shown {
                last: None,
                current: 0.0,
                done: 0,
                skip: 1.0,
                adds: false,
            })),
        };
        Self::with_display(display, signals::progress_requested(), console)
    }

    /// Shows a further percentage after two percent, and adds up the reports, as `qemu-img compare` and `rebase` do.
    pub fn adding_up(self) -> Self {
        if let Display::Lines(shown) = &self.display {
            let mut shown = lock(shown);
            (shown.skip, shown.adds) = (2.0, true);
        }
        self
    }

    /// Shows 0 %.
    pub fn begin(&self) {
        if let Display::Lines(_) = &self.display {
            self.set(0, 1);
        }
    }

    /// Whether each step of qemu-img has to be reported.
    pub fn shows_steps(&self) -> bool {
        matches!(self.display, Display::Lines(_))
    }

    fn with_display(display: Display, requested: &'static AtomicBool, console: &'a Console) -> Self {
        Self {
            console,
            display,
            requested,
        }
    }

    /// Reports that `done` of `total` is done. May be called from any thread.
    pub fn set(&self, done: u64, total: u64) {
        match &self.display {
            Display::Silent => {
                if self.requested.swap(false, Ordering::Relaxed) {
                    let percent = percent(done, total);
                    self.console.error_line(&format!("    ({percent:.2}/100%)"));
                }
            }
            Display::Lines(shown) => {
                if let Some(percent) = lock(shown).report(done, total) {
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

    /// Shows the next report even if it is not a further percent.
    pub fn restart(&self) {
        if let Display::Lines(shown) = &self.display {
            lock(shown).last = None;
        }
    }

    /// Reports that everything is done. As in qemu-img, 100 % is shown even if it was shown before.
    pub fn complete(&self) {
        match &self.display {
            Display::Silent => (),
            Display::Lines(shown) => {
                lock(shown).last = Some(100.0);
                self.console.print(&line(100.0));
                self.console.flush();
            }
            Display::Bar(bar) => bar.finish(),
        }
    }

    /// Hides the bar, runs `write`, which prints something, and shows the bar again.
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
            // After an error the bar stays where it was.
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

/// The single precision number next to a percentage.
#[expect(
    clippy::cast_possible_truncation,
    reason = "qemu-img shows percentages of this precision"
)]
fn single(percent: f64) -> f32 {
    percent as f32
}

fn line(percent: f32) -> String {
    format!("    ({percent:.2}/100%)\r")
}

/// Locks the percentage. A poisoned lock is used as well: a panic cannot leave the percentage inconsistent.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_more_than_a_percent_and_the_end_are_shown() {
        let mut shown = shown();
        let mut text = String::new();
        for done in [0, 0, 5, 9, 10, 11, 995, 999, 1000, 1000] {
            if let Some(percent) = shown.report(done, 1000) {
                text.push_str(&line(percent));
            }
        }
        assert_eq!(
            text,
            "    (0.00/100%)\r    (1.10/100%)\r    (99.50/100%)\r    (100.00/100%)\r    (100.00/100%)\r"
        );
    }

    fn shown() -> Shown {
        Shown {
            last: None,
            current: 0.0,
            done: 0,
            skip: 1.0,
            adds: false,
        }
    }

    #[test]
    fn sums_have_the_rounding_of_qemu_img() {
        let mut shown = Shown {
            skip: 2.0,
            adds: true,
            ..shown()
        };
        let found: Vec<_> = (0..=150).filter_map(|done| shown.report(done, 150)).collect();
        let found: Vec<_> = found.iter().map(|percent| format!("{percent:.2}")).collect();
        assert_eq!(found[..6], ["0.00", "2.67", "5.33", "8.00", "10.00", "12.00"]);
        assert_eq!(found.last().map(String::as_str), Some("100.00"));
    }

    #[test]
    fn an_empty_disk_starts_at_zero() {
        assert_eq!(percent(0, 0), 0.0);
    }

    #[test]
    fn progress_can_be_reported_from_threads() {
        let console = Console::new("test".as_ref());
        static REQUESTED: AtomicBool = AtomicBool::new(false);
        let display = Display::Lines(Mutex::new(Shown {
            last: Some(100.0),
            ..shown()
        }));
        let progress = Progress::with_display(display, &REQUESTED, &console);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| progress.set(1, 2));
            }
        });
    }
}
