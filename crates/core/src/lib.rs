//! What disk image formats and protocols share.
//!
//! The crate defines the few traits everything else is built from, and the code that is the same for all:
//!
//! * [`Device`]: a flat array of bytes, wherever they live;
//! * [`Layer`]: one opened image *without* its backing chain. It maps guest offsets to host offsets and never moves bytes;
//! * [`Capabilities`]: the optional features of a layer: compression, snapshots, bitmaps, a check, ...
//! * [`Image`]: a layer with its backing image; it is a device again, and the only code that walks a backing chain;
//! * [`Format`]: an entry of the table from which a program picks drivers;
//! * [`OpenContext`]: what the nodes of one block graph share while they are opened;
//! * [`Gate`]: the caller's policy about which files an image may refer to;
//! * [`Error`], [`ByteRange`], [`Budget`], and the zero test.
//!
//! Requests go down only:
//!
//! ```text
//!   Image     bounds, backing chain, copy-on-write       (is a Device)
//!     │ map, plan_write: which bytes lie where
//!   Layer     the tables of one format
//!     │ read_at, write_at
//!   Device    a file, an export, a filter, or another Image
//! ```
#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

mod aligned;
mod allocation;
mod backing;
mod bitmaps;
mod budget;
mod capabilities;
mod check;
mod codec;
mod decoded_cache;
mod device;
pub mod errno;
mod error;
mod event;
mod filter_device;
mod flush_on_drop;
mod format;
mod gate;
mod image;
mod info;
pub mod json;
mod layer;
mod local_time;
mod memory;
pub mod name;
mod node;
mod objects;
mod open_context;
pub mod options;
mod progress;
mod range;
pub mod size;
mod snapshots;
mod threads;
mod throttle;
mod view;
mod zero;

pub use aligned::AlignedBuf;
pub use allocation::{has_room, is_expected_to_fail, resize, vec_with_room, zeroed};
pub use backing::Backing;
pub use bitmaps::{BitmapInfo, Bitmaps, NewBitmap};
pub use budget::{Budget, Buffer, Reservation};
pub use capabilities::{
    Amend, AmendRequest, Backed, BackingIdentity, BackingSearch, Capabilities, DiskIdentity, MultiFile,
    Unfinished,
};
pub use check::{Check, CheckReport, Repair};
pub use codec::{Codec, CompressionLevel, Encoded, EncodedCluster, EncodedForm, EncodedPlan, Encoder};
pub use decoded_cache::DecodedBlockCache;
pub use device::{
    Device, Extent, ExtentKind, Limits, MAX_DEVICE_LEN, NETWORK_DRIVERS, Node, Preallocation, StatusDetail,
    ZeroMode, require_addressable,
};
pub use error::{Error, ErrorKind, Result, ResultExt};
pub use event::Event;
pub use filter_device::{FilterDevice, Filtered, status_below};
pub use flush_on_drop::OnLost;
pub use format::{
    CreatePlan, CreateRequest, Format, FormatProperties, LOOSE, Measure, MeasureSource, NewFiles,
    OpenRequest, Probe, Score,
};
pub use gate::{ClosedGate, Gate, Origin, Permissions, Reference, Role};
pub use image::{Image, PendingEncoded, PendingWrite, ZeroDetection};
pub use info::{Detail, DetailValue, FileRole, Info, NamedFile, SnapshotInfo};
pub use layer::{HoleMeaning, Layer, ResizeRequest, Run, RunKind, WritePlan, WriteRun};
pub use local_time::LocalTime;
pub use memory::MemoryDevice;
pub use name::Name;
pub use node::{NodeOptions, is_identifier};
pub use objects::{Object, Objects, Secret, TlsCreds, TlsKind};
pub use open_context::{OnImageLost, OnNote, OpenContext, OpenFiles};
pub use progress::{Note, Progress};
pub use range::{ByteRange, align_down, align_up, div_ceil, saturating_index, saturating_u32, to_index};
pub use snapshots::{NewSnapshot, Snapshots};
pub use threads::thread_builder;
pub use throttle::{BucketConfig, Direction, ThrottleGroup, ThrottleLimits};
pub use view::{ReadOnlyView, View};
pub use zero::{is_zero, leading_run, write_zero_chunks};
