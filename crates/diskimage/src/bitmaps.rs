//! Copying persistent bitmaps from one image to another.

use diskimage_core::{Bitmaps, Device, Error, ErrorKind, Image, Layer, NewBitmap, Result, ResultExt};

/// Checks, before the target is created, that the bitmaps of `source` can be copied. An inconsistent bitmap cannot be
/// copied; with `skip_broken` it is left out.
///
/// # Errors
/// The format of `source` has no bitmaps, or one bitmap is inconsistent.
pub fn check_bitmaps(source: &dyn Layer, skip_broken: bool) -> Result<()> {
    let list = bitmaps_of(source)?.list()?;
    // qemu-img names the last inconsistent bitmap of the directory.
    match list.iter().rev().find(|bitmap| bitmap.inconsistent) {
        Some(bitmap) if !skip_broken => Err(Error::invalid(format!(
            "Cannot copy inconsistent bitmap '{}'",
            bitmap.name
        ))
        .hint("Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it")),
        _ => Ok(()),
    }
}

/// Adds the bitmaps of `source` to `target` and copies their dirty ranges. Inconsistent bitmaps are left out; `on_skip`
/// is called with the name of each.
///
/// # Errors
/// The disks have different sizes, `target` has a bitmap of the same name, or reading or writing fails.
pub fn copy_bitmaps(source: &dyn Layer, target: &dyn Layer, on_skip: &dyn Fn(&str)) -> Result<()> {
    let (from, to) = (bitmaps_of(source)?, bitmaps_of(target)?);
    let (list, existing) = (from.list()?, to.list()?);
    let (broken, sound): (Vec<_>, Vec<_>) = list.into_iter().partition(|bitmap| bitmap.inconsistent);
    broken.iter().rev().for_each(|bitmap| on_skip(&bitmap.name));
    for bitmap in sound.iter().rev() {
        if existing.iter().any(|other| other.name == bitmap.name) {
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
        copy_dirty_ranges(from, &bitmap.name, to, &bitmap.name)
            .context(|| format!("Failed to populate bitmap {}", bitmap.name))?;
    }
    Ok(())
}

/// The error for adding `bitmap` to `image`, whose layer has no bitmaps.
pub fn cannot_add_bitmap(image: &Image, bitmap: &NewBitmap<'_>) -> Error {
    let is_valid = |bytes: u64| bytes.is_power_of_two() && GRANULARITY.contains(&bytes);
    if !bitmap.granularity.is_none_or(is_valid) {
        return Error::invalid("Granularity must be power of 2 and at least 512");
    }
    if bitmap.name.is_empty() {
        return Error::invalid("Bitmap name cannot be empty");
    }
    let node = Device::name(image);
    match image.layer().capabilities().bitmap_obstacle {
        Some(obstacle) => Error::unsupported(format!(
            "Can't make bitmap '{}' persistent in '{node}': {obstacle}",
            bitmap.name
        )),
        None => Error::unsupported(format!(
            "Can't store persistent bitmaps to {node}: Operation not supported"
        )),
    }
}

/// The granularities of bitmaps; limits of `qemu-img`.
const GRANULARITY: std::ops::RangeInclusive<u64> = 512..=1 << 31;

/// Marks the dirty ranges of the bitmap `from` of `source` in the bitmap `to` of `target`. Both may be in one image.
///
/// # Errors
/// A bitmap does not exist or is inconsistent, the disks have different sizes, or reading or writing fails.
pub fn merge_bitmap(source: &dyn Layer, from: &str, target: &dyn Layer, to: &str) -> Result<()> {
    let target_bitmaps = named_bitmap(target, to)?;
    let source_bitmaps = named_bitmap(source, from)?;
    if source.len() != target.len() {
        return Err(different_sizes(source, target));
    }
    copy_dirty_ranges(source_bitmaps, from, target_bitmaps, to)
}

/// The bitmaps of `layer`; an error unless one of them is called `name`.
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

/// The number of dirty ranges that one call of [`Bitmaps::mark`] gets; bounds the memory for a copy.
const BATCH: usize = 1 << 16;

fn copy_dirty_ranges(from: &dyn Bitmaps, from_name: &str, to: &dyn Bitmaps, name: &str) -> Result<()> {
    let mut batch = Vec::new();
    from.marked(from_name, &mut |range| {
        batch.push(range);
        if batch.len() == BATCH {
            to.mark(name, &batch)?;
            batch.clear();
        }
        Ok(())
    })?;
    // Called with an empty batch too: `mark` checks that the bitmap may be changed.
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
    fn dirty_ranges_and_states_are_copied() {
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
