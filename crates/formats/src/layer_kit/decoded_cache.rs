//! The block decoded last: small reads of a compressed disk come one after the other.
//!
//! One block is decoded at a time. Blocks may be as large as 64 MiB, and the requests of several workers mostly fall into
//! the same one: decoding it for each of them would cost more than it gains.

use std::sync::{Mutex, PoisonError};

use diskimage_core::Result;

/// The bytes of one block, known by its `K`.
#[derive(Debug)]
pub(crate) struct DecodedBlockCache<K>(Mutex<State<K>>);

#[derive(Debug)]
struct State<K> {
    key: Option<K>,
    bytes: Vec<u8>,
}

impl<K: PartialEq> DecodedBlockCache<K> {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(State {
            key: None,
            bytes: Vec::new(),
        }))
    }

    /// Has `take` use the bytes of block `key`, which `decode` makes if they are not there yet.
    pub(crate) fn with(
        &self,
        key: K,
        decode: impl FnOnce(&mut Vec<u8>) -> Result<()>,
        take: impl FnOnce(&[u8]),
    ) -> Result<()> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.key.as_ref() != Some(&key) {
            state.key = None;
            decode(&mut state.bytes)?;
            state.key = Some(key);
        }
        take(&state.bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use diskimage_core::Error;

    use super::*;

    #[test]
    fn a_block_is_decoded_once_and_never_left_half_done() {
        let last = DecodedBlockCache::new();
        let put = |value: u8| {
            move |bytes: &mut Vec<u8>| {
                *bytes = vec![value];
                Ok(())
            }
        };
        let expect = |value: u8| move |bytes: &[u8]| assert_eq!(bytes, [value]);
        last.with(1, put(10), expect(10)).unwrap();
        last.with(1, |_| unreachable!("it is there"), expect(10)).unwrap();
        let spoil = |bytes: &mut Vec<u8>| {
            bytes[0] = 99;
            Err(Error::corrupt("damaged"))
        };
        assert!(last.with(2, spoil, |_| unreachable!("it failed")).is_err());
        last.with(1, put(11), expect(11)).unwrap();
    }
}
