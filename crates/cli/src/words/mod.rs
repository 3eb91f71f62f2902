//! From words to arguments: option tables as data, the parser that reads words by them, and the help that shows them.
//!
//! ```text
//!   Command ── flags, operands ──┬── Parser   words → (flag, value), operands     (getopt_long's rules)
//!                                ├── help     the text of --help
//!                                └── examples/manuals: manual pages and shell completions
//! ```

pub mod help;
mod parser;
mod stop;
mod table;
mod values;

pub use parser::Parser;
pub use stop::{Prefix, Stop, Wrong};
pub use table::{Command, Flag, Operand};
pub use values::{
    CreateOptions, ImageName, OutputFormat, Source, count, size, snapshot_selector, source_cache,
    target_cache, text,
};
