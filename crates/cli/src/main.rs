//! The executable `qemu-img`.

use std::process::ExitCode;

fn main() -> ExitCode {
    qemu_img_rs::run(std::env::args_os())
}
