//! The metadata of a sparse extent, which guest data must not overwrite.
//!
//! ```text
//!   |header|descriptor|directory, tables|directory, tables|grains ...       `reserved`, `tables`
//! ```
//!
//! In a damaged image, a grain table's entry may refer to any of these, and a directory's entry to a grain. Overlaps
//! that show when offsets are compared with the two directories are found before anything is written.

use std::collections::HashSet;

use diskimage_core::{Budget, ByteRange, Error, Result};

use super::extent::Extent;
use super::header::{Geometry, SECTOR};
use super::tables::{Grain, GrainTables, parse};
use super::{State, VmdkLayer};
use crate::layer_kit::reserved::{Pieces, Reserved};

/// The metadata of a sparse extent that is written to.
#[derive(Debug)]
pub(super) struct Occupied {
    /// The header, the descriptor and the directories.
    reserved: Reserved,
    /// The grain tables that the directories refer to.
    tables: Pieces,
    /// The offset of a grain table that lies beyond the end of the file.
    missing: Option<u64>,
    /// Offsets of the grain tables whose contents were validated since the image was opened.
    sound: HashSet<u64>,
}

impl Geometry {
    /// The number of entries of a directory.
    pub(super) fn tables(&self) -> u64 {
        self.capacity.div_ceil(self.grain.saturating_mul(self.entries))
    }

    /// Bytes of a grain table.
    pub(super) fn table_len(&self) -> u64 {
        (self.entries * self.entry_size()).next_multiple_of(SECTOR)
    }

    /// The bytes of the directory that starts at `start`.
    pub(super) fn directory_at(&self, start: u64) -> ByteRange {
        ByteRange::at(start, self.tables().saturating_mul(self.entry_size()))
    }

    /// The metadata that reads of grains depend on.
    pub(super) fn relied_on(&self) -> Reserved {
        Reserved::new([
            ("header", ByteRange::new(0, SECTOR)),
            ("grain directory", self.directory_at(self.directory)),
        ])
    }

    /// The metadata outside of grain tables.
    fn reserved(&self) -> Reserved {
        let redundant = self.redundant.map(|start| self.directory_at(start));
        Reserved::new([
            ("header", ByteRange::new(0, SECTOR)),
            ("grain directory", self.directory_at(self.directory)),
            (
                "redundant grain directory",
                redundant.unwrap_or(ByteRange::new(0, 0)),
            ),
            ("descriptor", self.descriptor),
        ])
    }
}

impl Occupied {
    /// Reads the metadata of extent `index`, with the table offsets in its directories.
    fn read(
        tables: &mut GrainTables,
        extents: &[Extent],
        index: usize,
        geometry: &Geometry,
        budget: &Budget,
    ) -> Result<Self> {
        let reserved = geometry.reserved();
        reserved.require_apart()?;
        let file_len = super::tables::device_of(extents, index)?
            .len()
            .next_multiple_of(SECTOR);
        let len = geometry.table_len();
        let mut found = Pieces::new("grain table", len, budget);
        let mut missing = None;
        for directory in geometry.directories() {
            let mut nth = 0;
            while nth < geometry.tables() {
                let left = geometry.tables() - nth;
                for entry in tables.entries(extents, index, directory.saturating_add(nth * 4), left)? {
                    nth += 1;
                    let offset = u64::from(entry) * SECTOR;
                    if offset == 0 {
                        continue;
                    }
                    found.add(offset)?;
                    if offset + len > file_len {
                        missing = Some(offset);
                    }
                }
            }
        }
        let tables = found.sort();
        tables.require_outside("descriptor", geometry.descriptor)?;
        Ok(Self {
            reserved,
            tables,
            missing,
            sound: HashSet::new(),
        })
    }

    /// Refuses guest data at `range` if it overlaps metadata.
    fn require_free(&self, range: ByteRange) -> Result<()> {
        self.reserved.require_outside("grain", range)?;
        self.tables.require_outside("grain", range)
    }

    /// Refuses to extend a truncated file: missing tables would then read as zeroes, like allocated ones.
    fn require_whole(&self) -> Result<()> {
        match self.missing {
            None => Ok(()),
            Some(offset) => Err(Error::corrupt(format!(
                "The grain table at {offset:#x} lies beyond the end of the file, which looks cut off"
            ))),
        }
    }
}

impl VmdkLayer {
    /// The metadata of extent `index`, read if it is not known yet.
    pub(super) fn occupied<'a>(
        &self,
        state: &'a mut State,
        extents: &[Extent],
        index: usize,
        geometry: &Geometry,
    ) -> Result<(&'a mut Occupied, &'a mut GrainTables)> {
        let State { tables, occupied, .. } = state;
        let known = match occupied.remove(&index) {
            Some(known) => known,
            None => Occupied::read(tables, extents, index, geometry, &self.budget)?,
        };
        Ok((occupied.entry(index).or_insert(known), tables))
    }

    /// Refuses grains of extent `index` at host range `range` if they overlap metadata.
    pub(super) fn require_grains(
        &self,
        state: &mut State,
        extents: &[Extent],
        index: usize,
        geometry: &Geometry,
        range: ByteRange,
    ) -> Result<()> {
        self.occupied(state, extents, index, geometry)?
            .0
            .require_free(range)
    }

    /// Refuses to extend the file of extent `index` if it was truncated.
    pub(super) fn require_whole(
        &self,
        state: &mut State,
        extents: &[Extent],
        index: usize,
        geometry: &Geometry,
    ) -> Result<()> {
        self.occupied(state, extents, index, geometry)?.0.require_whole()
    }

    /// Refuses to change the entry of `grain` if a directory has no table for it, if the table is shared, or if it is
    /// not a table: where most entries are invalid, the directory's entry refers to a grain.
    pub(super) fn require_table(
        &self,
        state: &mut State,
        extents: &[Extent],
        index: usize,
        geometry: &Geometry,
        grain: u64,
    ) -> Result<()> {
        let (occupied, tables) = self.occupied(state, extents, index, geometry)?;
        let mut copies = Vec::new();
        for directory in geometry.directories() {
            copies.push(tables.require_table(extents, index, geometry, directory, grain)?);
        }
        if copies.iter().all(|table| occupied.sound.contains(table)) {
            return Ok(());
        }
        for table in &copies {
            occupied.require_sound(tables, extents, index, geometry, *table)?;
        }
        if let [first, second] = *copies {
            require_agreement(tables, extents, index, geometry, [first, second])?;
        }
        occupied.sound.extend(copies);
        Ok(())
    }

    /// Refuses to change an embedded descriptor that overlaps other metadata.
    pub(super) fn require_descriptor(&self, state: &mut State) -> Result<()> {
        let extents = self.extents();
        let embedded = extents.first().filter(|extent| extent.kind.is_none());
        match embedded.and_then(Extent::geometry) {
            Some(geometry) => self.occupied(state, &extents, 0, &geometry).map(drop),
            None => Ok(()),
        }
    }
}

impl Occupied {
    fn require_sound(
        &self,
        tables: &mut GrainTables,
        extents: &[Extent],
        index: usize,
        geometry: &Geometry,
        table: u64,
    ) -> Result<()> {
        let whole = ByteRange::at(table, geometry.table_len());
        self.reserved.require_outside("grain table", whole)?;
        self.tables.require_unshared(table)?;
        let file_len = super::tables::device_of(extents, index)?.len();
        let end = file_len.next_multiple_of(geometry.grain.max(SECTOR));
        let (mut valid, mut invalid, mut nth) = (0_u64, 0_u64, 0);
        while nth < geometry.entries {
            let left = geometry.entries - nth;
            for entry in tables.entries(extents, index, table + nth * 4, left)? {
                nth += 1;
                let Ok(Grain::At(offset)) = parse(entry.into(), geometry) else {
                    continue;
                };
                // The length of a compressed grain is not in the table.
                let len = if geometry.compressed { 1 } else { geometry.grain };
                let grain = ByteRange::at(offset, len);
                if grain.end() <= end && self.require_free(grain).is_ok() {
                    valid += 1;
                } else {
                    invalid += 1;
                }
            }
        }
        if invalid > valid {
            return Err(Error::corrupt(format!(
                "What lies at {table:#x} is no grain table"
            )));
        }
        Ok(())
    }
}

/// Refuses two copies of a grain table that mostly differ: one of them is not a grain table. A few different entries
/// may be left by a crash.
fn require_agreement(
    tables: &mut GrainTables,
    extents: &[Extent],
    index: usize,
    geometry: &Geometry,
    copies: [u64; 2],
) -> Result<()> {
    let (mut same, mut different) = (0_u64, 0_u64);
    for nth in 0..geometry.entries {
        let [first, second] = copies.map(|table| tables.entry(extents, index, table + nth * 4));
        match (first?, second?) {
            (0, 0) => {}
            (first, second) if first == second => same += 1,
            _ => different += 1,
        }
    }
    if different > same {
        let [first, second] = copies;
        return Err(Error::corrupt(format!(
            "The grain tables at {first:#x} and {second:#x} are no copies of each other"
        )));
    }
    Ok(())
}
