//! The executable `qemu-img`.

use std::process::ExitCode;

use diskimage::LastWordsAllocator;

#[global_allocator]
static ALLOCATOR: LastWordsAllocator = LastWordsAllocator::new("qemu-img: Cannot allocate memory\n");

fn main() -> ExitCode {
    qemu_img_rs::run(std::env::args_os())
}
