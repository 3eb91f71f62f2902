//! Config files: sections of lines `name = "value"`.
//!
//! ```text
//!   # the second write fails
//!   [set-state]
//!   event = "write_aio"
//!   new_state = "2"
//! ```

use diskimage_core::{Device, Error, ErrorKind, NodeOptions, Result, ResultExt, name, to_index};

use super::rules::{Rules, SECTIONS};

/// The limit of the length of a config file.
const MAX_LEN: u64 = 1 << 20;

/// Adds the rules of `file` to `rules`.
///
/// # Errors
/// Invalid lines, and invalid rules.
pub(super) fn read(file: &dyn Device, rules: &Rules) -> Result<()> {
    if file.len() > MAX_LEN {
        return Err(Error::new(
            ErrorKind::Limit,
            "Could not read blkdebug config file: too large",
        ));
    }
    let mut bytes = vec![0; to_index(file.len())?];
    file.read_at(&mut bytes, 0)
        .context(|| "Could not read blkdebug config file")?;
    parse(&name::from_bytes(&bytes), rules)
}

fn parse(text: &str, rules: &Rules) -> Result<()> {
    let mut section: Option<(&'static str, NodeOptions)> = None;
    let add = |section: Option<(&'static str, NodeOptions)>| match section {
        Some((name, mut options)) => rules.add(name, &mut options, |name| {
            Error::invalid(format!("Invalid parameter '{name}'"))
        }),
        None => Ok(()),
    };
    for line in text.lines() {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(rest) = line.strip_prefix('[') {
            add(section.take())?;
            let name = rest.split([']', ' ']).next().unwrap_or_default();
            let known = SECTIONS.iter().find(|known| **known == name);
            let known = known.ok_or_else(|| Error::invalid(format!("There is no option group '{name}'")))?;
            section = Some((known, NodeOptions::new()));
            continue;
        }
        let Some((_, options)) = &mut section else {
            return Err(Error::invalid("no group defined"));
        };
        let (name, value) = line.split_once('=').unwrap_or((line, ""));
        let quoted = value.split('"').nth(1).unwrap_or_default();
        options.set(name.trim(), quoted);
    }
    add(section)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(text: &str) -> std::result::Result<(), String> {
        parse(text, &Rules::new()).map_err(|error| error.chain())
    }

    #[test]
    fn sections_become_rules() {
        let text = "# why\n\n[inject-error \"a\"]\nevent = \"l2_load\"\nerrno = \"28\"\n\n[set-state]\n  event = \"read_aio\"\n";
        assert_eq!(outcome(text), Ok(()));
    }

    #[test]
    fn invalid_rules_are_refused() {
        for (text, message) in [
            ("event = \"x\"", "no group defined"),
            ("[foo]", "There is no option group 'foo'"),
            ("[inject-error]\n", "Missing event name for rule"),
            ("[inject-error]\nevent = l2_load\n", "invalid parameter value: "),
            (
                "[inject-error]\nfoo = \"1\"\nevent = \"none\"",
                "Invalid parameter 'foo'",
            ),
            (
                "[set-state]\nevent = \"none\"\nnew_state = \"a\"\n",
                "Parameter 'new_state' expects a number",
            ),
        ] {
            assert_eq!(outcome(text), Err(message.to_owned()), "{text}");
        }
    }
}
