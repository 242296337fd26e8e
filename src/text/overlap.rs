//! What a stream of texts has in common, word for word, with a fixed set of queries.
//!
//! For every query: the largest share of its distinct n-grams that one text holds, and the number of texts that are the
//! query itself. Tokens are the words and marks of [`super::tokens`], lower-cased. A query of fewer than n tokens has one
//! n-gram, all of it. Memory depends on the queries alone, never on the stream.
//!
//! The queries' n-grams are kept by their 64-bit hash, each with the queries that have it. Lists of queries are stored
//! once for all n-grams that share them, so a template that every query begins with costs one list and one step per text,
//! not one per n-gram of the template.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use rayon::prelude::*;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::{MixMap, tokens};
use crate::error::{Error, ErrorKind, Result};

/// Bits of the filter per n-gram of the queries: most n-grams of a text are in no query, and are told apart in the cache.
const FILTER_BITS: usize = 16;
/// Texts one thread takes at a time.
const CHUNK: usize = 64;

/// Overlap of a stream of texts with queries; see the module.
pub struct Overlap {
    n: usize,
    queries: usize,
    grams: MixMap<u64, u32>,
    filter: Filter,
    /// Lists of queries, by the number that `grams` holds.
    holders: Vec<Box<[u32]>>,
    /// Distinct n-grams of each query.
    sizes: Vec<u32>,
    /// Lengths of n-grams looked for: n, and those of shorter queries.
    lengths: Vec<usize>,
    whole: MixMap<u64, Vec<u32>>,
    best: Vec<AtomicU32>,
    copies: Vec<AtomicU64>,
}

/// What a thread needs for a text; reused from text to text.
struct Scratch {
    word: String,
    tokens: Vec<u64>,
    hits: Vec<u64>,
    classes: Vec<u32>,
    counts: Vec<u32>,
    touched: Vec<u32>,
}

impl Scratch {
    fn new(queries: usize) -> Self {
        Self {
            word: String::new(),
            tokens: Vec::new(),
            hits: Vec::new(),
            classes: Vec::new(),
            counts: vec![0; queries],
            touched: Vec::new(),
        }
    }

    fn read(&mut self, text: &str) {
        self.tokens.clear();
        let tokens = &mut self.tokens;
        tokens::tokens(text, &mut self.word, |token| tokens.push(xxh3_64(token.as_bytes())));
    }
}

/// A set of hashes with false positives only.
struct Filter {
    bits: Vec<u64>,
    shift: u32,
}

impl Filter {
    fn new(entries: usize) -> Self {
        let log = (entries * FILTER_BITS).next_power_of_two().trailing_zeros().max(6);
        Self { bits: vec![0; 1 << (log - 6)], shift: 64 - log }
    }

    fn at(&self, hash: u64) -> (usize, u64) {
        let bit = hash >> self.shift;
        ((bit >> 6) as usize, 1 << (bit & 63))
    }

    fn insert(&mut self, hash: u64) {
        let (word, bit) = self.at(hash);
        self.bits[word] |= bit;
    }

    fn may_hold(&self, hash: u64) -> bool {
        let (word, bit) = self.at(hash);
        self.bits[word] & bit != 0
    }
}

/// The hash of a run of tokens; runs of different lengths differ.
fn hash_of(tokens: &[u64]) -> u64 {
    let start = xxh3_64_with_seed(&(tokens.len() as u64).to_le_bytes(), 0x6e);
    tokens.iter().fold(start, |hash, token| {
        let mixed = (hash.rotate_left(23) ^ token).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        mixed ^ (mixed >> 29)
    })
}

impl Overlap {
    /// The n-grams of the queries.
    ///
    /// # Errors
    /// `Parameter` where n is 0, or there are 2³² queries or more.
    pub fn new<T: AsRef<str> + Sync>(queries: &[T], n: usize) -> Result<Self> {
        if n == 0 || u32::try_from(queries.len()).is_err() {
            return Err(Error::new(ErrorKind::Parameter, "n must be at least 1, and queries fewer than 2³²"));
        }
        // Hashes of the query's n-grams, its number of tokens, and the hash of all of it.
        let read: Vec<(Vec<u64>, usize, u64)> = queries
            .par_iter()
            .map_init(
                || Scratch::new(0),
                |scratch, text| {
                    scratch.read(text.as_ref());
                    let tokens = &scratch.tokens;
                    let mut grams: Vec<u64> = match tokens.len() {
                        0 => Vec::new(),
                        length => tokens.windows(n.min(length)).map(hash_of).collect(),
                    };
                    grams.sort_unstable();
                    grams.dedup();
                    (grams, tokens.len(), hash_of(tokens))
                },
            )
            .collect();
        let mut holders_of: MixMap<u64, Vec<u32>> = MixMap::default();
        let mut whole: MixMap<u64, Vec<u32>> = MixMap::default();
        let mut lengths = vec![n];
        for (query, (grams, length, all)) in (0u32..).zip(&read) {
            if *length == 0 {
                continue;
            }
            lengths.push(n.min(*length));
            whole.entry(*all).or_default().push(query);
            for &gram in grams {
                holders_of.entry(gram).or_default().push(query);
            }
        }
        lengths.sort_unstable();
        lengths.dedup();
        let mut filter = Filter::new(holders_of.len());
        let mut numbers: HashMap<Box<[u32]>, u32> = HashMap::new();
        let mut grams = MixMap::default();
        grams.reserve(holders_of.len());
        for (gram, list) in holders_of {
            filter.insert(gram);
            let next = u32::try_from(numbers.len()).expect("fewer lists than n-grams held in memory");
            grams.insert(gram, *numbers.entry(list.into_boxed_slice()).or_insert(next));
        }
        let mut holders = vec![Box::default(); numbers.len()];
        for (list, number) in numbers {
            holders[number as usize] = list;
        }
        let sizes = read.iter().map(|(grams, _, _)| u32::try_from(grams.len()).unwrap_or(u32::MAX)).collect();
        let count = queries.len();
        Ok(Self {
            n,
            queries: count,
            grams,
            filter,
            holders,
            sizes,
            lengths,
            whole,
            best: (0..count).map(|_| AtomicU32::new(0)).collect(),
            copies: (0..count).map(|_| AtomicU64::new(0)).collect(),
        })
    }

    /// Compares the next texts of the stream with all queries.
    pub fn add<T: AsRef<str> + Sync>(&self, texts: &[T]) {
        // Largest counts and sums of ones: the same in any order of the texts.
        texts.par_chunks(CHUNK).for_each_init(
            || Scratch::new(self.queries),
            |scratch, texts| texts.iter().for_each(|text| self.add_one(text.as_ref(), scratch)),
        );
    }

    fn add_one(&self, text: &str, scratch: &mut Scratch) {
        scratch.read(text);
        let Scratch { tokens, hits, classes, counts, touched, .. } = scratch;
        if tokens.is_empty() {
            return;
        }
        if let Some(queries) = self.whole.get(&hash_of(tokens)) {
            for &query in queries {
                self.copies[query as usize].fetch_add(1, Relaxed);
            }
        }
        hits.clear();
        for &length in &self.lengths {
            let found = tokens.windows(length).map(hash_of).filter(|&gram| self.filter.may_hold(gram));
            hits.extend(found);
        }
        hits.sort_unstable();
        hits.dedup();
        classes.clear();
        classes.extend(hits.iter().filter_map(|gram| self.grams.get(gram)));
        classes.sort_unstable();
        for same in classes.chunk_by(|a, b| a == b) {
            for &query in &self.holders[same[0] as usize] {
                let count = &mut counts[query as usize];
                if *count == 0 {
                    touched.push(query);
                }
                *count += same.len() as u32;
            }
        }
        for query in touched.drain(..) {
            let count = std::mem::take(&mut counts[query as usize]);
            let best = &self.best[query as usize];
            if best.load(Relaxed) < count {
                best.fetch_max(count, Relaxed);
            }
        }
    }

    /// n.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Per query, the largest share of its distinct n-grams that one text held (NaN for a query without tokens), and the
    /// number of texts with the query's very tokens.
    pub fn result(&self) -> Vec<(f64, u64)> {
        let shares = self.best.iter().zip(&self.sizes).map(|(best, &size)| {
            if size == 0 { f64::NAN } else { f64::from(best.load(Relaxed)) / f64::from(size) }
        });
        shares.zip(self.copies.iter().map(|copies| copies.load(Relaxed))).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use proptest::prelude::*;

    fn tokens_of(text: &str) -> Vec<String> {
        let (mut out, mut word) = (Vec::new(), String::new());
        tokens::tokens(text, &mut word, |token| out.push(token.to_owned()));
        out
    }

    /// The definition, with strings in sets.
    fn plain(queries: &[String], texts: &[String], n: usize) -> Vec<(f64, u64)> {
        queries
            .iter()
            .map(|query| {
                let query = tokens_of(query);
                let length = n.min(query.len());
                let grams = |tokens: &[String]| -> HashSet<Vec<String>> {
                    if length == 0 {
                        HashSet::new()
                    } else {
                        tokens.windows(length).map(<[_]>::to_vec).collect()
                    }
                };
                let own = grams(&query);
                let texts: Vec<_> = texts.iter().map(|text| tokens_of(text)).collect();
                let best = texts.iter().map(|text| own.intersection(&grams(text)).count()).max().unwrap_or(0);
                let copies = texts.iter().filter(|text| **text == query && !query.is_empty()).count();
                (best as f64 / own.len() as f64, copies as u64)
            })
            .collect()
    }

    fn same(a: &[(f64, u64)], b: &[(f64, u64)]) -> bool {
        a.len() == b.len()
            && a.iter().zip(b).all(|(a, b)| a.1 == b.1 && (a.0 == b.0 || a.0.is_nan() && b.0.is_nan()))
    }

    proptest! {
        #[test]
        fn agrees_with_the_definition(
            queries in prop::collection::vec("([ab!]{1,2} ?){0,9}", 1..8),
            texts in prop::collection::vec("([ab!]{1,2} ?){0,14}", 0..20),
            n in 1usize..6,
            cut in 0usize..20,
        ) {
            let overlap = Overlap::new(&queries, n).unwrap();
            let cut = cut.min(texts.len());
            overlap.add(&texts[..cut]);
            overlap.add(&texts[cut..]);
            let (found, expected) = (overlap.result(), plain(&queries, &texts, n));
            prop_assert!(same(&found, &expected), "{:?} {:?}", found, expected);
        }
    }

    #[test]
    fn a_text_counts_by_itself() {
        // Half of the query in one text, the other half in another: the most that one text has is what counts.
        let overlap = Overlap::new(&["one two three four five six"], 2).unwrap();
        overlap.add(&["One  two three", "four five six", "six five", "ONE two THREE four five six"]);
        assert_eq!(overlap.result(), [(1.0, 1)]);
        let halves = Overlap::new(&["one two three four five six"], 2).unwrap();
        halves.add(&["One two three", "four five six"]);
        assert_eq!(halves.result(), [(0.4, 0)]);
    }

    #[test]
    fn a_shared_template_is_one_list() {
        let queries: Vec<String> =
            (0..500).map(|i| format!("answer the following question with care : q{i} x{i} y{i}")).collect();
        let overlap = Overlap::new(&queries, 3).unwrap();
        // The five n-grams of the template share a list; two more reach into each query and one is its own.
        assert_eq!(overlap.holders.len(), 1 + 500);
        overlap.add(&["answer the following question with care : nothing"]);
        assert!(overlap.result().iter().all(|&(share, copies)| share == 5.0 / 8.0 && copies == 0));
    }

    #[test]
    fn no_queries_and_no_n() {
        Overlap::new(&[] as &[&str], 5).unwrap().add(&["a b c"]);
        assert!(Overlap::new(&["a"], 0).is_err());
    }
}
