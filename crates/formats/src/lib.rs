//! Disk image formats: how bytes are arranged.

mod codec;
mod qcow2;

pub use qcow2::Qcow2Format;
