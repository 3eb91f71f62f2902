//! The files of an image, which may be longer than what is written to them.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The files of one image. The image itself is the one called [`Files::IMAGE`].
#[derive(Debug, Default)]
pub(crate) struct Files {
    list: Vec<(String, Sparse)>,
}

impl Files {
    /// The name of the image's own file.
    pub(crate) const IMAGE: &str = "image";

    /// The image's own file.
    pub(crate) fn image(&mut self) -> &mut Sparse {
        self.file(Self::IMAGE)
    }

    /// The file `name`, which is new if there was none.
    pub(crate) fn file(&mut self, name: &str) -> &mut Sparse {
        let known = self.list.iter().position(|(other, _)| other == name);
        let at = known.unwrap_or_else(|| {
            self.list.push((name.to_owned(), Sparse::default()));
            self.list.len() - 1
        });
        &mut self.list[at].1
    }

    /// Adds the image of `other` under the name `name`.
    pub(crate) fn add(&mut self, name: &str, other: Self) {
        for (_, contents) in other.list {
            self.list.push((name.to_owned(), contents));
        }
    }

    /// Writes all files into a directory.
    ///
    /// # Errors
    /// Those of the file system.
    pub(crate) fn write(&self, directory: &Path) -> io::Result<()> {
        fs::create_dir_all(directory)?;
        for (name, contents) in &self.list {
            contents.write(&File::create(directory.join(name))?)?;
        }
        Ok(())
    }
}

/// A file as pieces of bytes; everything else of it is a hole.
#[derive(Debug, Default)]
pub(crate) struct Sparse {
    pieces: Vec<(u64, Vec<u8>)>,
    len: u64,
}

impl Sparse {
    /// Writes `bytes` at `at`, over what was there.
    pub(crate) fn put(&mut self, at: u64, bytes: impl AsRef<[u8]>) -> &mut Self {
        let bytes = bytes.as_ref();
        self.len = self.len.max(at + bytes.len() as u64);
        self.pieces.push((at, bytes.to_vec()));
        self
    }

    /// Writes pieces of equal length one behind the other.
    fn put_all<const N: usize>(&mut self, at: u64, pieces: impl Iterator<Item = [u8; N]>) -> &mut Self {
        self.put(at, pieces.flatten().collect::<Vec<u8>>())
    }

    /// Writes big-endian numbers of 32 bits.
    pub(crate) fn be32(&mut self, at: u64, numbers: &[u32]) -> &mut Self {
        self.put_all(at, numbers.iter().map(|number| number.to_be_bytes()))
    }

    /// Writes big-endian numbers of 64 bits.
    pub(crate) fn be64(&mut self, at: u64, numbers: &[u64]) -> &mut Self {
        self.put_all(at, numbers.iter().map(|number| number.to_be_bytes()))
    }

    /// Writes little-endian numbers of 32 bits.
    pub(crate) fn le32(&mut self, at: u64, numbers: &[u32]) -> &mut Self {
        self.put_all(at, numbers.iter().map(|number| number.to_le_bytes()))
    }

    /// Writes little-endian numbers of 64 bits.
    pub(crate) fn le64(&mut self, at: u64, numbers: &[u64]) -> &mut Self {
        self.put_all(at, numbers.iter().map(|number| number.to_le_bytes()))
    }

    /// Sets the length of the file.
    pub(crate) fn len(&mut self, len: u64) -> &mut Self {
        self.len = len;
        self
    }

    fn write(&self, file: &File) -> io::Result<()> {
        for (at, bytes) in &self.pieces {
            file.write_all_at(bytes, *at)?;
        }
        file.set_len(self.len)
    }
}
