//! Runs every case of `cases/` on two threads and reports as `cargo test` does.
//!
//! `cargo test -p parity --test parity -- [FILTER]... [--exact] [--list] [--test-threads N]`. Environment:
//! `QEMU_IMG_UNDER_TEST` names the tool (else the workspace's own is built and used), `REQUIRE_STOCK_TOOLS=1` makes
//! missing stock tools a failure, `PARITY_KEEP=1` keeps the directories of failed cases.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use parity::process::Tools;
use parity::run::{Verdict, run_case};
use parity::script::{self, Case};

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(101),
        Err(message) => {
            writeln!(io::stderr(), "parity: {message}").ok();
            ExitCode::from(101)
        }
    }
}

fn run() -> Result<bool, String> {
    let arguments = Arguments::parse(env::args().skip(1))?;
    let all = load_cases()?;
    let cases: Vec<&Case> = all.iter().filter(|case| arguments.selects(&case.name)).collect();
    if arguments.list {
        for case in &cases {
            say(&format!("{}: test\n", case.name));
        }
        say(&format!("\n{} tests, 0 benchmarks\n", cases.len()));
        return Ok(true);
    }
    let filtered = all.len() - cases.len();
    let (stock_img, stock_io) = (find_program("qemu-img"), find_program("qemu-io"));
    let (Some(stock_img), Some(stock_io)) = (stock_img, stock_io) else {
        if tools_are_required() {
            return Err(
                "qemu-img and qemu-io are required (REQUIRE_STOCK_TOOLS=1) and not installed".to_owned(),
            );
        }
        say(&format!("\nrunning {} tests\n", cases.len()));
        for case in &cases {
            say(&format!(
                "test {} ... ignored, the stock qemu-img and qemu-io are not installed\n",
                case.name
            ));
        }
        let ignored = cases.len();
        say(&format!(
            "\ntest result: ok. 0 passed; 0 failed; {ignored} ignored; 0 measured; {filtered} filtered out\n\n"
        ));
        return Ok(true);
    };
    let mut servers = cases.iter().flat_map(|case| case.servers());
    if let Some(server) = servers.find(|server| tools_are_required() && find_program(server.name()).is_none())
    {
        return Err(format!(
            "{} is required (REQUIRE_STOCK_TOOLS=1) and not installed",
            server.name()
        ));
    }
    let tools = Tools {
        stock_img,
        stock_io,
        under_test: find_tool_under_test()?,
    };
    say(&format!(
        "\nrunning {} tests of {}\n",
        cases.len(),
        tools.under_test.display()
    ));
    let start = Instant::now();
    let tally = run_all(&cases, &tools, arguments.threads);
    let seconds = start.elapsed().as_secs_f64();
    Ok(tally.report(filtered, seconds))
}

/// Whether missing stock tools are a failure.
fn tools_are_required() -> bool {
    env::var_os("REQUIRE_STOCK_TOOLS").is_some_and(|value| value == "1")
}

struct Arguments {
    filters: Vec<String>,
    exact: bool,
    list: bool,
    threads: usize,
}

impl Arguments {
    /// Parses the options of a test program that this one has; others are an error.
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut arguments = Self {
            filters: Vec::new(),
            exact: false,
            list: false,
            threads: 2,
        };
        while let Some(word) = words.next() {
            match word.as_str() {
                "--exact" => arguments.exact = true,
                "--list" => arguments.list = true,
                "--test-threads" => {
                    let count = words
                        .next()
                        .and_then(|count| count.parse().ok())
                        .filter(|count| *count > 0);
                    arguments.threads = count.ok_or("--test-threads takes a number")?;
                }
                _ if word.starts_with("--test-threads=") => {
                    let count = word.split_once('=').and_then(|(_, count)| count.parse().ok());
                    arguments.threads = count
                        .filter(|count| *count > 0)
                        .ok_or("--test-threads takes a number")?;
                }
                _ if word.starts_with('-') => return Err(format!("unknown option {word}")),
                _ => arguments.filters.push(word),
            }
        }
        Ok(arguments)
    }

    fn selects(&self, name: &str) -> bool {
        let matches = |filter: &String| {
            if self.exact {
                name == filter
            } else {
                name.contains(filter.as_str())
            }
        };
        self.filters.is_empty() || self.filters.iter().any(matches)
    }
}

#[derive(Default)]
struct Tally {
    passed: usize,
    ignored: usize,
    failures: BTreeMap<String, String>,
}

impl Tally {
    fn report(&self, filtered: usize, seconds: f64) -> bool {
        if !self.failures.is_empty() {
            say("\nfailures (- the stock tool, + the tool under test):\n");
            for (name, text) in &self.failures {
                say(&format!("\n---- {name} ----\n{text}"));
            }
            say("\nfailures:\n");
            for name in self.failures.keys() {
                say(&format!("    {name}\n"));
            }
        }
        let word = if self.failures.is_empty() { "ok" } else { "FAILED" };
        say(&format!(
            "\ntest result: {word}. {} passed; {} failed; {} ignored; 0 measured; {filtered} filtered out; finished in \
             {seconds:.2}s\n\n",
            self.passed,
            self.failures.len(),
            self.ignored,
        ));
        self.failures.is_empty()
    }
}

fn run_all(cases: &[&Case], tools: &Tools, threads: usize) -> Tally {
    let keep = env::var_os("PARITY_KEEP").is_some_and(|value| value == "1");
    let next = AtomicUsize::new(0);
    let tally = Mutex::new(Tally::default());
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let missing = case
                        .servers()
                        .find(|server| find_program(server.name()).is_none());
                    if let Some(server) = missing {
                        tally.lock().expect("no thread panics while it counts").ignored += 1;
                        say(&format!(
                            "test {} ... ignored, {} is not installed\n",
                            case.name,
                            server.name()
                        ));
                        continue;
                    }
                    let verdict = run_case(case, tools, keep);
                    let mut tally = tally.lock().expect("no thread panics while it counts");
                    match verdict {
                        Verdict::Passed => {
                            tally.passed += 1;
                            say(&format!("test {} ... ok\n", case.name));
                        }
                        Verdict::ExpectedFailure(reason) => {
                            tally.ignored += 1;
                            say(&format!(
                                "test {} ... ignored, fails as expected: {reason}\n",
                                case.name
                            ));
                        }
                        Verdict::Failed(text) => {
                            tally.failures.insert(case.name.clone(), text);
                            say(&format!("test {} ... FAILED\n", case.name));
                        }
                    }
                }
            });
        }
    });
    tally.into_inner().expect("no thread panics while it counts")
}

fn load_cases() -> Result<Vec<Case>, String> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("cases");
    let read = |path: &Path| fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()));
    let entries = fs::read_dir(&directory).map_err(|error| format!("{}: {error}", directory.display()))?;
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.retain(|path| path.extension() == Some(OsStr::new("cases")));
    paths.sort();
    let mut cases = Vec::new();
    for path in paths {
        let stem = path
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        cases.extend(script::parse(&stem, &read(&path)?)?);
    }
    Ok(cases)
}

fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path)
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.is_file())
}

/// `QEMU_IMG_UNDER_TEST`, or the executable that the workspace builds in this test's own profile.
fn find_tool_under_test() -> Result<PathBuf, String> {
    if let Some(path) = env::var_os("QEMU_IMG_UNDER_TEST") {
        // An absolute path, since cases run in their own directories.
        return fs::canonicalize(&path)
            .map_err(|error| format!("QEMU_IMG_UNDER_TEST={}: {error}", path.display()));
    }
    let own = env::current_exe().map_err(|error| error.to_string())?;
    let profile_directory = own
        .ancestors()
        .nth(2)
        .ok_or("the test is not in a target directory")?;
    let target_directory = profile_directory
        .parent()
        .ok_or("the test is not in a target directory")?;
    // `cargo test -p parity` builds this package only. Another build is fast if the tool is up to date.
    if let Some(cargo) = env::var_os("CARGO") {
        let profile = match profile_directory.file_name().and_then(OsStr::to_str) {
            Some("debug") | None => "dev",
            Some(other) => other,
        };
        let status = Command::new(cargo)
            .args([
                "build",
                "--quiet",
                "--package",
                "qemu-img-rs",
                "--package",
                "qemu-img-tls",
                "--profile",
                profile,
                "--target-dir",
            ])
            .arg(target_directory)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status();
        if !status.is_ok_and(|status| status.success()) {
            return Err("the tool under test could not be built".to_owned());
        }
    }
    let tool = profile_directory.join("qemu-img");
    if tool.is_file() {
        Ok(tool)
    } else {
        Err(format!(
            "{} is missing: build the workspace first or set QEMU_IMG_UNDER_TEST",
            tool.display()
        ))
    }
}

fn say(text: &str) {
    io::stdout().write_all(text.as_bytes()).ok();
}
