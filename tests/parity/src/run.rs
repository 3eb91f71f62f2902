//! Runs one case with both tools.
//!
//! The first lines that do not involve the tool under test are done once, so that both runs start with the same bytes
//! (otherwise the dates of snapshots would differ, for example). Both runs use a directory of the same absolute name:
//!
//! ```text
//! <temporary>/run   --prepared-->  rename to seed
//! copy of seed      as run  --stock tool-->  rename to expected
//! copy of seed      as run  --tool under test-->  rename to actual
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::{self, Holder, Outcome, RunningServer, Tools};
use crate::script::{Case, Step, StockTool};
use crate::structure;
use crate::verdict;

/// The result of a case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Both tools behave the same.
    Passed,
    /// They differ, as the case expects; its reason.
    ExpectedFailure(String),
    /// They differ, or the case is wrong; the text describes it.
    Failed(String),
}

/// Runs a case with both tools. With `keep`, the directory of a failed case is kept and the text names it.
pub fn run_case(case: &Case, tools: &Tools, keep: bool) -> Verdict {
    let result = tempfile::Builder::new()
        .prefix("parity-")
        .tempdir()
        .map_err(|e| e.to_string())
        .and_then(|root| {
            let difference = differences(case, tools, root.path())?;
            Ok(match difference {
                Some(text) if keep => format!("{text}files kept in {}\n", root.keep().display()),
                Some(text) => text,
                None => String::new(),
            })
        });
    let expect_fail = case.expect_fail.as_ref().filter(|_| !tools.is_self_test());
    match (result, expect_fail) {
        (Ok(text), None) if text.is_empty() => Verdict::Passed,
        (Ok(text), Some(reason)) if text.is_empty() => Verdict::Failed(format!(
            "passes, but is marked expect-fail ({reason}): remove the mark\n"
        )),
        (Ok(_), Some(reason)) => Verdict::ExpectedFailure(reason.clone()),
        (Ok(text), None) => Verdict::Failed(text),
        // An error in the case itself is never an expected failure.
        (Err(message), _) => Verdict::Failed(format!("the case itself is broken: {message}\n")),
    }
}

/// How often the stock tool runs while ours differs from it: some of its output depends on which of two requests in
/// flight ends first.
const STOCK_RUNS: usize = 4;

/// Runs both tools and returns their differences. Our tool runs once; it has to behave as the stock tool does in one of
/// its runs. The text describes the differences from the first. `Err` is an error of the case or of the machine.
fn differences(case: &Case, tools: &Tools, root: &Path) -> Result<Option<String>, String> {
    let prepared = case.steps.iter().take_while(|step| step.is_preparation()).count();
    let (preparation, rest) = case.steps.split_at(prepared);
    let (run, seed) = (root.join("run"), root.join("seed"));
    fs::create_dir(&run).map_err(|error| error.to_string())?;
    perform(preparation, tools, &tools.stock_img, &run)?;
    rename(&run, &seed)?;

    let (expected_directory, actual_directory) = (root.join("expected"), root.join("actual"));
    copy_tree(&seed, &run)?;
    let expected = perform(rest, tools, &tools.stock_img, &run)?;
    rename(&run, &expected_directory)?;
    copy_tree(&seed, &run)?;
    // A step that uses an image of our tool may fail because of that image: this is a difference, not an error of the
    // case.
    let actual = match perform(rest, tools, &tools.under_test, &run) {
        Ok(actual) => actual,
        Err(message) => return Ok(Some(format!("only with the tool under test: {message}\n"))),
    };
    rename(&run, &actual_directory)?;

    let first = compare_runs(
        case,
        tools,
        (&expected, &expected_directory),
        (&actual, &actual_directory),
    )?;
    if first.is_empty() || case.expect_fail.is_some() {
        return Ok(Some(first).filter(|text| !text.is_empty()));
    }
    for again in 1..STOCK_RUNS {
        let directory = root.join(format!("expected{again}"));
        copy_tree(&seed, &run)?;
        let expected = perform(rest, tools, &tools.stock_img, &run)?;
        rename(&run, &directory)?;
        let text = compare_runs(case, tools, (&expected, &directory), (&actual, &actual_directory))?;
        if text.is_empty() {
            return Ok(None);
        }
    }
    Ok(Some(first))
}

/// Compares the outcomes and the directories of two runs; empty if they are equal.
fn compare_runs(
    case: &Case,
    tools: &Tools,
    (expected, expected_directory): (&[Performed<'_>], &Path),
    (actual, actual_directory): (&[Performed<'_>], &Path),
) -> Result<String, String> {
    let mut text = String::new();
    for (expected, actual) in expected.iter().zip(actual) {
        let ignore_stdout = case.ignore_stdout.is_some() && matches!(expected.step, Step::UnderTest(_));
        text += &verdict::command(
            &expected.step.display(),
            &expected.outcome,
            &actual.outcome,
            ignore_stdout,
        );
    }
    text += &structure::file_names(expected_directory, actual_directory, &case.unfinished)?;
    for comparison in &case.comparisons {
        text += &structure::compare(comparison, tools, expected_directory, actual_directory)?;
    }
    Ok(text)
}

struct Performed<'a> {
    step: &'a Step,
    outcome: Outcome,
}

fn perform<'a>(
    steps: &'a [Step],
    tools: &Tools,
    under_test: &Path,
    directory: &Path,
) -> Result<Vec<Performed<'a>>, String> {
    let mut performed = Vec::new();
    let mut holders: Vec<(&str, Holder)> = Vec::new();
    let mut servers: Vec<RunningServer> = Vec::new();
    for step in steps {
        match step {
            Step::UnderTest(args) => {
                let outcome = process::run(under_test, StockTool::Img, args, directory)?;
                performed.push(Performed { step, outcome });
            }
            Step::Observe(tool, args) => {
                let outcome = process::run(tools.stock(*tool), *tool, args, directory)?;
                performed.push(Performed { step, outcome });
            }
            Step::Stock(tool, args) => {
                let outcome = process::run(tools.stock(*tool), *tool, args, directory)?;
                if !outcome.is_success() {
                    return Err(format!(
                        "{}: {}: {}{}",
                        step.display(),
                        outcome.ending,
                        String::from_utf8_lossy(&outcome.stderr),
                        String::from_utf8_lossy(&outcome.stdout)
                    ));
                }
            }
            Step::Hold {
                image,
                read_only,
                options,
            } => {
                holders.push((
                    image,
                    Holder::start(tools, image, *read_only, options, directory)?,
                ));
            }
            Step::Serve { server, socket, args } => {
                servers.push(RunningServer::start(*server, socket, args, directory)?);
            }
            Step::Release(name) if servers.iter().any(|server| server.socket() == name) => {
                servers.retain(|server| server.socket() != name);
            }
            Step::Release(image) => {
                let at = holders.iter().position(|(held, _)| held == image);
                let at = at.ok_or_else(|| format!("{image} is not held"))?;
                holders.remove(at);
            }
            Step::File(operation) => {
                operation
                    .apply(directory)
                    .map_err(|error| format!("{}: {error}", step.display()))?;
            }
        }
    }
    Ok(performed)
}

fn rename(from: &Path, to: &Path) -> Result<(), String> {
    fs::rename(from, to).map_err(|error| format!("{}: {error}", from.display()))
}

/// Copies a directory with `cp`, which keeps holes. Both runs get a copy, so that both have what `cp` does not keep.
fn copy_tree(from: &Path, to: &PathBuf) -> Result<(), String> {
    let output = Command::new("cp")
        .arg("-a")
        .arg("--sparse=auto")
        .arg(from)
        .arg(to)
        .output();
    let output = output.map_err(|error| format!("cp: {error}"))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::script::parse;

    /// Shell scripts instead of the tools, so that these tests run on any machine.
    struct Scripts {
        directory: tempfile::TempDir,
    }

    impl Scripts {
        fn new() -> Self {
            Self {
                directory: tempfile::tempdir().unwrap(),
            }
        }

        fn write(&self, name: &str, body: &str) -> PathBuf {
            let path = self.directory.path().join(name);
            fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            path
        }

        fn verdict(&self, case: &str, stock: &str, under_test: &str) -> Verdict {
            let tools = Tools {
                stock_img: self.write("stock", stock),
                stock_io: self.write("io", "exit 0"),
                under_test: self.write("ours", under_test),
            };
            let cases = parse("t", case).unwrap();
            run_case(&cases[0], &tools, false)
        }
    }

    fn failed(verdict: &Verdict) -> &str {
        match verdict {
            Verdict::Failed(text) => text,
            other => panic!("a failure expected, not {other:?}"),
        }
    }

    const CASE: &str = "case a\nqemu-img info x\n";

    #[test]
    fn the_same_behaviour_passes() {
        let scripts = Scripts::new();
        let tool = "echo out; echo err >&2; exit 3";
        assert_eq!(
            scripts.verdict(CASE, tool, &format!("{tool} # a different file")),
            Verdict::Passed
        );
    }

    #[test]
    fn only_versions_and_durations_are_normalised() {
        let scripts = Scripts::new();
        let case = "case a\nqemu-img --version\n";
        for (one, other) in [
            ("qemu-img version 1 (x)", "qemu-img version 2 (y)"),
            (
                "Run completed in 0.123 seconds.",
                "Run completed in 10.000 seconds.",
            ),
        ] {
            let verdict = scripts.verdict(case, &format!("echo '{one}'"), &format!("echo '{other}'"));
            assert_eq!(verdict, Verdict::Passed);
        }
        let verdict = scripts.verdict(
            case,
            "echo 'Run completed in 0.123 seconds.'",
            "echo 'Run completed in 0.1 seconds.'",
        );
        assert_ne!(verdict, Verdict::Passed);
    }

    #[test]
    fn each_difference_of_a_command_is_reported() {
        let scripts = Scripts::new();
        let verdict = scripts.verdict(CASE, "exit 1", "exit 2");
        assert!(
            failed(&verdict).contains("- exit code 1\n  + exit code 2"),
            "{verdict:?}"
        );
        let verdict = scripts.verdict(CASE, "echo a; echo b", "echo a; echo c");
        assert!(
            failed(&verdict).contains("stdout:\n    a\n  - b\n  + c\n"),
            "{verdict:?}"
        );
        let verdict = scripts.verdict(CASE, "echo a >&2", "echo a >&2; printf b >&2");
        assert!(
            failed(&verdict).contains("stderr:\n    a\n  - \n  + b\n"),
            "{verdict:?}"
        );
    }

    #[test]
    fn an_additional_file_and_other_bytes_are_reported() {
        let scripts = Scripts::new();
        let verdict = scripts.verdict(CASE, "true", "touch surprise");
        assert!(failed(&verdict).contains("+ surprise"), "{verdict:?}");
        let case = "case a\nqemu-img x\nsame-bytes f\n";
        let verdict = scripts.verdict(case, "printf aa > f", "printf ab > f");
        assert!(
            failed(&verdict).contains("first difference at byte 1"),
            "{verdict:?}"
        );
        let verdict = scripts.verdict(case, "printf aa > f", "printf aaa > f");
        assert!(failed(&verdict).contains("2 bytes"), "{verdict:?}");
    }

    #[test]
    fn an_expected_failure_that_passes_is_reported() {
        let scripts = Scripts::new();
        let case = "case a\nqemu-img x\nexpect-fail later\n";
        assert_eq!(
            scripts.verdict(case, "exit 0", "exit 1"),
            Verdict::ExpectedFailure("later".to_owned())
        );
        assert!(failed(&scripts.verdict(case, "exit 0", "exit 0")).contains("remove the mark"));
    }

    #[test]
    fn ours_matches_one_of_the_runs_of_a_stock_tool_that_varies() {
        let scripts = Scripts::new();
        let runs = scripts.directory.path().join("runs");
        let varying = format!("echo >> {0}; wc -l < {0}", runs.display());
        assert_eq!(scripts.verdict(CASE, &varying, "echo 3"), Verdict::Passed);
        fs::remove_file(&runs).unwrap();
        let verdict = scripts.verdict(CASE, &varying, "echo 9");
        assert!(failed(&verdict).contains("- 1\n  + 9"), "{verdict:?}");
        assert_eq!(fs::read(&runs).unwrap().len(), STOCK_RUNS);
    }

    #[test]
    fn a_failed_preparation_is_an_error_of_the_case() {
        let scripts = Scripts::new();
        let case = "case a\nstock qemu-img create x\nqemu-img info x\n";
        assert!(failed(&scripts.verdict(case, "exit 1", "exit 1")).contains("broken"));
    }
}
