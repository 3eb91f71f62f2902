//! Runs both sides of a workload alternately.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Context, Result};
use crate::fixture::Fixtures;
use crate::measure::{Sample, Tool, remove};
use crate::sparse_copy;
use crate::workload::{NOISE, Step, Workload};

/// The result of one workload.
#[derive(Debug)]
pub(crate) struct Comparison {
    pub(crate) name: &'static str,
    pub(crate) repeat: u32,
    pub(crate) outcome: std::result::Result<Sides, String>,
}

/// The figures of both sides.
#[derive(Debug)]
pub(crate) struct Sides {
    pub(crate) stock: Figures,
    pub(crate) ours: Figures,
}

/// The runs of one side; at least one.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    samples: Vec<Sample>,
}

impl Comparison {
    /// Whether both sides succeeded.
    pub(crate) fn ran(&self) -> bool {
        self.outcome.is_ok()
    }
}

impl Sides {
    /// The time of the stock program divided by ours: above 1, ours is faster.
    pub(crate) fn ratio(&self) -> f64 {
        ratio(self.stock.wall(), self.ours.wall())
    }
}

impl Figures {
    /// The shortest wall time: noise can only add to it.
    pub(crate) fn wall(&self) -> Duration {
        self.samples
            .iter()
            .map(|sample| sample.wall)
            .min()
            .unwrap_or_default()
    }

    /// The shortest processor time.
    pub(crate) fn cpu(&self) -> Duration {
        self.samples
            .iter()
            .map(|sample| sample.cpu)
            .min()
            .unwrap_or_default()
    }

    /// The longest wall time divided by the shortest.
    pub(crate) fn spread(&self) -> f64 {
        ratio(
            self.samples
                .iter()
                .map(|sample| sample.wall)
                .max()
                .unwrap_or_default(),
            self.wall(),
        )
    }

    /// The highest peak memory of all runs in bytes.
    pub(crate) fn memory(&self) -> u64 {
        self.samples
            .iter()
            .map(|sample| sample.memory)
            .max()
            .unwrap_or_default()
    }

    /// The allocated bytes of the output of the last run.
    pub(crate) fn output(&self) -> Option<u64> {
        self.samples.last().and_then(|sample| sample.output)
    }
}

/// Runs both sides of `workload` `runs` times, alternately, after a warm-up of each.
///
/// A side that fails is an outcome to report, not an error: the other workloads are still run.
pub(crate) fn compare(
    workload: &Workload,
    stock: &Tool,
    ours: &Tool,
    fixtures: &Fixtures<'_>,
    scratch: &Path,
    runs: u32,
) -> Result<Comparison> {
    for name in workload.fixtures() {
        fixtures.path(name)?;
    }
    // Dirty pages of the inputs must not be written back while the clock runs.
    rustix::fs::sync();

    let bench = Bench {
        workload,
        stock,
        fixtures,
        files: Files::new(scratch),
    };
    let outcome = bench.warm_up(ours).and_then(|()| {
        let mut sides = Sides {
            stock: Figures::default(),
            ours: Figures::default(),
        };
        for _ in 0..runs {
            for (tool, figures) in [(stock, &mut sides.stock), (ours, &mut sides.ours)] {
                figures.samples.push(bench.run(tool)?);
                // Removed now, not before the next run, so that the kernel does not write its dirty pages back.
                bench.files.remove()?;
            }
        }
        Ok(sides)
    });
    Ok(Comparison {
        name: workload.name,
        repeat: workload.repeat,
        outcome: outcome.map_err(|error| error.to_string()),
    })
}

/// Compares the stock program with itself.
pub(crate) fn compare_with_itself(
    stock: &Tool,
    fixtures: &Fixtures<'_>,
    scratch: &Path,
    runs: u32,
) -> Result<Comparison> {
    compare(
        &NOISE,
        stock,
        &stock.as_side("stock again"),
        fixtures,
        scratch,
        runs,
    )
}

/// One workload and the state that its runs need.
struct Bench<'a> {
    workload: &'a Workload,
    stock: &'a Tool,
    fixtures: &'a Fixtures<'a>,
    files: Files,
}

impl Bench<'_> {
    /// Runs both sides once to fill the caches, and compares their outputs.
    fn warm_up(&self, ours: &Tool) -> Result<()> {
        self.run(self.stock)?;
        if self.workload.verify.is_some() {
            fs::rename(&self.files.out, &self.files.stock)
                .with_context(|| self.files.out.display().to_string())?;
        }
        self.run(ours)?;
        if let Some(command) = self.workload.verify {
            self.stock.run_untimed(&self.arguments(command)?)?;
        }
        self.files.remove()
    }

    /// Prepares and runs the command as often as the workload requires, and keeps the files of the last run.
    fn run(&self, tool: &Tool) -> Result<Sample> {
        let errors = &self.files.errors;
        let arguments = match tool.side {
            "ours" => self.arguments(&self.workload.ours())?,
            _ => self.arguments(self.workload.command)?,
        };
        let mut total = Sample::default();
        for _ in 0..self.workload.repeat {
            self.files.remove_of_run()?;
            self.prepare()?;
            total = total.then(tool.run(&arguments, &self.files.out, errors)?);
        }
        Ok(total)
    }

    fn prepare(&self) -> Result<()> {
        self.workload.before.iter().try_for_each(|step| match step {
            Step::Stock(command) => self.stock.run_untimed(&self.arguments(command)?),
            Step::Copy(fixture, to) => {
                let from = self.fixtures.path(fixture)?;
                let to = if *to == "top" {
                    &self.files.top
                } else {
                    &self.files.out
                };
                sparse_copy::copy(&from, to).with_context(|| to.display().to_string())
            }
        })
    }

    fn arguments(&self, command: &str) -> Result<Vec<std::ffi::OsString>> {
        let files = &self.files;
        self.fixtures.arguments(
            command,
            &[("out", &files.out), ("top", &files.top), ("stock", &files.stock)],
        )
    }
}

/// The files that runs create.
struct Files {
    out: PathBuf,
    top: PathBuf,
    /// The output of the stock program, to compare ours with.
    stock: PathBuf,
    errors: PathBuf,
}

impl Files {
    fn new(scratch: &Path) -> Self {
        let [out, top, stock, errors] =
            ["out.img", "top.img", "stock.img", "errors.txt"].map(|name| scratch.join(name));
        Self {
            out,
            top,
            stock,
            errors,
        }
    }

    fn remove_of_run(&self) -> Result<()> {
        remove(&self.out)?;
        remove(&self.top)
    }

    fn remove(&self) -> Result<()> {
        self.remove_of_run()?;
        remove(&self.stock)
    }
}

fn ratio(numerator: Duration, denominator: Duration) -> f64 {
    if denominator.is_zero() {
        return f64::NAN;
    }
    numerator.as_secs_f64() / denominator.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(milliseconds: &[u64]) -> Figures {
        let samples = milliseconds
            .iter()
            .map(|&ms| Sample {
                wall: Duration::from_millis(ms),
                cpu: Duration::from_millis(2 * ms),
                memory: ms,
                output: None,
            })
            .collect();
        Figures { samples }
    }

    #[test]
    fn minimum_and_spread_of_runs() {
        let runs = figures(&[30, 20, 25]);
        assert_eq!(runs.wall(), Duration::from_millis(20));
        assert_eq!(runs.cpu(), Duration::from_millis(40));
        assert_eq!(runs.memory(), 30);
        assert!((runs.spread() - 1.5).abs() < 1e-9);
    }

    #[test]
    fn ratio_above_one_means_ours_is_faster() {
        let sides = Sides {
            stock: figures(&[40, 50]),
            ours: figures(&[25, 20]),
        };
        assert!((sides.ratio() - 2.0).abs() < 1e-9);
    }

    #[test]
    fn no_time_at_all_has_no_ratio() {
        assert!(ratio(Duration::from_millis(1), Duration::ZERO).is_nan());
    }
}
