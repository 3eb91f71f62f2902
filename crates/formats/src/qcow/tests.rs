//! The format on devices in memory.
