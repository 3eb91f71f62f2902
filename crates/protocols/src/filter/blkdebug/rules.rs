//! Rules: which request fails, and when.
//!
//! Drivers announce the steps that they are about to take as events. The rules for an event and the current state
//! replace the active ones. A request fails if it matches an active rule; the first one counts. `set-state` rules
//! change the state after all rules have been matched. Rules for the event `none` are active from the start.

use std::sync::{Mutex, MutexGuard, PoisonError};

use diskimage_core::options::{OptionDef, OptionKind};
use diskimage_core::{ByteRange, Error, NodeOptions, Result, errno};

/// The sections and options that hold rules.
pub(super) const SECTIONS: [&str; 2] = [INJECT_ERROR, SET_STATE];

const INJECT_ERROR: &str = "inject-error";
const SET_STATE: &str = "set-state";

/// All events of QEMU. Rules for those that no driver here announces never become active.
const EVENTS: &[&str] = &[
    "l1_update",
    "l1_grow_alloc_table",
    "l1_grow_write_table",
    "l1_grow_activate_table",
    "l2_load",
    "l2_update",
    "l2_update_compressed",
    "l2_alloc_cow_read",
    "l2_alloc_write",
    "read_aio",
    "read_backing_aio",
    "read_compressed",
    "write_aio",
    "write_compressed",
    "vmstate_load",
    "vmstate_save",
    "cow_read",
    "cow_write",
    "reftable_load",
    "reftable_grow",
    "reftable_update",
    "refblock_load",
    "refblock_update",
    "refblock_update_part",
    "refblock_alloc",
    "refblock_alloc_hookup",
    "refblock_alloc_write",
    "refblock_alloc_write_blocks",
    "refblock_alloc_write_table",
    "refblock_alloc_switch_table",
    "cluster_alloc",
    "cluster_alloc_bytes",
    "cluster_free",
    "flush_to_os",
    "flush_to_disk",
    "pwritev_rmw_head",
    "pwritev_rmw_after_head",
    "pwritev_rmw_tail",
    "pwritev_rmw_after_tail",
    "pwritev",
    "pwritev_zero",
    "pwritev_done",
    "empty_image_prepare",
    "l1_shrink_write_table",
    "l1_shrink_free_l2_clusters",
    "cor_write",
    "cluster_alloc_space",
    NONE,
];

/// The event of rules that are active from the start.
const NONE: &str = "none";

/// The types of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Read,
    Write,
    WriteZeroes,
    Discard,
    Flush,
    BlockStatus,
}

impl Request {
    fn from_name(name: &str) -> Result<Self> {
        Ok(match name {
            "read" => Self::Read,
            "write" => Self::Write,
            "write-zeroes" => Self::WriteZeroes,
            "discard" => Self::Discard,
            "flush" => Self::Flush,
            "block-status" => Self::BlockStatus,
            other => return Err(Error::invalid(format!("invalid parameter value: {other}"))),
        })
    }
}

const INJECT_OPTIONS: &[OptionDef] = &[
    OptionDef::new("event", OptionKind::Text, "When"),
    OptionDef::new("state", OptionKind::Number, "In which state; 0 for any").or("0"),
    OptionDef::new("iotype", OptionKind::Text, "Which requests"),
    OptionDef::new("errno", OptionKind::Number, "With which error").or("5"),
    OptionDef::new("sector", OptionKind::Number, "About which sector"),
    OptionDef::new("once", OptionKind::Flag, "Only the first of them").or("off"),
    OptionDef::new("immediately", OptionKind::Flag, "Before the request is begun").or("off"),
];

const STATE_OPTIONS: &[OptionDef] = &[
    OptionDef::new("event", OptionKind::Text, "When"),
    OptionDef::new("state", OptionKind::Number, "In which state; 0 for any").or("0"),
    OptionDef::new("new_state", OptionKind::Number, "The state afterwards").or("0"),
];

#[derive(Clone, Debug)]
struct Rule {
    event: &'static str,
    /// 0 for any.
    state: u64,
    action: Action,
}

#[derive(Clone, Debug)]
enum Action {
    InjectError {
        /// All except `block-status` if not given.
        request: Option<Request>,
        errno: i32,
        sector: Option<u64>,
        once: bool,
    },
    SetState(u64),
}

/// The rules of a node, and their state.
#[derive(Debug)]
pub(super) struct Rules(Mutex<RuleState>);

#[derive(Debug)]
struct RuleState {
    rules: Vec<Rule>,
    /// The active ones, as indices into `rules`.
    active: Vec<usize>,
    /// The `once` rules that have been used, as indices into `rules`.
    spent: Vec<usize>,
    state: u64,
}

impl Rules {
    pub(super) fn new() -> Self {
        Self(Mutex::new(RuleState {
            rules: Vec::new(),
            active: Vec::new(),
            spent: Vec::new(),
            state: 1,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, RuleState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the rules out of a node's options: `inject-error.0.event` and so on.
    ///
    /// # Errors
    /// Invalid rules.
    pub(super) fn take(&self, options: &mut NodeOptions) -> Result<()> {
        for section in SECTIONS {
            let mut list = options.take_node(section);
            for index in 0.. {
                let mut rule = list.take_node(&index.to_string());
                if rule.is_empty() {
                    break;
                }
                self.add(section, &mut rule, |name| {
                    Error::invalid(format!("[{section}] section doesn't support the option '{name}'"))
                })?;
            }
            if let Some(name) = list.first_unused() {
                return Err(Error::invalid(format!("Unused option '{name}' for [{section}]")));
            }
        }
        Ok(())
    }

    /// Adds a rule of `section` with these options; `unknown` returns the error for an unsupported option.
    ///
    /// # Errors
    /// An invalid rule.
    pub(super) fn add(
        &self,
        section: &str,
        options: &mut NodeOptions,
        unknown: impl Fn(&str) -> Error,
    ) -> Result<()> {
        let injects = section == INJECT_ERROR;
        let table = if injects { INJECT_OPTIONS } else { STATE_OPTIONS };
        let values = options.take_known(table)?;
        if let Some(name) = options.first_unused() {
            return Err(unknown(name));
        }
        let event = values
            .text("event")
            .ok_or_else(|| Error::invalid("Missing event name for rule"))?;
        let known = EVENTS.iter().find(|known| **known == event);
        let event = known.ok_or_else(|| Error::invalid(format!("invalid parameter value: {event}")))?;
        let number = |name: &str| values.number(name).unwrap_or(0);
        let action = if injects {
            Action::InjectError {
                request: values.text("iotype").map(Request::from_name).transpose()?,
                // A larger number is no error number of any system.
                errno: i32::try_from(number("errno")).unwrap_or(errno::EIO),
                // A negative number means any sector.
                sector: values
                    .number("sector")
                    .filter(|sector| i64::try_from(*sector).is_ok()),
                once: values.flag("once") == Some(true),
            }
        } else {
            Action::SetState(number("new_state"))
        };
        self.lock().rules.push(Rule {
            event,
            state: number("state"),
            action,
        });
        Ok(())
    }

    /// Activates the rules for the event `none`.
    pub(super) fn start(&self) {
        self.handle_event(NONE);
    }

    /// Activates the rules for an event and changes the state.
    pub(super) fn handle_event(&self, event: &str) {
        let mut inner = self.lock();
        let inner = &mut *inner;
        let mut state = inner.state;
        let mut active = Vec::new();
        for (at, rule) in inner.rules.iter().enumerate() {
            if rule.event != event || (rule.state != 0 && rule.state != inner.state) {
                continue;
            }
            match rule.action {
                Action::SetState(other) => state = other,
                Action::InjectError { .. } if inner.spent.contains(&at) => {}
                Action::InjectError { .. } => active.push(at),
            }
        }
        if !active.is_empty() {
            inner.active = active;
        }
        inner.state = state;
    }

    /// Fails a request for `range` if it matches an active rule.
    ///
    /// # Errors
    /// The error number of the rule.
    pub(super) fn check(&self, kind: Request, range: ByteRange) -> Result<()> {
        let mut inner = self.lock();
        let matching = inner.active.iter().copied().find(|at| {
            let Some(Rule {
                action: Action::InjectError { request, sector, .. },
                ..
            }) = inner.rules.get(*at)
            else {
                return false;
            };
            request.map_or(kind != Request::BlockStatus, |request| request == kind)
                && sector.is_none_or(|sector| overlaps(range, sector))
        });
        let rule = matching.and_then(|at| inner.rules.get(at).map(|rule| (at, rule.action.clone())));
        let Some((at, Action::InjectError { errno, once, .. })) = rule else {
            return Ok(());
        };
        if once {
            inner.active.retain(|other| *other != at);
            inner.spent.push(at);
        }
        if errno == 0 {
            Ok(())
        } else {
            Err(Error::from_errno(errno))
        }
    }
}

fn overlaps(range: ByteRange, sector: u64) -> bool {
    let start = sector.saturating_mul(512);
    range.overlaps(ByteRange::new(start, start.saturating_add(512)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(list: &str) -> Rules {
        let rules = Rules::new();
        let mut options = NodeOptions::from_list(list).expect("options");
        rules.take(&mut options).expect("rules");
        rules.start();
        rules
    }

    fn read(rules: &Rules, sector: u64) -> Option<i32> {
        let outcome = rules.check(Request::Read, ByteRange::at(sector * 512, 512));
        outcome.err().map(|error| match error.chain().as_str() {
            "Input/output error" => errno::EIO,
            "No space left on device" => errno::ENOSPC,
            other => panic!("{other}"),
        })
    }

    #[test]
    fn rules_stay_active_until_others_replace_them() {
        let rules = rules(
            "inject-error.0.event=l2_load,inject-error.0.sector=7,inject-error.1.event=cow_read,inject-error.1.sector=9",
        );
        assert_eq!(read(&rules, 7), None);
        rules.handle_event("l2_load");
        assert_eq!(read(&rules, 8), None);
        rules.handle_event("read_aio");
        assert_eq!(
            (read(&rules, 7), read(&rules, 7)),
            (Some(errno::EIO), Some(errno::EIO))
        );
        rules.handle_event("cow_read");
        assert_eq!((read(&rules, 7), read(&rules, 9)), (None, Some(errno::EIO)));
    }

    #[test]
    fn once_rules_fail_one_request() {
        let rules = rules(
            "inject-error.0.event=read_aio,inject-error.0.sector=1,\
             inject-error.1.event=read_aio,inject-error.1.errno=28,inject-error.1.once=on",
        );
        rules.handle_event("read_aio");
        assert_eq!(read(&rules, 1), Some(errno::EIO));
        assert_eq!(read(&rules, 2), Some(errno::ENOSPC));
        rules.handle_event("read_aio");
        assert_eq!(read(&rules, 2), None);
    }

    #[test]
    fn states_change_after_all_rules_have_been_matched() {
        let rules = rules(
            "inject-error.0.event=read_aio,inject-error.0.state=2,set-state.0.event=read_aio,set-state.0.new_state=2",
        );
        rules.handle_event("read_aio");
        assert_eq!(read(&rules, 0), None);
        rules.handle_event("read_aio");
        assert_eq!(read(&rules, 0), Some(errno::EIO));
    }

    #[test]
    fn status_fails_only_if_the_rule_names_it() {
        let any = rules("inject-error.0.event=none");
        assert!(any.check(Request::BlockStatus, ByteRange::at(0, 512)).is_ok());
        assert!(any.check(Request::Flush, ByteRange::at(0, 0)).is_err());
        let status = rules("inject-error.0.event=none,inject-error.0.iotype=block-status");
        assert!(status.check(Request::BlockStatus, ByteRange::at(0, 512)).is_err());
        assert_eq!(read(&status, 0), None);
    }
}
