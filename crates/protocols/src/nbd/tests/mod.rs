//! Tests of the client: the codec on byte strings, then the client with a small server in this process.

mod client;
mod codec;
mod misbehaviour;
mod server;
#[cfg(feature = "tls")]
mod tls;
