//! A flat array of bytes, whatever stores it.
//!
//! ```text
//!   Device ── limits()    alignment and size of good requests
//!    ├ read_at, write_at, write_zeroes, discard, flush, resize
//!    ├ status ─► Extent   how many bytes are of one kind, and where they lie
//!    └ node ─► Node       driver, options and children in the block graph
//! ```

use std::fmt::Debug;
use std::sync::Arc;

use crate::json::Value;
use crate::{
    ByteRange, Error, ErrorKind, Event, Image, Info, NodeOptions, Origin, Permissions, Result, errno,
    to_index,
};

/// The longest file and the longest disk of qemu-img, in bytes: the last whole gibibyte before 2^63.
pub const MAX_DEVICE_LEN: u64 = (1 << 63) - (1 << 30);

/// Checks that a file can have `len` bytes at `offset`: that the range ends at [`MAX_DEVICE_LEN`] at the latest. What a
/// header refers to beyond that is damage, whatever the length of the file.
///
/// # Errors
/// `EIO`, as in qemu-img.
pub fn require_addressable(offset: u64, len: u64) -> Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= MAX_DEVICE_LEN => Ok(()),
        _ => Err(Error::from_errno(errno::EIO)),
    }
}

/// A flat array of bytes: a file, a network export, a decrypted view, an opened image.
///
/// Every method takes `&self`, moves the whole request or fails, and may be called from many threads at once.
pub trait Device: Debug + Send + Sync {
    /// The length in bytes.
    fn len(&self) -> u64;

    /// Whether the length is 0.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Alignment and size of the requests that suit the device; fixed once it is open.
    fn limits(&self) -> &Limits;

    /// Fills `buf` with the bytes from `offset` on.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for a read beyond [`Device::len`], and read errors of the storage.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Writes all of `buf` at `offset`. A write beyond the end of a file makes it longer.
    ///
    /// # Errors
    /// Write errors of the storage: no space, a device that was opened for reading only.
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()>;

    /// Makes `range` read as zeroes.
    ///
    /// # Errors
    /// As [`Device::write_at`], and [`ErrorKind::Unsupported`] as [`ZeroMode::FastOnly`] says.
    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()>;

    /// Discards the contents of `range`. Each device decides what the range reads as afterwards. A device without
    /// discard does nothing.
    ///
    /// # Errors
    /// Write errors of the storage, but not that it does not support discard.
    fn discard(&self, range: ByteRange) -> Result<()>;

    /// The kind of the bytes at the start of `range`, and for how many bytes that holds. `range` is not empty and lies
    /// inside the device; the extent is not empty and lies inside `range`.
    ///
    /// # Errors
    /// Read errors of the storage, and damage in the tables that are read for the answer.
    fn status(&self, range: ByteRange, detail: StatusDetail) -> Result<Extent>;

    /// Makes all completed writes durable.
    ///
    /// # Errors
    /// Write errors of the storage. A file whose flush has failed fails all later ones.
    fn flush(&self) -> Result<()>;

    /// Changes the length; new bytes read as zeroes.
    ///
    /// # Errors
    /// Write errors of the storage, a length that cannot be changed, an unsupported preallocation mode.
    fn resize(&self, len: u64, preallocation: Preallocation) -> Result<()>;

    /// Copies `range` to `target_offset` of `target` inside the kernel, if both devices are files. `Ok(false)` means
    /// that nothing was copied and the caller has to read and write.
    ///
    /// # Errors
    /// Errors after a part has been copied.
    fn copy_to(&self, _range: ByteRange, _target: &dyn Device, _target_offset: u64) -> Result<bool> {
        Ok(false)
    }

    /// The file behind the device, for [`Device::copy_to`] between two of them.
    fn as_file(&self) -> Option<&std::fs::File> {
        None
    }

    /// The image, if the device is one: gives access to its backing chain.
    fn as_image(&self) -> Option<&Image> {
        None
    }

    /// Is told about the step that a driver is about to take; see [`Event`].
    fn event(&self, _event: Event) {}

    /// Changes the permissions that the file is locked for. Devices that no other process can open do nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] if another process holds a conflicting lock; the locks stay as they were.
    fn lock(&self, _permissions: Permissions) -> Result<()> {
        Ok(())
    }

    /// Identifies the storage: two devices with equal identities are the same storage.
    fn identity(&self) -> Option<(u64, u64)> {
        None
    }

    /// Whether bytes that were not written yet read as zero on a device that was just created or truncated.
    fn is_zero_when_new(&self) -> bool {
        true
    }

    /// Whether its bytes are computed on each read and stored nowhere in this form.
    fn is_view(&self) -> bool {
        false
    }

    /// Bytes allocated in the file system, where known.
    fn allocated_bytes(&self) -> Option<u64> {
        None
    }

    /// The name to show to users.
    fn name(&self) -> String {
        String::new()
    }

    /// Its node in the block graph.
    fn node(&self) -> Node {
        Node {
            name: Some(self.name()),
            ..Node::default()
        }
    }

    /// Facts about the device for `info`.
    ///
    /// # Errors
    /// Damage in the tables that hold these facts.
    fn info(&self) -> Result<Info> {
        Ok(Info::default())
    }
}

/// The drivers whose bytes come from a server.
pub const NETWORK_DRIVERS: &[&str] = &["nbd"];

/// A node of the block graph: driver, options and children of a device.
#[derive(Clone, Debug, Default)]
pub struct Node {
    /// The driver's name.
    pub driver: &'static str,
    /// The options that are part of the node's `json:` filename, without the driver and the children.
    pub options: NodeOptions,
    /// The name that the user gave the node (`node-name`).
    pub node_name: Option<String>,
    /// A plain filename that opens the same node, if there is one.
    pub name: Option<String>,
    /// The child nodes, by their names among the options.
    pub children: Vec<(String, Arc<dyn Device>)>,
    /// See [`Origin::format_is_stated`].
    pub format_is_stated: bool,
}

impl Node {
    /// All options that open the node again, with the child nodes nested, in the order in which `qemu-img` prints
    /// them.
    pub fn to_json(&self) -> Value {
        let own = self
            .options
            .iter()
            .map(|(name, value)| (name.to_owned(), value.clone()));
        let driver = ("driver".to_owned(), Value::from(self.driver));
        let (mut children, mut listed) = (Vec::new(), Vec::<(String, Vec<Value>)>::new());
        for (name, child) in &self.children {
            let value = child.node().to_json();
            // Children called `children.0`, `children.1`, ... form a list.
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

    /// What is known about the image of this node, for the gate that opens the files that it refers to.
    pub fn origin(&self) -> Origin {
        Origin {
            format_is_stated: self.format_is_stated,
            is_remote: self.is_remote(),
        }
    }

    fn is_remote(&self) -> bool {
        NETWORK_DRIVERS.contains(&self.driver)
            || self.children.iter().any(|(_, child)| child.node().is_remote())
    }

    /// The filename that relative names in the image are resolved against: that of the file at the end of the chain of
    /// base children.
    pub fn base_name(&self) -> String {
        match self.base() {
            Some(file) => file.node().base_name(),
            None => self.name.clone().unwrap_or_default(),
        }
    }

    /// Whether its bytes come from several files, so that relative names cannot be resolved against one of them.
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

    /// The filename to show: the plain one, or `json:` and all options.
    pub fn shown_name(&self) -> String {
        match &self.name {
            Some(name) => name.clone(),
            None => format!("json:{}", self.to_json().compact()),
        }
    }
}

/// The names of the child that holds a node's bytes.
const BASES: [&str; 3] = ["file", "image", "raw"];

/// Alignment and size of the requests that suit a device, and its length if that is fixed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The preferred multiple of offsets and lengths; 1 if there is none. The device also serves other requests,
    /// slower.
    pub alignment: u32,
    /// The largest request that is passed on undivided.
    pub max_transfer: u32,
    /// How many requests should be in flight.
    pub parallelism: u32,
    /// qemu-img's message for a new image that does not fit the device, whose length is fixed.
    pub fixed_len_message: &'static str,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            alignment: 1,
            max_transfer: 1 << 30,
            parallelism: 8,
            fixed_len_message: "Cannot grow device files",
        }
    }
}

/// How a range is made zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroMode {
    /// Storage may be freed.
    Unmap,
    /// Storage stays allocated.
    KeepAllocated,
    /// Either way, but [`ErrorKind::Unsupported`] instead of writing zero bytes.
    FastOnly,
}

/// How much detail [`Device::status`] finds out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusDetail {
    /// Which image of the chain has the bytes. The file system is not asked for holes.
    Allocation,
    /// Also whether the bytes read as zero, as far as tables and file system know without reading them.
    Zeroes,
}

/// A run of bytes of one kind.
#[derive(Clone, Debug)]
pub struct Extent {
    /// Length in bytes; never zero.
    pub len: u64,
    /// The kind of the bytes.
    pub kind: ExtentKind,
    /// Depth in the backing chain of the image that has the bytes; 0 is the image asked.
    pub depth: u32,
    /// Device and host offset of the first byte, if the bytes are stored unchanged.
    pub host: Option<(Arc<dyn Device>, u64)>,
}

impl Extent {
    /// `len` bytes of data of the device asked, of whose place nothing is known.
    pub const fn data(len: u64) -> Self {
        Self {
            len,
            kind: ExtentKind::Data,
            depth: 0,
            host: None,
        }
    }
}

/// The kinds of [`Extent`].
///
/// | kind | reads as | reported by |
/// |---|---|---|
/// | `Data` | unknown | formats, files, exports |
/// | `Compressed` | unknown | formats |
/// | `Zero` | zero | formats for zero clusters, exports for zero holes |
/// | `FileHole` | zero | files; formats for a hole in allocated data |
/// | `PreallocatedZero` | zero | exports |
/// | `UnknownHole` | unknown | exports, `null-co` |
/// | `Unallocated` | zero | formats |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Bytes that must be read to be known.
    Data,
    /// Bytes of a compressed cluster.
    Compressed,
    /// A zero cluster; [`Extent::host`] is set if storage is allocated for it.
    Zero,
    /// A hole of the file: allocated in the format's tables, without storage in the file system.
    FileHole,
    /// Allocated storage that holds zeroes.
    PreallocatedZero,
    /// A hole whose contents are not known without reading them.
    UnknownHole,
    /// Allocated in no image of the chain.
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

/// How much of new space is allocated at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// None.
    #[default]
    Off,
    /// The format's tables map all of it, without storage in the file system.
    Metadata,
    /// Storage is allocated with `fallocate`.
    Falloc,
    /// Storage is allocated by writing zeroes.
    Full,
}

impl Preallocation {
    /// The mode with this name.
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
    /// Fills `buf` from `offset` on, with zeroes for bytes beyond the end: some programs do not pad a file after the
    /// metadata at its end.
    ///
    /// # Errors
    /// As [`Device::read_at`].
    pub fn read_padded(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let available = to_index(self.len().saturating_sub(offset).min(buf.len() as u64))?;
        let (head, tail) = buf.split_at_mut(available);
        tail.fill(0);
        if head.is_empty() {
            Ok(())
        } else {
            self.read_at(head, offset)
        }
    }

    /// Fills `buf` with the bytes from `offset` on, and fails if the device ends before.
    ///
    /// # Errors
    /// As [`Device::read_at`], and [`ErrorKind::CutOff`] with the message of `require`.
    pub fn read_whole(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.require(offset, buf.len() as u64)?;
        self.read_at(buf, offset)
    }

    /// Checks that `len` bytes from `offset` on lie inside the device. Bytes that a table points to and the device
    /// lacks were lost: they must not be read as zeroes.
    ///
    /// # Errors
    /// [`ErrorKind::CutOff`] if they do not.
    pub fn require(&self, offset: u64, len: u64) -> Result<()> {
        let device_len = self.len();
        match offset.checked_add(len) {
            Some(end) if end <= device_len => Ok(()),
            _ => Err(self.cut_off(offset.max(device_len), device_len)),
        }
    }

    /// The error for a device of `len` bytes that lacks the byte at `missing`.
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
