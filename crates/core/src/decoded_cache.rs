//! The block decoded last: small sequential reads of a compressed disk hit the same one.
//!
//! There are two ways to fill the cache. [`DecodedBlockCache::get_or_decode`] lets several threads decode at the same time:
//! for clusters, which are small, and of which workers read different ones. [`DecodedBlockCache::read_with`] decodes one
//! block at a time into one buffer: for blocks of up to 64 MiB, where the requests of several workers mostly fall into the
//! same one, and decoding it for each of them would cost more time and memory than it gains.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Result;

/// The bytes of one block, known by its key `K`.
#[derive(Debug)]
pub struct DecodedBlockCache<K>(Mutex<Block<K>>);

#[derive(Debug)]
struct Block<K> {
    /// `None` where there is no block.
    key: Option<K>,
    bytes: Arc<Vec<u8>>,
}

impl<K> Default for DecodedBlockCache<K> {
    fn default() -> Self {
        Self(Mutex::new(Block {
            key: None,
            bytes: Arc::default(),
        }))
    }
}

impl<K: PartialEq> DecodedBlockCache<K> {
    /// The bytes of block `key`. `decode` makes them unless they are cached; meanwhile others may use the cache.
    ///
    /// # Errors
    /// Those of `decode`.
    pub fn get_or_decode(&self, key: K, decode: impl FnOnce() -> Result<Vec<u8>>) -> Result<Arc<Vec<u8>>> {
        let block = self.lock();
        if block.key.as_ref() == Some(&key) {
            return Ok(Arc::clone(&block.bytes));
        }
        drop(block);
        let bytes = Arc::new(decode()?);
        *self.lock() = Block {
            key: Some(key),
            bytes: Arc::clone(&bytes),
        };
        Ok(bytes)
    }

    /// Has `take` use the bytes of block `key`. `decode` puts them into the buffer of the block before unless they are
    /// cached; meanwhile others wait.
    ///
    /// # Errors
    /// Those of `decode`.
    pub fn read_with(
        &self,
        key: K,
        decode: impl FnOnce(&mut Vec<u8>) -> Result<()>,
        take: impl FnOnce(&[u8]),
    ) -> Result<()> {
        let mut block = self.lock();
        if block.key.as_ref() != Some(&key) {
            block.key = None;
            let mut bytes = Arc::try_unwrap(std::mem::take(&mut block.bytes)).unwrap_or_default();
            decode(&mut bytes)?;
            *block = Block {
                key: Some(key),
                bytes: Arc::new(bytes),
            };
        }
        take(&block.bytes);
        Ok(())
    }

    /// Drops the block: the disk is about to change.
    pub fn clear(&self) {
        let mut block = self.lock();
        if block.key.take().is_some() {
            block.bytes = Arc::default();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Block<K>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn a_block_is_decoded_once_and_never_left_half_done() {
        let last = DecodedBlockCache::default();
        let put = |value: u8| {
            move |bytes: &mut Vec<u8>| {
                *bytes = vec![value];
                Ok(())
            }
        };
        let expect = |value: u8| move |bytes: &[u8]| assert_eq!(bytes, [value]);
        last.read_with(1, put(10), expect(10)).unwrap();
        last.read_with(1, |_| unreachable!("it is cached"), expect(10))
            .unwrap();
        let spoil = |bytes: &mut Vec<u8>| {
            bytes.push(99);
            Err(Error::corrupt("damaged"))
        };
        assert!(last.read_with(2, spoil, |_| unreachable!("it failed")).is_err());
        last.read_with(1, put(11), expect(11)).unwrap();
    }

    #[test]
    fn a_shared_block_outlives_the_next_one() {
        let last = DecodedBlockCache::default();
        let first = last.get_or_decode(1, || Ok(vec![10])).unwrap();
        assert!(Arc::ptr_eq(
            &first,
            &last.get_or_decode(1, || unreachable!("it is cached")).unwrap()
        ));
        assert!(last.get_or_decode(2, || Err(Error::corrupt("damaged"))).is_err());
        let put = |bytes: &mut Vec<u8>| {
            bytes.push(30);
            Ok(())
        };
        last.read_with(3, put, |bytes| assert_eq!(bytes, [30])).unwrap();
        assert_eq!(*first, [10]);
        last.clear();
        assert_eq!(*last.get_or_decode(3, || Ok(vec![31])).unwrap(), [31]);
    }
}
