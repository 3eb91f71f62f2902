//! The messages of `qemu-img` for a failed handshake, which are those of GnuTLS.

use diskimage_core::{Error, ErrorKind};

/// The connection ended without a close alert.
pub(in super::super) const UNCLEAN_END: &str = "The TLS connection was non-properly terminated.";
/// The connection ended during a write.
pub(super) const UNCLEAN_PUSH: &str = "Error in the push function.: Unable to write to socket: Broken pipe";
/// The connection ended with a close alert.
#[cfg(feature = "tls-psk")]
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
#[cfg(feature = "tls-psk")]
pub(super) const INSUFFICIENT: &str = "Insufficient credentials for that request.";

/// The error of a failed handshake.
pub(super) fn handshake_failed(reason: &str) -> Error {
    Error::new(ErrorKind::Permission, format!("TLS handshake failed: {reason}"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Bytes of a server, and the message of `qemu-img` for them.
    pub(in super::super) const INSTEAD_OF_A_HANDSHAKE: &[(&[u8], &str)] = &[
        (b"\x15\x03\x03\0\x02\x02\x28", ALERT),
        (b"\x15\x03\x03\0\x02\x02\x46", ALERT),
        (b"\x15\x03\x03\0\x02\x02\x73", ALERT),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", UNEXPECTED),
        (&[0; 100], UNEXPECTED),
        (&[0xff; 100], UNEXPECTED),
        (b"\x17\x03\x03\0\x10aaaaaaaaaaaaaaaa", UNEXPECTED),
        (b"\x16\x03\x03\0\x10\x02\0\0\x0c\x03\x03aaaaaaaaaa", UNDECODABLE),
        (b"\x16\x03\x03\xff\xffaaaa", LENGTH),
    ];
}
