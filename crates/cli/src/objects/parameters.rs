//! The parameters of an object, from a list or from JSON.

use diskimage::is_identifier;
use diskimage::json::{self, Value};
use diskimage::size::parse_number;

use crate::words::Stop;

/// The parameters of an object: `TYPE,name=value,...` or `{"qom-type": "TYPE", "name": "value"}`.
///
/// Of several errors the first one is reported: parameters in the order in which they are taken, then unknown
/// parameters, then the identifier.
pub(super) struct Parameters {
    given: Vec<(String, Given)>,
    /// Help is asked for.
    pub(super) wants_help: bool,
}

/// The value of a parameter.
enum Given {
    /// Text of `name=value`, for a parameter of any type.
    Word(String),
    /// A value of JSON, which has a type.
    Typed(Value),
}

impl Parameters {
    /// Reads the parameters of `--object`.
    pub(super) fn read(text: &str) -> Result<Self, Stop> {
        if text.starts_with('{') {
            return Self::from_json(text);
        }
        let mut given: Vec<(String, Given)> = Vec::new();
        let mut wants_help = false;
        // A doubled comma is a comma of the value. It is a NUL until the list is split: no parameter contains a NUL.
        let text = text.replace(",,", "\0");
        for (at, item) in text.split(',').enumerate() {
            let item = item.replace('\0', ",");
            match item.split_once('=') {
                Some((name, value)) => {
                    given.retain(|(other, _)| other != name);
                    given.push((name.to_owned(), Given::Word(value.to_owned())));
                }
                None if item.is_empty() => (),
                None if at == 0 => given.push(("qom-type".to_owned(), Given::Word(item))),
                None if matches!(item.as_str(), "help" | "?") => wants_help = true,
                None => return Err(Stop::wrong(format!("Expected '=' after parameter '{item}'"))),
            }
        }
        Ok(Self { given, wants_help })
    }

    fn from_json(text: &str) -> Result<Self, Stop> {
        let Value::Object(members) = json::parse(text)? else {
            return Err(Stop::wrong("Invalid parameter type, expected: object"));
        };
        let mut given = Vec::new();
        for (name, value) in members {
            match value {
                Value::Object(members) if name == "limits" => {
                    let inside = |(member, value)| (format!("{name}.{member}"), Given::Typed(value));
                    given.extend(members.into_iter().map(inside));
                }
                value => given.push((name.into_owned(), Given::Typed(value))),
            }
        }
        Ok(Self {
            given,
            wants_help: false,
        })
    }

    /// Whether a parameter is given.
    pub(super) fn has(&self, name: &str) -> bool {
        self.given.iter().any(|(other, _)| other == name)
    }

    fn take(&mut self, name: &str) -> Option<Given> {
        let at = self.given.iter().position(|(other, _)| other == name)?;
        Some(self.given.remove(at).1)
    }

    /// Takes a text.
    pub(super) fn take_text(&mut self, name: &str) -> Result<Option<String>, Stop> {
        match self.take(name) {
            None => Ok(None),
            Some(Given::Word(text) | Given::Typed(Value::Text(text))) => Ok(Some(text)),
            Some(Given::Typed(_)) => Err(wrong_type(name, "string")),
        }
    }

    /// Takes a flag.
    pub(super) fn take_flag(&mut self, name: &str) -> Result<Option<bool>, Stop> {
        match self.take(name) {
            None => Ok(None),
            Some(Given::Word(word)) => match word.as_str() {
                "on" | "yes" | "true" | "y" => Ok(Some(true)),
                "off" | "no" | "false" | "n" => Ok(Some(false)),
                _ => Err(Stop::wrong(format!("Parameter '{name}' expects 'on' or 'off'"))),
            },
            Some(Given::Typed(Value::Bool(flag))) => Ok(Some(flag)),
            Some(Given::Typed(_)) => Err(wrong_type(name, "boolean")),
        }
    }

    /// Takes an integer.
    pub(super) fn take_integer(&mut self, name: &str) -> Result<Option<i64>, Stop> {
        let number = match self.take(name) {
            None => return Ok(None),
            Some(Given::Word(word)) => parse_number(&word).ok(),
            Some(Given::Typed(Value::Int(number))) => Some(number),
            Some(Given::Typed(_)) => return Err(wrong_type(name, "integer")),
        };
        let number = number.and_then(|number| i64::try_from(number).ok());
        number
            .map(Some)
            .ok_or_else(|| Stop::wrong(format!("Parameter '{name}' expects integer")))
    }

    /// Takes the identifier of the object.
    pub(super) fn take_id(&mut self) -> Result<String, Stop> {
        self.take_text("id")?
            .ok_or_else(|| Stop::wrong("Parameter 'id' is missing"))
    }

    /// Refuses parameters that were not taken, and an invalid identifier.
    pub(super) fn finish(&self, id: &str) -> Result<(), Stop> {
        if let Some((name, _)) = self.given.first() {
            return Err(Stop::wrong(format!("Parameter '{name}' is unexpected")));
        }
        if is_identifier(id) {
            return Ok(());
        }
        Err(Stop::wrong("Parameter 'id' expects an identifier")
            .with_hints(["Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."]))
    }
}

/// The error for a value of JSON of the wrong type.
pub(super) fn wrong_type(name: &str, expected: &str) -> Stop {
    Stop::wrong(format!(
        "Invalid parameter type for '{name}', expected: {expected}"
    ))
}

/// The error for a value that is none of a parameter's.
pub(super) fn not_accepted(name: &str, value: &str) -> Stop {
    Stop::wrong(format!("Parameter '{name}' does not accept value '{value}'"))
}
