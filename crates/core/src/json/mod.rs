//! JSON as `qemu-img` reads and prints it: indented by four spaces, ASCII only; strings in single quotes are read, too.

mod order;
mod parse;
mod value;

pub use parse::parse;
pub use value::Value;
