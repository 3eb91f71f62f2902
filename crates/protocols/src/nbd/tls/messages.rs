//! What the original says of a handshake that fails, in the words of its own library, whatever ours calls it.

use diskimage_core::{Error, ErrorKind};

/// The connection ended without farewell.
pub(in super::super) const UNCLEAN_END: &str = "The TLS connection was non-properly terminated.";
/// The connection ended while something was to be sent.
pub(super) const UNCLEAN_PUSH: &str = "Error in the push function.: Unable to write to socket: Broken pipe";
/// The connection ended with a farewell.
#[cfg(feature = "tls-psk")]
pub(super) const FAREWELL: &str = "Peer has terminated the connection";
/// The other side gave up and said why.
pub(super) const ALERT: &str = "A TLS fatal alert has been received.";
/// Something else was due, or it is no TLS at all.
pub(super) const UNEXPECTED: &str = "An unexpected TLS packet was received.";
/// A message that ends too early or goes on too long.
pub(super) const UNDECODABLE: &str = "Error decoding the received TLS packet.";
/// A record of a length that none has.
pub(super) const LENGTH: &str = "A TLS record packet with invalid length was received.";
/// The other side wants to be believed for something that we have not.
#[cfg(feature = "tls-psk")]
pub(super) const INSUFFICIENT: &str = "Insufficient credentials for that request.";

/// A handshake that failed for this reason.
pub(super) fn handshake_failed(reason: &str) -> Error {
    Error::new(ErrorKind::Permission, format!("TLS handshake failed: {reason}"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// What a server might say, and what the original says of it.
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
