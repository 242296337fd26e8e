//! The hashing encoder, the n-gram model and word counts, on lists of Python strings.

use std::sync::Arc;

use numpy::{IntoPyArray, PyArray1, PyArray2, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::PyBytes;

use super::errors::to_python;
use crate::error::{Error, ErrorKind};
use crate::text::hashing::{Hashing, IdfCounter};
use crate::text::ngrams::{Ngram, NgramCounts, TokenCounts, Unknown};
use crate::text::overlap::Overlap;
use crate::text::tokens::spans;

/// Texts handled between two looks at pending signals (Ctrl-C).
const BATCH: usize = 4096;

/// Feature counts held while an idf is fitted: some 300 MB.
const IDF_ENTRIES: usize = 1 << 23;

/// Calls `work` on batches of texts, the interpreter released, and answers Ctrl-C between them.
fn in_batches<T: Send>(
    py: Python<'_>,
    texts: &[PyBackedStr],
    mut work: impl FnMut(&[PyBackedStr]) -> T + Send,
) -> PyResult<Vec<T>> {
    let mut results = Vec::with_capacity(texts.len().div_ceil(BATCH));
    for batch in texts.chunks(BATCH) {
        py.check_signals()?;
        results.push(py.detach(|| work(batch)));
    }
    Ok(results)
}

/// Counts document frequencies over texts, to make a `HashingEncoder`.
#[pyclass(module = "lmd3._lmd3")]
struct HashingFitter {
    counter: IdfCounter,
}

#[pymethods]
impl HashingFitter {
    #[new]
    #[pyo3(signature = (seed=0, max_texts=262_144))]
    fn new(seed: u64, max_texts: u64) -> Self {
        Self { counter: IdfCounter::new(seed, max_texts, IDF_ENTRIES) }
    }

    fn add(&mut self, py: Python<'_>, texts: Vec<PyBackedStr>) -> PyResult<()> {
        in_batches(py, &texts, |batch| self.counter.add(batch)).map(drop)
    }

    #[getter]
    fn seen(&self) -> u64 {
        self.counter.seen()
    }

    /// Freezes the counts; the fitter is empty afterwards.
    fn finish(&mut self, py: Python<'_>, dim: usize) -> PyResult<HashingEncoder> {
        let counter = std::mem::replace(&mut self.counter, IdfCounter::new(0, 1, 0));
        let inner = py.detach(|| counter.finish(dim)).map_err(|error| to_python(py, &error))?;
        Ok(HashingEncoder { inner })
    }
}

/// The built-in lexical encoder with its frozen idf.
#[pyclass(module = "lmd3._lmd3", frozen)]
struct HashingEncoder {
    inner: Hashing,
}

/// Vectors (m, dim), words read (m,), words left out (m,).
type Encoded<'py> = (Bound<'py, PyArray2<f32>>, Bound<'py, PyArray1<i32>>, Bound<'py, PyArray1<i32>>);

#[pymethods]
impl HashingEncoder {
    #[staticmethod]
    fn from_bytes(py: Python<'_>, data: &[u8]) -> PyResult<Self> {
        Hashing::from_bytes(data).map(|inner| Self { inner }).map_err(|error| to_python(py, &error))
    }

    fn to_bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.inner.to_bytes())
    }

    #[getter]
    fn dim(&self) -> usize {
        self.inner.dim()
    }

    #[getter]
    fn fitted_texts(&self) -> u64 {
        self.inner.texts()
    }

    #[getter]
    fn seen_texts(&self) -> u64 {
        self.inner.seen()
    }

    #[getter]
    fn features(&self) -> usize {
        self.inner.features()
    }

    #[getter]
    fn fingerprint(&self) -> String {
        self.inner.fingerprint()
    }

    /// Features in the texts (each once a text) and those without a frequency of their own.
    #[pyo3(signature = (texts, max_words=None))]
    fn unknown(
        &self,
        py: Python<'_>,
        texts: Vec<PyBackedStr>,
        max_words: Option<usize>,
    ) -> PyResult<(u64, u64)> {
        let limit = max_words.unwrap_or(usize::MAX);
        let counts = in_batches(py, &texts, |batch| self.inner.unknown(batch, limit))?;
        Ok(counts.into_iter().fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1)))
    }

    #[pyo3(signature = (texts, max_words=None))]
    fn encode<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<PyBackedStr>,
        max_words: Option<usize>,
    ) -> PyResult<Encoded<'py>> {
        let (m, dim) = (texts.len(), self.inner.dim());
        let mut vectors = vec![0f32; m * dim];
        let mut words = vec![0i32; m];
        let mut left_out = vec![0i32; m];
        let mut done = 0;
        in_batches(py, &texts, |batch| {
            let rows = done..done + batch.len();
            done = rows.end;
            self.inner.encode(
                batch,
                max_words.unwrap_or(usize::MAX),
                &mut vectors[rows.start * dim..rows.end * dim],
                &mut words[rows.clone()],
                &mut left_out[rows],
            );
        })?;
        let vectors = vectors.into_pyarray(py).reshape([m, dim])?;
        Ok((vectors, words.into_pyarray(py), left_out.into_pyarray(py)))
    }
}

/// Hashes of ids (m,): the xxh3-64 of each under a seed.
#[pyfunction]
fn hash_ids<'py>(py: Python<'py>, ids: Vec<PyBackedStr>, seed: u64) -> Bound<'py, PyArray1<u64>> {
    let hashes: Vec<u64> =
        ids.iter().map(|id| xxhash_rust::xxh3::xxh3_64_with_seed(id.as_bytes(), seed)).collect();
    hashes.into_pyarray(py)
}

/// The words of each text as (words, 2) starts and ends in characters.
#[pyfunction]
fn word_spans<'py>(py: Python<'py>, texts: Vec<PyBackedStr>) -> PyResult<Vec<Bound<'py, PyArray2<u32>>>> {
    let found = in_batches(py, &texts, |batch| batch.iter().map(|text| spans(text)).collect::<Vec<_>>())?;
    let spans = found.into_iter().flatten();
    spans
        .map(|spans| {
            let flat: Vec<u32> = spans.iter().flat_map(|&(start, end)| [start, end]).collect();
            flat.into_pyarray(py).reshape([spans.len(), 2])
        })
        .collect()
}

/// Counts of an order-3 model; texts can be added at any time, also to a copy.
#[pyclass(name = "NgramCounts", module = "lmd3._lmd3")]
struct PyNgramCounts {
    inner: Arc<NgramCounts>,
}

#[pymethods]
impl PyNgramCounts {
    #[new]
    fn new() -> Self {
        Self { inner: Arc::default() }
    }

    fn add(&mut self, py: Python<'_>, texts: Vec<PyBackedStr>) -> PyResult<()> {
        // A model or copy that shares the counts keeps them as they were.
        let counts = py.detach(|| Arc::make_mut(&mut self.inner));
        for result in in_batches(py, &texts, |batch| counts.add(batch))? {
            result.map_err(|error| to_python(py, &error))?;
        }
        Ok(())
    }

    fn copy(&self) -> Self {
        Self { inner: Arc::clone(&self.inner) }
    }

    #[pyo3(signature = (spelled=false))]
    fn model(&self, py: Python<'_>, spelled: bool) -> PyResult<PyNgram> {
        let unknown = if spelled { Unknown::Spelled } else { Unknown::Symbol };
        let inner = py
            .detach(|| Ngram::new(Arc::clone(&self.inner), unknown))
            .map_err(|error| to_python(py, &error))?;
        Ok(PyNgram { inner })
    }

    #[getter]
    fn texts(&self) -> u64 {
        self.inner.texts()
    }

    #[getter]
    fn tokens(&self) -> u64 {
        self.inner.tokens()
    }

    #[getter]
    fn vocabulary(&self) -> usize {
        self.inner.vocabulary()
    }
}

/// An interpolated Kneser–Ney model of order 3.
#[pyclass(name = "Ngram", module = "lmd3._lmd3", frozen)]
struct PyNgram {
    inner: Ngram,
}

/// Nats (m,), predicted tokens (m,), unknown words among them (m,).
type Scored<'py> = (Bound<'py, PyArray1<f64>>, Bound<'py, PyArray1<u32>>, Bound<'py, PyArray1<u32>>);

#[pymethods]
impl PyNgram {
    #[pyo3(signature = (texts, prompts=None))]
    fn score<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<PyBackedStr>,
        prompts: Option<Vec<PyBackedStr>>,
    ) -> PyResult<Scored<'py>> {
        if let Some(prompts) = &prompts
            && prompts.len() != texts.len()
        {
            let message = format!("{} prompts for {} texts", prompts.len(), texts.len());
            return Err(to_python(py, &Error::new(ErrorKind::Shape, message)));
        }
        let mut done = 0;
        let scores = in_batches(py, &texts, |batch| {
            let prompts = prompts.as_ref().map(|prompts| &prompts[done..done + batch.len()]);
            done += batch.len();
            match prompts {
                Some(prompts) => self.inner.score_after(prompts, batch),
                None => self.inner.score(batch),
            }
        })?
        .concat();
        Ok((
            scores.iter().map(|score| score.nats).collect::<Vec<_>>().into_pyarray(py),
            scores.iter().map(|score| score.tokens).collect::<Vec<_>>().into_pyarray(py),
            scores.iter().map(|score| score.unknown).collect::<Vec<_>>().into_pyarray(py),
        ))
    }

    #[pyo3(signature = (context, token, from_start=false))]
    fn log_probability(
        &self,
        context: Vec<PyBackedStr>,
        token: Option<PyBackedStr>,
        from_start: bool,
    ) -> f64 {
        let context: Vec<&str> = context.iter().map(AsRef::as_ref).collect();
        self.inner.log_probability(&context, from_start, token.as_deref())
    }

    #[getter]
    fn discounts(&self) -> [[f64; 3]; 3] {
        self.inner.discounts()
    }
}

/// Word counts of a stream of texts, in bounded memory: at most `max_words` different words, some 300 MB by default.
#[pyclass(name = "TokenCounts", module = "lmd3._lmd3")]
struct PyTokenCounts {
    inner: TokenCounts,
}

/// Nats per token (m,), tokens (m,).
type CrossEntropy<'py> = (Bound<'py, PyArray1<f64>>, Bound<'py, PyArray1<u32>>);

#[pymethods]
impl PyTokenCounts {
    #[new]
    #[pyo3(signature = (max_words=8_388_608))]
    fn new(max_words: usize) -> Self {
        Self { inner: TokenCounts::new(max_words) }
    }

    fn add(&mut self, py: Python<'_>, texts: Vec<PyBackedStr>) -> PyResult<()> {
        in_batches(py, &texts, |batch| self.inner.add(batch)).map(drop)
    }

    fn cross_entropy<'py>(&self, py: Python<'py>, texts: Vec<PyBackedStr>) -> PyResult<CrossEntropy<'py>> {
        let results = in_batches(py, &texts, |batch| self.inner.cross_entropy(batch))?.concat();
        let (nats, tokens): (Vec<f64>, Vec<u32>) = results.into_iter().unzip();
        Ok((nats.into_pyarray(py), tokens.into_pyarray(py)))
    }

    /// Counts as float64 (m,), NaN for a text without words.
    fn rarest<'py>(&self, py: Python<'py>, texts: Vec<PyBackedStr>) -> PyResult<Bound<'py, PyArray1<f64>>> {
        let counts = in_batches(py, &texts, |batch| self.inner.rarest(batch))?.concat();
        let counts = counts.iter().map(|count| count.map_or(f64::NAN, |count| count as f64));
        Ok(counts.collect::<Vec<_>>().into_pyarray(py))
    }

    #[getter]
    fn tokens(&self) -> u64 {
        self.inner.tokens()
    }

    #[getter]
    fn words(&self) -> usize {
        self.inner.words()
    }

    #[getter]
    fn forgotten(&self) -> u64 {
        self.inner.forgotten()
    }
}

/// Overlap of a stream of texts with queries, in memory that depends on the queries alone.
#[pyclass(name = "Overlap", module = "lmd3._lmd3", frozen)]
struct PyOverlap {
    inner: Overlap,
}

#[pymethods]
impl PyOverlap {
    #[new]
    #[pyo3(signature = (queries, n=5))]
    fn new(py: Python<'_>, queries: Vec<PyBackedStr>, n: usize) -> PyResult<Self> {
        let inner = py.detach(|| Overlap::new(&queries, n)).map_err(|error| to_python(py, &error))?;
        Ok(Self { inner })
    }

    fn add(&self, py: Python<'_>, texts: Vec<PyBackedStr>) -> PyResult<()> {
        in_batches(py, &texts, |batch| self.inner.add(batch)).map(drop)
    }

    /// Largest shares (m,), texts that are the query itself (m,).
    fn result<'py>(&self, py: Python<'py>) -> (Bound<'py, PyArray1<f64>>, Bound<'py, PyArray1<u64>>) {
        let (shares, copies): (Vec<f64>, Vec<u64>) = self.inner.result().into_iter().unzip();
        (shares.into_pyarray(py), copies.into_pyarray(py))
    }

    #[getter]
    fn n(&self) -> usize {
        self.inner.n()
    }
}

/// Adds this part's classes and functions to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(hash_ids, module)?)?;
    module.add_function(wrap_pyfunction!(word_spans, module)?)?;
    module.add_class::<HashingFitter>()?;
    module.add_class::<HashingEncoder>()?;
    module.add_class::<PyNgramCounts>()?;
    module.add_class::<PyNgram>()?;
    module.add_class::<PyTokenCounts>()?;
    module.add_class::<PyOverlap>()
}
