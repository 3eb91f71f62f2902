//! Names of files as they stand in images.

use crate::{Error, Result};

/// The name of a file that stands in an image, which need not be UTF-8.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredName {
    shown: String,
    is_exact: bool,
}

impl StoredName {
    /// The name of these bytes.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self::within(bytes, &String::from_utf8_lossy(bytes))
    }

    /// The name that is shown as `shown`, found in these bytes.
    pub fn within(bytes: &[u8], shown: &str) -> Self {
        Self {
            shown: shown.to_owned(),
            is_exact: std::str::from_utf8(bytes).is_ok(),
        }
    }

    /// The name as it is shown, in which other characters may stand for bytes that are not UTF-8.
    pub fn shown(&self) -> &str {
        &self.shown
    }

    /// The name to open the file by.
    ///
    /// # Errors
    /// A name that is not UTF-8: what is shown could be the name of another file.
    pub fn exact(&self) -> Result<&str> {
        if self.is_exact {
            Ok(&self.shown)
        } else {
            Err(Error::unsupported(format!(
                "The file name '{}' is not UTF-8",
                self.shown
            )))
        }
    }
}

impl<T: Into<String>> From<T> for StoredName {
    fn from(name: T) -> Self {
        Self {
            shown: name.into(),
            is_exact: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_very_name_opens_a_file() {
        let names = [&b"o\xff.raw"[..], "o\u{fffd}.raw".as_bytes(), b"plain"];
        let [broken, replaced, plain] = names.map(StoredName::from_bytes);
        assert_eq!(broken.shown(), replaced.shown());
        assert_ne!(broken, replaced);
        assert_eq!(replaced.exact().expect("is text"), "o\u{fffd}.raw");
        assert_eq!(plain.exact().expect("is text"), "plain");
        let error = broken.exact().expect_err("is no text");
        assert_eq!(error.chain(), "The file name 'o\u{fffd}.raw' is not UTF-8");
    }
}
