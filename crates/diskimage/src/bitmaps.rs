//! Copying persistent bitmaps from one image to another.

use diskimage_core::{Bitmaps, Error, ErrorKind, Layer, NewBitmap, Result, ResultExt};

/// Checks, before anything is made, that the bitmaps of `source` can be copied. Inconsistent ones cannot; with
/// `skip_broken` they are left out.
///
/// # Errors
/// An image that cannot have bitmaps, or one of them that is inconsistent.
pub fn check_bitmaps(source: &dyn Layer, skip_broken: bool) -> Result<()> {
    let list = bitmaps_of(source)?.list()?;
    // The original begins with the last.
    match list.iter().rev().find(|bitmap| bitmap.inconsistent) {
        Some(bitmap) if !skip_broken => Err(Error::invalid(format!(
            "Cannot copy inconsistent bitmap '{}'",
            bitmap.name
        ))
        .hint("Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it")),
        _ => Ok(()),
    }
}

/// Gives `target` the bitmaps that `source` has, with what is marked in them. Inconsistent ones are left out, and
/// `on_skip` is told their names.
///
/// # Errors
/// Disks of different sizes, bitmaps that `target` has already, and failures to read or write.
pub fn copy_bitmaps(source: &dyn Layer, target: &dyn Layer, on_skip: &dyn Fn(&str)) -> Result<()> {
    let (from, to) = (bitmaps_of(source)?, bitmaps_of(target)?);
    let (list, there) = (from.list()?, to.list()?);
    let (broken, sound): (Vec<_>, Vec<_>) = list.into_iter().partition(|bitmap| bitmap.inconsistent);
    broken.iter().rev().for_each(|bitmap| on_skip(&bitmap.name));
    for bitmap in sound.iter().rev() {
        if there.iter().any(|other| other.name == bitmap.name) {
            let error = Error::invalid(format!("Bitmap already exists: {}", bitmap.name));
            return Err(error.context(format!("Failed to create bitmap {}", bitmap.name)));
        }
        if source.len() != target.len() {
            let error = different_sizes(source, target);
            return Err(error.context(format!("Failed to populate bitmap {}", bitmap.name)));
        }
    }
    for bitmap in &sound {
        to.add(&NewBitmap {
            name: &bitmap.name,
            granularity: Some(bitmap.granularity),
            enabled: bitmap.enabled,
        })
        .context(|| format!("Failed to create bitmap {}", bitmap.name))?;
        copy_marks(from, &bitmap.name, to, &bitmap.name)
            .context(|| format!("Failed to populate bitmap {}", bitmap.name))?;
    }
    Ok(())
}

/// Marks in the bitmap `to` of `target` what is marked in the bitmap `from` of `source`, which may be the same image.
///
/// # Errors
/// Bitmaps that there are none of or that are inconsistent, disks of different sizes, and failures to read or write.
pub fn merge_bitmap(source: &dyn Layer, from: &str, target: &dyn Layer, to: &str) -> Result<()> {
    let target_bitmaps = named_bitmap(target, to)?;
    let source_bitmaps = named_bitmap(source, from)?;
    if source.len() != target.len() {
        return Err(different_sizes(source, target));
    }
    copy_marks(source_bitmaps, from, target_bitmaps, to)
}

/// The bitmaps of `layer`, which has one called `name`.
fn named_bitmap<'a>(layer: &'a dyn Layer, name: &str) -> Result<&'a dyn Bitmaps> {
    let bitmaps = layer.bitmaps().ok_or_else(|| no_bitmap(name))?;
    if bitmaps.list()?.iter().any(|bitmap| bitmap.name == name) {
        Ok(bitmaps)
    } else {
        Err(no_bitmap(name))
    }
}

fn no_bitmap(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("Dirty bitmap '{name}' not found"))
}

fn different_sizes(source: &dyn Layer, target: &dyn Layer) -> Error {
    Error::invalid(format!(
        "Bitmaps are of different sizes (destination size is {}, source size is {}) and can't be merged",
        target.len(),
        source.len()
    ))
}

/// Parts of the disk that are marked in one go.
const BATCH: usize = 1 << 16;

fn copy_marks(from: &dyn Bitmaps, from_name: &str, to: &dyn Bitmaps, name: &str) -> Result<()> {
    let mut batch = Vec::new();
    from.marked(from_name, &mut |range| {
        batch.push(range);
        if batch.len() == BATCH {
            to.mark(name, &batch)?;
            batch.clear();
        }
        Ok(())
    })?;
    // Also without a mark: whether there may be any is checked.
    to.mark(name, &batch)
}

fn bitmaps_of(layer: &dyn Layer) -> Result<&dyn Bitmaps> {
    layer
        .bitmaps()
        .ok_or_else(|| Error::unsupported("Source lacks bitmap support"))
}

#[cfg(test)]
mod tests {
    use diskimage_core::{ByteRange, Device};

    use super::*;
    use crate::testing::image;

    #[test]
    fn marks_and_states_are_copied() {
        let (source, _) = image("qcow2", "", 1 << 20);
        let (target, _) = image("qcow2", "cluster_size=512", 1 << 20);
        let from = bitmaps_of(&**source.layer()).expect("qcow2 has bitmaps");
        for (name, granularity, enabled) in [("a", 512, true), ("b", 65536, false)] {
            let granularity = Some(granularity);
            from.add(&NewBitmap {
                name,
                granularity,
                enabled,
            })
            .expect("added");
        }
        source.write_at(&[1; 600], 1000).expect("writes");
        source.flush().expect("flushes");
        from.mark("b", &[ByteRange::new(70_000, 200_000)]).expect("marks");
        check_bitmaps(&**source.layer(), false).expect("sound");
        copy_bitmaps(&**source.layer(), &**target.layer(), &|_| ()).expect("copied");
        let to = bitmaps_of(&**target.layer()).expect("qcow2 has bitmaps");
        assert_eq!(to.list().expect("readable"), from.list().expect("readable"));
        for name in ["a", "b"] {
            let marks = |bitmaps: &dyn Bitmaps| {
                let mut all = Vec::new();
                let visit = &mut |range| {
                    all.push(range);
                    Ok(())
                };
                bitmaps.marked(name, visit).expect("readable");
                all
            };
            assert_eq!(marks(to), marks(from), "{name}");
        }
        let again = copy_bitmaps(&**source.layer(), &**target.layer(), &|_| ());
        assert_eq!(
            again.map_err(|error| error.chain()),
            Err("Failed to create bitmap b: Bitmap already exists: b".to_owned())
        );
    }

    #[test]
    fn formats_without_bitmaps_are_refused() {
        let (source, _) = image("raw", "", 1 << 20);
        assert_eq!(
            check_bitmaps(&**source.layer(), true).map_err(|error| error.chain()),
            Err("Source lacks bitmap support".to_owned())
        );
    }
}
