//! The output of `info` for one image, as text and as JSON.

use std::fmt::Display;

use diskimage::size::human_size;
use diskimage::{
    Backing, Detail, DetailValue, Device, Image, ImageReference, Info, Node, OpenOptions, SnapshotInfo,
    format_by_name, found_backing_name, full_backing_name, is_relative, references,
};
use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::words::Stop;
use diskimage::json::Value;

/// The information about a node and its children.
pub(crate) struct Facts {
    /// The path of child names from the topmost node, like `/file/file`; empty for the topmost node.
    path: String,
    node: Node,
    info: Info,
    len: u64,
    allocated: Option<u64>,
    children: Vec<(String, Facts)>,
    /// The name that the backing image was found by.
    found_backing: Option<String>,
    /// The files that the image names, if they are to be shown.
    references: Option<Vec<ImageReference>>,
}

/// Whether the driver of this name reports nothing but the length of an image in qemu-img.
pub(crate) fn reports_only_length(driver: &str) -> bool {
    matches!(
        driver,
        "nbd" | "null-co" | "null-aio" | "vvfat" | "quorum" | "bochs" | "cloop" | "dmg" | "parallels"
    )
}

impl Facts {
    /// Collects the information about an image that was opened with `options`.
    ///
    /// # Errors
    /// A table that has to be read is unreadable or corrupt.
    pub(crate) fn of(image: &Image, options: &OpenOptions) -> Result<Self, Stop> {
        let facts = Self::collect(image, String::new())?;
        Ok(Self {
            found_backing: found_backing_name(image, options),
            ..facts
        })
    }

    /// The same with the files that `image` names.
    ///
    /// # Errors
    /// As [`Facts::of`].
    pub(crate) fn with_references(self, image: &Image) -> Result<Self, Stop> {
        Ok(Self {
            references: Some(references(image)?),
            ..self
        })
    }

    fn collect(device: &dyn Device, path: String) -> Result<Self, Stop> {
        let node = device.node();
        // As in qemu-img, the child that was attached last comes first.
        let children: Result<_, Stop> = node
            .children
            .iter()
            .rev()
            .map(|(name, child)| Ok((name.clone(), Self::collect(&**child, format!("{path}/{name}"))?)))
            .collect();
        Ok(Self {
            path,
            info: device.info()?,
            // qemu-img counts whole sectors.
            len: device.len().next_multiple_of(512),
            allocated: device.allocated_bytes(),
            children: children?,
            node,
            found_backing: None,
            references: None,
        })
    }

    /// Whether the node is shown as a protocol and not as an image.
    fn is_protocol(&self) -> bool {
        !self.path.is_empty() && self.children.is_empty()
    }

    /// Whether qemu-img reports more than the length of the node.
    fn has_details(&self) -> bool {
        let is_format = format_by_name(self.node.driver).is_some();
        match (self.node.driver, self.children.last()) {
            (driver, _) if reports_only_length(driver) => false,
            (driver, Some((_, file))) if driver == "raw" || !is_format => file.has_details(),
            _ => true,
        }
    }

    /// The backing file name as the image stores it, and the resolved one unless the name is relative and the image has
    /// several directories.
    fn backing(&self) -> Option<(&Backing, Option<String>)> {
        let backing = self.info.backing.as_ref()?;
        let resolved = || full_backing_name(&self.node.base_name(), backing.name.text());
        let full = self.found_backing.clone().unwrap_or_else(resolved);
        Some((
            backing,
            (!self.node.spans_several_files() || !is_relative(backing.name.text())).then_some(full),
        ))
    }

    /// Calls `print` with each line of the text.
    pub(crate) fn print(&self, print: &mut dyn FnMut(&str)) {
        self.print_indented(print, 0);
    }

    fn print_indented(&self, print: &mut dyn FnMut(&str), indent: usize) {
        let mut print_line = |line: &str| print(&format!("{:indent$}{line}", ""));
        let name = self.node.shown_name();
        let (kinds, size) = if self.is_protocol() {
            (["filename", "protocol type"], "file length")
        } else {
            (["image", "file format"], "virtual size")
        };
        print_line(&format!("{}: {}", kinds[0], name));
        print_line(&format!("{}: {}", kinds[1], self.node.driver));
        print_line(&format!("{size}: {} ({} bytes)", human_size(self.len), self.len));
        print_line(&disk_size(self.allocated));
        if self.info.encrypted {
            print_line("encrypted: yes");
        }
        if let Some(size) = self.info.cluster_size {
            print_line(&format!("cluster_size: {size}"));
        }
        if self.info.dirty {
            print_line("cleanly shut down: no");
        }
        if let Some((Backing { name, format }, full)) = self.backing() {
            let actual_path = match full {
                None => " (cannot determine actual path)".to_owned(),
                Some(full) if full == name.text() => String::new(),
                Some(full) => format!(" (actual path: {})", full),
            };
            print_line(&format!("backing file: {}{actual_path}", name.text()));
            if let Some(format) = format {
                print_line(&format!("backing file format: {}", format));
            }
        }
        if !self.info.snapshots.is_empty() {
            for line in snapshot_lines(&self.info.snapshots) {
                print_line(&line);
            }
        }
        if let Some(details) = self.info.specific.as_ref().filter(|details| !details.is_empty()) {
            print_line("Format specific information:");
            print_details(print, details, indent + 4);
        }
        let references = self.references.as_deref().unwrap_or_default();
        if !references.is_empty() {
            print_references(print, references);
        }
        for (_, child) in &self.children {
            print(&format!("{:indent$}Child node '{}':", "", child.path));
            child.print_indented(print, indent + 4);
        }
    }

    /// The same as JSON. The facts go as their JSON comes: there may be a million.
    pub(crate) fn json(mut self) -> Value {
        let mut members: Vec<(&'static str, Value)> = vec![
            ("virtual-size", self.len.into()),
            ("filename", self.node.shown_name().into()),
            ("format", self.node.driver.into()),
        ];
        if self.has_details() {
            members.push(("dirty-flag", self.info.dirty.into()));
        }
        if let Some((Backing { name, format }, full)) = self.backing() {
            members.push(("backing-filename", name.text().into()));
            if let Some(full) = full {
                members.push(("full-backing-filename", full.into()));
            }
            if let Some(format) = format {
                members.push(("backing-filename-format", format.as_str().into()));
            }
        }
        if !self.info.snapshots.is_empty() {
            let snapshots = self.info.snapshots.iter().map(snapshot_json);
            members.push(("snapshots", Value::List(snapshots.collect())));
        }
        if let Some(size) = self.info.cluster_size {
            members.push(("cluster-size", size.into()));
        }
        if let Some(bytes) = self.allocated {
            members.push(("actual-size", bytes.into()));
        }
        if let Some(details) = self.info.specific.take() {
            let kind = match self.node.driver {
                // qemu-img has one type of information for all three drivers.
                "host_device" | "host_cdrom" => "file".into(),
                driver => driver.into(),
            };
            let specific = Value::object([("type", kind), ("data", details_json(details))]);
            members.push(("format-specific", specific));
        }
        if self.info.encrypted {
            members.push(("encrypted", true.into()));
        }
        if let Some(references) = &self.references {
            let references = references.iter().map(reference_json);
            members.push(("references", Value::List(references.collect())));
        }
        let children = self
            .children
            .into_iter()
            .map(|(name, child)| Value::object([("name", Value::from(name)), ("info", child.json())]));
        members.insert(0, ("children", Value::List(children.collect())));
        in_table_order(members)
    }
}

fn print_references(print: &mut dyn FnMut(&str), references: &[ImageReference]) {
    print("References:");
    for ImageReference { file, is_beneath } in references {
        let place = if *is_beneath {
            "beneath the image's directory"
        } else {
            "elsewhere"
        };
        print(&format!("    {}: {} ({place})", file.role.name(), file.name));
    }
}

fn reference_json(reference: &ImageReference) -> Value {
    Value::object([
        ("role", Value::from(reference.file.role.name())),
        ("name", reference.file.name.as_str().into()),
        ("beneath", reference.is_beneath.into()),
    ])
}

/// The members of an object in the order in which qemu-img prints them.
fn in_table_order(members: Vec<(&'static str, Value)>) -> Value {
    Value::object(members).in_table_order()
}

fn disk_size(bytes: Option<u64>) -> String {
    format!(
        "disk size: {}",
        bytes.map_or_else(|| "unavailable".to_owned(), human_size)
    )
}

/// The heading of the table of snapshots.
const SNAPSHOT_HEAD: &str =
    "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT";

/// The lines of the table of snapshots.
pub(crate) fn snapshot_lines(snapshots: &[SnapshotInfo]) -> impl Iterator<Item = String> {
    let head = ["Snapshot list:", SNAPSHOT_HEAD].map(str::to_owned);
    head.into_iter().chain(snapshots.iter().map(snapshot_line))
}

fn snapshot_line(snapshot: &SnapshotInfo) -> String {
    let seconds = snapshot.vm_clock_nsec / NANOS;
    let clock = format!(
        "{:04}:{:02}:{:02}.{:03}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        snapshot.vm_clock_nsec % NANOS / 1_000_000
    );
    let icount = snapshot
        .icount
        .map_or_else(|| "--".to_owned(), |icount| icount.to_string());
    format!(
        "{:<7} {:<16} {:>8} {:>19} {clock:>15} {icount:>10}",
        snapshot.id,
        snapshot.name,
        human_size(snapshot.vm_state_size),
        local_date(snapshot.date_sec),
    )
}

const NANOS: u64 = 1_000_000_000;

fn local_date(seconds: u32) -> String {
    let Ok(time) = Timestamp::from_second(seconds.into()) else {
        return String::new();
    };
    time.to_zoned(TimeZone::system())
        .strftime("%Y-%m-%d %H:%M:%S")
        .to_string()
}

fn snapshot_json(snapshot: &SnapshotInfo) -> Value {
    let mut members: Vec<(&'static str, Value)> = Vec::new();
    if let Some(icount) = snapshot.icount {
        members.push(("icount", icount.into()));
    }
    members.extend([
        ("vm-clock-nsec", (snapshot.vm_clock_nsec % NANOS).into()),
        ("name", snapshot.name.as_str().into()),
        ("date-sec", snapshot.date_sec.into()),
        ("date-nsec", snapshot.date_nsec.into()),
        ("vm-clock-sec", (snapshot.vm_clock_nsec / NANOS).into()),
        ("id", snapshot.id.as_str().into()),
        ("vm-state-size", snapshot.vm_state_size.into()),
    ]);
    Value::object(members)
}

fn print_details(print: &mut dyn FnMut(&str), details: &[Detail], indent: usize) {
    for detail in details {
        print_value(print, &detail.name.replace('-', " "), &detail.value, indent);
    }
}

fn print_value(print: &mut dyn FnMut(&str), name: &str, value: &DetailValue, indent: usize) {
    let mut simple = |value: &dyn Display| print(&format!("{:indent$}{name}: {value}", ""));
    match value {
        DetailValue::Flag(flag) => simple(flag),
        DetailValue::Number(number) => simple(number),
        DetailValue::Text(words) => simple(words),
        DetailValue::Group(details) => {
            print(&format!("{:indent$}{name}:", ""));
            print_details(print, details, indent + 4);
        }
        DetailValue::List(values) => {
            print(&format!("{:indent$}{name}:", ""));
            for (index, value) in values.iter().enumerate() {
                print_value(print, &format!("[{index}]"), value, indent + 4);
            }
        }
    }
}

fn details_json(details: Vec<Detail>) -> Value {
    Value::object(
        details
            .into_iter()
            .map(|detail| (detail.name, value_json(detail.value))),
    )
}

fn value_json(value: DetailValue) -> Value {
    match value {
        DetailValue::Flag(flag) => flag.into(),
        DetailValue::Number(number) => number.into(),
        DetailValue::Text(words) => words.into(),
        DetailValue::Group(details) => details_json(details),
        DetailValue::List(values) => Value::List(values.into_iter().map(value_json).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots_are_lines_of_a_table() {
        let snapshot = SnapshotInfo {
            id: "1".to_owned(),
            name: "before\nupgrade".to_owned(),
            vm_state_size: 1 << 20,
            date_sec: 0,
            date_nsec: 0,
            vm_clock_nsec: 3_723_004_000_000,
            icount: None,
            disk_size: 0,
        };
        let line = snapshot_line(&snapshot);
        assert!(line.starts_with("1       before\nupgrade      1 MiB "), "{line}");
        assert!(line.ends_with("  0001:02:03.004         --"), "{line}");
    }

    #[test]
    fn lists_in_groups_are_indented() {
        let details = [Detail {
            name: "some-list",
            value: DetailValue::List(vec![DetailValue::Group(vec![Detail::flag("is-on", true)])]),
        }];
        let mut lines = Vec::new();
        print_details(&mut |line| lines.push(line.to_owned()), &details, 4);
        assert_eq!(
            lines,
            ["    some list:", "        [0]:", "            is on: true"]
        );
    }
}
