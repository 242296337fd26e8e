//! The built-in encoder: tf-idf weighted words and word pairs under a signed random projection.
//!
//! Every distinct word and pair of adjacent words of a text is a feature, known by a 64-bit hash. Its weight is
//! (1 + ln tf)·idf with idf = 1 + ln(N / max(df, 1)), where N texts of the corpus were counted and df of them hold the
//! feature; a feature never seen weighs as much as one seen once, the most. The vector is Σ weight·s(feature), scaled to
//! length one, with s(feature) ∈ {−1, 1}^dim drawn from the feature's hash.
//!
//! Signs are dense rather than on a few coordinates: the error of a cosine has variance 1/dim either way, but texts of few
//! words get no chance collisions of whole features, and adding 384 signs costs less than finding the idf in memory.
//!
//! What it measures is *lexical*: texts are near where they share words and phrases, whatever they mean.

use rayon::prelude::*;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::{MixMap, tokens};
use crate::error::{Error, ErrorKind, Result};

const WORD: u64 = 1;
const PAIR: u64 = 2;
const EMPTY: u64 = 3;
const SAMPLE: u64 = 4;

const MAGIC: &[u8; 8] = b"lmd3hash";
/// Version of the state's format *and* of the rules for words, hashes and weights above.
const VERSION: u32 = 1;
const HEADER: usize = 48;

/// Largest dimension accepted.
pub const MAX_DIM: usize = 1 << 16;
/// Features kept in a state, the most frequent ones; the rest count as unseen.
const MAX_FEATURES: usize = 1 << 20;

/// What a text's features need while they are collected; reused from text to text.
#[derive(Default)]
struct Scratch {
    word: String,
    hashes: Vec<u64>,
    features: Vec<u64>,
    sum: Vec<f32>,
}

impl Scratch {
    /// Collects the text's features, sorted, repeated as often as they occur. Returns its number of words and how many
    /// beyond `max_words` were left out.
    ///
    /// A text without words is represented by its marks; one without any mark by a feature reserved for it.
    fn collect(&mut self, text: &str, max_words: usize) -> (usize, usize) {
        self.hashes.clear();
        self.features.clear();
        let hashes = &mut self.hashes;
        tokens::words(text, &mut self.word, |word| hashes.push(xxh3_64_with_seed(word.as_bytes(), WORD)));
        if hashes.is_empty() {
            tokens::tokens(text, &mut self.word, |mark| {
                hashes.push(xxh3_64_with_seed(mark.as_bytes(), WORD))
            });
        }
        let total = hashes.len();
        hashes.truncate(max_words);
        self.features.extend_from_slice(hashes);
        self.features.extend(hashes.windows(2).map(|pair| {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&pair[0].to_le_bytes());
            bytes[8..].copy_from_slice(&pair[1].to_le_bytes());
            xxh3_64_with_seed(&bytes, PAIR)
        }));
        if self.features.is_empty() {
            self.features.push(xxh3_64_with_seed(b"", EMPTY));
        }
        self.features.sort_unstable();
        (hashes.len(), total - hashes.len())
    }
}

/// Counts document frequencies over a stream of texts, in bounded memory.
///
/// Text number i has a level drawn from (seed, i), ℓ with probability 2^−ℓ−1. When the texts or features held become too
/// many, the lowest level held is dropped: what remains is a uniform sample, the same however the stream is cut.
pub struct IdfCounter {
    seed: u64,
    max_texts: u64,
    max_entries: usize,
    lowest: usize,
    seen: u64,
    levels: Vec<Level>,
}

#[derive(Default)]
struct Level {
    texts: u64,
    frequency: MixMap<u64, u32>,
}

impl IdfCounter {
    /// A counter that keeps at most `max_texts` texts and `max_entries` feature counts (a feature counts once per level).
    pub fn new(seed: u64, max_texts: u64, max_entries: usize) -> Self {
        let levels = (0..=64).map(|_| Level::default()).collect();
        Self { seed, max_texts: max_texts.max(1), max_entries, lowest: 0, seen: 0, levels }
    }

    fn level(&self, text: u64) -> usize {
        xxh3_64_with_seed(&text.to_le_bytes(), self.seed ^ (SAMPLE << 56)).leading_zeros() as usize
    }

    /// Counts the next texts of the stream.
    pub fn add<T: AsRef<str> + Sync>(&mut self, texts: &[T]) {
        let first = self.seen;
        let features: Vec<(usize, Vec<u64>)> = texts
            .par_iter()
            .enumerate()
            .map_init(Scratch::default, |scratch, (i, text)| {
                let level = self.level(first + i as u64);
                if level < self.lowest {
                    return (level, Vec::new());
                }
                scratch.collect(text.as_ref(), usize::MAX);
                scratch.features.dedup();
                (level, scratch.features.clone())
            })
            .collect();
        self.seen += texts.len() as u64;
        for (level, features) in features {
            if level < self.lowest {
                continue;
            }
            let counts = &mut self.levels[level];
            counts.texts += 1;
            for feature in features {
                *counts.frequency.entry(feature).or_insert(0) += 1;
            }
            while self.lowest < 64 && self.full() {
                self.levels[self.lowest] = Level::default();
                self.lowest += 1;
            }
        }
    }

    fn full(&self) -> bool {
        let (texts, entries) = self.held();
        // A level is dropped only while another remains.
        let more = self.levels[self.lowest + 1..].iter().any(|level| level.texts > 0);
        more && (texts > self.max_texts || entries > self.max_entries)
    }

    fn held(&self) -> (u64, usize) {
        self.levels.iter().fold((0, 0), |(t, e), level| (t + level.texts, e + level.frequency.len()))
    }

    /// Texts given so far.
    pub fn seen(&self) -> u64 {
        self.seen
    }

    /// Freezes the counts into an encoder of `dim` coordinates.
    ///
    /// # Errors
    /// `Parameter` where `dim` is 0 or above [`MAX_DIM`], or no text was counted.
    pub fn finish(self, dim: usize) -> Result<Hashing> {
        if dim == 0 || dim > MAX_DIM {
            return Err(Error::new(ErrorKind::Parameter, format!("dimension {dim} is not in 1..={MAX_DIM}")));
        }
        let texts = self.held().0;
        if texts == 0 {
            return Err(Error::new(ErrorKind::Parameter, "no texts to fit the idf on"));
        }
        let mut levels = self.levels.into_iter();
        let mut merged = levels.next().expect("65 levels").frequency;
        for level in levels {
            for (feature, count) in level.frequency {
                *merged.entry(feature).or_insert(0) += count;
            }
        }
        // Once or never makes no difference to the weight.
        let mut entries: Vec<(u64, u32)> = merged.into_iter().filter(|entry| entry.1 > 1).collect();
        if entries.len() > MAX_FEATURES {
            entries.sort_unstable_by_key(|&(feature, count)| (std::cmp::Reverse(count), feature));
            entries.truncate(MAX_FEATURES);
        }
        entries.sort_unstable();
        Ok(Hashing::new(dim, texts, self.seen, self.seed, entries))
    }
}

/// The frozen encoder.
pub struct Hashing {
    dim: usize,
    texts: u64,
    seen: u64,
    seed: u64,
    /// (feature, document frequency ≥ 2), ascending by feature.
    entries: Vec<(u64, u32)>,
    idf: MixMap<u64, f32>,
    unseen: f32,
    signs: Box<[[u32; 8]; 256]>,
}

impl Hashing {
    fn new(dim: usize, texts: u64, seen: u64, seed: u64, entries: Vec<(u64, u32)>) -> Self {
        let idf = |frequency: f64| (1.0 + (texts as f64 / frequency).ln()) as f32;
        let mut signs = Box::new([[0; 8]; 256]);
        for (byte, lanes) in signs.iter_mut().enumerate() {
            for (bit, lane) in lanes.iter_mut().enumerate() {
                *lane = ((byte as u32 >> bit) & 1) << 31;
            }
        }
        let table = entries.iter().map(|&(feature, count)| (feature, idf(f64::from(count)))).collect();
        Self { dim, texts, seen, seed, entries, idf: table, unseen: idf(1.0), signs }
    }

    /// Coordinates of a vector.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Texts whose words were counted (a sample of those seen where they were too many).
    pub fn texts(&self) -> u64 {
        self.texts
    }

    /// Texts the idf was fitted on a sample of.
    pub fn seen(&self) -> u64 {
        self.seen
    }

    /// Features with a frequency of their own.
    pub fn features(&self) -> usize {
        self.entries.len()
    }

    /// Encodes texts into the rows of `vectors` (`texts.len() × dim`), with the number of words read of each and of those
    /// beyond `max_words`, which are left out. The same text gives the same bytes in any company, on any number of threads.
    pub fn encode<T: AsRef<str> + Sync>(
        &self,
        texts: &[T],
        max_words: usize,
        vectors: &mut [f32],
        words: &mut [i32],
        left_out: &mut [i32],
    ) {
        assert_eq!(vectors.len(), texts.len() * self.dim);
        vectors.par_chunks_mut(self.dim).zip(words).zip(left_out).zip(texts).with_min_len(16).for_each_init(
            Scratch::default,
            |scratch, (((row, words), left_out), text)| {
                let (read, beyond) = scratch.collect(text.as_ref(), max_words);
                *words = i32::try_from(read).unwrap_or(i32::MAX);
                *left_out = i32::try_from(beyond).unwrap_or(i32::MAX);
                self.project(scratch, row);
            },
        );
    }

    /// How many features the texts hold, each counted once a text, and how many of them have no frequency of their own:
    /// what an idf counted on other texts does not know.
    pub fn unknown<T: AsRef<str> + Sync>(&self, texts: &[T], max_words: usize) -> (u64, u64) {
        texts
            .par_iter()
            .map_init(Scratch::default, |scratch, text| {
                scratch.collect(text.as_ref(), max_words);
                scratch.features.dedup();
                let unknown =
                    scratch.features.iter().filter(|feature| !self.idf.contains_key(feature)).count();
                (scratch.features.len() as u64, unknown as u64)
            })
            .reduce(|| (0, 0), |a, b| (a.0 + b.0, a.1 + b.1))
    }

    fn project(&self, scratch: &mut Scratch, row: &mut [f32]) {
        let sum = &mut scratch.sum;
        sum.clear();
        sum.resize(self.dim.next_multiple_of(64), 0.0);
        for run in scratch.features.chunk_by(|a, b| a == b) {
            let feature = run[0];
            let idf = self.idf.get(&feature).copied().unwrap_or(self.unseen);
            let weight = if run.len() == 1 { idf } else { (1.0 + (run.len() as f32).ln()) * idf };
            let bits = weight.to_bits();
            let mut state = feature;
            for lanes in sum.chunks_exact_mut(64) {
                let word = splitmix(&mut state);
                for (lanes, byte) in lanes.chunks_exact_mut(8).zip(word.to_le_bytes()) {
                    for (lane, sign) in lanes.iter_mut().zip(&self.signs[byte as usize]) {
                        *lane += f32::from_bits(bits ^ sign);
                    }
                }
            }
        }
        let sum = &sum[..self.dim];
        let norm = sum.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
        if norm > 0.0 {
            for (out, &x) in row.iter_mut().zip(sum) {
                *out = (f64::from(x) / norm) as f32;
            }
        } else {
            // Signs that cancel exactly: possible for a handful of coordinates only.
            row.fill(0.0);
            row[0] = 1.0;
        }
    }

    /// The state as bytes: header, features, frequencies, checksum; little endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + self.entries.len() * 12 + 8);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&u32::try_from(self.dim).expect("at most MAX_DIM").to_le_bytes());
        for value in [self.texts, self.seen, self.seed, self.entries.len() as u64] {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        bytes.extend(self.entries.iter().flat_map(|entry| entry.0.to_le_bytes()));
        bytes.extend(self.entries.iter().flat_map(|entry| entry.1.to_le_bytes()));
        let checksum = xxh3_64(&bytes);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads a state back.
    ///
    /// # Errors
    /// `Format` where the bytes are no such state, of another version, or damaged.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let bad = |message: &str| Error::new(ErrorKind::Format, format!("hashing encoder state: {message}"));
        if bytes.len() < HEADER + 8 || &bytes[..8] != MAGIC {
            return Err(bad("not such a file"));
        }
        let (body, checksum) = bytes.split_at(bytes.len() - 8);
        let u32_at = |at: usize| u32::from_le_bytes(body[at..at + 4].try_into().expect("4 bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(body[at..at + 8].try_into().expect("8 bytes"));
        if u32_at(8) != VERSION {
            return Err(bad(&format!("version {} (this lmd3 reads {VERSION})", u32_at(8))));
        }
        if xxh3_64(body).to_le_bytes() != checksum {
            return Err(bad("damaged: the checksum does not hold"));
        }
        let dim = u32_at(12) as usize;
        let (texts, seen, seed) = (u64_at(16), u64_at(24), u64_at(32));
        let count = usize::try_from(u64_at(40)).ok().filter(|&count| count <= MAX_FEATURES);
        let count = count.filter(|count| HEADER + count * 12 == body.len());
        let count = count.ok_or_else(|| bad("length does not fit its header"))?;
        if dim == 0 || dim > MAX_DIM || texts == 0 {
            return Err(bad("header out of range"));
        }
        let frequencies = HEADER + count * 8;
        let entries: Vec<(u64, u32)> =
            (0..count).map(|i| (u64_at(HEADER + i * 8), u32_at(frequencies + i * 4))).collect();
        let sorted = entries.windows(2).all(|pair| pair[0].0 < pair[1].0);
        if !sorted || entries.iter().any(|entry| entry.1 < 2 || u64::from(entry.1) > texts) {
            return Err(bad("features out of order or frequencies out of range"));
        }
        Ok(Self::new(dim, texts, seen, seed, entries))
    }

    /// What identifies the encoder: the checksum of its state, 16 hexadecimal digits.
    pub fn fingerprint(&self) -> String {
        let bytes = self.to_bytes();
        let checksum: [u8; 8] = bytes[bytes.len() - 8..].try_into().expect("8 bytes");
        format!("{:016x}", u64::from_le_bytes(checksum))
    }
}

/// Next word of the splitmix64 sequence (Steele, Lea, Flood 2014).
fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fit(texts: &[&str], dim: usize) -> Hashing {
        let mut counter = IdfCounter::new(0, 1 << 18, 1 << 23);
        counter.add(texts);
        counter.finish(dim).unwrap()
    }

    fn encode(encoder: &Hashing, texts: &[&str]) -> Vec<Vec<f32>> {
        let mut vectors = vec![0.0; texts.len() * encoder.dim()];
        let (mut words, mut cut) = (vec![0; texts.len()], vec![0; texts.len()]);
        encoder.encode(texts, usize::MAX, &mut vectors, &mut words, &mut cut);
        assert!(cut.iter().all(|&cut| cut == 0));
        vectors.chunks(encoder.dim()).map(<[f32]>::to_vec).collect()
    }

    fn dot(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum()
    }

    /// Σ weight·sign written out from the definition, without tables.
    #[test]
    fn vectors_follow_the_definition() {
        let encoder = fit(&["the cat", "the dog", "a bird"], 100);
        let got = &encode(&encoder, &["The cat the"])[0];
        let hash = |word: &str| xxh3_64_with_seed(word.as_bytes(), WORD);
        let pair = |a: &str, b: &str| {
            let bytes = [hash(a).to_le_bytes(), hash(b).to_le_bytes()].concat();
            xxh3_64_with_seed(&bytes, PAIR)
        };
        let rare = 1.0 + 3f64.ln();
        let features = [
            (hash("the"), (1.0 + 2f64.ln()) * (1.0 + 1.5f64.ln())),
            (hash("cat"), rare),
            (pair("the", "cat"), rare),
            (pair("cat", "the"), rare),
        ];
        let mut expected = vec![0.0; 128];
        for (feature, weight) in features {
            let mut state = feature;
            for block in 0..2 {
                let word = splitmix(&mut state);
                for bit in 0..64 {
                    expected[block * 64 + bit] += if word >> bit & 1 == 1 { -weight } else { weight };
                }
            }
        }
        let norm = expected[..100].iter().map(|x| x * x).sum::<f64>().sqrt();
        for (x, y) in got.iter().zip(&expected) {
            assert!((f64::from(*x) - y / norm).abs() < 1e-6);
        }
    }

    #[test]
    fn words_beyond_the_limit_are_counted_and_change_nothing() {
        let encoder = fit(&["a b c", "b c d"], 32);
        let read = |text: &str, limit| {
            let (mut vector, mut words, mut cut) = (vec![0.0; 32], [0], [0]);
            encoder.encode(&[text], limit, &mut vector, &mut words, &mut cut);
            (vector, words[0], cut[0])
        };
        assert_eq!(read("a b c d e", 3), (read("a b c", 9).0, 3, 2));
        assert_eq!(read("a b c", 3).2, 0);
    }

    #[test]
    fn features_without_a_frequency_are_counted_once_a_text() {
        let encoder = fit(&["a b", "a b", "c"], 8);
        // Known are those seen twice: a, b and their pair; in "c c" the word c and the pair (c, c) are not.
        assert_eq!(encoder.unknown(&["a b", "c c", "a b a b"], usize::MAX), (3 + 2 + 4, 2 + 1));
    }

    #[test]
    fn shared_rare_words_bring_texts_nearer_than_shared_common_ones() {
        let texts: Vec<String> = (0..50).map(|i| format!("the number {i} of zebra{i}")).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let v = encode(
            &fit(&texts, 384),
            &["zebra7 sleeps here", "old zebra7 runs", "the number ran", "the of you"],
        );
        assert!(dot(&v[0], &v[1]) > dot(&v[2], &v[3]) + 0.05);
    }

    #[test]
    fn texts_without_words_have_vectors_of_their_own() {
        let encoder = fit(&["one two"], 384);
        let v = encode(&encoder, &["", "   ", "!!", "?!?", "!!"]);
        assert_eq!(v[0], v[1]);
        assert_eq!(v[2], v[4]);
        assert!(dot(&v[0], &v[2]).abs() < 0.5 && v[2] != v[3]);
        assert!(v.iter().all(|v| (dot(v, v) - 1.0).abs() < 1e-6));
    }

    #[test]
    fn the_sample_depends_on_the_seed_only() {
        let texts: Vec<String> = (0..2000).map(|i| format!("w{} w{} common", i % 97, i % 31)).collect();
        let state = |chunk: usize, threads: usize, seed: u64| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut counter = IdfCounter::new(seed, 300, 1 << 20);
                texts.chunks(chunk).for_each(|chunk| counter.add(chunk));
                counter.finish(16).unwrap()
            })
        };
        let reference = state(2000, 1, 5);
        assert!(reference.texts() > 100 && reference.texts() <= 300 && reference.seen() == 2000);
        assert_eq!(reference.to_bytes(), state(7, 3, 5).to_bytes());
        assert_ne!(reference.fingerprint(), state(2000, 1, 6).fingerprint());
    }

    #[test]
    fn states_are_read_back_and_damage_is_refused() {
        let encoder = fit(&["a b", "a c", "b c"], 8);
        let bytes = encoder.to_bytes();
        let again = Hashing::from_bytes(&bytes).unwrap();
        assert_eq!(again.to_bytes(), bytes);
        assert_eq!(encode(&again, &["a b c"]), encode(&encoder, &["a b c"]));
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert_eq!(Hashing::from_bytes(&damaged).err().unwrap().kind, ErrorKind::Format);
            assert!(Hashing::from_bytes(&bytes[..at]).is_err());
        }
    }

    proptest! {
        #[test]
        fn any_text_gives_a_unit_vector(texts in prop::collection::vec(".{0,40}", 1..8), dim in 1usize..200) {
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            let encoder = fit(&texts, dim);
            for v in encode(&encoder, &texts) {
                prop_assert!((dot(&v, &v) - 1.0).abs() < 1e-5);
            }
        }

        #[test]
        fn junk_is_refused_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut framed = MAGIC.to_vec();
            framed.extend_from_slice(&VERSION.to_le_bytes());
            framed.extend_from_slice(&bytes);
            let checksum = xxh3_64(&framed);
            framed.extend_from_slice(&checksum.to_le_bytes());
            prop_assert!(Hashing::from_bytes(&bytes).is_err());
            prop_assert!(Hashing::from_bytes(&framed).is_err());
        }
    }
}
