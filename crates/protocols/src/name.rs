//! Filenames of images as users write them: a path, or a protocol and its argument.

use diskimage_core::{Error, Result};

/// A protocol of this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProtocolKind {
    /// Regular files.
    File,
    /// Block devices, and character devices that behave like one.
    HostDevice,
    /// Optical drives.
    HostCdrom,
}

impl ProtocolKind {
    /// The name as `info` shows it.
    pub fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::HostDevice => "host_device",
            Self::HostCdrom => "host_cdrom",
        }
    }
}

/// A parsed filename.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The protocol, if the name has one; else the type of the file decides.
    pub protocol: Option<ProtocolKind>,
    /// The path, with `./` in front if it would look like a protocol.
    pub path: String,
}

impl Target {
    /// Parses a filename. `foo:bar` is a protocol and its argument, `./foo:bar` and `a/b:c` are paths.
    ///
    /// # Errors
    /// Unknown protocols, and the empty name.
    pub fn parse(name: &str) -> Result<Self> {
        let target = match protocol_prefix(name) {
            None => Self {
                protocol: None,
                path: name.to_owned(),
            },
            Some("file") => Self::with_protocol(None, &name["file:".len()..]).only(ProtocolKind::File),
            Some("host_device") => {
                Self::with_protocol(None, &name["host_device:".len()..]).only(ProtocolKind::HostDevice)
            }
            Some("host_cdrom") => {
                Self::with_protocol(None, &name["host_cdrom:".len()..]).only(ProtocolKind::HostCdrom)
            }
            Some(other) => return Err(Error::invalid(format!("Unknown protocol '{other}'"))),
        };
        if target.path.is_empty() {
            return Err(Error::invalid(
                "The 'file' block driver requires a file name".to_owned(),
            ));
        }
        Ok(target)
    }

    /// A path that is never parsed as a protocol and its argument: for names of data files in images.
    pub fn plain(path: &str) -> Self {
        Self::with_protocol(None, path)
    }

    fn with_protocol(protocol: Option<ProtocolKind>, path: &str) -> Self {
        let path = match protocol_prefix(path) {
            Some(_) => format!("./{path}"),
            None => path.to_owned(),
        };
        Self { protocol, path }
    }

    fn only(self, protocol: ProtocolKind) -> Self {
        Self {
            protocol: Some(protocol),
            ..self
        }
    }

    /// The filename of `name`, to which the image at `from` refers: relative to the directory of that image, unless
    /// `name` is absolute or has a protocol.
    pub fn resolve(from: &str, name: &str) -> String {
        if name.starts_with('/') || protocol_prefix(name).is_some() {
            return name.to_owned();
        }
        let from = match protocol_prefix(from) {
            Some(protocol) => Self::with_protocol(None, &from[protocol.len() + 1..]).path,
            None => from.to_owned(),
        };
        match from.rfind('/') {
            Some(slash) => format!("{}{name}", &from[..=slash]),
            None => name.to_owned(),
        }
    }
}

/// The text before the first colon, unless a slash comes before the colon.
pub(crate) fn protocol_prefix(name: &str) -> Option<&str> {
    let at = name.find([':', '/'])?;
    name[at..].starts_with(':').then_some(&name[..at])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(name: &str) -> String {
        Target::parse(name).expect("is a path").path
    }

    #[test]
    fn a_slash_before_the_colon_makes_a_path() {
        assert_eq!(path("./a:b"), "./a:b");
        assert_eq!(path("/x/a:b"), "/x/a:b");
        assert_eq!(path("file:a:b"), "./a:b");
        assert_eq!(path("file:/x/a:b"), "/x/a:b");
        assert_eq!(
            Target::parse("foo:bar").map_err(|e| e.chain()),
            Err("Unknown protocol 'foo'".to_owned())
        );
    }

    #[test]
    fn relative_names_start_at_the_image_that_has_them() {
        assert_eq!(Target::resolve("dir/top", "base"), "dir/base");
        assert_eq!(Target::resolve("file:image:top", "base"), "./base");
        assert_eq!(Target::resolve("top", "base"), "base");
        assert_eq!(Target::resolve("dir/top", "/base"), "/base");
        assert_eq!(Target::resolve("dir/top", "file:base"), "file:base");
    }
}
