//! Changes options with which an image was created.
//!
//! Invalid combinations are refused before anything changes. Then the changes are made one after the other. Each is
//! published by one write to the first sector of the header, is durable before the next, and works on the reopened
//! image.

mod version;
mod zero;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use diskimage_core::options::{OptionDef, Options};
use diskimage_core::{AmendRequest, Error, Layer, Preallocation, Progress, ResizeRequest, Result, ResultExt};

use super::Qcow2;
use super::encrypt::Encrypted;
use super::files::read_header;
use super::header::feature::{Autoclear, Compatible, Incompatible};
use super::header::{Header, field};
use super::metadata::Metadata;
use super::options;
use crate::luks;
use crate::luks::amend::SlotChange;
use crate::luks::volume::Volume;

/// The options of `amend`, in qemu-img's order.
pub(super) const AMEND: &[OptionDef] = &[
    OptionDef::BACKING_FILE,
    OptionDef::BACKING_FMT,
    options::COMPAT,
    options::DATA_FILE,
    options::DATA_FILE_RAW,
    luks::options::ITER_TIME.named("encrypt.iter-time"),
    luks::amend::KEYSLOT.named("encrypt.keyslot"),
    luks::amend::NEW_SECRET.named("encrypt.new-secret"),
    luks::amend::OLD_SECRET.named("encrypt.old-secret"),
    luks::amend::STATE.named("encrypt.state"),
    options::LAZY_REFCOUNTS,
    options::REFCOUNT_BITS,
    OptionDef::SIZE,
];

/// The wanted changes; `None` leaves a property unchanged.
#[derive(Clone, Debug, Default)]
struct Changes {
    version: Option<u32>,
    refcount_order: Option<u32>,
    lazy_refcounts: Option<bool>,
    data_file: Option<String>,
    data_file_raw: Option<bool>,
    size: Option<u64>,
}

fn names_key_slots(options: &Options) -> bool {
    AMEND
        .iter()
        .any(|def| def.name.starts_with("encrypt.") && options.is_given(def.name))
}

fn change_key_slots(volume: &Volume, request: &AmendRequest<'_>) -> Result<()> {
    let change = SlotChange {
        options: request.options,
        prefix: "encrypt.",
        objects: request.objects,
        force: request.force,
    };
    change.apply(volume)
}

impl Changes {
    /// Checks the options against each other and the image, with qemu-img's messages and in its order.
    fn parse(request: &AmendRequest<'_>, header: &Header) -> Result<Self> {
        let options = request.options;
        let version = match options.text("compat") {
            None => header.version,
            Some("0.10" | "v2") => 2,
            Some("1.1" | "v3") => 3,
            Some(other) => return Err(Error::invalid(format!("Unknown compatibility level {other}"))),
        };
        check_backing(request, header)?;
        let data_file = options.text("data_file").map(str::to_owned);
        let has_data_file = header.features.incompatible.has(Incompatible::DATA_FILE);
        if data_file.is_some() && !has_data_file {
            return Err(Error::invalid(
                "data-file can only be set for images that use an external data file",
            ));
        }
        let raw = header.features.autoclear.has(Autoclear::DATA_FILE_RAW);
        let data_file_raw = options.flag("data_file_raw").filter(|wanted| *wanted != raw);
        if data_file_raw == Some(true) {
            return Err(Error::invalid("data-file-raw cannot be set on existing images"));
        }
        let order = refcount_order(options.number("refcount_bits"), version, header)?;
        let lazy = options.flag("lazy_refcounts");
        if lazy == Some(true) && version < 3 {
            return Err(Error::invalid(
                "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)",
            ));
        }
        if version < header.version {
            check_downgrade(header)?;
        }
        let is_lazy = header.features.compatible.has(Compatible::LAZY_REFCOUNTS);
        Ok(Self {
            version: Some(version).filter(|version| *version != header.version),
            refcount_order: Some(order).filter(|order| *order != header.geometry.refcount_order),
            lazy_refcounts: lazy.filter(|lazy| *lazy != is_lazy && version >= 3),
            data_file,
            data_file_raw,
            size: size_option(options)?,
        })
    }
}

/// The new size. qemu-img treats `size=0` as not given.
fn size_option(options: &Options) -> Result<Option<u64>> {
    match options.size("size") {
        Some(size) if i64::try_from(size).is_err() => Err(Error::invalid("Image size cannot be negative")),
        size => Ok(size.filter(|size| *size > 0)),
    }
}

/// Accepts the name and the format of the backing file only if they equal the present ones.
fn check_backing(request: &AmendRequest<'_>, header: &Header) -> Result<()> {
    let (file, format) = (
        request.options.text("backing_file"),
        request.options.text("backing_fmt"),
    );
    if file.is_none() && format.is_none() {
        return Ok(());
    }
    match &header.backing {
        Some(backing) if file == Some(backing.name.text()) && format == backing.format.as_deref() => Ok(()),
        _ => Err(Error::unsupported("Cannot amend the backing file")
            .hint("You can use 'qemu-img rebase' instead.")),
    }
}

fn refcount_order(bits: Option<u64>, version: u32, header: &Header) -> Result<u32> {
    let bits = bits.unwrap_or(1 << header.geometry.refcount_order);
    if !bits.is_power_of_two() || bits > 64 {
        return Err(Error::invalid(
            "Refcount width must be a power of two and may not exceed 64 bits",
        ));
    }
    let present = 1 << header.geometry.refcount_order;
    if version < 3 && bits != 16 {
        return Err(Error::invalid(if bits != present {
            "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)"
        } else {
            "compat=0.10 requires refcount_bits=16"
        }));
    }
    Ok(bits.trailing_zeros())
}

fn check_downgrade(header: &Header) -> Result<()> {
    let incompatible = header.features.incompatible;
    if incompatible.has(Incompatible::DATA_FILE) {
        return Err(Error::unsupported("Cannot downgrade an image with a data file"));
    }
    if incompatible.has(Incompatible::COMPRESSION) {
        return Err(Error::unsupported(
            "Cannot downgrade an image with compression type zstd: compat=0.10 has zlib only",
        ));
    }
    match incompatible.0 & !(Incompatible::DIRTY | Incompatible::CORRUPT) {
        0 => Ok(()),
        bits => Err(Error::unsupported(format!(
            "Cannot downgrade an image with incompatible features {bits:#x} set"
        ))),
    }
}

impl Qcow2 {
    /// Amends the image. Afterwards this layer refuses writes, because its header is out of date.
    pub(super) fn amend_impl(&self, request: &AmendRequest<'_>) -> Result<()> {
        let volume = self.volume_to_change(request.options)?;
        let changes = Changes::parse(request, &self.header)?;
        if let Some(volume) = volume {
            change_key_slots(volume, request)?;
        }
        let resize = |len| ResizeRequest {
            backing_len: request.backing_len,
            ..ResizeRequest::new(len, Preallocation::Off)
        };
        self.flush().context(|| "Could not flush the image")?;
        self.write.store(false, Ordering::Relaxed);
        let image = self.reopen()?;
        // After an upgrade to version 3 the resize itself checks the size, with the rules of version 3.
        if let Some(len) = changes.size.filter(|_| changes.version != Some(3)) {
            image.check_resize_impl(&resize(len))?;
        }
        let steps = Steps {
            all: u64::from(changes.version.is_some()) + u64::from(changes.refcount_order.is_some()),
            progress: request.progress,
        };
        let mut done = 0;
        let upgrade = changes.version == Some(3);
        if upgrade {
            steps.report(done, 0, 2);
            image.complete_snapshots()?;
            image.rewrite_header(3).context(|| UPDATING_HEADER)?;
            steps.report(done, 1, 2);
            done += 1;
            steps.report(done, 0, 2);
        }
        if let Some(order) = changes.refcount_order {
            self.reopen()?
                .change_width(order, &|part, whole| steps.report(done, part, whole))?;
            done += 1;
            steps.report(done, 0, 1);
        }
        self.reopen()?
            .change_features(&changes)
            .context(|| UPDATING_HEADER)?;
        if let Some(len) = changes.size {
            let image = self.reopen()?;
            image.resize_impl(&resize(len))?;
            image.flush()?;
        }
        if changes.version == Some(2) {
            let image = self.reopen()?;
            image.check_snapshot_sizes()?;
            image
                .expand_zero_clusters(&|part, whole| steps.report(done, part, whole))
                .context(|| "Failed to turn zero into data clusters")?;
            image.rewrite_header(2).context(|| UPDATING_HEADER)?;
        }
        Ok(())
    }

    /// Checks that all snapshots have the size of the disk: version 2 stores no other.
    fn check_snapshot_sizes(&self) -> Result<()> {
        let snapshots = self.read_snapshots()?;
        if snapshots
            .iter()
            .all(|snapshot| snapshot.info.disk_size == self.header.size)
        {
            Ok(())
        } else {
            Err(Error::unsupported(
                "Internal snapshots prevent downgrade of image",
            ))
        }
    }

    /// The LUKS volume whose key slots the options change, if they do.
    fn volume_to_change(&self, options: &Options) -> Result<Option<&Volume>> {
        if !names_key_slots(options) {
            return Ok(None);
        }
        match &self.encrypted {
            Some(Encrypted::Luks(volume)) => Ok(Some(volume)),
            Some(Encrypted::Aes(_)) => Err(Error::unsupported("Only LUKS encryption options can be amended")),
            None => Err(Error::invalid(
                "Can't amend encryption options - encryption not present",
            )),
        }
    }

    /// Opens the image again with its present header.
    fn reopen(&self) -> Result<Arc<Self>> {
        let header = read_header(&self.file, false)?;
        let mut image = Self::assemble(self.parts(header), true, true);
        image.begin_writing(false)?;
        Ok(Arc::new(image))
    }

    fn change_width(&self, order: u32, report: &dyn Fn(u64, u64)) -> Result<()> {
        let mut state = self.lock();
        let Metadata { cache, refcounts } = &mut state.metadata;
        cache.clear()?;
        let len = self.file.len();
        let rewritten = refcounts.rewrite(cache, &*self.file, order, report);
        if rewritten.is_err() {
            // Nothing refers to the new structure. If the file cannot be cut, its clusters stay free.
            let _ = self.file.resize(len, Preallocation::Off);
        }
        let new = rewritten?;
        self.patch_header(|head| {
            head[WIDTH_AT..WIDTH_AT + 4].copy_from_slice(&order.to_be_bytes());
            let at = TABLE_AT;
            head[at..at + 8].copy_from_slice(&new.table_offset.get().to_be_bytes());
            head[at + 8..at + 12].copy_from_slice(&new.table_clusters.to_be_bytes());
        })
        .context(|| UPDATING_HEADER)?;
        let image = self.reopen()?;
        let mut now = image.lock();
        now.metadata.release_structure(refcounts)?;
        now.metadata.cache.write_back()?;
        now.metadata.cache.sync()
    }

    fn change_features(&self, changes: &Changes) -> Result<()> {
        if let Some(lazy) = changes.lazy_refcounts {
            let features = self.header.features.compatible.0 & !Compatible::LAZY_REFCOUNTS;
            let bit = if lazy { Compatible::LAZY_REFCOUNTS } else { 0 };
            self.file
                .write_at(&(features | bit).to_be_bytes(), field::COMPATIBLE)?;
        }
        if changes.data_file_raw == Some(false) {
            let features = self.header.features.autoclear.0 & !Autoclear::DATA_FILE_RAW;
            self.file.write_at(&features.to_be_bytes(), field::AUTOCLEAR)?;
        }
        self.file.flush()?;
        match &changes.data_file {
            Some(name) => self.rename_data_file(name),
            None => Ok(()),
        }
    }

    /// Changes the first bytes of the header, which are in one sector, with one write.
    fn patch_header(&self, change: impl FnOnce(&mut [u8; FIXED])) -> Result<()> {
        let mut head = [0; FIXED];
        self.file.read_at(&mut head, 0)?;
        change(&mut head);
        self.file.write_at(&head, 0)?;
        self.file.flush()
    }
}

const UPDATING_HEADER: &str = "Failed to update the image header";

/// The bytes of the header up to and including the refcount order.
const FIXED: usize = 100;
const WIDTH_AT: usize = 96;
const TABLE_AT: usize = 48;

const _: () = assert!(TABLE_AT as u64 == field::REFCOUNT_TABLE);

/// Splits the progress into equal parts for each large change, as qemu-img does.
struct Steps<'a> {
    all: u64,
    progress: &'a Progress<'a>,
}

impl Steps<'_> {
    fn report(&self, done: u64, part: u64, whole: u64) {
        let whole = whole.max(1);
        self.progress.set(done * whole + part, self.all.max(1) * whole);
    }
}
