//! `throttle`: delays requests so that the node stays within the limits of its throttle group.

use std::sync::Arc;

use diskimage_core::options::{OptionDef, OptionKind};
use diskimage_core::{
    ByteRange, Device, Direction, Error, FilterDevice, Filtered, Node, NodeOptions, Result, ThrottleGroup,
    ZeroMode,
};

use super::{Filter, FilterChild, FilterRequest, ParseName, file_child};

#[derive(Debug)]
pub(crate) struct Throttle;

const OPTIONS: &[OptionDef] = &[OptionDef::new(
    "throttle-group",
    OptionKind::Text,
    "The group whose limits hold",
)];

impl Filter for Throttle {
    fn name(&self) -> &'static str {
        "throttle"
    }

    fn children(&self, _options: &mut NodeOptions, _: ParseName) -> Result<Vec<FilterChild>> {
        Ok(file_child())
    }

    fn open(&self, request: FilterRequest<'_>) -> Result<Arc<dyn Device>> {
        let node = request.node(self.name(), |name| name == "throttle-group");
        let options = request.options.take_known(OPTIONS)?;
        let name = options
            .text("throttle-group")
            .ok_or_else(|| Error::invalid("Please specify a throttle group"))?;
        Ok(Arc::new(Filtered(Throttled {
            device: Arc::clone(&request.only_child()?.device),
            group: Arc::clone(request.context.objects.throttle_group(name)?),
            node,
        })))
    }
}

#[derive(Debug)]
struct Throttled {
    device: Arc<dyn Device>,
    group: Arc<ThrottleGroup>,
    node: Node,
}

impl FilterDevice for Throttled {
    fn below(&self) -> &Arc<dyn Device> {
        &self.device
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.group.wait(Direction::Read, buf.len() as u64);
        self.device.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.group.wait(Direction::Write, buf.len() as u64);
        self.device.write_at(buf, offset)
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.group.wait(Direction::Write, range.len());
        self.device.write_zeroes(range, mode)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.group.wait(Direction::Write, range.len());
        self.device.discard(range)
    }

    fn node(&self) -> Node {
        self.node.clone()
    }
}
