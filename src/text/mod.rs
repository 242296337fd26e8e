//! Words of texts, and what is counted over them: the built-in hashing encoder, the n-gram model, overlap with queries.

pub mod hashing;
pub mod ngrams;
pub mod overlap;
pub mod tokens;

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// A hasher for keys that are small tuples of integers or hashes already: one multiply and xor-shift per word.
#[derive(Clone, Copy, Default)]
pub struct Mix(u64);

impl Hasher for Mix {
    fn write(&mut self, bytes: &[u8]) {
        self.write_u64(xxhash_rust::xxh3::xxh3_64(bytes));
    }

    fn write_u8(&mut self, value: u8) {
        self.write_u64(u64::from(value));
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        let mixed = (self.0 ^ value).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = mixed ^ (mixed >> 32);
    }

    fn write_usize(&mut self, _: usize) {
        // Lengths of fixed-size keys say nothing.
    }

    fn finish(&self) -> u64 {
        self.0.wrapping_mul(0xD6E8_FEB8_6659_FD93)
    }
}

/// A map under [`Mix`]; never iterated where order would reach a result.
pub(crate) type MixMap<K, V> = HashMap<K, V, BuildHasherDefault<Mix>>;
