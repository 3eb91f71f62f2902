//! The words of the command line: option tables as data, the parser that reads them, the help text that is generated
//! from them, and types of values.
//!
//! ```text
//!   Command ── flags, operands ──┬── Parser   words → (flag, value), operands     (rules of getopt_long)
//!                                ├── help     the text of --help
//!                                └── examples/manuals: manual pages and shell completions
//! ```

pub mod help;
mod parser;
mod policy;
mod stop;
mod table;
mod values;

pub use parser::Parser;
pub use policy::Policy;
pub use stop::{Prefix, Stop, Wrong};
pub use table::{Command, Flag, Operand};
pub use values::{
    CreateOptions, ImageName, LARGEST, OutputFormat, Source, count, only_image, size, snapshot_selector,
    source_cache, target_cache, text,
};
