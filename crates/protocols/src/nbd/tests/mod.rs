//! Tests of the client: the codec on byte strings, then the whole against a small server in this process.

mod client;
mod codec;
mod misbehaviour;
mod server;
#[cfg(feature = "tls")]
mod tls;
