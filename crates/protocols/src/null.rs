//! `null-co` and `null-aio`: devices that store nothing, for measuring the layers above them.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use diskimage_core::options::{OptionDef, OptionKind};
use diskimage_core::{
    ByteRange, Device, Error, Extent, ExtentKind, Info, Limits, Node, NodeOptions, Preallocation, Result,
    StatusDetail, ZeroMode,
};

use crate::protocol::{Protocol, ProtocolRequest};

/// The driver under one of its two names, which behave the same.
#[derive(Debug)]
pub(crate) struct NullDriver {
    name: &'static str,
    prefixes: &'static [&'static str],
}

pub(crate) static NULL_CO: NullDriver = NullDriver {
    name: "null-co",
    prefixes: &["null-co"],
};
pub(crate) static NULL_AIO: NullDriver = NullDriver {
    name: "null-aio",
    prefixes: &["null-aio"],
};

const OPTIONS: &[OptionDef] = &[
    OptionDef::new("size", OptionKind::Size, "How long it is").or("1G"),
    OptionDef::new(
        "latency-ns",
        OptionKind::Number,
        "How long each request takes, in nanoseconds",
    )
    .or("0"),
    OptionDef::new("read-zeroes", OptionKind::Flag, "Whether it reads as zeroes").or("off"),
];

/// The options that are part of the node's `json:` filename.
const STRONG_OPTIONS: [&str; 2] = ["size", "read-zeroes"];

impl NullDriver {
    /// The only filename of the driver.
    fn full_name(&self) -> String {
        format!("{}://", self.name)
    }
}

impl Protocol for NullDriver {
    fn name(&self) -> &'static str {
        self.name
    }

    fn prefixes(&self) -> &'static [&'static str] {
        self.prefixes
    }

    fn parse(&self, name: &str) -> Result<NodeOptions> {
        if name == self.full_name() {
            Ok(NodeOptions::new())
        } else {
            Err(Error::invalid(format!(
                "The only allowed filename for this driver is '{}'",
                self.full_name()
            )))
        }
    }

    fn can_hold_image(&self) -> bool {
        false
    }

    fn open(&self, request: ProtocolRequest<'_>) -> Result<Arc<dyn Device>> {
        let mut strong = request.options.clone();
        strong.retain(|name| STRONG_OPTIONS.contains(&name));
        let options = request.options.take_known(OPTIONS)?;
        let latency = options.number("latency-ns").unwrap_or(0);
        if i64::try_from(latency).is_err() {
            return Err(Error::invalid("latency-ns is invalid"));
        }
        let node = Node {
            driver: self.name,
            name: strong.is_empty().then(|| self.full_name()),
            options: strong,
            ..Node::default()
        };
        Ok(Arc::new(Null {
            node,
            len: options.size("size").unwrap_or(0),
            latency: Duration::from_nanos(latency),
            reads_zeroes: options.flag("read-zeroes") == Some(true),
            limits: Limits::default(),
        }))
    }
}

/// A device that stores nothing.
#[derive(Debug)]
struct Null {
    node: Node,
    len: u64,
    latency: Duration,
    reads_zeroes: bool,
    limits: Limits,
}

impl Null {
    fn pass_time(&self) {
        if !self.latency.is_zero() {
            thread::sleep(self.latency);
        }
    }
}

impl Device for Null {
    fn len(&self) -> u64 {
        self.len
    }

    fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Without `read-zeroes` the contents are undefined; zeroes keep old contents of `buf` from being read as data.
    fn read_at(&self, buf: &mut [u8], _offset: u64) -> Result<()> {
        self.pass_time();
        buf.fill(0);
        Ok(())
    }

    fn write_at(&self, _buf: &[u8], _offset: u64) -> Result<()> {
        self.pass_time();
        Ok(())
    }

    fn write_zeroes(&self, _range: ByteRange, _mode: ZeroMode) -> Result<()> {
        self.pass_time();
        Ok(())
    }

    fn discard(&self, _range: ByteRange) -> Result<()> {
        Ok(())
    }

    fn status(&self, range: ByteRange, _detail: StatusDetail) -> Result<Extent> {
        Ok(Extent {
            len: range.len(),
            kind: if self.reads_zeroes {
                ExtentKind::Zero
            } else {
                ExtentKind::UnknownHole
            },
            depth: 0,
            host: None,
        })
    }

    fn flush(&self) -> Result<()> {
        self.pass_time();
        Ok(())
    }

    fn resize(&self, _len: u64, _preallocation: Preallocation) -> Result<()> {
        Err(Error::unsupported("Image format driver does not support resize"))
    }

    fn is_zero_when_new(&self) -> bool {
        false
    }

    fn allocated_bytes(&self) -> Option<u64> {
        Some(0)
    }

    fn name(&self) -> String {
        self.node.shown_name()
    }

    fn node(&self) -> Node {
        self.node.clone()
    }

    fn info(&self) -> Result<Info> {
        Ok(Info::default())
    }
}
