//! What the user has named on the command line: the files and servers that a confined process may still use.

use std::path::PathBuf;

use diskimage::json::Value;
use diskimage::{NETWORK_DRIVERS, NodeOptions, Object, Objects, full_backing_name, name, node_of_name};

use crate::words::{ImageName, Source};

/// The files and servers that a command uses by the user's own words.
#[derive(Debug, Default)]
pub(crate) struct Reach {
    read: Vec<PathBuf>,
    written: Vec<PathBuf>,
    network: bool,
}

/// Options whose value is a path, as the last part of their name.
const PATHS: &[&str] = &["filename", "config", "dir"];

impl Reach {
    /// The files of `objects`.
    pub(crate) fn new(objects: &Objects) -> Self {
        let mut reach = Self::default();
        for object in objects.iter() {
            if let Object::TlsCreds(creds) = object {
                reach
                    .read
                    .extend(creds.dir.as_deref().map(|dir| name::to_path(dir).join("x")));
            }
        }
        reach
    }

    /// With an image that is read, and the files beneath its directory.
    #[must_use]
    pub(crate) fn reads(self, source: &Source) -> Self {
        self.with(source, false)
    }

    /// With an image that is written or made, and the files beneath its directory.
    #[must_use]
    pub(crate) fn writes(self, source: &Source) -> Self {
        self.with(source, true)
    }

    /// With an image that is written only if `write` says so.
    #[must_use]
    pub(crate) fn with(self, source: &Source, write: bool) -> Self {
        let node = match &source.name {
            ImageName::File(name) => node_of_name(name, source.format.as_deref()),
            ImageName::Options(list) => NodeOptions::from_list(list),
        };
        match node {
            Ok(node) => self.with_node(&node, write),
            // To open it will fail for the same reason.
            Err(_) => self,
        }
    }

    /// With the new image `image`, and the other files that its creation options name.
    #[must_use]
    pub(crate) fn makes(self, image: &str, backing: Option<&str>, options: Option<&str>) -> Self {
        let mut reach = self.writes(&named(image));
        if let Some(backing) = backing {
            reach = reach.reads_below(backing);
        }
        for (option, value) in diskimage::options::split_list(options.unwrap_or_default(), None) {
            reach = match option.as_str() {
                "backing_file" => reach.reads_below(&value),
                "data_file" => reach.writes(&named(&value)),
                _ => reach,
            };
        }
        reach
    }

    /// With the backing image `backing` of the first image that is written.
    #[must_use]
    pub(crate) fn reads_below(self, backing: &str) -> Self {
        let image = self.written.first().map(|file| name::of_path(file));
        let name = full_backing_name(&image.unwrap_or_default(), backing);
        self.reads(&named(&name))
    }

    fn with_node(mut self, node: &NodeOptions, write: bool) -> Self {
        for (option, value) in node.iter() {
            let Value::Text(text) = value else { continue };
            let last = option.rsplit('.').next().unwrap_or(option);
            if last == "driver" && NETWORK_DRIVERS.contains(&text.as_str()) {
                self.network = true;
            } else if PATHS.contains(&last) {
                let files = if write { &mut self.written } else { &mut self.read };
                files.push(name::to_path(text));
            }
        }
        self
    }

    /// The files that are read.
    pub(super) fn read(&self) -> &[PathBuf] {
        &self.read
    }

    /// The files that are written or made.
    pub(super) fn written(&self) -> &[PathBuf] {
        &self.written
    }

    /// Whether there is a server among them.
    pub(super) fn has_network(&self) -> bool {
        self.network
    }
}

fn named(name: &str) -> Source {
    Source {
        name: ImageName::File(name.to_owned()),
        format: None,
    }
}
