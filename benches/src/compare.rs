//! Runs both sides of a workload in turn.

use std::path::Path;
use std::time::Duration;

use crate::error::Result;
use crate::fixture::Fixtures;
use crate::measure::{Sample, Tool, remove};
use crate::workload::{NOISE, Workload, fixtures_of};

/// What came out of one workload.
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

/// One side's runs, never none.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    samples: Vec<Sample>,
}

impl Comparison {
    /// Whether both sides got through it.
    pub(crate) fn ran(&self) -> bool {
        self.outcome.is_ok()
    }
}

impl Sides {
    /// How many times as fast as the stock program ours is.
    pub(crate) fn ratio(&self) -> f64 {
        ratio(self.stock.wall(), self.ours.wall())
    }
}

impl Figures {
    /// The shortest wall time: noise only ever adds.
    pub(crate) fn wall(&self) -> Duration {
        self.samples
            .iter()
            .map(|sample| sample.wall)
            .min()
            .unwrap_or_default()
    }

    /// The least processor time.
    pub(crate) fn cpu(&self) -> Duration {
        self.samples
            .iter()
            .map(|sample| sample.cpu)
            .min()
            .unwrap_or_default()
    }

    /// The longest wall time over the shortest.
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

    /// Bytes on the disk of what the last run wrote.
    pub(crate) fn output(&self) -> Option<u64> {
        self.samples.last().and_then(|sample| sample.output)
    }
}

/// Runs both sides of `workload` `runs` times, in turn, after a warm-up of each.
///
/// A side that fails is an outcome to report, not an error: the other workloads still have something to tell.
pub(crate) fn compare(
    workload: &Workload,
    stock: &Tool,
    ours: &Tool,
    fixtures: &Fixtures<'_>,
    scratch: &Path,
    runs: u32,
) -> Result<Comparison> {
    for name in fixtures_of(workload.command) {
        fixtures.path(name)?;
    }
    // What making the inputs left to be written must not be written while the clock runs.
    rustix::fs::sync();

    let mut sides = Sides {
        stock: Figures::default(),
        ours: Figures::default(),
    };
    let mut one_round = |keep: bool| {
        for (tool, figures) in [(stock, &mut sides.stock), (ours, &mut sides.ours)] {
            let sample = run_one(workload, tool, stock, fixtures, scratch)?;
            if keep {
                figures.samples.push(sample);
            }
        }
        Ok::<(), crate::error::Error>(())
    };
    let outcome = one_round(false).and_then(|()| (0..runs).try_for_each(|_| one_round(true)));
    Ok(Comparison {
        name: workload.name,
        repeat: workload.repeat,
        outcome: outcome.map(|()| sides).map_err(|error| error.to_string()),
    })
}

/// The stock program on both sides.
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

fn run_one(
    workload: &Workload,
    tool: &Tool,
    stock: &Tool,
    fixtures: &Fixtures<'_>,
    scratch: &Path,
) -> Result<Sample> {
    let out = scratch.join("out.img");
    let errors = scratch.join("errors.txt");
    let arguments = fixtures.arguments(workload.command, &out)?;
    let before = workload
        .before
        .map(|command| fixtures.arguments(command, &out))
        .transpose()?;

    let mut total = Sample::default();
    for _ in 0..workload.repeat {
        remove(&out)?;
        if let Some(before) = &before {
            stock.run_untimed(before)?;
        }
        total = total.then(tool.run(&arguments, &out, &errors)?);
    }
    // Removed now, not before the next run: the kernel then has no reason to write it to the disk.
    remove(&out)?;
    Ok(total)
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
