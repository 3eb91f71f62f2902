//! The options about images that all commands have.

/// The policies that the user asks for, about the images that a command opens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Images come from strangers: `--untrusted`.
    pub untrusted: bool,
    /// Images may not refer to other files: `--deny-references`.
    pub deny_references: bool,
}

/// The environment variable that has the effect of `--untrusted`.
const VARIABLE: &str = "QEMU_IMG_UNTRUSTED";

impl Policy {
    /// The policy of the environment.
    pub(crate) fn of_environment() -> Self {
        let value = std::env::var_os(VARIABLE);
        Self {
            untrusted: value.is_some_and(|value| !value.is_empty() && value != "0"),
            deny_references: false,
        }
    }
}
