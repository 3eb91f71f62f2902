//! `quorum`: several devices with the same contents. A read returns the version on which enough of them agree.

use std::sync::Arc;

use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{
    ByteRange, Device, Error, ErrorKind, Event, Extent, ExtentKind, Info, Limits, Node, NodeOptions,
    Permissions, Preallocation, Result, StatusDetail, ZeroMode, errno,
};

use super::{ChildKind, Filter, FilterChild, FilterRequest, ParseName, child, read_only};

#[derive(Debug)]
pub(crate) struct Quorum;

const OPTIONS: &[OptionDef] = &[
    OptionDef::new("vote-threshold", OptionKind::Number, "So many have to agree"),
    OptionDef::new("blkverify", OptionKind::Flag, "Both have to agree, or it ends").or("off"),
    OptionDef::new(
        "rewrite-corrupted",
        OptionKind::Flag,
        "Whoever disagrees gets what the others hold",
    )
    .or("off"),
    OptionDef::new(
        "read-pattern",
        OptionKind::Text,
        "Whether all are read, or the next if one fails (quorum, fifo)",
    )
    .or("quorum"),
];

/// The limit of children; each read is sent to all of them.
const MAX_CHILDREN: usize = 32;

impl Filter for Quorum {
    fn name(&self) -> &'static str {
        "quorum"
    }

    fn children(&self, options: &mut NodeOptions, _: ParseName) -> Result<Vec<FilterChild>> {
        let given = options.node("children");
        let mut count = 0;
        while given.has(&count.to_string()) || given.has_node(&count.to_string()) {
            count += 1;
        }
        let is_child = |name: &str| {
            let index = name
                .split('.')
                .next()
                .and_then(|index| index.parse::<usize>().ok());
            index.is_some_and(|index| index < count)
        };
        if given.iter().any(|(name, _)| !is_child(name)) {
            return Err(Error::invalid("Option children is not a valid array"));
        }
        if count == 0 {
            return Err(Error::invalid("Number of provided children must be 1 or more"));
        }
        if count > MAX_CHILDREN {
            return Err(Error::new(
                ErrorKind::Limit,
                format!("More than {MAX_CHILDREN} children"),
            ));
        }
        // Checked before the children are opened, as in qemu-img.
        threshold(&options.clone().take_known(OPTIONS)?, count)?;
        Ok((0..count)
            .map(|index| child(&format!("children.{index}"), ChildKind::Image))
            .collect())
    }

    fn open(&self, request: FilterRequest<'_>) -> Result<Arc<dyn Device>> {
        let node = request.node(self.name(), |name| OPTIONS.iter().any(|def| def.name == name));
        let options = request.options.take_known(OPTIONS)?;
        let children: Vec<_> = request
            .children
            .iter()
            .map(|below| Arc::clone(&below.device))
            .collect();
        let threshold = threshold(&options, children.len())?;
        let pattern = match options.text("read-pattern") {
            Some("fifo") => ReadPattern::Fifo,
            Some("quorum") | None if options.flag("blkverify") == Some(true) => {
                if children.len() != 2 || threshold != 2 {
                    return Err(Error::invalid(
                        "blkverify=on can only be set if there are exactly two files and vote-threshold is 2",
                    ));
                }
                ReadPattern::Verify
            }
            Some("quorum") | None if options.flag("rewrite-corrupted") == Some(true) => {
                if !request.write {
                    return Err(read_only());
                }
                ReadPattern::Vote { rewrite: true }
            }
            Some("quorum") | None => ReadPattern::Vote { rewrite: false },
            Some(_) => return Err(Error::invalid("Please set read-pattern as fifo or quorum")),
        };
        let len = children.first().map_or(0, |first| first.len());
        if children.iter().any(|other| other.len() != len) {
            return Err(Error::from_errno(errno::EIO).context("Could not refresh total sector count"));
        }
        Ok(Arc::new(Voting {
            children,
            threshold,
            pattern,
            len,
            limits: Limits::default(),
            node,
        }))
    }
}

fn threshold(options: &Options, children: usize) -> Result<usize> {
    let threshold = options.number("vote-threshold").unwrap_or(0);
    if threshold < 1 {
        return Err(Error::invalid("Parameter 'vote-threshold' expects a value >= 1"));
    }
    usize::try_from(threshold)
        .ok()
        .filter(|threshold| *threshold <= children)
        .ok_or_else(|| Error::invalid("threshold may not exceed children count"))
}

/// Which children a read is sent to, and how their data is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReadPattern {
    /// One after the other until one succeeds.
    Fifo,
    /// All; enough have to agree.
    Vote {
        /// Whether the agreed data is written to the others.
        rewrite: bool,
    },
    /// Both; a mismatch is an error.
    Verify,
}

#[derive(Debug)]
struct Voting {
    children: Vec<Arc<dyn Device>>,
    threshold: usize,
    pattern: ReadPattern,
    len: u64,
    limits: Limits,
    node: Node,
}

impl Voting {
    /// Executes `task` on every child; enough have to succeed.
    fn on_all(&self, mut task: impl FnMut(&Arc<dyn Device>) -> Result<()>) -> Result<()> {
        let mut failures = Vec::new();
        for child in &self.children {
            failures.extend(task(child).err());
        }
        let succeeded = self.children.len() - failures.len();
        match failures.into_iter().next() {
            Some(first) if succeeded < self.threshold => Err(first),
            _ => Ok(()),
        }
    }

    fn read_first(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut outcome = Ok(());
        for child in &self.children {
            outcome = child.read_at(buf, offset);
            if outcome.is_ok() {
                break;
            }
        }
        outcome
    }

    fn read_agreed(&self, buf: &mut [u8], offset: u64, rewrite: bool) -> Result<()> {
        let mut answers = Vec::new();
        let mut failure = None;
        for child in &self.children {
            let mut answer = vec![0; buf.len()];
            match child.read_at(&mut answer, offset) {
                Ok(()) => answers.push((child, answer)),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        if answers.len() < self.threshold {
            return Err(failure.unwrap_or_else(|| Error::from_errno(errno::EIO)));
        }
        let votes = |answer: &[u8]| answers.iter().filter(|(_, other)| *other == answer).count();
        // Of several versions with equally many votes, the first.
        let winner = answers
            .iter()
            .map(|(_, answer)| answer)
            .rev()
            .max_by_key(|answer| votes(answer));
        let Some(winner) = winner.filter(|winner| votes(winner) >= self.threshold) else {
            return Err(Error::from_errno(errno::EIO));
        };
        buf.copy_from_slice(winner);
        if rewrite {
            for (child, _) in answers.iter().filter(|(_, answer)| answer != winner) {
                child.write_at(winner, offset)?;
            }
        }
        Ok(())
    }

    fn read_verified(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut answers = self.children.iter().map(|child| {
            let mut answer = vec![0; buf.len()];
            child.read_at(&mut answer, offset).map(|()| answer)
        });
        let (Some(one), Some(other)) = (answers.next(), answers.next()) else {
            return Err(Error::from_errno(errno::EIO));
        };
        let (one, other) = (one?, other?);
        if let Some(at) = one.iter().zip(&other).position(|(one, other)| one != other) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "quorum: offset={offset} bytes={} contents mismatch at offset {}",
                    one.len(),
                    offset + at as u64
                ),
            ));
        }
        buf.copy_from_slice(&one);
        Ok(())
    }
}

impl Device for Voting {
    fn len(&self) -> u64 {
        self.len
    }

    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        match self.pattern {
            ReadPattern::Fifo => self.read_first(buf, offset),
            ReadPattern::Vote { rewrite } => self.read_agreed(buf, offset, rewrite),
            ReadPattern::Verify => self.read_verified(buf, offset),
        }
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.on_all(|child| child.write_at(buf, offset))
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.on_all(|child| child.write_zeroes(range, mode))
    }

    /// Ignored: each child decides what a discarded range reads as, so they could differ afterwards.
    fn discard(&self, _range: ByteRange) -> Result<()> {
        Ok(())
    }

    /// `Zero` if all children report zeroes, else `Data` for the extent of the first child that does not.
    fn status(&self, range: ByteRange, detail: StatusDetail) -> Result<Extent> {
        let extent = |len, kind| Extent {
            len,
            kind,
            depth: 0,
            host: None,
        };
        let mut len = range.len();
        for child in &self.children {
            let below = child.status(range, detail)?;
            if !below.kind.is_zero() {
                return Ok(extent(below.len, ExtentKind::Data));
            }
            len = len.min(below.len);
        }
        Ok(extent(len, ExtentKind::Zero))
    }

    fn flush(&self) -> Result<()> {
        self.on_all(|child| child.flush())
    }

    fn resize(&self, _len: u64, _preallocation: Preallocation) -> Result<()> {
        Err(Error::unsupported("Image format driver does not support resize"))
    }

    fn event(&self, event: Event) {
        self.children.iter().for_each(|child| child.event(event));
    }

    fn lock(&self, permissions: Permissions) -> Result<()> {
        self.children.iter().try_for_each(|child| child.lock(permissions))
    }

    fn is_view(&self) -> bool {
        true
    }

    fn allocated_bytes(&self) -> Option<u64> {
        self.children.iter().map(|child| child.allocated_bytes()).sum()
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

#[cfg(test)]
mod tests {
    use diskimage_core::MemoryDevice;

    use super::*;

    fn voting(
        contents: &[&[u8]],
        threshold: usize,
        pattern: ReadPattern,
    ) -> (Voting, Vec<Arc<MemoryDevice>>) {
        let devices: Vec<_> = contents
            .iter()
            .map(|bytes| Arc::new(MemoryDevice::new(bytes.to_vec())))
            .collect();
        let children: Vec<Arc<dyn Device>> = devices
            .iter()
            .map(|device| Arc::<MemoryDevice>::clone(device) as Arc<dyn Device>)
            .collect();
        let voting = Voting {
            len: children[0].len(),
            children,
            threshold,
            pattern,
            limits: Limits::default(),
            node: Node::default(),
        };
        (voting, devices)
    }

    fn read(voting: &Voting) -> Option<Vec<u8>> {
        let mut buf = vec![0xff; 2];
        voting.read_at(&mut buf, 1).ok().map(|()| buf)
    }

    #[test]
    fn a_read_returns_what_enough_agree_on() {
        let vote = ReadPattern::Vote { rewrite: false };
        assert_eq!(
            read(&voting(&[b"abcd", b"axcd", b"abcd"], 2, vote).0),
            Some(b"bc".to_vec())
        );
        assert_eq!(read(&voting(&[b"axcd", b"abcd", b"aycd"], 2, vote).0), None);
        // Of several versions with equally many votes, the first.
        assert_eq!(
            read(&voting(&[b"axcd", b"abcd"], 1, vote).0),
            Some(b"xc".to_vec())
        );
        // A child that cannot be read has no vote.
        assert_eq!(
            read(&voting(&[b"a", b"abcd", b"abcd"], 2, vote).0),
            Some(b"bc".to_vec())
        );
        assert_eq!(read(&voting(&[b"a", b"abcd", b"abcd"], 3, vote).0), None);
    }

    #[test]
    fn children_that_disagree_are_rewritten() {
        let (voting, devices) = voting(
            &[b"abcd", b"axcd", b"abcd"],
            2,
            ReadPattern::Vote { rewrite: true },
        );
        assert_eq!(read(&voting), Some(b"bc".to_vec()));
        assert_eq!(devices[1].contents(), b"abcd");
    }

    #[test]
    fn fifo_reads_the_next_after_a_failure_and_verify_compares_two() {
        assert_eq!(
            read(&voting(&[b"a", b"axcd", b"abcd"], 2, ReadPattern::Fifo).0),
            Some(b"xc".to_vec())
        );
        assert_eq!(
            read(&voting(&[b"abcd", b"abcx"], 2, ReadPattern::Verify).0),
            Some(b"bc".to_vec())
        );
        let (voting, _) = voting(&[b"abcd", b"abxd"], 2, ReadPattern::Verify);
        let error = voting.read_at(&mut [0; 2], 1).map_err(|error| error.chain());
        assert_eq!(
            error,
            Err("quorum: offset=1 bytes=2 contents mismatch at offset 2".to_owned())
        );
    }

    #[test]
    fn writes_reach_all_and_enough_have_to_succeed() {
        let (voting, devices) = voting(&[b"abcd", b"abcd"], 2, ReadPattern::Fifo);
        voting.write_at(b"xy", 1).expect("writes");
        assert!(devices.iter().all(|device| device.contents() == b"axyd"));
        let mut calls = 0;
        let once = |_: &Arc<dyn Device>| {
            calls += 1;
            if calls == 1 {
                Err(Error::from_errno(errno::EIO))
            } else {
                Ok(())
            }
        };
        assert!(voting.on_all(once).is_err());
    }
}
