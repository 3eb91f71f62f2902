//! The images, format by format.

mod bochs;
mod cloop;
mod dmg;
mod luks;
mod parallels;
mod qcow;
mod qcow2;
mod qed;
mod raw;
mod vdi;
mod vhdx;
mod vmdk;
mod vpc;

use std::io;
use std::path::Path;

use crate::files::Files;

/// An image that is made to cost much.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Image {
    /// Begins with the format.
    pub(crate) name: &'static str,
    /// What it attacks, in a sentence.
    pub(crate) attack: &'static str,
    pub(crate) open: Open,
    build: fn(&mut Files),
}

/// How it is opened.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Open {
    /// Without a format.
    Probe,
    /// With `-f`.
    Format(&'static str),
    /// With an object, unless that is empty, and the options of a node.
    Options {
        objects: &'static str,
        node: &'static str,
    },
}

impl Image {
    const fn new(
        format: &'static str,
        name: &'static str,
        attack: &'static str,
        build: fn(&mut Files),
    ) -> Self {
        Self {
            name,
            attack,
            open: Open::Format(format),
            build,
        }
    }

    const fn open(self, open: Open) -> Self {
        Self { open, ..self }
    }

    /// Makes the image in `directory`.
    ///
    /// # Errors
    /// Those of the file system.
    pub(crate) fn make(&self, directory: &Path) -> io::Result<()> {
        let mut files = Files::default();
        (self.build)(&mut files);
        files.write(directory)
    }
}

/// All images.
pub(crate) fn all() -> impl Iterator<Item = &'static Image> {
    let formats: [&[Image]; 13] = [
        raw::IMAGES,
        qcow2::IMAGES,
        qcow::IMAGES,
        qed::IMAGES,
        vdi::IMAGES,
        vhdx::IMAGES,
        vpc::IMAGES,
        vmdk::IMAGES,
        parallels::IMAGES,
        luks::IMAGES,
        dmg::IMAGES,
        cloop::IMAGES,
        bochs::IMAGES,
    ];
    formats.into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::all;

    #[test]
    fn names_are_unique_and_every_image_says_what_it_attacks() {
        let names: HashSet<_> = all().map(|image| image.name).collect();
        assert_eq!(names.len(), all().count());
        assert!(all().all(|image| image.attack.ends_with('.') && image.attack.contains(' ')));
        assert!(names.len() >= 150, "{}", names.len());
    }

    #[test]
    fn the_attacks_that_the_documents_name_are_there() {
        let names: HashSet<_> = all().map(|image| image.name).collect();
        let formats: HashSet<_> = all().filter_map(|image| image.name.split('-').next()).collect();
        let page = include_str!("../../../../docs/security.md");
        let known = page.split("\n## ").find(|part| part.starts_with("Known attacks"));
        let words = known.expect("a section").split('`').skip(1).step_by(2);
        let named = words.filter(|word| {
            word.split_once('-')
                .is_some_and(|(format, _)| formats.contains(format))
        });
        let named: Vec<_> = named.collect();
        assert!(named.len() > 30, "{named:?}");
        let missing: Vec<_> = named.iter().filter(|name| !names.contains(*name)).collect();
        assert!(missing.is_empty(), "{missing:?}");
    }
}
