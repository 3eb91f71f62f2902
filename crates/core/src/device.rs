//! A flat array of bytes, wherever it lives.

use std::fmt::Debug;
use std::sync::Arc;

use crate::json::Value;
use crate::{ByteRange, Error, ErrorKind, Event, Image, Info, NodeOptions, Permissions, Result, to_index};

/// A flat array of bytes: a file, a network export, a decrypted view, an opened image.
///
/// Every method takes `&self`, moves the whole request or fails, and may be called from many threads at once.
pub trait Device: Debug + Send + Sync {
    /// How many bytes there are.
    fn len(&self) -> u64;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What requests suit the device; fixed once it is open.
    fn limits(&self) -> &Limits;

    /// Fills `buf` with the bytes from `offset` on.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where bytes are asked for beyond [`Device::len`], else what the operating system says.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Writes all of `buf` at `offset`. A file grows when it is written beyond its end.
    ///
    /// # Errors
    /// What the operating system says.
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()>;

    /// Makes `range` read as zeroes.
    ///
    /// # Errors
    /// What the operating system says.
    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()>;

    /// Gives up the contents of `range`; what it reads as afterwards is the device's own matter.
    ///
    /// # Errors
    /// What the operating system says. A device that cannot discard does nothing.
    fn discard(&self, range: ByteRange) -> Result<()>;

    /// What is known about the bytes at the start of `range`, and how far that holds. `range` is not empty and inside
    /// the device; neither is the answer's extent.
    ///
    /// # Errors
    /// What the operating system says, and damage found in tables on the way.
    fn status(&self, range: ByteRange, detail: StatusDetail) -> Result<Extent>;

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// What the operating system says.
    fn flush(&self) -> Result<()>;

    /// Changes the length; what is new reads as zeroes.
    ///
    /// # Errors
    /// What the operating system says, and modes that the device does not offer.
    fn resize(&self, len: u64, preallocation: Preallocation) -> Result<()>;

    /// The words for that a new image does not fit, where the length is what it is.
    fn fixed_len_message(&self) -> &'static str {
        "Cannot grow device files"
    }

    /// Moves `len` bytes from `offset` here to `target_offset` of `target` without passing them through this
    /// process, if the two devices know a way. `Ok(false)` means nothing was done and the caller copies.
    ///
    /// # Errors
    /// What the operating system says after it began.
    fn copy_to(&self, _range: ByteRange, _target: &dyn Device, _target_offset: u64) -> Result<bool> {
        Ok(false)
    }

    /// The file behind the device, for [`Device::copy_to`] between two of them.
    fn as_file(&self) -> Option<&std::fs::File> {
        None
    }

    /// The image that the device is, for what has to be known of its chain.
    fn as_image(&self) -> Option<&Image> {
        None
    }

    /// Learns what is about to be done with it.
    fn event(&self, _event: Event) {}

    /// Changes what the storage below is locked for. Devices that nobody else can open have nothing to do.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] if another opener is in the way; the locks stay as they were.
    fn lock(&self, _permissions: Permissions) -> Result<()> {
        Ok(())
    }

    /// Tells whether two devices are the same storage: they are if both answer the same.
    fn identity(&self) -> Option<(u64, u64)> {
        None
    }

    /// Whether what was not written yet reads as zero when the device has just been made or emptied.
    fn is_zero_when_new(&self) -> bool {
        true
    }

    /// Whether its bytes are made on their way and stored nowhere as they are.
    fn is_view(&self) -> bool {
        false
    }

    /// Bytes taken on the storage below, where that is known.
    fn allocated_bytes(&self) -> Option<u64> {
        None
    }

    /// The name to show for it.
    fn name(&self) -> String {
        String::new()
    }

    /// How it stands in the block graph.
    fn node(&self) -> Node {
        Node {
            name: Some(self.name()),
            ..Node::default()
        }
    }

    /// What it says of itself.
    ///
    /// # Errors
    /// Damage in the tables that it reads for this.
    fn info(&self) -> Result<Info> {
        Ok(Info::default())
    }
}

/// How a device stands in the block graph.
#[derive(Clone, Debug, Default)]
pub struct Node {
    /// The driver's name.
    pub driver: &'static str,
    /// The options without which it would be another device, but for the driver and the nodes below.
    pub options: NodeOptions,
    /// What the user calls the node (`node-name`).
    pub node_name: Option<String>,
    /// A plain name that says it all, if there is one.
    pub name: Option<String>,
    /// The nodes below, by their names among the options.
    pub children: Vec<(String, Arc<dyn Device>)>,
}

impl Node {
    /// All options that it takes to open it again, with the nodes below nested, in the order in which the original
    /// prints them.
    pub fn to_json(&self) -> Value {
        let own = self
            .options
            .iter()
            .map(|(name, value)| (name.to_owned(), value.clone()));
        let driver = ("driver".to_owned(), Value::from(self.driver));
        let (mut children, mut listed) = (Vec::new(), Vec::<(String, Vec<Value>)>::new());
        for (name, child) in &self.children {
            let value = child.node().to_json();
            // Nodes called `children.0`, `children.1`, ... are a list.
            match name.rsplit_once('.') {
                None => children.push((name.clone(), value)),
                Some((list, _)) => match listed.iter_mut().find(|(name, _)| name == list) {
                    Some((_, members)) => members.push(value),
                    None => listed.push((list.to_owned(), vec![value])),
                },
            }
        }
        children.extend(
            listed
                .into_iter()
                .map(|(name, members)| (name, Value::List(members))),
        );
        Value::object(own.chain([driver]).chain(children)).in_table_order()
    }

    /// The name that relative names inside it start from: that of the file it ends in, whatever is between.
    pub fn base_name(&self) -> String {
        match self.base() {
            Some(file) => file.node().base_name(),
            None => self.name.clone().unwrap_or_default(),
        }
    }

    /// Whether it ends in several files at once, so that there is no one place that relative names could start from.
    pub fn spans_several_files(&self) -> bool {
        match self.base() {
            Some(file) => file.node().spans_several_files(),
            None => !self.children.is_empty(),
        }
    }

    fn base(&self) -> Option<&Arc<dyn Device>> {
        let children = &self.children;
        let named = |base: &&str| children.iter().find(|(name, _)| name == base);
        BASES.iter().find_map(named).map(|(_, file)| file)
    }

    /// The name to show: the plain one, or `json:` and all options.
    pub fn shown_name(&self) -> String {
        match &self.name {
            Some(name) => name.clone(),
            None => format!("json:{}", self.to_json().compact()),
        }
    }
}

/// What nodes call the one below that they are in.
const BASES: [&str; 3] = ["file", "image", "raw"];

/// What requests suit a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Offsets and lengths of requests are best multiples of this; 1 if any will do. The device copes with others.
    pub alignment: u32,
    /// The largest request it takes in one piece.
    pub max_transfer: u32,
    /// How many requests it wants in flight.
    pub parallelism: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            alignment: 1,
            max_transfer: 1 << 30,
            parallelism: 8,
        }
    }
}

/// How zeroes come about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroMode {
    /// Storage may be given back.
    Unmap,
    /// Storage stays allocated.
    KeepAllocated,
    /// As either, but fail with [`ErrorKind::Unsupported`] instead of writing zeroes byte by byte.
    FastOnly,
}

/// How much trouble [`Device::status`] takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusDetail {
    /// Which layer has the bytes is enough; holes of the storage below are not looked for.
    Allocation,
    /// Also whether they read as zero, where tables and the file system can tell without reading.
    Zeroes,
}

/// What a run of bytes is.
#[derive(Clone, Debug)]
pub struct Extent {
    /// How many bytes the answer holds for; never zero.
    pub len: u64,
    /// What kind of bytes they are.
    pub kind: ExtentKind,
    /// How many images further down the chain the bytes come from; 0 is the image asked.
    pub depth: u32,
    /// Where the first byte lies, if it lies anywhere as it is.
    pub host: Option<(Arc<dyn Device>, u64)>,
}

/// The kinds of [`Extent`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Bytes that have to be read to be known.
    Data,
    /// Bytes that have to be decompressed.
    Compressed,
    /// Reads as zero; with [`Extent::host`] if storage is set aside for it.
    Zero,
    /// A hole of the storage below: allocated as far as the format is concerned, reads as zero.
    FileHole,
    /// Written with zeroes as far as the storage below knows: takes room, reads as zero.
    PreallocatedZero,
    /// Takes no room on the storage below, and what it reads as is not known without reading.
    UnknownHole,
    /// No image of the chain has it; reads as zero.
    Unallocated,
}

impl ExtentKind {
    /// Whether the bytes are known to be zero.
    pub fn is_zero(self) -> bool {
        matches!(
            self,
            Self::Zero | Self::FileHole | Self::PreallocatedZero | Self::Unallocated
        )
    }
}

/// How much of a new area is set aside at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// The format's own tables, but no storage.
    Metadata,
    /// Storage by `fallocate`.
    Falloc,
    /// Storage by writing zeroes.
    Full,
}

impl Preallocation {
    /// The mode of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Off, Self::Metadata, Self::Falloc, Self::Full]
            .into_iter()
            .find(|mode| mode.name() == name)
    }

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Metadata => "metadata",
            Self::Falloc => "falloc",
            Self::Full => "full",
        }
    }
}

impl dyn Device + '_ {
    /// Reads at `offset` what there is, and zeroes for what lies beyond the end: metadata at the end of a file that is
    /// not padded.
    ///
    /// # Errors
    /// As [`Device::read_at`].
    pub fn read_padded(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let there = to_index(self.len().saturating_sub(offset).min(buf.len() as u64))?;
        let (head, tail) = buf.split_at_mut(there);
        tail.fill(0);
        if head.is_empty() {
            Ok(())
        } else {
            self.read_at(head, offset)
        }
    }

    /// Fills `buf` with the bytes from `offset` on, all of which the device has to have.
    ///
    /// # Errors
    /// As [`Device::read_at`], and [`ErrorKind::CutOff`] in the words of `require`.
    pub fn read_whole(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.require(offset, buf.len() as u64)?;
        self.read_at(buf, offset)
    }

    /// Checks that `len` bytes from `offset` on lie inside the device. What a table leads to and the device does not have
    /// was lost: it must not be taken for zeroes.
    ///
    /// # Errors
    /// [`ErrorKind::CutOff`] if they do not.
    pub fn require(&self, offset: u64, len: u64) -> Result<()> {
        let there = self.len();
        match offset.checked_add(len) {
            Some(end) if end <= there => Ok(()),
            _ => Err(self.cut_off(offset.max(there), there)),
        }
    }

    /// The error of bytes from `missing` on that a device of `len` bytes should have.
    #[cold]
    fn cut_off(&self, missing: u64, len: u64) -> Error {
        let name = match self.name() {
            name if name.is_empty() => "the file".to_owned(),
            name => format!("'{name}'"),
        };
        Error::new(
            ErrorKind::CutOff,
            format!("Bytes at offset {missing:#x} are missing: {name} ends at {len:#x} and looks cut off"),
        )
    }
}
