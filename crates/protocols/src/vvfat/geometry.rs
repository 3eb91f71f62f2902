//! The geometry of the disk, and the structures that follow from it alone: master boot record, boot sector, capacity.

use super::entry::Label;

/// Bytes in a sector.
pub(super) const SECTOR: u64 = 512;
/// The contents of a sector.
pub(super) type Sector = [u8; 512];
/// Sectors in a cluster, whatever the size of the disk.
const SECTORS_PER_CLUSTER: u8 = 16;
/// Bytes in a cluster.
pub(super) const CLUSTER: u64 = SECTOR * SECTORS_PER_CLUSTER as u64;
/// The capacity of the root directory in entries, on FAT32 as well.
pub(super) const ROOT_ENTRIES: u16 = 512;
/// Sectors before the partition of a hard disk.
const HIDDEN_SECTORS: u8 = 63;
/// The boot sector.
const RESERVED_SECTORS: u64 = 1;
const FATS: u8 = 2;
/// The first cluster after a root directory of the full size.
const FIRST_DATA_CLUSTER: u64 = 2;

/// The width of entries in the FAT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FatType {
    Fat12,
    Fat16,
    Fat32,
}

impl FatType {
    /// The bits of an entry, which are also in the name of the type.
    pub(super) fn bits(self) -> u64 {
        match self {
            Self::Fat12 => 12,
            Self::Fat16 => 16,
            Self::Fat32 => 32,
        }
    }

    /// The entry that ends a chain of clusters.
    pub(super) fn end_of_chain(self) -> u32 {
        match self {
            Self::Fat12 => 0xfff,
            Self::Fat16 => 0xffff,
            Self::Fat32 => 0x0fff_ffff,
        }
    }
}

/// The geometry of one disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) fat: FatType,
    floppy: bool,
    cylinders: u16,
    heads: u8,
    sectors_per_track: u8,
}

impl Geometry {
    /// A hard disk of 504 MiB, of 31.5 MiB with FAT12, or a floppy of 1.44 or 2.88 MB.
    pub(super) fn new(fat: FatType, floppy: bool) -> Self {
        let (cylinders, heads, sectors_per_track) = match (floppy, fat) {
            (true, FatType::Fat12) => (80, 2, 18),
            (true, _) => (80, 2, 36),
            (false, FatType::Fat12) => (64, 16, 63),
            (false, _) => (1024, 16, 63),
        };
        Self {
            fat,
            floppy,
            cylinders,
            heads,
            sectors_per_track,
        }
    }

    /// The default: a hard disk with FAT16, or a 2.88 MB floppy with FAT12.
    pub(super) fn by_default(floppy: bool) -> Self {
        let geometry = Self::new(FatType::Fat16, floppy);
        if floppy {
            Self {
                fat: FatType::Fat12,
                ..geometry
            }
        } else {
            geometry
        }
    }

    /// The number of sectors of the disk.
    fn sectors(&self) -> u64 {
        u64::from(self.cylinders) * u64::from(self.heads) * u64::from(self.sectors_per_track)
    }

    /// The length of the disk in bytes.
    pub(super) fn len(&self) -> u64 {
        self.sectors() * SECTOR
    }

    fn hidden_sectors(&self) -> u8 {
        if self.floppy { 0 } else { HIDDEN_SECTORS }
    }

    fn media(&self) -> u8 {
        if self.floppy { 0xf0 } else { 0xf8 }
    }

    /// The first entry of the FAT, which has the media descriptor.
    pub(super) fn media_entry(&self) -> u32 {
        (self.fat.end_of_chain() & !0xff) | u32::from(self.media())
    }

    fn sectors_per_fat(&self) -> u16 {
        let clusters = self.sectors() / u64::from(SECTORS_PER_CLUSTER);
        let sectors = (clusters * self.fat.bits()).div_ceil(8 * SECTOR);
        u16::try_from(sectors).expect("the largest disk has 64512 clusters")
    }

    /// The offset of the boot sector.
    pub(super) fn boot_sector(&self) -> u64 {
        u64::from(self.hidden_sectors()) * SECTOR
    }

    /// The offset of the first FAT.
    pub(super) fn fats(&self) -> u64 {
        self.boot_sector() + RESERVED_SECTORS * SECTOR
    }

    /// The length of one FAT in bytes.
    pub(super) fn fat_len(&self) -> u64 {
        u64::from(self.sectors_per_fat()) * SECTOR
    }

    /// The offset of the root directory, which is cluster 0 here.
    pub(super) fn root(&self) -> u64 {
        self.fats() + u64::from(FATS) * self.fat_len()
    }

    /// The first cluster that is not usable. As in qemu-img, the hidden sectors are subtracted twice.
    pub(super) fn end_cluster(&self) -> u32 {
        let root_end = self.root() + FIRST_DATA_CLUSTER * CLUSTER;
        let room = self.len() - root_end - self.boot_sector();
        u32::try_from(FIRST_DATA_CLUSTER + room / CLUSTER).expect("the largest disk has 64512 clusters")
    }

    /// The message for a directory that needs more clusters.
    pub(super) fn does_not_fit(&self) -> String {
        // A megabyte is 2000 sectors here, as on floppy labels.
        let hundredths = (self.partition_sectors() * 100 + 1000) / 2000;
        format!(
            "Directory does not fit in FAT{} (capacity {}.{:02} MB)",
            self.fat.bits(),
            hundredths / 100,
            hundredths % 100
        )
    }

    fn partition_sectors(&self) -> u64 {
        self.sectors() - u64::from(self.hidden_sectors())
    }

    /// The master boot record of a hard disk.
    pub(super) fn master_boot_record(&self) -> Sector {
        let mut sector = [0; 512];
        sector[0x1b8..0x1bc].copy_from_slice(&DISK_SIGNATURE.to_le_bytes());
        let last = self.cylinders - 1;
        let [cylinder, high] = last.to_le_bytes();
        let kind = match self.fat {
            FatType::Fat12 => 0x01,
            FatType::Fat16 => 0x06,
            FatType::Fat32 => 0x0b,
        };
        let entry = &mut sector[0x1be..0x1ce];
        // Active, and starts at the second track.
        entry[..4].copy_from_slice(&[0x80, 1, 1, 0]);
        entry[4..8].copy_from_slice(&[
            kind,
            self.heads - 1,
            self.sectors_per_track | (high << 6),
            cylinder,
        ]);
        entry[8..12].copy_from_slice(&u32::from(HIDDEN_SECTORS).to_le_bytes());
        entry[12..].copy_from_slice(&self.partition_sectors_32().to_le_bytes());
        sector[0x1fe..].copy_from_slice(&BOOT_SIGNATURE);
        sector
    }

    fn partition_sectors_32(&self) -> u32 {
        u32::try_from(self.partition_sectors()).expect("the largest disk has 1032192 sectors")
    }

    /// The boot sector. As in qemu-img, FAT32 has that of FAT16.
    pub(super) fn boot_sector_bytes(&self, label: &Label) -> Sector {
        let mut sector = [0; 512];
        let mut put = |at: usize, bytes: &[u8]| sector[at..at + bytes.len()].copy_from_slice(bytes);
        let total = self.partition_sectors_32();
        let (small, large) = match u16::try_from(total) {
            Ok(small) => (small, 0),
            Err(_) => (0, total),
        };
        let kind: &[u8] = match self.fat {
            FatType::Fat12 => b"FAT12   ",
            FatType::Fat16 | FatType::Fat32 => b"FAT16   ",
        };
        put(0x00, &[0xeb, 0x3e, 0x90]);
        put(0x03, b"MSWIN4.1");
        put(0x0b, &[0x00, 0x02, SECTORS_PER_CLUSTER, 1, 0, FATS]);
        put(0x11, &ROOT_ENTRIES.to_le_bytes());
        put(0x13, &small.to_le_bytes());
        put(0x15, &[self.media()]);
        put(0x16, &self.sectors_per_fat().to_le_bytes());
        put(0x18, &[self.sectors_per_track, 0, self.heads, 0]);
        put(0x1c, &[self.hidden_sectors()]);
        put(0x20, &large.to_le_bytes());
        put(0x24, &[if self.floppy { 0 } else { 0x80 }, 0, 0x29]);
        put(0x27, &VOLUME_ID.to_le_bytes());
        put(0x2b, label.bytes());
        put(0x36, kind);
        put(0x1fe, &BOOT_SIGNATURE);
        sector
    }
}

const DISK_SIGNATURE: u32 = 0xbe1a_fdfa;
const VOLUME_ID: u32 = 0xfabe_1afd;
const BOOT_SIGNATURE: [u8; 2] = [0x55, 0xaa];

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected values were found by extending a file until `qemu-img` refused it.
    #[test]
    fn capacities_are_those_of_qemu_img() {
        let end = |fat, floppy| Geometry::new(fat, floppy).end_cluster();
        assert_eq!(end(FatType::Fat12, false), 4022);
        assert_eq!(end(FatType::Fat16, false), 64472);
        assert_eq!(end(FatType::Fat32, false), 64441);
        assert_eq!(end(FatType::Fat12, true), 179);
        assert_eq!(end(FatType::Fat16, true), 359);
        assert_eq!(end(FatType::Fat32, true), 359);
        assert_eq!(Geometry::by_default(true).end_cluster(), 359);
    }

    #[test]
    fn the_error_has_the_capacity() {
        let said = |fat, floppy| Geometry::new(fat, floppy).does_not_fit();
        assert_eq!(
            said(FatType::Fat16, false),
            "Directory does not fit in FAT16 (capacity 516.06 MB)"
        );
        assert_eq!(
            said(FatType::Fat12, false),
            "Directory does not fit in FAT12 (capacity 32.22 MB)"
        );
        assert_eq!(
            said(FatType::Fat12, true),
            "Directory does not fit in FAT12 (capacity 1.44 MB)"
        );
    }
}
