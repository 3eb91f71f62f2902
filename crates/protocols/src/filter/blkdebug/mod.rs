//! `blkdebug`: injects errors into requests, and simulates the limits of other devices.
//!
//! Source: QEMU's `docs/devel/testing/blkdebug.rst` and `BlockdevOptionsBlkdebug` in its reference of QMP.

mod config;
mod rules;

use std::sync::Arc;

use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{
    ByteRange, Device, Error, Event, Extent, FilterDevice, Filtered, Limits, Node, NodeOptions, Permissions,
    Result, StatusDetail, ZeroMode, align_up, status_below, write_zero_chunks,
};

use self::rules::{Request, Rules};
use super::{ChildKind, Filter, FilterChild, FilterRequest, ParseName, child, name_child, read_only};

#[derive(Debug)]
pub(crate) struct Blkdebug;

const OPTIONS: &[OptionDef] = &[
    OptionDef::new("config", OptionKind::Text, "A file with rules"),
    OptionDef::new("align", OptionKind::Size, "Requests are multiples of this").or("0"),
    OptionDef::new("max-transfer", OptionKind::Size, "The longest request").or("0"),
    OptionDef::new(
        "opt-write-zero",
        OptionKind::Size,
        "Zeroes come in multiples of this",
    )
    .or("0"),
    OptionDef::new("max-write-zero", OptionKind::Size, "So many zeroes at once").or("0"),
    OptionDef::new(
        "opt-discard",
        OptionKind::Size,
        "Discarding goes by multiples of this",
    )
    .or("0"),
    OptionDef::new("max-discard", OptionKind::Size, "So much is discarded at once").or("0"),
];

impl Filter for Blkdebug {
    fn name(&self) -> &'static str {
        "blkdebug"
    }

    fn prefixes(&self) -> &'static [&'static str] {
        &["blkdebug"]
    }

    /// `blkdebug:CONFIG:IMAGE`; `CONFIG` may be empty.
    fn parse(&self, name: &str) -> Result<NodeOptions> {
        let words = name.split_once(':').and_then(|(_, rest)| rest.split_once(':'));
        let (config, image) =
            words.ok_or_else(|| Error::invalid("blkdebug requires both config file and image path"))?;
        let mut options = NodeOptions::new();
        if !config.is_empty() {
            options.set("config", config);
        }
        options.set("x-image", image);
        Ok(options)
    }

    fn children(&self, options: &mut NodeOptions, parse_name: ParseName) -> Result<Vec<FilterChild>> {
        name_child(options, "x-image", "image", parse_name)?;
        Ok(vec![child("image", ChildKind::Bytes)])
    }

    fn open(&self, request: FilterRequest<'_>) -> Result<Arc<dyn Device>> {
        let below = Arc::clone(&request.only_child()?.device);
        let only_config = request.options.iter().all(|(name, _)| name == "config");
        let mut node = request.node(self.name(), |_| true);
        let options = request.options.take_known(OPTIONS)?;
        let config = options.text("config");
        if only_config {
            let image = below.node().name;
            node.name = image.map(|image| format!("blkdebug:{}:{image}", config.unwrap_or_default()));
        }
        let rules = Rules::new();
        if let Some(name) = config {
            let unreadable = |error: Error| {
                let cause = error.errno().map_or(error, Error::from_errno);
                cause.context("Could not read blkdebug config file")
            };
            let file = (request.open_file)(name).map_err(unreadable)?;
            config::read(&*file, &rules)?;
        }
        rules.take(request.options)?;
        let permissions = ChildPermissions::take(request.options)?;
        if permissions.writes() && !request.write {
            return Err(read_only());
        }
        let constraints = Constraints::new(&options, below.limits())?;
        rules.start();
        Ok(Arc::new(Filtered(BlkdebugDevice {
            below,
            rules,
            constraints,
            permissions,
            node,
        })))
    }
}

/// The simulated limits of requests.
#[derive(Debug)]
struct Constraints {
    limits: Limits,
    zero_unit: u64,
    max_zero: u64,
    discard_unit: u64,
    max_discard: u64,
}

impl Constraints {
    fn new(options: &Options, below: &Limits) -> Result<Self> {
        let given = |name: &str| options.size(name).unwrap_or(0);
        let refuse =
            |name: &str, value: u64| Error::invalid(format!("Cannot meet constraints with {name} {value}"));
        let align = given("align");
        if align != 0 && (!align.is_power_of_two() || align >= i32::MAX.unsigned_abs().into()) {
            return Err(refuse("align", align));
        }
        let unit = align.max(1);
        let multiple = |name: &str, unit: u64| {
            let value = given(name);
            if value != 0 && (!value.is_multiple_of(unit) || value >= i32::MAX.unsigned_abs().into()) {
                return Err(refuse(name, value));
            }
            Ok(value)
        };
        let max_transfer = multiple("max-transfer", unit)?;
        let zero_unit = multiple("opt-write-zero", unit)?;
        let max_zero = multiple("max-write-zero", zero_unit.max(unit))?;
        let discard_unit = multiple("opt-discard", unit)?;
        let max_discard = multiple("max-discard", discard_unit.max(unit))?;
        let narrow = |value: u64, otherwise: u32| match u32::try_from(value) {
            Ok(0) | Err(_) => otherwise,
            Ok(value) => value,
        };
        Ok(Self {
            limits: Limits {
                alignment: narrow(align, below.alignment),
                max_transfer: narrow(max_transfer, below.max_transfer),
                ..below.clone()
            },
            zero_unit: zero_unit.max(1),
            max_zero,
            discard_unit: discard_unit.max(1),
            max_discard,
        })
    }

    /// The first `most` bytes of `range`; all of it if `most` is 0.
    fn limit(range: ByteRange, most: u64) -> ByteRange {
        if most == 0 { range } else { range.first(most) }
    }
}

/// The permissions that the filter takes on its child and does not share, in addition to those of its own users.
#[derive(Clone, Copy, Debug, Default)]
struct ChildPermissions {
    take: [bool; 4],
    unshare: [bool; 4],
}

/// The names of permissions in the order of [`ChildPermissions`].
const PERMISSIONS: [&str; 4] = ["consistent-read", "write", "write-unchanged", "resize"];

impl ChildPermissions {
    fn take(options: &mut NodeOptions) -> Result<Self> {
        Ok(Self {
            take: Self::list(options, "take-child-perms")?,
            unshare: Self::list(options, "unshare-child-perms")?,
        })
    }

    fn list(options: &mut NodeOptions, name: &str) -> Result<[bool; 4]> {
        let mut list = options.take_node(name);
        let mut claimed = [false; 4];
        for index in 0.. {
            let Some(word) = list.take_text(&index.to_string()) else {
                break;
            };
            let at = PERMISSIONS.iter().position(|known| *known == word);
            let at = at.ok_or_else(|| {
                Error::invalid(format!("Parameter '{name}' does not accept value '{word}'"))
            })?;
            claimed[at] = true;
        }
        Ok(claimed)
    }

    fn writes(self) -> bool {
        self.take[1..].contains(&true)
    }

    fn add_to(self, permissions: Permissions) -> Permissions {
        let [read, write, _, resize] = self.take;
        Permissions {
            read: permissions.read || read,
            write: permissions.write || write,
            resize: permissions.resize || resize,
            share_write: permissions.share_write && !self.unshare[1],
            share_resize: permissions.share_resize && !self.unshare[3],
        }
    }
}

#[derive(Debug)]
struct BlkdebugDevice {
    below: Arc<dyn Device>,
    rules: Rules,
    constraints: Constraints,
    permissions: ChildPermissions,
    node: Node,
}

impl BlkdebugDevice {
    fn write_zero_bytes(&self, range: ByteRange) -> Result<()> {
        write_zero_chunks(range, |zeroes, offset| self.write_at(zeroes, offset))
    }
}

impl FilterDevice for BlkdebugDevice {
    fn below(&self) -> &Arc<dyn Device> {
        &self.below
    }

    fn limits(&self) -> &Limits {
        &self.constraints.limits
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.rules
            .check(Request::Read, ByteRange::at(offset, buf.len() as u64))?;
        self.below.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.rules
            .check(Request::Write, ByteRange::at(offset, buf.len() as u64))?;
        self.below.write_at(buf, offset)
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        let unit = self.constraints.zero_unit;
        let mut rest = range;
        while !rest.is_empty() {
            let start = rest.start();
            let whole = rest.align_in(unit);
            let chunk = if start.is_multiple_of(unit) && !whole.is_empty() {
                let chunk = Constraints::limit(whole, self.constraints.max_zero);
                self.rules.check(Request::WriteZeroes, chunk)?;
                self.below.write_zeroes(chunk, mode)?;
                chunk
            } else {
                let chunk = rest.first(align_up(start + 1, unit) - start);
                self.write_zero_bytes(chunk)?;
                chunk
            };
            rest = rest.skip(chunk.len());
        }
        Ok(())
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        let mut rest = range.align_in(self.constraints.discard_unit);
        while !rest.is_empty() {
            let chunk = Constraints::limit(rest, self.constraints.max_discard);
            self.rules.check(Request::Discard, chunk)?;
            self.below.discard(chunk)?;
            rest = rest.skip(chunk.len());
        }
        Ok(())
    }

    fn status(&self, range: ByteRange, detail: StatusDetail) -> Result<Extent> {
        self.rules.check(Request::BlockStatus, range)?;
        status_below(&self.below, range, detail)
    }

    fn flush(&self) -> Result<()> {
        self.rules.check(Request::Flush, ByteRange::at(0, 0))?;
        self.below.flush()
    }

    fn event(&self, event: Event) {
        self.rules.handle_event(event.name());
    }

    fn lock(&self, permissions: Permissions) -> Result<()> {
        self.below.lock(self.permissions.add_to(permissions))
    }

    fn allocated_bytes(&self) -> Option<u64> {
        None
    }

    fn node(&self) -> Node {
        self.node.clone()
    }
}
