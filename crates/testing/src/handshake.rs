//! What a TLS client may get instead of a handshake.

/// Bytes of a server, and the cause that `qemu-img` states for them.
pub const INSTEAD_OF_A_HANDSHAKE: &[(&[u8], &str)] = &[
    (b"\x15\x03\x03\0\x02\x02\x28", ALERT),
    (b"\x15\x03\x03\0\x02\x02\x46", ALERT),
    (b"\x15\x03\x03\0\x02\x02\x73", ALERT),
    (b"HTTP/1.1 400 Bad Request\r\n\r\n", UNEXPECTED),
    (&[0; 100], UNEXPECTED),
    (&[0xff; 100], UNEXPECTED),
    (b"\x17\x03\x03\0\x10aaaaaaaaaaaaaaaa", UNEXPECTED),
    (
        b"\x16\x03\x03\0\x10\x02\0\0\x0c\x03\x03aaaaaaaaaa",
        "Error decoding the received TLS packet.",
    ),
    (
        b"\x16\x03\x03\xff\xffaaaa",
        "A TLS record packet with invalid length was received.",
    ),
];
const ALERT: &str = "A TLS fatal alert has been received.";
const UNEXPECTED: &str = "An unexpected TLS packet was received.";
