//! The kinds of images that are damaged, and the fields of their metadata.

use diskimage_core::{ByteRange, Device, Format};

use diskimage_testing::{FULLY_PRESENT, PagedFile, SparseBlock, VhdImage, VhdParent, VhdxImage};

/// A kind of image.
pub(super) struct Kind {
    pub(super) format: &'static dyn Format,
    pub(super) options: &'static str,
    /// Makes an image by hand, of a kind that is not created; `options` is then its name.
    pub(super) made: Option<fn() -> Vec<u8>>,
    pub(super) size: u64,
    /// Bytes of a cluster, block or grain.
    pub(super) unit: u64,
    /// The guest ranges that are written and read.
    pub(super) parts: &'static [ByteRange],
    /// The distance of the sectors that are read, in bytes; 512 for all.
    pub(super) stride: u64,
    /// The name of the file that is damaged.
    pub(super) file: &'static str,
    pub(super) fields: fn(&PagedFile) -> Vec<Field>,
    /// Recomputes the checksums.
    pub(super) seal: fn(&PagedFile),
    /// Whether two entries that refer to the same cluster are only found by a walk over all tables.
    pub(super) may_share: bool,
    /// Whether only whole unallocated clusters can be written.
    pub(super) is_stream: bool,
}

/// A field of metadata: a number in the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Field {
    pub(super) at: u64,
    pub(super) width: usize,
    pub(super) big_endian: bool,
    /// The unit of its value, in bytes.
    pub(super) unit: u64,
    /// Bits that are set in every allocated entry.
    pub(super) flags: u64,
    /// Whether it is a table's entry, not a header's field.
    pub(super) is_entry: bool,
}

const fn number(at: u64, width: usize, unit: u64) -> Field {
    Field {
        at,
        width,
        big_endian: false,
        unit,
        flags: 0,
        is_entry: false,
    }
}

/// Adds the first entries of a table, and all further ones that are not zero, to `found`.
fn table(file: &PagedFile, start: u64, count: u64, like: Field, found: &mut Vec<Field>) {
    for nth in 0..count.min(4096) {
        let field = Field {
            at: start + nth * like.width as u64,
            is_entry: true,
            ..like
        };
        if nth < 6 || field.read(file) & field.all_ones() != 0 {
            found.push(field);
        }
    }
}

impl Field {
    pub(super) fn read(&self, file: &PagedFile) -> u64 {
        file.number(self.at, self.width, self.big_endian)
    }

    pub(super) fn write(&self, file: &PagedFile, value: u64) {
        file.set_number(self.at, self.width, self.big_endian, value);
    }

    pub(super) fn all_ones(&self) -> u64 {
        u64::MAX >> (64 - self.width * 8)
    }

    const fn big(self) -> Self {
        Self {
            big_endian: true,
            ..self
        }
    }
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

const BASE: Kind = Kind {
    format: &crate::QedFormat,
    options: "",
    made: None,
    size: 5 * MIB,
    unit: 4096,
    parts: &[
        ByteRange::new(0, 96 * KIB),
        ByteRange::new(2 * MIB - 32 * KIB, 2 * MIB + 32 * KIB),
        ByteRange::new(5 * MIB - 16 * KIB, 5 * MIB),
    ],
    stride: 512,
    file: "disk",
    fields: qed,
    seal: |_| {},
    may_share: true,
    is_stream: false,
};

const VMDK: Kind = Kind {
    format: &crate::Vmdk,
    size: 33 * MIB + 512 * 7,
    unit: 64 * KIB,
    parts: &[
        ByteRange::new(0, 384 * KIB),
        ByteRange::new(32 * MIB - 128 * KIB, 32 * MIB + 128 * KIB),
    ],
    fields: vmdk,
    ..BASE
};

const BLOCKS: Kind = Kind {
    size: 5 * MIB + 512 * 3,
    unit: MIB,
    parts: &[ByteRange::new(0, 5 * MIB + 512 * 3)],
    stride: 64 * KIB,
    may_share: false,
    ..BASE
};

pub(super) static QED: Kind = Kind {
    options: "cluster_size=4096,table_size=1",
    ..BASE
};
pub(super) static QCOW: Kind = Kind {
    format: &crate::QcowFormat,
    fields: qcow,
    ..BASE
};
pub(super) static VMDK_SPARSE: Kind = VMDK;
pub(super) static VMDK_ZEROED: Kind = Kind {
    options: "zeroed_grain=on",
    ..VMDK
};
pub(super) static VMDK_PARTS: Kind = Kind {
    options: "subformat=twoGbMaxExtentSparse",
    file: "disk-s001.vmdk",
    ..VMDK
};
pub(super) static VMDK_STREAM: Kind = Kind {
    options: "subformat=streamOptimized",
    is_stream: true,
    ..VMDK
};
pub(super) static VDI: Kind = Kind {
    format: &crate::Vdi,
    fields: vdi,
    ..BLOCKS
};
pub(super) static VDI_STATIC: Kind = Kind {
    format: &crate::Vdi,
    options: "static=on",
    fields: vdi,
    ..BLOCKS
};
const VPC_BLOCKS: Kind = Kind {
    format: &crate::Vpc,
    options: "force_size=on",
    size: 9 * MIB,
    unit: 2 * MIB,
    parts: &[ByteRange::new(0, 9 * MIB)],
    fields: vpc,
    seal: seal_vpc,
    ..BLOCKS
};
pub(super) static VPC: Kind = VPC_BLOCKS;
pub(super) static VPC_FIXED: Kind = Kind {
    format: &crate::Vpc,
    options: "force_size=on,subformat=fixed",
    size: MIB,
    unit: 64 * KIB,
    parts: &[ByteRange::new(0, MIB)],
    fields: vpc_fixed,
    seal: seal_vpc_fixed,
    ..BLOCKS
};
pub(super) static VPC_BITMAPS: Kind = Kind {
    options: "clear bits in sector bitmaps",
    made: Some(|| vhd(None)),
    stride: 9 * 512,
    fields: vpc_bitmaps,
    ..VPC_BLOCKS
};
pub(super) static VPC_DIFFERENCING: Kind = Kind {
    options: "differencing",
    made: Some(|| {
        vhd(Some(VhdParent {
            unique_id: [1; 16],
            locators: vec![
                (*b"W2ru", ".\\parent.vhd".to_owned()),
                (*b"W2ku", "C:\\parent.vhd".to_owned()),
            ],
            ..VhdParent::default()
        }))
    }),
    stride: 9 * 512,
    fields: vpc_differencing,
    ..VPC_BLOCKS
};
pub(super) static VHDX_4096: Kind = Kind {
    format: &crate::Vhdx,
    options: "sectors of 4096 bytes",
    made: Some(|| {
        let image = VhdxImage {
            size: 6 * MIB,
            sector: 4096,
            blocks: vec![(FULLY_PRESENT, sparse(2, 256)), (FULLY_PRESENT, sparse(0, 256))],
            ..VhdxImage::default()
        };
        image.build()
    }),
    size: 6 * MIB,
    parts: &[ByteRange::new(0, 6 * MIB)],
    fields: vhdx,
    seal: seal_vhdx,
    ..BLOCKS
};
pub(super) static VHDX: Kind = Kind {
    format: &crate::Vhdx,
    options: "block_size=1M",
    fields: vhdx,
    seal: seal_vhdx,
    ..BLOCKS
};
pub(super) static PARALLELS: Kind = Kind {
    format: &crate::Parallels,
    options: "cluster_size=4096",
    size: 256 * KIB,
    unit: 4096,
    parts: &[ByteRange::new(0, 256 * KIB)],
    stride: 512,
    fields: parallels,
    ..BLOCKS
};

fn qed(file: &PagedFile) -> Vec<Field> {
    let mut found = vec![
        number(4, 4, 1),
        number(8, 4, 1),
        number(12, 4, 1),
        number(40, 8, 1),
        number(48, 8, 1),
        number(56, 4, 1),
        number(60, 4, 1),
    ];
    let entry = number(0, 8, 1);
    let l1 = file.number(40, 8, false);
    table(file, l1, 512, entry, &mut found);
    for nth in 0..3 {
        let l2 = file.number(l1 + nth * 8, 8, false);
        if l2 != 0 {
            table(file, l2, 512, entry, &mut found);
        }
    }
    found
}

fn qcow(file: &PagedFile) -> Vec<Field> {
    let mut found = vec![
        number(8, 8, 1).big(),
        number(16, 4, 1).big(),
        number(24, 8, 1).big(),
        number(32, 1, 1).big(),
        number(33, 1, 1).big(),
        number(40, 8, 1).big(),
    ];
    let entry = number(0, 8, 1).big();
    let l1 = file.number(40, 8, true);
    table(file, l1, 3, entry, &mut found);
    for nth in 0..3 {
        let l2 = file.number(l1 + nth * 8, 8, true);
        if l2 != 0 {
            table(file, l2, 512, entry, &mut found);
        }
    }
    found
}

fn vmdk(file: &PagedFile) -> Vec<Field> {
    let mut found = vec![number(44, 4, 1)];
    found.extend([12, 20, 28, 36, 48, 56, 64].map(|at| number(at, 8, 512)));
    let entry = number(0, 4, 512);
    for directory in [48, 56].map(|at| file.number(at, 8, false) * 512) {
        table(file, directory, 2, entry, &mut found);
        for nth in 0..2 {
            let grains = file.number(directory + nth * 4, 4, false) * 512;
            table(file, grains, 512, entry, &mut found);
        }
    }
    found
}

fn vdi(file: &PagedFile) -> Vec<Field> {
    let mut found = vec![number(0x170, 8, 1)];
    found.extend([0x154, 0x158].map(|at| number(at, 4, 1)));
    found.extend([0x4c, 0x178, 0x180, 0x184].map(|at| number(at, 4, 1)));
    table(
        file,
        file.number(0x154, 4, false),
        6,
        number(0, 4, MIB),
        &mut found,
    );
    found
}

fn vpc(file: &PagedFile) -> Vec<Field> {
    let mut found = vec![
        number(16, 8, 1).big(),
        number(48, 8, 1).big(),
        number(60, 4, 1).big(),
        number(512 + 16, 8, 1).big(),
        number(512 + 28, 4, 1).big(),
        number(512 + 32, 4, 1).big(),
    ];
    table(file, 1536, 5, number(0, 4, 512).big(), &mut found);
    found
}

/// A disk of two blocks that are partly written, on a parent or not.
fn vhd(parent: Option<VhdParent>) -> Vec<u8> {
    let image = VhdImage {
        size: 9 * MIB,
        parent,
        blocks: vec![sparse(3, 4096), sparse(0, 4096)],
        ..VhdImage::default()
    };
    image.build()
}

/// A block of `sectors` sectors that is partly written.
fn sparse(index: u64, sectors: u64) -> SparseBlock {
    SparseBlock {
        index,
        written: vec![
            (0..3, 0x11),
            (sectors / 4..sectors / 2, 0x12),
            (sectors - 1..sectors, 0x13),
        ],
        stale: 0x55,
    }
}

fn vpc_bitmaps(file: &PagedFile) -> Vec<Field> {
    let mut found = vpc(file);
    // Some numbers in the bitmaps of the two blocks.
    for block in [0, 3] {
        let bitmap = file.number(1536 + block * 4, 4, true) * 512;
        found.extend([0, 64, 128].map(|at| number(bitmap + at, 8, 1)));
    }
    found
}

fn vpc_differencing(file: &PagedFile) -> Vec<Field> {
    let mut found = vpc_bitmaps(file);
    for locator in [0, 1] {
        let at = 512 + 576 + locator * 24;
        found.extend([number(at + 8, 4, 1).big(), number(at + 16, 8, 1).big()]);
    }
    found
}

/// Recomputes the checksum of `len` bytes at `start`; it is stored at byte `at` of them.
fn sum(file: &PagedFile, start: u64, len: usize, at: u64) {
    file.set_number(start + at, 4, true, 0);
    let mut bytes = vec![0; len];
    file.read_at(&mut bytes, start).expect("inside");
    let sum = bytes.iter().map(|byte| u64::from(*byte)).sum::<u64>();
    file.set_number(start + at, 4, true, !sum);
}

fn seal_vpc(file: &PagedFile) {
    sum(file, 0, 512, 64);
    sum(file, 512, 1024, 36);
}

fn vpc_fixed(file: &PagedFile) -> Vec<Field> {
    let footer = file.len() - 512;
    vec![
        number(footer + 48, 8, 1).big(),
        number(footer + 56, 2, 1).big(),
        number(footer + 58, 1, 1).big(),
        number(footer + 28, 4, 1).big(),
    ]
}

fn seal_vpc_fixed(file: &PagedFile) {
    sum(file, file.len() - 512, 512, 64);
}

fn vhdx(file: &PagedFile) -> Vec<Field> {
    let mut found = Vec::new();
    for header in [64 * KIB, 128 * KIB] {
        found.extend([number(header + 72, 8, 1), number(header + 68, 4, 1)]);
    }
    let regions = 192 * KIB;
    for nth in 0..2 {
        found.extend([
            number(regions + 32 + nth * 32, 8, 1),
            number(regions + 40 + nth * 32, 4, 1),
        ]);
    }
    let (bat, metadata) = (
        file.number(regions + 32, 8, false),
        file.number(regions + 64, 8, false),
    );
    for nth in 0..5 {
        found.push(number(metadata + 32 + nth * 32 + 16, 4, 1));
    }
    found.push(number(metadata + 64 * KIB, 4, 1));
    found.push(number(metadata + 64 * KIB + 8, 8, 1));
    let entry = Field {
        flags: 6,
        ..number(0, 8, 1)
    };
    table(file, bat, 8, entry, &mut found);
    found
}

fn seal_vhdx(file: &PagedFile) {
    for (start, len) in [(64, 4), (128, 4), (192, 64), (256, 64)] {
        let mut bytes = vec![0; len << 10];
        file.read_at(&mut bytes, start * KIB).expect("inside");
        bytes[4..8].fill(0);
        let checksum = crc32c::crc32c(&bytes);
        file.set_number(start * KIB + 4, 4, false, checksum.into());
    }
}

fn parallels(file: &PagedFile) -> Vec<Field> {
    // Not the cluster size: as in qemu-img, opening the image would then drop the entries of clusters beyond the end of
    // the file.
    let mut found = [32, 48].map(|at| number(at, 4, 512)).to_vec();
    found.push(number(36, 8, 512));
    found.push(number(56, 8, 512));
    table(file, 64, 64, number(0, 4, 4096), &mut found);
    found
}
