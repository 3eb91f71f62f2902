//! Copies an input for a command that changes it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// Copies data and keeps holes: a preallocated image is as long as its disk, and most of it is a hole.
pub(crate) fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let source = File::open(from)?;
    let target = File::create(to)?;
    let len = source.metadata()?.len();
    target.set_len(len)?;

    let mut buffer = vec![0; BUFFER];
    let mut offset = 0;
    while let Some(start) = next_data(&source, offset)? {
        let end = seek(&source, SeekFrom::Hole(start))?;
        offset = start;
        while offset < end {
            let count = usize::try_from(end - offset).map_or(BUFFER, |left| left.min(BUFFER));
            source.read_exact_at(&mut buffer[..count], offset)?;
            target.write_all_at(&buffer[..count], offset)?;
            offset += count as u64;
        }
    }
    Ok(())
}

/// The offset of the next data at or after `offset`, if there is any.
fn next_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    match seek(file, SeekFrom::Data(offset)) {
        Ok(start) => Ok(Some(start)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

const BUFFER: usize = 1024 * 1024;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn data_is_copied_and_holes_stay() {
        let directory = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| directory.path().join(name));
        let file = File::create(&from).unwrap();
        file.set_len(1 << 40).unwrap();
        file.write_all_at(b"middle", 1 << 30).unwrap();

        copy(&from, &to).unwrap();

        let copied = File::open(&to).unwrap();
        let mut found = [0; 6];
        copied.read_exact_at(&mut found, 1 << 30).unwrap();
        assert_eq!(&found, b"middle");
        assert_eq!(copied.metadata().unwrap().len(), 1 << 40);
        assert!(copied.metadata().unwrap().blocks() < 1024);
    }
}
