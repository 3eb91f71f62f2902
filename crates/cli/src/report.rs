//! The output of `check`.

use std::fmt::{self, Write};

use diskimage::CheckReport;
use diskimage::json::Value;

use crate::out::Console;

/// The exit status of a check.
pub(crate) fn status(report: &CheckReport) -> u8 {
    if report.check_errors > 0 {
        1
    } else if report.corruptions > 0 {
        2
    } else if report.leaks > 0 {
        3
    } else {
        0
    }
}

/// The report as text.
pub(crate) fn summary(report: &CheckReport) -> String {
    let mut text = String::new();
    if report.corruptions == 0 && report.leaks == 0 && report.check_errors == 0 {
        text.push_str("No errors were found on the image.\n");
    }
    // Writing to a string does not fail.
    if report.corruptions > 0 {
        let _ = write!(
            text,
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt \
             it.\n",
            report.corruptions
        );
    }
    if report.leaks > 0 {
        let _ = write!(
            text,
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n",
            report.leaks
        );
    }
    if report.check_errors > 0 {
        let _ = write!(
            text,
            "\n{} internal errors have occurred during the check.\n",
            report.check_errors
        );
    }
    if report.total_clusters > 0 && report.allocated_clusters > 0 {
        let _ = writeln!(
            text,
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            report.allocated_clusters,
            report.total_clusters,
            percent(report.allocated_clusters, report.total_clusters),
            percent(report.fragmented_clusters, report.allocated_clusters),
            percent(report.compressed_clusters, report.allocated_clusters),
        );
    }
    if report.image_end_offset > 0 {
        let _ = writeln!(text, "Image end offset: {}", report.image_end_offset);
    }
    text
}

#[expect(clippy::cast_precision_loss, reason = "two digits of a percentage are shown")]
fn percent(part: u64, whole: u64) -> f64 {
    part as f64 * 100.0 / whole as f64
}

/// The report on the image `name` as JSON. Counts of zero are left out, except that of internal errors.
pub(crate) fn json(name: &str, format: &str, report: &CheckReport) -> Value {
    let mut members: Vec<(&'static str, Value)> = Vec::new();
    let mut count = |name, value: u64| {
        if value > 0 || name == "check-errors" {
            members.push((name, value.into()));
        }
    };
    count("image-end-offset", report.image_end_offset);
    count("compressed-clusters", report.compressed_clusters);
    count("total-clusters", report.total_clusters);
    count("corruptions", report.corruptions);
    count("corruptions-fixed", report.corruptions_fixed);
    count("check-errors", report.check_errors);
    count("leaks", report.leaks);
    count("leaks-fixed", report.leaks_fixed);
    count("allocated-clusters", report.allocated_clusters);
    members.push(("filename", name.into()));
    members.push(("format", format.into()));
    if report.fragmented_clusters > 0 {
        members.push(("fragmented-clusters", report.fragmented_clusters.into()));
    }
    Value::object(members)
}

/// Prints text as `write` makes it: it is never in memory whole.
pub(crate) fn print_pieces(console: &Console, write: impl FnOnce(&mut dyn Write) -> fmt::Result) {
    let mut printed = Printed {
        console,
        chunk: String::new(),
    };
    // The console remembers failures.
    let _ = write(&mut printed);
    console.print(&printed.chunk);
}

/// Text that is printed in chunks.
struct Printed<'a> {
    console: &'a Console,
    chunk: String,
}

/// Bytes of a chunk.
const CHUNK: usize = 64 << 10;

impl Write for Printed<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.chunk.push_str(text);
        if self.chunk.len() >= CHUNK {
            self.console.print(&self.chunk);
            self.chunk.clear();
        }
        Ok(())
    }
}

/// The text after a repair, before the image is checked again.
pub(crate) fn repaired(report: &CheckReport) -> String {
    format!(
        "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} \
         corruptions\n\nDouble checking the fixed image now...\n",
        report.leaks_fixed, report.corruptions_fixed
    )
}
