//! The messages of `qemu-img` for a failed handshake, which are those of GnuTLS.

use diskimage_core::{Error, ErrorKind};

/// The connection ended without a close alert.
pub(in super::super) const UNCLEAN_END: &str = "The TLS connection was non-properly terminated.";
/// The connection ended during a write.
pub(super) const UNCLEAN_PUSH: &str = "Error in the push function.: Unable to write to socket: Broken pipe";
/// The connection ended with a close alert.
pub(super) const FAREWELL: &str = "Peer has terminated the connection";
/// The peer sent a fatal alert.
pub(super) const ALERT: &str = "A TLS fatal alert has been received.";
/// A message out of sequence, or no TLS at all.
pub(super) const UNEXPECTED: &str = "An unexpected TLS packet was received.";
/// A message that is too short or too long.
pub(super) const UNDECODABLE: &str = "Error decoding the received TLS packet.";
/// A record with an invalid length.
pub(super) const LENGTH: &str = "A TLS record packet with invalid length was received.";
/// The peer authenticates with a method for which the client has no credentials.
pub(super) const INSUFFICIENT: &str = "Insufficient credentials for that request.";

/// The error of a failed handshake.
pub(super) fn handshake_failed(reason: &str) -> Error {
    Error::new(ErrorKind::Permission, format!("TLS handshake failed: {reason}"))
}
