//! What must not be written over: a sparse extent's own structures.
//!
//! ```text
//!   |header|descriptor|directory, tables|directory, tables|grains ...       `reserved`, `tables`
//! ```
//!
//! A grain entry of a damaged image may lead to any of these, and a directory's entry to a grain. What can be told by
//! comparing places with the two directories is found before anything is written.

use std::collections::HashSet;

use diskimage_core::{Budget, ByteRange, Error, Result};

use super::extent::Extent;
use super::header::{Geometry, SECTOR};
use super::tables::{Grain, GrainTables, parse};
use super::{State, VmdkLayer};
use crate::layer_kit::reserved::{Pieces, Reserved};

/// What a sparse extent that is written to has besides grains.
#[derive(Debug)]
pub(super) struct Occupied {
    /// The header, the descriptor and the directories.
    reserved: Reserved,
    /// The grain tables that the directories lead to.
    tables: Pieces,
    /// One of which the file has no bytes.
    missing: Option<u64>,
    /// Those that were found to be tables since the image was opened.
    sound: HashSet<u64>,
}

impl Geometry {
    /// How many grain tables a directory leads to.
    pub(super) fn tables(&self) -> u64 {
        self.capacity.div_ceil(self.grain.saturating_mul(self.entries))
    }

    /// Bytes of a grain table.
    pub(super) fn table_len(&self) -> u64 {
        (self.entries * self.entry_size()).next_multiple_of(SECTOR)
    }

    fn directory_at(&self, start: u64) -> ByteRange {
        ByteRange::at(start, self.tables().saturating_mul(self.entry_size()))
    }

    /// Without what no grain can be read.
    pub(super) fn relied_on(&self) -> Reserved {
        Reserved::new([
            ("header", ByteRange::new(0, SECTOR)),
            ("grain directory", self.directory_at(self.directory)),
        ])
    }

    /// What is no grain's.
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
    /// What the directories of extent `index` say.
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
                for entry in tables.words(extents, index, directory.saturating_add(nth * 4), left)? {
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

    /// Refuses to write a guest's bytes to `range`, where something else is.
    fn require_free(&self, range: ByteRange) -> Result<()> {
        self.reserved.require_outside("grain", range)?;
        self.tables.require_outside("grain", range)
    }

    /// Refuses to make a file longer that was cut off: tables that are missing would seem to be there.
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
    /// What extent `index` has besides grains.
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

    /// Refuses to write to grains of extent `index` that are at `range`, where something else is.
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

    /// Refuses to make the file of extent `index` longer if it was cut off.
    pub(super) fn require_whole(
        &self,
        state: &mut State,
        extents: &[Extent],
        index: usize,
        geometry: &Geometry,
    ) -> Result<()> {
        self.occupied(state, extents, index, geometry)?.0.require_whole()
    }

    /// Refuses to change the entry of `grain` if there is no table for it in a directory, if one is shared, or if what lies
    /// there is none: where most entries make no sense, a directory's entry leads to a grain.
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

    /// Refuses to change a descriptor that is where something else is, too.
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
        let (mut sense, mut nonsense, mut nth) = (0_u64, 0_u64, 0);
        while nth < geometry.entries {
            let left = geometry.entries - nth;
            for entry in tables.words(extents, index, table + nth * 4, left)? {
                nth += 1;
                let Ok(Grain::At(offset)) = parse(entry.into(), geometry) else {
                    continue;
                };
                // Compressed grains may be short.
                let len = if geometry.compressed { 1 } else { geometry.grain };
                let grain = ByteRange::at(offset, len);
                if grain.end() <= end && self.require_free(grain).is_ok() {
                    sense += 1;
                } else {
                    nonsense += 1;
                }
            }
        }
        if nonsense > sense {
            return Err(Error::corrupt(format!(
                "What lies at {table:#x} is no grain table"
            )));
        }
        Ok(())
    }
}

/// Refuses two grain tables for the same grains that mostly say different things: one of them is something else. A crash may
/// leave a few entries that are in one of them only.
fn require_agreement(
    tables: &mut GrainTables,
    extents: &[Extent],
    index: usize,
    geometry: &Geometry,
    copies: [u64; 2],
) -> Result<()> {
    let (mut same, mut different) = (0_u64, 0_u64);
    for nth in 0..geometry.entries {
        let [first, second] = copies.map(|table| tables.word(extents, index, table + nth * 4));
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
