//! Feeds the codec with arbitrary bytes, for the fuzz targets. It must not panic, hang, or allocate memory in
//! proportion to a number that a server sent.

use diskimage_core::ByteRange;

use super::negotiate::{ClientOptions, Handshake, Next, ReplyMode};
use super::reply::{Assembly, Head, SHORTEST_HEAD, Step};
use super::request::Command;

/// Negotiates with `bytes` as the messages of the server; the first byte selects the client options.
pub fn negotiate(bytes: &[u8]) {
    let Some((first, mut rest)) = bytes.split_first() else {
        return;
    };
    let mut handshake = Handshake::new(ClientOptions {
        export: "x".repeat(usize::from(first >> 7)),
        tls: first & 1 != 0,
        context: "base:allocation".to_owned(),
    });
    while let Some((head, tail)) = rest.split_at_checked(handshake.wanted()) {
        rest = tail;
        match handshake.take(head) {
            Ok(Next::Read) => {}
            Ok(Next::StartTls) => handshake.secured(),
            Ok(Next::Done) => {
                handshake.finish();
                return;
            }
            Err(_) => {
                handshake.abort();
                return;
            }
        }
        handshake.output();
    }
}

/// Searches a key in `bytes` as a file of pre-shared keys.
#[cfg(feature = "tls")]
pub fn keys(bytes: &[u8]) {
    let _ = super::tls::find_key(bytes, "qemu");
}

/// Decodes `bytes` as the reply to one request; the first byte selects the request.
pub fn replies(bytes: &[u8]) {
    let Some((first, rest)) = bytes.split_first() else {
        return;
    };
    let reply_mode = [ReplyMode::Simple, ReplyMode::Structured, ReplyMode::Extended][usize::from(first % 3)];
    let command = [Command::Read, Command::BlockStatus, Command::Write][usize::from(first / 3 % 3)];
    let len = if command == Command::Read { 4096 } else { 0 };
    let assembly = Assembly::new(
        command,
        ByteRange::at(512, 4096),
        reply_mode,
        Some(0),
        vec![0; len],
    );
    feed(assembly, reply_mode, rest);
}

/// Feeds one reply as a connection does, and stops where the connection would be lost.
fn feed(mut assembly: Assembly, reply_mode: ReplyMode, bytes: &[u8]) -> Option<()> {
    let mut rest = bytes;
    let mut take = |len: usize| {
        let (head, tail) = rest.split_at_checked(len)?;
        rest = tail;
        Some(head)
    };
    loop {
        let mut head = take(SHORTEST_HEAD)?.to_vec();
        let len = Head::len_of(&head, reply_mode).ok()?;
        head.extend_from_slice(take(len.checked_sub(SHORTEST_HEAD)?)?);
        let head = Head::parse(&head).ok()?;
        let done = match assembly.step(head.kind).ok()? {
            Step::Nothing { done } => done,
            Step::Data {
                len,
                offset_first,
                done,
            } => {
                let mut offset = assembly.range().start();
                if offset_first {
                    offset = u64::from_be_bytes(take(8)?.try_into().ok()?);
                }
                let data = take(usize::try_from(len).ok()?)?;
                assembly.destination(offset, len).ok()?.copy_from_slice(data);
                done
            }
            Step::Chunk { kind, len, done } => {
                assembly.chunk(kind, take(len)?).ok()?;
                done
            }
        };
        if done {
            assembly.finish();
            return Some(());
        }
    }
}
