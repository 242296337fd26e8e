//! `_lmd3.Store` (an open store) and `_lmd3.ShardWriter`.

use std::path::PathBuf;
use std::sync::Arc;

use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2};
use pyo3::prelude::*;

use super::errors::to_python;
use crate::error::{Error, ErrorKind};
use crate::rows::Dtype;
use crate::store::{
    Place, ShardWriter as InnerWriter, Store as Inner, checksum as file_checksum, manifest::FileEntry,
};

/// An open store: a folder with a manifest, or bare vectors, mapped.
#[pyclass(frozen, module = "lmd3._lmd3")]
pub struct Store {
    inner: Arc<Inner>,
}

impl Store {
    /// The store itself, for the other parts of the extension.
    #[allow(dead_code, reason = "the scan's part of the extension reads it")]
    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }
}

/// Whether a signal (Ctrl-C) waits for Python; the exception is raised by the caller once it is attached again.
fn interrupted() -> bool {
    Python::attach(|py| py.check_signals().is_err())
}

/// A place in a file: element type, rows, dimensions, offset in bytes.
type NamedPlace = (String, u64, u64, u64);

/// The element type of a name.
fn element_type(py: Python<'_>, name: &str) -> PyResult<Dtype> {
    Dtype::from_name(name).ok_or_else(|| {
        let error = Error::new(ErrorKind::Dtype, format!("elements of type {name:?} are not known"))
            .remedy("use float16, float32, bfloat16 or int8");
        to_python(py, &error)
    })
}

#[pymethods]
impl Store {
    /// Opens a store; headers, shapes and sizes are checked, values are not.
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let inner = py.detach(|| Inner::open(&path)).map_err(|error| to_python(py, &error))?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Opens bare vectors that lie in several files, or in parts of files, as one store.
    ///
    /// A piece is (file, place): a whole file by its name and header (place None), or (dtype, rows, d, offset) in one.
    #[staticmethod]
    #[pyo3(signature = (path, pieces, groups = None, weights = None))]
    fn of_pieces(
        py: Python<'_>,
        path: PathBuf,
        pieces: Vec<(PathBuf, Option<NamedPlace>)>,
        groups: Option<PyReadonlyArray1<'_, u32>>,
        weights: Option<PyReadonlyArray1<'_, f32>>,
    ) -> PyResult<Self> {
        let mut found = Vec::with_capacity(pieces.len());
        for (file, place) in pieces {
            let place = match place {
                Some((name, n, d, offset)) => Some(Place { dtype: element_type(py, &name)?, n, d, offset }),
                None => None,
            };
            found.push((file, place));
        }
        let groups = groups.as_ref().map(|groups| groups.as_slice()).transpose()?;
        let weights = weights.as_ref().map(|weights| weights.as_slice()).transpose()?;
        let inner = py
            .detach(|| Inner::of_pieces(&path, &found, groups, weights))
            .map_err(|error| to_python(py, &error))?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Rows.
    #[getter]
    fn n(&self) -> u64 {
        self.inner.n()
    }

    /// Dimensions.
    #[getter]
    fn d(&self) -> usize {
        self.inner.d()
    }

    /// Element type: "float32", "float16", "bfloat16" or "int8".
    #[getter]
    fn dtype(&self) -> &'static str {
        self.inner.dtype().name()
    }

    /// The shards in row order: (file of the embeddings, number of its first row, rows).
    #[getter]
    fn shards(&self) -> Vec<(PathBuf, u64, usize)> {
        let facts =
            |shard: &crate::store::Shard| (shard.path().to_path_buf(), shard.first_row(), shard.len());
        self.inner.shards().iter().map(facts).collect()
    }

    /// The rows of the given numbers, in their order: (m, d) float32.
    fn read_rows<'py>(
        &self,
        py: Python<'py>,
        rows: PyReadonlyArray1<'py, i64>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let numbers: Vec<i64> = rows.as_array().to_vec();
        let d = self.inner.d();
        let read = || {
            let mut values = vec![0.0_f32; numbers.len() * d];
            for (&number, out) in numbers.iter().zip(values.chunks_exact_mut(d)) {
                let place = u64::try_from(number).ok().and_then(|row| self.inner.locate(row));
                let (shard, row) = place.ok_or_else(|| {
                    let message = format!("there is no row {number} in a store of {} rows", self.inner.n());
                    Error::new(ErrorKind::Parameter, message).file(self.inner.path())
                })?;
                shard.view().rows.read_f32(row, out);
            }
            Ok(values)
        };
        let values = py.detach(read).map_err(|error: Error| to_python(py, &error))?;
        PyArray1::from_vec(py, values).reshape([numbers.len(), d])
    }

    /// The group code of every row: (n,) uint32; None where the store has none.
    fn group_codes<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyArray1<u32>>> {
        let views: Option<Vec<&[u32]>> =
            self.inner.shards().iter().map(|shard| shard.view().groups).collect();
        views.map(|views| PyArray1::from_vec(py, py.detach(|| views.concat())))
    }

    /// Refuses NaN and infinity, naming file and row.
    #[pyo3(signature = (threads = 1))]
    fn check_finite(&self, py: Python<'_>, threads: usize) -> PyResult<()> {
        py.detach(|| self.inner.check_finite(threads, &interrupted)).map_err(|error| to_python(py, &error))
    }

    /// Smallest and largest Euclidean norm of the rows of each shard: (low, its row in the shard, high, its row).
    #[pyo3(signature = (threads = 1))]
    fn norms(&self, py: Python<'_>, threads: usize) -> PyResult<Vec<(f64, usize, f64, usize)>> {
        let found =
            py.detach(|| self.inner.norms(threads, &interrupted)).map_err(|error| to_python(py, &error))?;
        Ok(found.iter().map(|norms| (norms.low.0, norms.low.1, norms.high.0, norms.high.1)).collect())
    }

    fn __repr__(&self) -> String {
        let inner = &self.inner;
        format!("<Store of {} × {} {} rows>", inner.n(), inner.d(), inner.dtype().name())
    }
}

/// A file's name, size and checksum as the manifest lists them.
type Entry = (String, u64, String);

fn entry(file: FileEntry) -> Entry {
    (file.name, file.bytes, file.xxh3)
}

/// Writes the embeddings of one shard: streamed, converted, synced and renamed by `finish`.
#[pyclass(module = "lmd3._lmd3")]
pub struct ShardWriter {
    inner: Option<InnerWriter>,
}

impl ShardWriter {
    fn finished(py: Python<'_>) -> PyErr {
        to_python(py, &Error::new(ErrorKind::Parameter, "the shard is finished or given up already"))
    }
}

#[pymethods]
impl ShardWriter {
    /// Starts shard `number` in a folder, with vectors of `d` dimensions, stored as `dtype`.
    #[new]
    fn new(py: Python<'_>, folder: PathBuf, number: usize, d: usize, dtype: &str) -> PyResult<Self> {
        let dtype = element_type(py, dtype)?;
        let inner = InnerWriter::create(&folder, number, d, dtype);
        Ok(Self { inner: Some(inner.map_err(|error| to_python(py, &error))?) })
    }

    /// Rows so far.
    #[getter]
    fn rows(&self) -> u64 {
        self.inner.as_ref().map_or(0, InnerWriter::rows)
    }

    /// Largest ‖x̂ − x‖/‖x‖ of the int8 rows so far: x as given, x̂ as stored; 0 for other types.
    #[getter]
    fn rounding(&self) -> f64 {
        self.inner.as_ref().map_or(0.0, InnerWriter::rounding)
    }

    /// Appends (m, d) float32 rows in C order; refuses NaN, infinity and overflow with the row within the shard.
    fn append(&mut self, py: Python<'_>, vectors: PyReadonlyArray2<'_, f32>) -> PyResult<()> {
        let inner = self.inner.as_mut().ok_or_else(|| Self::finished(py))?;
        let values = vectors.as_slice()?;
        py.detach(|| inner.append(values)).map_err(|error| to_python(py, &error))
    }

    /// Completes the files: (rows, embeddings, scales), a file as (name, bytes, xxh3).
    fn finish(&mut self, py: Python<'_>) -> PyResult<(u64, Entry, Option<Entry>)> {
        let inner = self.inner.take().ok_or_else(|| Self::finished(py))?;
        let shard = py.detach(|| inner.finish()).map_err(|error| to_python(py, &error))?;
        Ok((shard.rows, entry(shard.embeddings), shard.scales.map(entry)))
    }

    /// Gives the shard up and removes its unfinished files.
    fn abandon(&mut self) {
        self.inner = None;
    }
}

/// The xxh3-64 of a file as 16 hexadecimal digits, and its size.
#[pyfunction]
fn checksum(py: Python<'_>, path: PathBuf) -> PyResult<(String, u64)> {
    py.detach(|| file_checksum(&path)).map_err(|error| to_python(py, &error))
}

/// The xxh3-64 of bytes as 16 hexadecimal digits.
#[pyfunction]
fn xxh3(py: Python<'_>, data: &[u8]) -> String {
    format!("{:016x}", py.detach(|| xxhash_rust::xxh3::xxh3_64(data)))
}

/// Makes a read of a mapped file that was cut short end the process with status 1 and the file's name (as JSON on
/// stdout where `json`), for the command line. Does nothing where there is no such signal.
#[pyfunction]
fn end_where_files_are_cut_short(json: bool) {
    #[cfg(unix)]
    crate::store::end_by_name(json);
    #[cfg(not(unix))]
    let _ = json;
}

/// Adds this part's classes and functions to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(checksum, module)?)?;
    module.add_function(wrap_pyfunction!(xxh3, module)?)?;
    module.add_function(wrap_pyfunction!(end_where_files_are_cut_short, module)?)?;
    module.add_class::<ShardWriter>()?;
    module.add_class::<Store>()
}
