//! Changes of key slots: `state=active,new-secret=...` and `state=inactive,...`, refused in the same cases as in
//! qemu-img.

use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{Error, Objects, Result};

use super::header::SLOTS;
use super::options::{DEFAULT_ITER_TIME, ITER_TIME, passphrase};
use super::volume::Volume;

// The options that describe a change; qcow2 has them with a prefix.
pub(crate) const STATE: OptionDef = OptionDef::new(
    "state",
    OptionKind::Text,
    "Select new state of affected keyslots (active/inactive)",
);
pub(crate) const KEYSLOT: OptionDef = OptionDef::new(
    "keyslot",
    OptionKind::Number,
    "Select a single keyslot to modify explicitly",
);
pub(crate) const OLD_SECRET: OptionDef = OptionDef::new(
    "old-secret",
    OptionKind::Text,
    "Select all keyslots that match this password",
);
pub(crate) const NEW_SECRET: OptionDef = OptionDef::new(
    "new-secret",
    OptionKind::Text,
    "New secret to set in the matching keyslots. Empty string to erase",
);

/// The options of `amend`.
pub(crate) const AMEND_OPTIONS: &[OptionDef] = &[STATE, KEYSLOT, OLD_SECRET, NEW_SECRET, ITER_TIME];

/// A change of key slots.
#[derive(Debug)]
pub(crate) struct SlotChange<'a> {
    /// The options that describe the change; their names start with `prefix`.
    pub(crate) options: &'a Options,
    /// `encrypt.` for qcow2.
    pub(crate) prefix: &'a str,
    /// The objects among which secrets are looked up.
    pub(crate) objects: &'a Objects,
    /// Whether changes that may lose the data are allowed.
    pub(crate) force: bool,
}

impl SlotChange<'_> {
    /// Makes the change.
    ///
    /// # Errors
    /// Options that cannot be combined, changes that would lose data unless forced, failed writes.
    pub(crate) fn apply(&self, volume: &Volume) -> Result<()> {
        match self.text("state") {
            Some("active") => self.activate(volume),
            Some("inactive") => self.erase(volume),
            Some(other) => Err(Error::invalid(format!(
                "Parameter 'state' does not accept value '{other}'"
            ))),
            None => Err(Error::invalid("Parameter 'state' is missing")),
        }
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.options.text(&format!("{}{name}", self.prefix))
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.options.number(&format!("{}{name}", self.prefix))
    }

    /// The slot that the options name.
    fn slot(&self) -> Result<Option<usize>> {
        let Some(given) = self.number("keyslot") else {
            return Ok(None);
        };
        match usize::try_from(given) {
            Ok(slot) if slot < SLOTS => Ok(Some(slot)),
            // qemu-img truncates the number to 32 bits.
            _ => Err(Error::invalid(format!(
                "Invalid keyslot {} specified, must be between 0 and {}",
                given & u64::from(u32::MAX),
                SLOTS - 1
            ))),
        }
    }

    fn activate(&self, volume: &Volume) -> Result<()> {
        let Some(new_secret) = self.text("new-secret") else {
            return Err(Error::invalid("'new-secret' is required to activate a keyslot"));
        };
        if self.text("old-secret").is_some() {
            return Err(Error::invalid(
                "'old-secret' must not be given when activating keyslots",
            ));
        }
        let active = active(volume);
        let slot = match self.slot()? {
            Some(slot) if active[slot] && !self.force => {
                return Err(Error::invalid(format!(
                    "Refusing to overwrite active keyslot {slot} - please erase it first"
                )));
            }
            Some(slot) => slot,
            None => (0..SLOTS)
                .find(|slot| !active[*slot])
                .ok_or_else(|| Error::invalid("Can't add a keyslot - all keyslots are in use"))?,
        };
        let new = passphrase(self.objects, Some(new_secret), "new-secret")?;
        let iter_time = self.number("iter-time").unwrap_or(DEFAULT_ITER_TIME);
        // While the only active slot is overwritten, a spare slot holds the key for the new passphrase.
        let only = active[slot] && active.iter().filter(|active| **active).count() == 1;
        let spare = (0..SLOTS).find(|other| only && *other != slot);
        if let Some(spare) = spare {
            volume.fill_slot(spare, new, iter_time)?;
        }
        volume.fill_slot(slot, new, iter_time)?;
        match spare {
            Some(spare) => volume.erase_slot(spare),
            None => Ok(()),
        }
    }

    fn erase(&self, volume: &Volume) -> Result<()> {
        for name in ["new-secret", "iter-time"] {
            if self.options.is_given(&format!("{}{name}", self.prefix)) {
                return Err(Error::invalid(format!(
                    "'{name}' must not be given when erasing keyslots"
                )));
            }
        }
        let old = match self.text("old-secret") {
            Some(id) => Some(passphrase(self.objects, Some(id), "old-secret")?),
            None => None,
        };
        let active = active(volume);
        match (self.slot()?, old) {
            (Some(slot), old) => {
                if let Some(old) = old
                    && volume.open_slot(slot, old)?.is_none()
                {
                    return Err(Error::invalid(format!(
                        "Given keyslot {slot} doesn't contain the given old password for erase operation"
                    )));
                }
                self.erase_one(volume, active, slot)
            }
            (None, Some(old)) => self.erase_matching(volume, active, old),
            (None, None) => Err(Error::invalid(
                "To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be \
                 given",
            )),
        }
    }

    fn erase_one(&self, volume: &Volume, active: [bool; SLOTS], slot: usize) -> Result<()> {
        if !self.force {
            if !active[slot] {
                return Err(Error::invalid(format!(
                    "Given keyslot {slot} is already erased (inactive) "
                )));
            }
            if active.iter().filter(|active| **active).count() == 1 {
                return Err(Error::invalid(format!(
                    "Attempt to erase the only active keyslot {slot} which will erase all the data in the image \
                     irreversibly - refusing operation"
                )));
            }
        }
        volume.erase_slot(slot)
    }

    fn erase_matching(&self, volume: &Volume, active: [bool; SLOTS], old: &[u8]) -> Result<()> {
        let mut matching = Vec::new();
        for slot in 0..SLOTS {
            if volume.open_slot(slot, old)?.is_some() {
                matching.push(slot);
            }
        }
        if matching.is_empty() {
            return Err(Error::invalid(
                "No keyslots match given (old) password for erase operation",
            ));
        }
        if !self.force && matching.len() == active.iter().filter(|active| **active).count() {
            return Err(Error::invalid(
                "All the active keyslots match the (old) password that was given and erasing them will erase all the \
                 data in the image irreversibly - refusing operation",
            ));
        }
        matching.into_iter().try_for_each(|slot| volume.erase_slot(slot))
    }
}

fn active(volume: &Volume) -> [bool; SLOTS] {
    volume.header().slots.map(|slot| slot.active)
}
