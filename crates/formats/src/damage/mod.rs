//! Tests of damaged images: one field of a sound image is damaged and one command changes the image. Every sector that
//! was readable before reads the same afterwards, or as the command wrote it.
//!
//! ```text
//!   sound image ──► damaged ──► read ──► opened for writing, one command, flushed ──► read
//!                                 \____________________ the same ____________________/
//! ```
//!
//! `DAMAGE_STEPS=100000 cargo test -p diskimage-formats damage -- --nocapture` runs more steps than the default.

mod kinds;

use std::collections::HashMap;
use std::sync::Arc;

use diskimage_core::options::Options;
use diskimage_core::{
    ByteRange, CreateRequest, Device, Error, ErrorKind, Gate, Image, NewFiles, NodeOptions, OpenContext,
    OpenRequest, Preallocation, Progress, Reference, Repair, ResizeRequest, Result, RunKind, ZeroMode,
};

use self::kinds::{Field, Kind};
use diskimage_testing::PagedFile;

/// Steps for each kind of image without `DAMAGE_STEPS`.
const STEPS: u64 = 500;
/// The number of sound images, which steps damage in turn.
const SOUND: u64 = 12;
/// The byte that commands write.
const WRITTEN: u8 = 0xee;

fn steps() -> u64 {
    let wanted = std::env::var("DAMAGE_STEPS");
    wanted.ok().and_then(|text| text.parse().ok()).unwrap_or(STEPS)
}

/// Pseudo-random numbers from a seed (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit.max(1)
    }

    fn one_of<T: Copy>(&mut self, values: &[T]) -> T {
        values[usize::try_from(self.below(values.len() as u64)).expect("small")]
    }

    /// A range inside one of the `parts` of `kind`.
    fn range(&mut self, kind: &Kind) -> ByteRange {
        let part = self.one_of(kind.parts);
        let at = part.start() + self.below(part.len());
        let most = self.one_of(&[512, kind.unit, kind.unit * 3]);
        let range = ByteRange::at(at, 1 + self.below(most));
        let aligned = match self.below(3) {
            _ if kind.is_stream => range.align_out(kind.unit),
            0 => range.align_out(kind.unit),
            1 => range.align_out(512),
            _ => range,
        };
        aligned.intersect(part)
    }
}

/// The files of an image.
#[derive(Clone)]
struct Files(HashMap<String, Arc<PagedFile>>);

impl Files {
    fn copy(&self) -> Self {
        Self(
            self.0
                .iter()
                .map(|(name, file)| (name.clone(), file.copy()))
                .collect(),
        )
    }

    fn open(&self, kind: &Kind, write: bool) -> Result<Image> {
        let file: Arc<dyn Device> = Arc::<PagedFile>::clone(&self.0["disk"]);
        let context = OpenContext::new(Arc::new(self.clone()));
        let layer = kind.format.open(OpenRequest {
            write,
            ..OpenRequest::new(file, "disk.vmdk", &mut NodeOptions::new(), &context)
        })?;
        Ok(Image::new(layer, None, "disk.vmdk", write))
    }
}

impl Gate for Files {
    fn open(&self, reference: &Reference<'_>) -> Result<Arc<dyn Device>> {
        let name = reference.options.text("filename").unwrap_or_default();
        match self.0.get(name) {
            Some(file) => Ok(Arc::<PagedFile>::clone(file)),
            None => Err(Error::new(ErrorKind::Denied, "no such file")),
        }
    }
}

/// A sound image with some written clusters.
fn sound(kind: &Kind, seed: u64) -> Files {
    let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ (seed + 1));
    let files = match kind.made {
        Some(made) => Files(HashMap::from([(
            "disk".to_owned(),
            Arc::new(PagedFile::new(made().into())),
        )])),
        None => created(kind),
    };
    let image = files.open(kind, true).expect("opens");
    for _ in 0..4 + random.below(12) {
        let mut range = random.range(kind);
        if kind.format.name() == "vmdk" {
            // A grain whose start is zero over the length of a table cannot be distinguished from a grain table.
            let disk = ByteRange::new(0, kind.size);
            range = range.align_out(kind.unit).intersect(disk);
        }
        let mut bytes = vec![0; usize::try_from(range.len()).expect("small")];
        for sector in bytes.chunks_mut(512) {
            sector.fill(u8::try_from(1 + random.below(200)).expect("small"));
        }
        // In a stream, each grain can be written once.
        let written = image.write_at(&bytes, range.start());
        assert!(written.is_ok() || kind.is_stream, "{written:?}");
    }
    encode_some(kind, &image, &mut random);
    image.flush().expect("flushes");
    files
}

/// A new image.
fn created(kind: &Kind) -> Files {
    let mut options = Options::new(kind.format.create_options());
    options.parse(kind.options).expect("valid options");
    let mut files = Files(HashMap::from([("disk".to_owned(), Arc::default())]));
    let objects = Arc::default();
    let plan = kind.format.plan_create(CreateRequest {
        name: "disk.vmdk",
        size: kind.size,
        options: &options,
        objects: &objects,
    });
    let created = plan.expect("valid options").write(NewFiles {
        file: Arc::<PagedFile>::clone(&files.0["disk"]),
        make_part: &mut |part| {
            let file = files.0.entry(part.to_owned()).or_default();
            Ok(Arc::<PagedFile>::clone(file))
        },
        backing: None,
    });
    created.expect("creates");
    files
}

/// Stores some compressed clusters, in formats that mix them with plain ones.
fn encode_some(kind: &Kind, image: &Image, random: &mut Random) {
    if kind.is_stream || kind.format.name() != "qcow" {
        return;
    }
    let mut encoder = image.layer().encoder(None).expect("has one").expect("has one");
    let mut out = Vec::new();
    for _ in 0..random.below(4) {
        let cluster = random.range(kind).first(1).align_out(kind.unit);
        let bytes = vec![0x55; usize::try_from(kind.unit).expect("small")];
        if encoder.encode(&bytes, &mut out).expect("encodes") {
            image.write_encoded(cluster.start(), &out).expect("writes");
        }
    }
}

/// The sectors of the disk by guest offset; `None` for an unreadable one.
type View = Vec<(u64, Option<Vec<u8>>)>;

fn view(kind: &Kind, files: &Files) -> View {
    let image = files.open(kind, false).ok();
    let mut view = Vec::new();
    for part in kind.parts {
        let mut at = part.start();
        while at < part.end() {
            let sector = image.as_ref().and_then(|image| {
                let mut sector = vec![0; 512];
                image.read_at(&mut sector, at).ok().map(|()| sector)
            });
            view.push((at, sector));
            at += kind.stride;
        }
    }
    view
}

/// A plausible wrong value for `field`.
fn damage(field: Field, fields: &[Field], file: &PagedFile, random: &mut Random) -> u64 {
    let own = field.read(file);
    let unit = field.unit;
    let offsets = [
        0,
        512,
        4096,
        file.len(),
        file.len() - file.len() % 512 + 512,
        file.len() / 2,
        1 << 40,
        random.below(file.len()),
        random.below(file.len()) / 512 * 512,
        random.below(file.len()) / 4096 * 4096,
        random.below(file.len()) >> 20 << 20,
    ];
    let offset = (random.one_of(&offsets) / unit) | field.flags;
    let other = random.one_of(fields).read(file);
    // The sector of a table's entry or of a header's field.
    let structure = (random.one_of(fields).at / 512 * 512 / unit) | field.flags;
    let entry = {
        let entries: Vec<Field> = fields.iter().copied().filter(|field| field.is_entry).collect();
        random.one_of(&entries_or(&entries, field)).read(file)
    };
    let values = [
        offset,
        offset,
        other,
        entry,
        entry,
        structure,
        structure,
        own.wrapping_add(1),
        own.wrapping_sub(1),
        own ^ 1 << random.below(field.width as u64 * 8),
        own.wrapping_add(8),
        1,
        u64::MAX,
        random.below(16),
    ];
    random.one_of(&values) & field.all_ones()
}

fn entries_or(entries: &[Field], field: Field) -> Vec<Field> {
    if entries.is_empty() {
        vec![field]
    } else {
        entries.to_vec()
    }
}

#[derive(Clone, Copy, Debug)]
enum Command {
    Write(ByteRange),
    Zero(ByteRange),
    Discard(ByteRange),
    Grow(u64),
    Check,
    Flush,
}

impl Command {
    fn random(kind: &Kind, random: &mut Random) -> Self {
        match random.below(12) {
            0..6 => Self::Write(random.range(kind)),
            6..8 => Self::Zero(random.range(kind)),
            8 => Self::Discard(random.range(kind)),
            9 => {
                let by = random.one_of(&[512, kind.unit, kind.unit * 40, 64 << 20, 600 << 20]);
                Self::Grow(by)
            }
            10 => Self::Check,
            _ => Self::Flush,
        }
    }

    fn run(self, image: &Image) -> Result<()> {
        match self {
            Self::Write(range) => {
                let bytes = vec![WRITTEN; usize::try_from(range.len()).expect("small")];
                image.write_at(&bytes, range.start())
            }
            Self::Zero(range) => image.write_zeroes(range, ZeroMode::Unmap),
            Self::Discard(range) => image.discard(range),
            Self::Grow(by) => {
                let len = (image.len().saturating_add(by)) / 512 * 512;
                let request = ResizeRequest::new(len, Preallocation::Off);
                if image.layer().new_parts(&request)?.is_empty() {
                    image.resize_with(&request)?;
                }
                Ok(())
            }
            Self::Check => image.layer().check(Repair::All, &Progress::none()).map(drop),
            Self::Flush => Ok(()),
        }
    }

    /// The guest range that may change, and the new value of its bytes.
    fn effect(self) -> (ByteRange, u8) {
        match self {
            Self::Write(range) => (range, WRITTEN),
            Self::Zero(range) | Self::Discard(range) => (range, 0),
            Self::Grow(_) | Self::Check | Self::Flush => (ByteRange::new(0, 0), 0),
        }
    }
}

/// Clusters that share host bytes with the clusters in `written` or with tables. Only kinds whose driver cannot detect
/// this have any.
fn shared(kind: &Kind, files: &Files, written: ByteRange, fields: &[Field]) -> Vec<ByteRange> {
    let Some(image) = files.open(kind, false).ok().filter(|_| kind.may_share) else {
        return Vec::new();
    };
    let disk = ByteRange::new(0, image.len());
    let stored = |cluster: &ByteRange| match image.layer().map(cluster.intersect(disk)).ok()?.kind {
        RunKind::Data { offset, .. } => Some(ByteRange::at(offset, kind.unit)),
        RunKind::Encoded(encoded) => Some(ByteRange::at(encoded.offset, encoded.stored)),
        RunKind::Zero { .. } | RunKind::Unallocated { .. } => None,
    };
    let clusters = |range: ByteRange| {
        let inside = range.intersect(disk);
        let units = if inside.is_empty() {
            0..0
        } else {
            inside.units(kind.unit)
        };
        units.map(|unit| ByteRange::at(unit * kind.unit, kind.unit))
    };
    let mut targets: Vec<ByteRange> = clusters(written).filter_map(|cluster| stored(&cluster)).collect();
    targets.extend(fields.iter().map(|field| ByteRange::at(field.at, 1)));
    let parts = kind.parts.iter().copied();
    parts
        .flat_map(clusters)
        .filter(|cluster| {
            let is_shared = |host: ByteRange| {
                let others = targets.iter().filter(|target| target.overlaps(host));
                // A cluster in `written` is a target itself.
                others.count() > usize::from(cluster.overlaps(written))
            };
            stored(cluster).is_some_and(is_shared)
        })
        .collect()
}

/// Counts of the outcomes of steps, to see that not all are refused.
#[derive(Debug, Default)]
struct Outcomes {
    unreadable: u64,
    not_opened: u64,
    refused: u64,
    done: u64,
}

fn step(kind: &Kind, sound: &Files, seed: u64, outcomes: &mut Outcomes) {
    let mut random = Random((seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    random.below(1);
    let files = sound.copy();
    let file = &files.0[kind.file];
    let fields = (kind.fields)(file);
    let is_entry = random.below(4) > 0;
    let candidates: Vec<Field> = fields
        .iter()
        .copied()
        .filter(|field| field.is_entry == is_entry)
        .collect();
    let field = random.one_of(&if candidates.is_empty() {
        fields.clone()
    } else {
        candidates
    });
    let (old, new) = (field.read(file), damage(field, &fields, file, &mut random));
    field.write(file, new);
    (kind.seal)(file);
    let command = Command::random(kind, &mut random);
    let before = view(kind, &files);
    if before.iter().all(|(_, sector)| sector.is_none()) {
        outcomes.unreadable += 1;
    }
    let (range, byte) = command.effect();
    let shared = shared(kind, &files, range, &fields);
    let outcome = files.open(kind, true).map(|image| {
        let outcome = command.run(&image);
        outcome.and(image.flush())
    });
    match &outcome {
        Err(_) => outcomes.not_opened += 1,
        Ok(Err(_)) => outcomes.refused += 1,
        Ok(Ok(())) => outcomes.done += 1,
    }
    let after = view(kind, &files);
    let is_done = matches!(outcome, Ok(Ok(()))) && !matches!(command, Command::Discard(_));
    for ((at, before), (_, after)) in before.iter().zip(&after) {
        let Some(before) = before else { continue };
        let sector = ByteRange::at(*at, 512);
        if shared.iter().any(|part| part.overlaps(sector)) {
            continue;
        }
        let details = || {
            format!(
                "{} {:?}, step {seed}: {old:#x} became {new:#x} in {field:?}; {command:?} gave {outcome:?}; at {at:#x}",
                kind.format.name(),
                kind.options,
            )
        };
        let Some(after) = after else {
            panic!("no longer readable: {}", details());
        };
        for (nth, (was, is)) in (*at..).zip(before.iter().zip(after)) {
            let is_written = range.start() <= nth && nth < range.end() && *is == byte;
            let may_stay = was == is && !(is_done && range.start() <= nth && nth < range.end());
            assert!(is_written || may_stay, "was {was:#x}, is {is:#x}: {}", details());
        }
    }
}

fn try_steps(kind: &Kind) {
    let images: Vec<Files> = (0..SOUND).map(|seed| sound(kind, seed)).collect();
    let mut outcomes = Outcomes::default();
    let steps = steps();
    for (seed, image) in (0..steps).zip(images.iter().cycle()) {
        step(kind, image, seed, &mut outcomes);
    }
    println!(
        "{} {:?}: {steps} steps, {outcomes:?}",
        kind.format.name(),
        kind.options
    );
    assert!(outcomes.done > steps / 10 && outcomes.refused > 0);
}

macro_rules! kinds {
    ($($test:ident: $kind:ident,)*) => {$(
        #[test]
        fn $test() {
            try_steps(&kinds::$kind);
        }
    )*};
}

kinds! {
    qed: QED,
    qcow: QCOW,
    vmdk_monolithic_sparse: VMDK_SPARSE,
    vmdk_with_zeroed_grains: VMDK_ZEROED,
    vmdk_in_parts: VMDK_PARTS,
    vmdk_stream: VMDK_STREAM,
    vdi_dynamic: VDI,
    vdi_static: VDI_STATIC,
    vpc_dynamic: VPC,
    vpc_fixed: VPC_FIXED,
    vpc_with_clear_bits: VPC_BITMAPS,
    vpc_differencing: VPC_DIFFERENCING,
    vhdx: VHDX,
    vhdx_with_large_sectors: VHDX_4096,
    parallels: PARALLELS,
}
