//! Compares two builds of `qemu-img`, workload by workload: ours and the installed ("stock") one.
//!
//! For every workload the two programs run alternately (stock, ours, stock, ours, …) on the same input files, after one
//! warm-up each, so that a change of the machine's speed affects both alike. The ratio is that of the shortest wall
//! times; the spread beside it shows how reliable they are, and the first line compares the stock program with itself,
//! which shows the ratio that noise alone produces.
//!
//! After the warm-up the stock program compares the outputs of both, if the workload has a command for that.
//!
//! The workloads are a table in [`workload`], their input files one in [`fixture`].

mod compare;
mod error;
mod filesystem_image;
mod fixture;
mod limits;
mod machine;
mod measure;
mod options;
mod report;
mod sparse_copy;
mod units;
mod workload;

use std::fs;
use std::io::{self, Write};
use std::process::ExitCode;

use crate::compare::{Comparison, compare, compare_with_itself};
use crate::error::{Context, Result};
use crate::fixture::Fixtures;
use crate::measure::Tool;
use crate::options::{Invocation, Options};
use crate::report::Table;

fn main() -> ExitCode {
    match options::parse(std::env::args().skip(1)) {
        Ok(Invocation::Help) => finish(print_help().map(|()| true)),
        Ok(Invocation::Compare(options)) => finish(run(&options)),
        Err(error) => finish(Err(error)),
    }
}

/// Exit status 0: every workload ran in both programs; 1: one failed in either, or nothing could be measured.
fn finish(outcome: Result<bool>) -> ExitCode {
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            // A failed write to standard error cannot be reported anywhere.
            let _ = writeln!(io::stderr(), "compare-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn print_help() -> Result<()> {
    let mut out = io::stdout().lock();
    write!(out, "{}\nWorkloads:\n", options::HELP).context("standard output")?;
    for workload in workload::WORKLOADS {
        writeln!(out, "  {:<24} {}", workload.name, workload.command).context("standard output")?;
    }
    Ok(())
}

fn run(options: &Options) -> Result<bool> {
    fs::create_dir_all(&options.work).with_context(|| options.work.display().to_string())?;
    let stock = Tool::new("stock", &options.stock)?;
    let ours = Tool::new("ours", &options.ours)?;
    let fixtures = Fixtures::new(&options.work, options.size, &stock)?;
    let scratch = options.work.join(format!("scratch-{}", std::process::id()));
    fs::create_dir_all(&scratch).with_context(|| scratch.display().to_string())?;
    // An absolute path: an overlay resolves a relative backing file name against its own directory.
    let scratch = fs::canonicalize(&scratch).with_context(|| scratch.display().to_string())?;

    let outcome = run_table(options, &stock, &ours, &fixtures, &scratch);
    // A directory that cannot be removed is harmless: the next run creates its own.
    let _ = fs::remove_dir_all(&scratch);
    outcome
}

fn run_table(
    options: &Options,
    stock: &Tool,
    ours: &Tool,
    fixtures: &Fixtures<'_>,
    scratch: &std::path::Path,
) -> Result<bool> {
    let mut out = io::stdout().lock();
    let mut all_ran = true;
    let mut table = Table::new(options.markdown);
    let floor = measure::memory_floor()?;
    table
        .header(&mut out, &machine::facts(options, stock, ours, floor))
        .context("standard output")?;

    let mut show = |comparison: &Comparison| {
        all_ran &= comparison.ran();
        table.row(&mut out, comparison).context("standard output")
    };
    show(&compare_with_itself(stock, fixtures, scratch, options.runs)?)?;
    for workload in options.selected() {
        show(&compare(workload, stock, ours, fixtures, scratch, options.runs)?)?;
    }
    // Measured last: a child process inherits the peak memory of its parent, so buffers that are allocated here before
    // the comparisons would be counted as memory of both programs.
    if options.limits {
        let limits = limits::measure(&fixtures.path("raw")?, scratch)?;
        table.limits(&mut out, &limits).context("standard output")?;
    }
    Ok(all_ran)
}
