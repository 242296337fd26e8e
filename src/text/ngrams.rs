//! A word n-gram model of order 3 with interpolated modified Kneser–Ney smoothing, and plain word counts.
//!
//! Chen and Goodman, *An empirical study of smoothing techniques for language modeling* (1999), with these choices:
//!
//! * Tokens are the words and marks of [`super::tokens`], lower-cased; a text is one sequence between a start and an end.
//! * p₃(w|u,v) = max(c(uvw) − D(c), 0)/c(uv·) + γ(uv)·p₂(w|v), and so down; the lower orders use continuation counts
//!   N₁₊(·vw) and N₁₊(·w), except that n-grams at the start of a text, which nothing can precede, use their counts.
//!   The discounts D₁, D₂, D₃₊ of each order come from its counts of counts.
//! * The lowest order is interpolated with a base distribution, p₁(w) = max(a(w) − D, 0)/A + γ·p₀(w):
//!   [`Unknown::Symbol`]: uniform over the V known tokens, the end and one symbol `<unk>` for all unknown words. `<unk>`
//!   is never counted, so an unknown word is dearer than any known one in its place; but a long one as dear as a short one.
//!   [`Unknown::Spelled`]: p₀(w) = the probability of the word's bytes under a smoothed byte-bigram model of the vocabulary.
//!   Then every string has a probability of its own, all of them sum to one, and rare names weigh heavily.

use std::collections::HashMap;
use std::sync::Arc;

use rayon::prelude::*;
use xxhash_rust::xxh3::{Xxh3DefaultBuilder, xxh3_64};

use super::{MixMap, tokens};
use crate::error::{Error, ErrorKind, Result};

const NONE: u32 = 0;
const START: u32 = 1;
const END: u32 = 2;
const FIRST: u32 = 3;
const UNKNOWN: u32 = u32::MAX;

/// Counts of words and trigrams over texts. More texts can be added at any time, also to a copy.
#[derive(Clone, Default)]
pub struct NgramCounts {
    vocabulary: HashMap<Box<str>, u32, Xxh3DefaultBuilder>,
    /// c(u, v, w). The first word after the start is counted as (NONE, START, w).
    trigrams: MixMap<[u32; 3], u32>,
    texts: u64,
    tokens: u64,
}

impl NgramCounts {
    /// Counts more texts.
    ///
    /// # Errors
    /// `Parameter` beyond 2³² − 4 different words.
    pub fn add<T: AsRef<str> + Sync>(&mut self, texts: &[T]) -> Result<()> {
        let vocabulary = &self.vocabulary;
        // Known words are looked up in parallel; the few new ones are numbered in the order of the texts.
        let looked_up: Vec<Vec<std::result::Result<u32, Box<str>>>> = texts
            .par_iter()
            .map_init(String::new, |scratch, text| {
                let mut ids = Vec::new();
                tokens::tokens(text.as_ref(), scratch, |token| {
                    ids.push(vocabulary.get(token).copied().ok_or_else(|| token.into()));
                });
                ids
            })
            .collect();
        for ids in looked_up {
            self.texts += 1;
            self.tokens += ids.len() as u64 + 1;
            let (mut u, mut v) = (NONE, START);
            for id in ids {
                let w = match id {
                    Ok(id) => id,
                    Err(word) => {
                        let next = self.vocabulary.len() as u64 + u64::from(FIRST);
                        let next = u32::try_from(next).ok().filter(|&id| id < UNKNOWN);
                        let next =
                            next.ok_or_else(|| Error::new(ErrorKind::Parameter, "too many different words"))?;
                        *self.vocabulary.entry(word).or_insert(next)
                    }
                };
                self.count([u, v, w]);
                (u, v) = (v, w);
            }
            self.count([u, v, END]);
        }
        Ok(())
    }

    fn count(&mut self, trigram: [u32; 3]) {
        let count = self.trigrams.entry(trigram).or_insert(0);
        *count = count.saturating_add(1);
    }

    /// Texts counted.
    pub fn texts(&self) -> u64 {
        self.texts
    }

    /// Tokens counted, ends of texts among them.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Different words and marks.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary.len()
    }
}

/// Discounts for counts 1, 2 and 3 or more.
type Discounts = [f64; 3];

/// Chen and Goodman's closed form from the counts of counts n₁..n₄; fixed values where these are too few to say.
fn discounts(n: [u64; 4]) -> Discounts {
    if n.contains(&0) {
        return [0.5, 1.0, 1.5];
    }
    let [n1, n2, n3, n4] = n.map(|n| n as f64);
    let y = n1 / (n1 + 2.0 * n2);
    let d = [1.0 - 2.0 * y * n2 / n1, 2.0 - 3.0 * y * n3 / n2, 3.0 - 4.0 * y * n4 / n3];
    // Below zero would add mass, at the full count nothing would be left of it.
    [d[0].clamp(0.05, 0.95), d[1].clamp(0.05, 1.95), d[2].clamp(0.05, 2.95)]
}

/// What follows a context: the sum of counts and how many followers were counted once, twice, more often.
#[derive(Clone, Copy, Default)]
struct Context {
    total: u64,
    followers: [u32; 3],
}

impl Context {
    fn push(&mut self, count: u32) {
        self.total += u64::from(count);
        self.followers[(count.min(3) - 1) as usize] += 1;
    }

    /// Discounted share of a follower, and the mass γ left for the lower order.
    fn share(&self, count: u32, d: &Discounts) -> f64 {
        if count == 0 { 0.0 } else { (f64::from(count) - d[(count.min(3) - 1) as usize]) / self.total as f64 }
    }

    fn left(&self, d: &Discounts) -> f64 {
        self.followers.iter().zip(d).map(|(&n, d)| f64::from(n) * d).sum::<f64>() / self.total as f64
    }
}

/// Byte bigrams of the vocabulary's words, smoothed by byte unigrams (strength [`SPELLING_PRIOR`]), these by add-one.
struct Spelling {
    /// ln p(b | a); 256 is the boundary, before the first and after the last byte.
    log: Vec<f64>,
}

const SYMBOLS: usize = 257;
const BOUNDARY: usize = 256;
const SPELLING_PRIOR: f64 = 16.0;

impl Spelling {
    fn new<'a>(words: impl Iterator<Item = &'a str>) -> Self {
        let mut pairs = vec![0u64; SYMBOLS * SYMBOLS];
        for word in words {
            let mut last = BOUNDARY;
            for byte in word.bytes().map(usize::from).chain([BOUNDARY]) {
                pairs[last * SYMBOLS + byte] += 1;
                last = byte;
            }
        }
        let mut single = [1.0; SYMBOLS];
        for row in pairs.chunks(SYMBOLS) {
            single.iter_mut().zip(row).for_each(|(sum, &count)| *sum += count as f64);
        }
        let all: f64 = single.iter().sum();
        let mut log = vec![0.0; SYMBOLS * SYMBOLS];
        for (from, (log, row)) in log.chunks_mut(SYMBOLS).zip(pairs.chunks(SYMBOLS)).enumerate() {
            let total = row.iter().sum::<u64>() as f64 + SPELLING_PRIOR;
            let mut p: Vec<f64> = row
                .iter()
                .zip(&single)
                .map(|(&c, s)| (c as f64 + SPELLING_PRIOR * s / all) / total)
                .collect();
            if from == BOUNDARY {
                // No word is empty.
                p[BOUNDARY] = 0.0;
                let rest: f64 = p.iter().sum();
                p.iter_mut().for_each(|p| *p /= rest);
            }
            log.iter_mut().zip(p).for_each(|(log, p)| *log = p.ln());
        }
        Self { log }
    }

    fn probability(&self, word: &str) -> f64 {
        let mut last = BOUNDARY;
        let mut log = 0.0;
        for byte in word.bytes().map(usize::from).chain([BOUNDARY]) {
            log += self.log[last * SYMBOLS + byte];
            last = byte;
        }
        // Longer words than any written one must not fall to zero.
        log.max(-600.0).exp()
    }
}

/// What the base distribution makes of words it never saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unknown {
    /// One symbol for all of them, under a uniform base.
    #[default]
    Symbol,
    /// Each by its spelling.
    Spelled,
}

/// What a text cost under a model.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Score {
    /// Negative log-likelihood of the text and its end, in nats.
    pub nats: f64,
    /// Predicted tokens: words, marks and the end of the text.
    pub tokens: u32,
    /// Of them, words the model never saw.
    pub unknown: u32,
}

/// γ·p₀.
struct Base {
    mass: f64,
    /// 1/(V + 2), where it is uniform.
    uniform: f64,
    spelling: Option<Spelling>,
}

impl Base {
    fn probability(&self, word: &str) -> f64 {
        self.mass * self.spelling.as_ref().map_or(self.uniform, |spelling| spelling.probability(word))
    }
}

/// The model: counts, with everything derived from them that its probabilities need.
pub struct Ngram {
    counts: Arc<NgramCounts>,
    /// Continuation count of (v, w), plain count after the start.
    bigrams: MixMap<[u32; 2], u32>,
    after_two: MixMap<[u32; 2], Context>,
    after_one: MixMap<u32, Context>,
    /// p₁ of every known token, by id.
    unigrams: Vec<f64>,
    base: Base,
    discounts: [Discounts; 3],
}

impl Ngram {
    /// Derives the model from counts.
    ///
    /// # Errors
    /// `Parameter` where no text was counted.
    pub fn new(counts: Arc<NgramCounts>, unknown: Unknown) -> Result<Self> {
        if counts.texts == 0 {
            return Err(Error::new(ErrorKind::Parameter, "no texts to train the n-gram model on"));
        }
        let mut of_three = [0; 4];
        let mut bigrams: MixMap<[u32; 2], u32> = MixMap::default();
        let mut after_two: MixMap<[u32; 2], Context> = MixMap::default();
        for (&[u, v, w], &count) in &counts.trigrams {
            if u == NONE {
                bigrams.insert([v, w], count);
                continue;
            }
            *bigrams.entry([v, w]).or_insert(0) += 1;
            after_two.entry([u, v]).or_default().push(count);
            tally(&mut of_three, count);
        }
        let mut of_two = [0; 4];
        let mut after_one: MixMap<u32, Context> = MixMap::default();
        let mut continuation = vec![0u32; counts.vocabulary.len() + FIRST as usize];
        for (&[v, w], &count) in &bigrams {
            after_one.entry(v).or_default().push(count);
            continuation[w as usize] += 1;
            tally(&mut of_two, count);
        }
        let mut of_one = [0; 4];
        let mut root = Context::default();
        for &count in continuation.iter().filter(|&&count| count > 0) {
            root.push(count);
            tally(&mut of_one, count);
        }
        let discounts = [of_one, of_two, of_three].map(discounts);
        let base = Base {
            mass: root.left(&discounts[0]),
            uniform: 1.0 / (counts.vocabulary.len() as f64 + 2.0),
            spelling: (unknown == Unknown::Spelled)
                .then(|| Spelling::new(counts.vocabulary.keys().map(AsRef::as_ref))),
        };
        let mut unigrams: Vec<f64> =
            continuation.iter().map(|&count| root.share(count, &discounts[0])).collect();
        for (word, &id) in &counts.vocabulary {
            unigrams[id as usize] += base.probability(word);
        }
        if base.spelling.is_none() {
            unigrams[END as usize] += base.mass * base.uniform;
        }
        Ok(Self { counts, bigrams, after_two, after_one, unigrams, base, discounts })
    }

    /// The counts it was made from.
    pub fn counts(&self) -> &Arc<NgramCounts> {
        &self.counts
    }

    /// Discounts of orders 1, 2 and 3, each for counts 1, 2 and 3 or more.
    pub fn discounts(&self) -> [[f64; 3]; 3] {
        self.discounts
    }

    /// p(w | u, v); `base` is p₁(w).
    fn probability(&self, [u, v, w]: [u32; 3], base: f64) -> f64 {
        let mut p = base;
        if let Some(context) = self.after_one.get(&v) {
            let count = self.bigrams.get(&[v, w]).copied().unwrap_or(0);
            p = context.share(count, &self.discounts[1]) + context.left(&self.discounts[1]) * p;
        }
        if let Some(context) = self.after_two.get(&[u, v]) {
            let count = self.counts.trigrams.get(&[u, v, w]).copied().unwrap_or(0);
            p = context.share(count, &self.discounts[2]) + context.left(&self.discounts[2]) * p;
        }
        p
    }

    fn base(&self, id: u32, word: &str) -> f64 {
        if id == UNKNOWN { self.base.probability(word) } else { self.unigrams[id as usize] }
    }

    fn id(&self, token: &str) -> u32 {
        self.counts.vocabulary.get(token).copied().unwrap_or(UNKNOWN)
    }

    /// Scores texts, in parallel; the result of a text does not depend on its company.
    pub fn score<T: AsRef<str> + Sync>(&self, texts: &[T]) -> Vec<Score> {
        texts
            .par_iter()
            .map_init(String::new, |scratch, text| self.score_one("", text.as_ref(), scratch))
            .collect()
    }

    /// Scores each text as the continuation of its prompt, whose own cost is not counted.
    pub fn score_after<T: AsRef<str> + Sync>(&self, prompts: &[T], texts: &[T]) -> Vec<Score> {
        let pairs = prompts.par_iter().zip(texts);
        pairs
            .map_init(String::new, |s, (prompt, text)| self.score_one(prompt.as_ref(), text.as_ref(), s))
            .collect()
    }

    fn score_one(&self, prompt: &str, text: &str, scratch: &mut String) -> Score {
        let mut score = Score::default();
        let (mut u, mut v) = (NONE, START);
        tokens::tokens(prompt, scratch, |token| (u, v) = (v, self.id(token)));
        tokens::tokens(text, scratch, |token| {
            let w = self.id(token);
            score.nats -= self.probability([u, v, w], self.base(w, token)).ln();
            score.tokens += 1;
            score.unknown += u32::from(w == UNKNOWN);
            (u, v) = (v, w);
        });
        score.nats -= self.probability([u, v, END], self.unigrams[END as usize]).ln();
        score.tokens += 1;
        score
    }

    /// ln p of one token after the tokens of `context` (of which the last two matter; `from_start`: they follow the
    /// start of the text). `token` is a word or mark as the tokeniser writes it, or None for the end of the text.
    pub fn log_probability(&self, context: &[&str], from_start: bool, token: Option<&str>) -> f64 {
        let mut ids: Vec<u32> = if from_start { vec![NONE, START] } else { vec![NONE, NONE] };
        ids.extend(context.iter().map(|token| self.id(token)));
        let (u, v) = (ids[ids.len() - 2], ids[ids.len() - 1]);
        match token {
            None => self.probability([u, v, END], self.unigrams[END as usize]).ln(),
            Some(token) => {
                let w = self.id(token);
                self.probability([u, v, w], self.base(w, token)).ln()
            }
        }
    }
}

fn tally(counts: &mut [u64; 4], count: u32) {
    if (1..=4).contains(&count) {
        counts[count as usize - 1] += 1;
    }
}

/// How often each token of a stream of texts occurs, in bounded memory.
///
/// Words are known by their 64-bit hash. Beyond `max_words` different ones, those counted once so far are forgotten (and
/// their number kept), then those counted twice, until half the room is free.
pub struct TokenCounts {
    counts: MixMap<u64, u64>,
    max_words: usize,
    tokens: u64,
    forgotten: u64,
}

impl TokenCounts {
    /// An empty counter.
    pub fn new(max_words: usize) -> Self {
        Self { counts: MixMap::default(), max_words: max_words.max(1), tokens: 0, forgotten: 0 }
    }

    /// Counts more texts.
    pub fn add<T: AsRef<str> + Sync>(&mut self, texts: &[T]) {
        let hashed: Vec<Vec<u64>> = texts
            .par_iter()
            .map_init(String::new, |scratch, text| {
                let mut hashes = Vec::new();
                tokens::tokens(text.as_ref(), scratch, |token| hashes.push(xxh3_64(token.as_bytes())));
                hashes
            })
            .collect();
        for hashes in hashed {
            self.tokens += hashes.len() as u64;
            for hash in hashes {
                *self.counts.entry(hash).or_insert(0) += 1;
            }
            if self.counts.len() > self.max_words {
                self.forget();
            }
        }
    }

    fn forget(&mut self) {
        let before = self.counts.len();
        let mut limit = 1;
        while self.counts.len() > self.max_words / 2 {
            self.counts.retain(|_, count| *count > limit);
            limit *= 2;
        }
        self.forgotten += (before - self.counts.len()) as u64;
    }

    /// Tokens counted, N.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Different words held, V.
    pub fn words(&self) -> usize {
        self.counts.len()
    }

    /// Words forgotten for want of room; a word that came back and was forgotten again counts twice.
    pub fn forgotten(&self) -> u64 {
        self.forgotten
    }

    /// Cross-entropy of each text in nats per token under the add-one smoothed counts,
    /// −1/T·Σ ln((c(w) + 1)/(N + V + 1)) with one class for all unseen words; NaN for a text without tokens. With it, T.
    pub fn cross_entropy<T: AsRef<str> + Sync>(&self, texts: &[T]) -> Vec<(f64, u32)> {
        let total = (self.tokens as f64 + self.counts.len() as f64 + 1.0).ln();
        texts
            .par_iter()
            .map_init(String::new, |scratch, text| {
                let (mut sum, mut tokens) = (0.0, 0u32);
                tokens::tokens(text.as_ref(), scratch, |token| {
                    let count = self.counts.get(&xxh3_64(token.as_bytes())).copied().unwrap_or(0);
                    sum += total - (count as f64 + 1.0).ln();
                    tokens += 1;
                });
                (sum / f64::from(tokens), tokens)
            })
            .collect()
    }

    /// The count of each text's rarest word, 0 where the texts counted lack one of its words; None for a text without words.
    pub fn rarest<T: AsRef<str> + Sync>(&self, texts: &[T]) -> Vec<Option<u64>> {
        texts
            .par_iter()
            .map_init(String::new, |scratch, text| {
                let mut rarest: Option<u64> = None;
                tokens::words(text.as_ref(), scratch, |word| {
                    let count = self.counts.get(&xxh3_64(word.as_bytes())).copied().unwrap_or(0);
                    rarest = Some(rarest.map_or(count, |least| least.min(count)));
                });
                rarest
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn train(texts: &[&str], unknown: Unknown) -> Ngram {
        let mut counts = NgramCounts::default();
        counts.add(texts).unwrap();
        Ngram::new(Arc::new(counts), unknown).unwrap()
    }

    /// Σ p over the vocabulary, the end, and all strings outside the vocabulary.
    fn total(model: &Ngram, context: &[&str], from_start: bool) -> f64 {
        let known: Vec<&str> = model.counts.vocabulary.keys().map(AsRef::as_ref).collect();
        let mut sum = model.log_probability(context, from_start, None).exp();
        sum += known.iter().map(|w| model.log_probability(context, from_start, Some(w)).exp()).sum::<f64>();
        let probe = "\u{10FFFF}?";
        let unknown = model.log_probability(context, from_start, Some(probe)).exp();
        // p(unseen word)/s(unseen word) is the same for all of them; their s sum to what the known leave.
        sum + model.base.spelling.as_ref().map_or(unknown, |spelling| {
            let rest = 1.0 - known.iter().map(|w| spelling.probability(w)).sum::<f64>();
            rest * unknown / spelling.probability(probe)
        })
    }

    proptest! {
        #[test]
        fn probabilities_sum_to_one(
            texts in prop::collection::vec("([a-e]{1,2}[ .]){0,12}", 1..12),
            context in prop::collection::vec("[a-f]", 0..3),
            from_start: bool,
        ) {
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            let context: Vec<&str> = context.iter().map(String::as_str).collect();
            for unknown in [Unknown::Symbol, Unknown::Spelled] {
                let sum = total(&train(&texts, unknown), &context, from_start);
                prop_assert!((sum - 1.0).abs() < 1e-9, "{}", sum);
            }
        }

        #[test]
        fn adding_texts_in_parts_changes_nothing(
            texts in prop::collection::vec("([a-e]{1,2} ){0,12}", 2..12), cut in 1usize..11, probe in "([a-f] ){0,6}",
        ) {
            let cut = cut.min(texts.len() - 1);
            let mut parts = NgramCounts::default();
            parts.add(&texts[..cut]).unwrap();
            let mut copy = parts.clone();
            copy.add(&texts[cut..]).unwrap();
            parts.add(&["something else entirely"]).unwrap();
            let whole: Vec<&str> = texts.iter().map(String::as_str).collect();
            let model = Ngram::new(Arc::new(copy), Unknown::Symbol).unwrap();
            prop_assert_eq!(model.score(&[&probe]), train(&whole, Unknown::Symbol).score(&[&probe]));
        }
    }

    #[test]
    fn spelling_is_a_distribution() {
        let spelling = Spelling::new(["abc", "abd", "é"].into_iter());
        for row in spelling.log.chunks(SYMBOLS) {
            assert!((row.iter().map(|log| log.exp()).sum::<f64>() - 1.0).abs() < 1e-12);
        }
        assert!(spelling.probability("abe") > spelling.probability("xqz"));
        assert!(spelling.probability(&"x".repeat(10_000)) > 0.0);
    }

    /// Counted by hand: "a b", "a b", "a c"; all counts of counts have holes, so discounts are .5, 1, 1.5.
    #[test]
    fn a_small_model_by_hand() {
        let model = train(&["a b", "a b", "a c"], Unknown::Symbol);
        assert_eq!(model.discounts(), [[0.5, 1.0, 1.5]; 3]);
        // Distinct bigrams: (start,a) (a,b) (a,c) (b,end) (c,end): N₁₊(·a)=1, b 1, c 1, end 2, A = 5.
        let left1: f64 = (3.0 * 0.5 + 1.0) / 5.0;
        let p1_b = 0.5 / 5.0 + left1 / 5.0;
        // After a: b once (preceded by start only), c once.
        let p2_b: f64 = 0.5 / 2.0 + (2.0 * 0.5 / 2.0) * p1_b;
        // After start, a: b twice, c once.
        let p3_b = (2.0 - 1.0) / 3.0 + (0.5 + 1.0) / 3.0 * p2_b;
        assert!((model.log_probability(&["a"], true, Some("b")) - p3_b.ln()).abs() < 1e-12);
        // The first word uses plain counts: a three times after the start.
        let p1_a = 0.5 / 5.0 + left1 / 5.0;
        let p2_a = (3.0 - 1.5) / 3.0 + 1.5 / 3.0 * p1_a;
        assert!((model.log_probability(&[], true, Some("a")) - p2_a.ln()).abs() < 1e-12);
        let p1_end: f64 = (2.0 - 1.0) / 5.0 + left1 / 5.0;
        let p2_end = 0.5 + 0.5 * p1_end;
        let p3_end = (2.0 - 1.0) / 2.0 + 1.0 / 2.0 * p2_end;
        let score = model.score(&["A b"])[0];
        assert!((score.nats + p2_a.ln() + p3_b.ln() + p3_end.ln()).abs() < 1e-12);
        assert_eq!((score.tokens, score.unknown), (3, 0));
    }

    #[test]
    fn prompts_are_context_only() {
        let model = train(&["a b c d", "b c e", "c d e a b"], Unknown::Symbol);
        let whole = model.score(&["a b c e"])[0].nats;
        let after = model.score_after(&["a b"], &["c e"])[0];
        let prompt: f64 =
            -model.log_probability(&[], true, Some("a")) - model.log_probability(&["a"], true, Some("b"));
        assert!((whole - prompt - after.nats).abs() < 1e-12);
        assert_eq!(after.tokens, 3);
        assert_eq!(model.score_after(&[""], &["c e"]), model.score(&["c e"]));
    }

    #[test]
    fn discounts_follow_chen_and_goodman() {
        let d = discounts([100, 40, 20, 12]);
        let y = 100.0 / 180.0;
        let expected = [1.0 - 2.0 * y * 0.4, 2.0 - 3.0 * y * 0.5, 3.0 - 4.0 * y * 0.6];
        assert!(d.iter().zip(expected).all(|(d, e)| (d - e).abs() < 1e-12));
        assert_eq!(discounts([5, 0, 1, 1]), [0.5, 1.0, 1.5]);
    }

    #[test]
    fn unknown_words_cost_more_than_known_ones() {
        let texts = ["the cat sat on the mat .", "the dog sat on the log ."];
        let nats = |unknown, text: &str| train(&texts, unknown).score(&[text])[0].nats;
        for unknown in [Unknown::Symbol, Unknown::Spelled] {
            // "log" was seen once and never after "sat".
            let model = train(&texts, unknown);
            let log_p = |word| model.log_probability(&["cat", "sat"], false, Some(word));
            assert!(log_p("log") > log_p("lot"));
        }
        let (short, long) = ("the cot", "the cottontail");
        assert_eq!(nats(Unknown::Symbol, short), nats(Unknown::Symbol, long));
        assert!(nats(Unknown::Spelled, short) < nats(Unknown::Spelled, long));
        assert!(nats(Unknown::Spelled, &"x".repeat(10_000)).is_finite());
    }

    #[test]
    fn nothing_to_train_on_is_refused() {
        assert_eq!(Ngram::new(Arc::default(), Unknown::Symbol).err().unwrap().kind, ErrorKind::Parameter);
    }

    #[test]
    fn token_counts_give_add_one_cross_entropy() {
        let mut counts = TokenCounts::new(100);
        counts.add(&["a a b", "c."]);
        let got = counts.cross_entropy(&["a z", "", "c"]);
        let expected = -((3.0f64 / 10.0).ln() + (1.0f64 / 10.0).ln()) / 2.0;
        assert!((got[0].0 - expected).abs() < 1e-12 && got[0].1 == 2);
        assert!(got[1].0.is_nan() && got[1].1 == 0);
        assert!((got[2].0 + (2.0f64 / 10.0).ln()).abs() < 1e-12);
    }

    #[test]
    fn a_full_counter_forgets_rare_words_and_says_so() {
        let mut counts = TokenCounts::new(64);
        for i in 0..1000 {
            counts.add(&[format!("often rare{i}")]);
        }
        assert!(counts.words() <= 64 && counts.forgotten() > 900 && counts.tokens() == 2000);
        assert!(counts.cross_entropy(&["often"])[0].0 < counts.cross_entropy(&["rare1"])[0].0);
    }
}
