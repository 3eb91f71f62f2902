//! What `info` shows of one image, as text and as JSON.

use std::fmt::Write;

use diskimage::size::human_size;
use diskimage::{Detail, DetailValue, Device, Image, Info, SnapshotInfo, Target};
use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::printable::printable;
use crate::words::Stop;
use diskimage::json::Value;

/// All that is known of an image.
pub(crate) struct Facts<'a> {
    image: &'a Image,
    info: Info,
}

impl<'a> Facts<'a> {
    /// Collects them.
    ///
    /// # Errors
    /// Damage in the tables that hold them.
    pub(crate) fn of(image: &'a Image) -> Result<Self, Stop> {
        Ok(Self {
            image,
            info: image.layer().info()?,
        })
    }

    /// The names of the image below: as it stands in the image, and where that is.
    fn backing(&self) -> Option<(String, String, Option<String>)> {
        let backing = self.image.layer().backing()?;
        let full = Target::resolve(&self.image.name(), &backing.name);
        Some((backing.name, full, backing.format))
    }

    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        let mut line = |words: String| {
            text.push_str(&words);
            text.push('\n');
        };
        line(format!("image: {}", printable(&self.image.name())));
        line(format!("file format: {}", self.image.layer().format()));
        line(format!(
            "virtual size: {} ({} bytes)",
            human_size(self.image.len()),
            self.image.len()
        ));
        line(disk_size(self.image.allocated_bytes()));
        if self.info.encrypted {
            line("encrypted: yes".to_owned());
        }
        if let Some(size) = self.info.cluster_size {
            line(format!("cluster_size: {size}"));
        }
        if self.info.dirty {
            line("cleanly shut down: no".to_owned());
        }
        if let Some((name, full, format)) = self.backing() {
            let place = if full == name {
                String::new()
            } else {
                format!(" (actual path: {})", printable(&full))
            };
            line(format!("backing file: {}{place}", printable(&name)));
            if let Some(format) = format {
                line(format!("backing file format: {}", printable(&format)));
            }
        }
        if !self.info.snapshots.is_empty() {
            line("Snapshot list:".to_owned());
            line(SNAPSHOT_HEAD.to_owned());
            for snapshot in &self.info.snapshots {
                line(snapshot_line(snapshot));
            }
        }
        if let Some(details) = &self.info.specific {
            line("Format specific information:".to_owned());
            details_text(&mut text, details, 4);
        }
        let file = self.image.layer().file();
        // Writing to a string does not fail.
        let _ = write!(
            text,
            "Child node '/file':\n    filename: {}\n    protocol type: {}\n    file length: {} ({} bytes)\n    {}\n",
            printable(&file.name()),
            protocol(&**file),
            human_size(file_length(&**file)),
            file_length(&**file),
            disk_size(file.allocated_bytes()),
        );
        text
    }

    pub(crate) fn json(&self) -> Value {
        let file = self.image.layer().file();
        let node = Value::object(vec![
            ("children", Value::List(Vec::new())),
            ("virtual-size", file_length(&**file).into()),
            ("filename", file.name().into()),
            ("format", protocol(&**file).into()),
            ("actual-size", file.allocated_bytes().unwrap_or(0).into()),
            (
                "format-specific",
                Value::object(vec![
                    ("type", protocol(&**file).into()),
                    ("data", Value::Object(Vec::new())),
                ]),
            ),
            ("dirty-flag", false.into()),
        ]);
        let child = Value::object(vec![("name", "file".into()), ("info", node)]);
        let mut members: Vec<(&'static str, Value)> = vec![("children", Value::List(vec![child]))];
        let backing = self.backing();
        if let Some((_, _, Some(format))) = &backing {
            members.push(("backing-filename-format", format.as_str().into()));
        }
        if !self.info.snapshots.is_empty() {
            members.push((
                "snapshots",
                Value::List(self.info.snapshots.iter().map(snapshot_json).collect()),
            ));
        }
        members.push(("virtual-size", self.image.len().into()));
        members.push(("filename", self.image.name().into()));
        if let Some(size) = self.info.cluster_size {
            members.push(("cluster-size", size.into()));
        }
        members.push(("format", self.image.layer().format().into()));
        if let Some(bytes) = self.image.allocated_bytes() {
            members.push(("actual-size", bytes.into()));
        }
        if let Some(details) = &self.info.specific {
            let kind = self.image.layer().format().into();
            members.push((
                "format-specific",
                Value::object(vec![("type", kind), ("data", details_json(details))]),
            ));
        }
        if let Some((name, full, _)) = backing {
            members.push(("full-backing-filename", full.into()));
            members.push(("backing-filename", name.into()));
        }
        if self.info.encrypted {
            members.push(("encrypted", true.into()));
        }
        members.push(("dirty-flag", self.info.dirty.into()));
        Value::object(members)
    }
}

/// The length of a file in whole sectors, as the original counts them.
fn file_length(file: &dyn Device) -> u64 {
    file.len().next_multiple_of(512)
}

fn protocol(file: &dyn Device) -> &'static str {
    match file.as_file().and_then(|file| file.metadata().ok()) {
        Some(metadata) if !metadata.is_file() => "host_device",
        _ => "file",
    }
}

fn disk_size(bytes: Option<u64>) -> String {
    format!(
        "disk size: {}",
        bytes.map_or_else(|| "unavailable".to_owned(), human_size)
    )
}

/// The head of the table of snapshots.
const SNAPSHOT_HEAD: &str =
    "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT";

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
        printable(&snapshot.id),
        printable(&snapshot.name),
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

fn details_text(text: &mut String, details: &[Detail], indent: usize) {
    for detail in details {
        value_text(text, &detail.name.replace('-', " "), &detail.value, indent);
    }
}

fn value_text(text: &mut String, name: &str, value: &DetailValue, indent: usize) {
    // Writing to a string does not fail.
    let _ = write!(text, "{:indent$}{name}:", "");
    let simple = match value {
        DetailValue::Flag(flag) => flag.to_string(),
        DetailValue::Number(number) => number.to_string(),
        DetailValue::Text(words) => printable(words).into_owned(),
        DetailValue::Group(details) => {
            text.push('\n');
            return details_text(text, details, indent + 4);
        }
        DetailValue::List(values) => {
            text.push('\n');
            for (index, value) in values.iter().enumerate() {
                value_text(text, &format!("[{index}]"), value, indent + 4);
            }
            return;
        }
    };
    let _ = writeln!(text, " {simple}");
}

fn details_json(details: &[Detail]) -> Value {
    Value::object(
        details
            .iter()
            .map(|detail| (detail.name, value_json(&detail.value))),
    )
}

fn value_json(value: &DetailValue) -> Value {
    match value {
        DetailValue::Flag(flag) => (*flag).into(),
        DetailValue::Number(number) => (*number).into(),
        DetailValue::Text(words) => words.as_str().into(),
        DetailValue::Group(details) => details_json(details),
        DetailValue::List(values) => Value::List(values.iter().map(value_json).collect()),
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
        assert!(line.starts_with("1       before\\x0aupgrade    1 MiB "), "{line}");
        assert!(line.ends_with("  0001:02:03.004         --"), "{line}");
    }

    #[test]
    fn lists_in_groups_are_indented() {
        let details = [Detail {
            name: "some-list",
            value: DetailValue::List(vec![DetailValue::Group(vec![Detail::flag("is-on", true)])]),
        }];
        let mut text = String::new();
        details_text(&mut text, &details, 4);
        assert_eq!(text, "    some list:\n        [0]:\n            is on: true\n");
    }
}
