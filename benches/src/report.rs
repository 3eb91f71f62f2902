//! Prints the table, for a terminal or as Markdown.

use std::io::{self, Write};

use crate::compare::{Comparison, Figures, Sides};
use crate::limits::Limit;
use crate::units::{KIB, mib, seconds};

/// Prints the table line by line while the workloads run.
#[derive(Debug)]
pub(crate) struct Table {
    markdown: bool,
}

/// The heading and the width of a column. Figures are printed as "stock / ours".
struct Column {
    heading: &'static str,
    width: usize,
}

const COLUMNS: &[Column] = &[
    Column {
        heading: "workload (stock / ours)",
        width: 24,
    },
    Column {
        heading: "wall s",
        width: 15,
    },
    Column {
        heading: "ratio",
        width: 6,
    },
    Column {
        heading: "cpu s",
        width: 15,
    },
    Column {
        heading: "spread",
        width: 11,
    },
    Column {
        heading: "peak MiB",
        width: 15,
    },
    Column {
        heading: "output MiB",
        width: 17,
    },
];

impl Table {
    pub(crate) fn new(markdown: bool) -> Self {
        Self { markdown }
    }

    /// Prints the facts about the programs and the machine, and the headings.
    pub(crate) fn header(&self, out: &mut dyn Write, facts: &[(&'static str, String)]) -> io::Result<()> {
        for (name, value) in facts {
            if self.markdown {
                writeln!(out, "- {name}: {value}")?;
            } else {
                writeln!(out, "{name:<13} {value}")?;
            }
        }
        writeln!(out)?;
        self.line(
            out,
            &COLUMNS
                .iter()
                .map(|column| column.heading.to_owned())
                .collect::<Vec<_>>(),
        )?;
        if self.markdown {
            let rule: Vec<_> = COLUMNS
                .iter()
                .map(|column| if column.width == 24 { "---" } else { "---:" })
                .collect();
            writeln!(out, "|{}|", rule.join("|"))?;
        }
        Ok(())
    }

    /// Prints the row of a workload.
    pub(crate) fn row(&mut self, out: &mut dyn Write, comparison: &Comparison) -> io::Result<()> {
        let name = match comparison.repeat {
            1 => comparison.name.to_owned(),
            repeat => format!("{} x{repeat}", comparison.name),
        };
        match &comparison.outcome {
            Ok(sides) => self.line(out, &cells(name, sides))?,
            Err(message) if self.markdown => writeln!(out, "| {name} | failed: {message} | | | | | |")?,
            Err(message) => writeln!(out, "{name:<24}  failed: {message}")?,
        }
        out.flush()
    }

    /// Prints the limits of the machine.
    pub(crate) fn limits(&self, out: &mut dyn Write, limits: &[Limit]) -> io::Result<()> {
        writeln!(out, "\nThis machine's limits, in MiB of guest data per second:\n")?;
        if self.markdown {
            writeln!(out, "| limit | one core | all cores |\n|---|---:|---:|")?;
        }
        for limit in limits {
            let [one, all] = [limit.one, limit.all].map(|rate| format!("{:.0}", rate / (KIB * KIB) as f64));
            if self.markdown {
                writeln!(out, "| {} | {one} | {all} |", limit.name)?;
            } else {
                writeln!(
                    out,
                    "{:<24} {one:>7} on 1 core {all:>7} on {}",
                    limit.name, limit.cores
                )?;
            }
        }
        Ok(())
    }

    fn line(&self, out: &mut dyn Write, cells: &[String]) -> io::Result<()> {
        if self.markdown {
            return writeln!(out, "| {} |", cells.join(" | "));
        }
        let padded: Vec<_> = COLUMNS
            .iter()
            .zip(cells)
            .enumerate()
            .map(|(index, (column, cell))| match index {
                0 => format!("{cell:<width$}", width = column.width),
                _ => format!("{cell:>width$}", width = column.width),
            })
            .collect();
        writeln!(out, "{}", padded.join("  ").trim_end())
    }
}

fn cells(name: String, sides: &Sides) -> Vec<String> {
    let both =
        |figure: &dyn Fn(&Figures) -> String| format!("{} / {}", figure(&sides.stock), figure(&sides.ours));
    vec![
        name,
        both(&|figures| seconds(figures.wall())),
        format!("{:.2}", sides.ratio()),
        both(&|figures| seconds(figures.cpu())),
        both(&|figures| format!("{:.2}", figures.spread())),
        both(&|figures| mib(figures.memory())),
        match (sides.stock.output(), sides.ours.output()) {
            (None, None) => String::new(),
            (stock, ours) => [stock, ours]
                .map(|size| size.map_or_else(|| "-".into(), mib))
                .join(" / "),
        },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(markdown: bool, comparison: &Comparison) -> String {
        let mut out = Vec::new();
        Table::new(markdown).row(&mut out, comparison).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_failure_is_a_row_of_its_own() {
        let failed = Comparison {
            name: "info",
            repeat: 5,
            outcome: Err("ours info: no such command".into()),
        };
        assert_eq!(
            printed(false, &failed),
            "info x5                   failed: ours info: no such command\n"
        );
        assert_eq!(
            printed(true, &failed),
            "| info x5 | failed: ours info: no such command | | | | | |\n"
        );
    }

    #[test]
    fn the_heading_has_the_width_of_all_columns() {
        let mut out = Vec::new();
        Table::new(false)
            .header(&mut out, &[("memory", "1 GiB".into())])
            .unwrap();
        let heading = String::from_utf8(out).unwrap();
        assert!(
            heading.starts_with("memory        1 GiB\n\nworkload"),
            "{heading}"
        );
        let width = heading.lines().last().unwrap().len();
        assert_eq!(
            width,
            COLUMNS.iter().map(|column| column.width + 2).sum::<usize>() - 2
        );
    }

    #[test]
    fn rates_are_in_mebibytes() {
        let limit = Limit {
            name: "copy",
            one: 3.0 * 1024.0 * 1024.0,
            all: 6.0 * 1024.0 * 1024.0,
            cores: 2,
        };
        let mut out = Vec::new();
        Table::new(true).limits(&mut out, &[limit]).unwrap();
        assert!(String::from_utf8(out).unwrap().ends_with("| copy | 3 | 6 |\n"));
    }
}
