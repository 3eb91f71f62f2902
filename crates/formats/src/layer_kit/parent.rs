//! The parent of a differencing disk (VHD, VHDX): of the files that its locators may mean, the first one that exists.
//!
//! Case counts only if both spellings exist.

use diskimage_core::{Backing, BackingSearch, Error, Gate, Name, Result, name};

use super::foreign_name::parent_paths;

/// What an image says about the place of its parent.
#[derive(Clone, Debug, Default)]
pub(crate) struct Locators {
    /// Paths relative to the directory of the image, as stored.
    pub(crate) relative: Vec<String>,
    /// Absolute paths, as stored.
    pub(crate) absolute: Vec<String>,
}

/// The parent of an image.
#[derive(Clone, Debug)]
pub(crate) struct Parent {
    locators: Locators,
    /// The name of the file that was found, else the first one that was looked for.
    name: String,
    /// The names that were looked for.
    tried: Vec<String>,
}

impl Parent {
    /// Looks for the parent of the image called `image`.
    ///
    /// # Errors
    /// The image names no file.
    pub(crate) fn find(locators: Locators, image: &str, gate: &dyn Gate) -> Result<Self> {
        let tried = parent_paths(&locators.relative, &locators.absolute);
        let found = tried.iter().find_map(|name| gate.locate(image, name));
        let Some(name) = found.or_else(|| tried.first().cloned()) else {
            return Err(Error::corrupt("The image does not say where its parent is"));
        };
        Ok(Self {
            locators,
            name,
            tried,
        })
    }

    /// The parent as a backing image of `format`.
    pub(crate) fn backing(&self, format: &str) -> Backing {
        Backing {
            name: Name::from_bytes(&name::to_bytes(&self.name)),
            format: Some(format.to_owned()),
        }
    }

    /// Where the parent was looked for.
    pub(crate) fn search(&self) -> BackingSearch {
        let locators = || self.locators.relative.iter().chain(&self.locators.absolute);
        let description = format!(
            "The parent is not found: its locators are {}, and it was looked for as {}",
            quoted(locators()),
            quoted(&self.tried)
        );
        BackingSearch {
            names: Vec::new(),
            stored: locators().cloned().collect(),
            description: Some(description),
        }
    }
}

fn quoted<'a>(names: impl IntoIterator<Item = &'a String>) -> String {
    let names: Vec<_> = names.into_iter().map(|name| format!("'{name}'")).collect();
    names.join(", ")
}

/// The text of little-endian (or else big-endian) UTF-16, up to the first zero.
pub(crate) fn utf16(bytes: &[u8], big_endian: bool) -> String {
    let units = bytes.as_chunks::<2>().0.iter().map(|unit| match big_endian {
        true => u16::from_be_bytes(*unit),
        false => u16::from_le_bytes(*unit),
    });
    let mut text = String::new();
    for unit in char::decode_utf16(units.take_while(|unit| *unit != 0)) {
        name::push_char(&mut text, unit.unwrap_or(char::REPLACEMENT_CHARACTER));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_file_that_exists_is_taken() {
        struct Only(&'static str);
        impl Gate for Only {
            fn open(
                &self,
                _: &diskimage_core::Reference<'_>,
            ) -> Result<std::sync::Arc<dyn diskimage_core::Device>> {
                Err(Error::unsupported("is not opened"))
            }
            fn locate(&self, image: &str, name: &str) -> Option<String> {
                (image == "d/child.vhd" && name.eq_ignore_ascii_case(self.0)).then(|| self.0.to_owned())
            }
        }
        let locators = Locators {
            relative: vec!["..\\Base.vhd".to_owned()],
            absolute: vec!["C:\\Base.vhd".to_owned()],
        };
        for (exists, taken) in [
            ("../base.VHD", "../base.VHD"),
            ("BASE.vhd", "BASE.vhd"),
            ("x", "../Base.vhd"),
        ] {
            let parent = Parent::find(locators.clone(), "d/child.vhd", &Only(exists)).expect("has locators");
            assert_eq!(parent.backing("vpc").name.text(), taken);
            assert_eq!(
                parent.search().description.as_deref(),
                Some(
                    "The parent is not found: its locators are '..\\Base.vhd', 'C:\\Base.vhd', and it was looked for \
                     as '../Base.vhd', 'Base.vhd'"
                )
            );
        }
        assert!(Parent::find(Locators::default(), "d/child.vhd", &Only("x")).is_err());
    }
}
