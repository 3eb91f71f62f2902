//! The cluster decoded last: small sequential reads of a compressed disk hit the same one.
//!
//! Several threads may decode at the same time: clusters are small, and workers read different ones.

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
    fn a_shared_block_outlives_the_next_one() {
        let last = DecodedBlockCache::default();
        let first = last.get_or_decode(1, || Ok(vec![10])).unwrap();
        assert!(Arc::ptr_eq(
            &first,
            &last.get_or_decode(1, || unreachable!("it is cached")).unwrap()
        ));
        assert!(last.get_or_decode(2, || Err(Error::corrupt("damaged"))).is_err());
        last.get_or_decode(3, || Ok(vec![30])).unwrap();
        assert_eq!(*first, [10]);
        last.clear();
        assert_eq!(*last.get_or_decode(3, || Ok(vec![31])).unwrap(), [31]);
    }
}
