//! The scan of a store or matrix, whole or by parts, and the fold of its parts.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::ops::Range;

use numpy::{PyReadonlyArray1, PyReadonlyArray2};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::convert::Matrix;
use super::errors::to_python;
use super::parts;
use super::results::{PyEstimate, PyScan};
use super::store::Store;
use super::watch::{Failure, watched};
use crate::error::{Error, ErrorKind, Result};
use crate::kernel::{Kernel, ScaledKernel};
use crate::rows::ShardView;
use crate::scan::reduce::{Fold, Part};
use crate::scan::{Io, NO_ROW, Precision, Request, check_queries, plan};
use crate::simd::Level;

/// The arguments of a scan, owned or borrowed from NumPy.
struct Arguments<'py> {
    source: Bound<'py, PyAny>,
    queries: PyReadonlyArray2<'py, f32>,
    kernels: Vec<ScaledKernel>,
    neighbors: usize,
    by_group: bool,
    group_map: Option<Vec<u32>>,
    exclude_rows: Option<Vec<u64>>,
    exclude_within: f64,
    row_rounding: f64,
    max_cosine: bool,
    row_sum: bool,
    weights: Option<PyReadonlyArray1<'py, f32>>,
    precision: Precision,
    level: Level,
    threads: usize,
    memory: usize,
    io: Io,
}

pub(super) fn scaled_kernels(kernels: &[(String, f64)]) -> Result<Vec<ScaledKernel>> {
    kernels.iter().map(|(name, bandwidth)| ScaledKernel::new(Kernel::from_name(name)?, *bandwidth)).collect()
}

impl<'py> Arguments<'py> {
    #[allow(clippy::too_many_arguments)] // keyword-only in Python, each with its default
    fn new(
        source: &Bound<'py, PyAny>,
        queries: PyReadonlyArray2<'py, f32>,
        kernels: &[(String, f64)],
        neighbors: usize,
        by_group: bool,
        group_map: Option<PyReadonlyArray1<'py, u32>>,
        exclude_rows: Option<PyReadonlyArray1<'py, i64>>,
        exclude_within: f64,
        row_rounding: f64,
        max_cosine: bool,
        row_sum: bool,
        weights: Option<PyReadonlyArray1<'py, f32>>,
        precision: &str,
        threads: usize,
        memory: usize,
        io: &str,
    ) -> PyResult<Self> {
        let raise = |error: Error| to_python(source.py(), &error);
        let exclude_rows = match exclude_rows {
            Some(rows) => {
                Some(rows.as_slice()?.iter().map(|&row| u64::try_from(row).unwrap_or(NO_ROW)).collect())
            }
            None => None,
        };
        Ok(Self {
            source: source.clone(),
            queries,
            kernels: scaled_kernels(kernels).map_err(raise)?,
            neighbors,
            by_group,
            group_map: group_map.map(|map| map.as_slice().map(<[u32]>::to_vec)).transpose()?,
            exclude_rows,
            exclude_within,
            row_rounding,
            max_cosine,
            row_sum,
            weights,
            precision: Precision::from_name(precision).map_err(raise)?,
            level: Level::current().map_err(raise)?,
            threads,
            memory,
            io: match io {
                "mmap" => Io::Map,
                "pread" => Io::Read,
                _ => {
                    let error = Error::new(ErrorKind::Parameter, format!("unknown io {io:?}"));
                    return Err(raise(error.remedy("choose mmap or pread")));
                }
            },
        })
    }

    fn request(&self) -> PyResult<Request<'_>> {
        Ok(Request {
            queries: self.queries.as_slice()?,
            d: self.queries.as_array().ncols(),
            kernels: self.kernels.clone(),
            neighbors: self.neighbors,
            by_group: self.by_group,
            exclude_rows: self.exclude_rows.as_deref(),
            exclude_within: self.exclude_within,
            row_rounding: self.row_rounding,
            max_cosine: self.max_cosine,
            row_sum: self.row_sum,
            precision: self.precision,
            level: self.level,
            threads: self.threads,
            memory: self.memory,
            io: self.io,
        })
    }

    /// Scans a range of segments (all: `None`); each part goes to `take`, with Python attached.
    fn run(
        &self,
        range: Option<Range<usize>>,
        progress: Option<Py<PyAny>>,
        take: impl FnMut(Python<'_>, Part) -> PyResult<()> + Send,
    ) -> PyResult<()> {
        let py = self.source.py();
        let raise = |error: Error| to_python(py, &error);
        let store = self.source.cast::<Store>().ok().map(|store| store.get().inner().clone());
        let matrix = if store.is_none() { Some(Matrix::borrow(&self.source)?) } else { None };
        let mut views = views(py, store.as_deref(), matrix.as_ref(), self.weights.as_ref())?;
        let mapped = self.groups_of(&views, range.clone());
        for (view, groups) in views.iter_mut().zip(&mapped) {
            view.groups = groups.as_deref();
        }
        let request = self.request()?;
        // Before the scan: its rows are looked up in the store, and a query's is none of them.
        if request.d > 0 {
            check_queries(&request).map_err(raise)?;
        }
        watched(py, &views, &request, range, progress, take).map_err(|error| match error {
            Failure::Python(error) => error,
            Failure::Scan(error) => raise(match (&store, error.row, error.kind) {
                (Some(store), Some(row), ErrorKind::NotFinite | ErrorKind::Parameter) => {
                    place(store, error, row)
                }
                _ => error,
            }),
        })
    }
}

impl Arguments<'_> {
    /// The group codes of each shard, renamed by the map; none of shards outside the range, nor where groups are not asked
    /// for: nobody reads them.
    fn groups_of<'a>(
        &self,
        views: &[ShardView<'a>],
        range: Option<Range<usize>>,
    ) -> Vec<Option<Cow<'a, [u32]>>> {
        let all = plan::segments(views);
        let range = range.unwrap_or(0..all.len());
        let touched: BTreeSet<usize> =
            all.get(range).unwrap_or(&[]).iter().map(|segment| segment.shard).collect();
        let rename = |groups: &'a [u32]| match &self.group_map {
            Some(map) => groups.iter().map(|&code| map.get(code as usize).copied().unwrap_or(code)).collect(),
            None => Cow::Borrowed(groups),
        };
        views
            .iter()
            .enumerate()
            .map(|(shard, view)| {
                let wanted = self.by_group && touched.contains(&shard);
                view.groups.filter(|_| wanted).map(rename)
            })
            .collect()
    }
}

/// The shards of a store, or the one of a matrix.
pub(super) fn views<'a>(
    py: Python<'_>,
    store: Option<&'a crate::store::Store>,
    matrix: Option<&'a Matrix<'_>>,
    weights: Option<&'a PyReadonlyArray1<'_, f32>>,
) -> PyResult<Vec<ShardView<'a>>> {
    Ok(match (store, matrix) {
        (Some(store), _) => store.shards().iter().map(|shard| shard.view()).collect(),
        (None, Some(matrix)) => {
            let weights = weights.map(|weights| weights.as_slice()).transpose()?;
            vec![ShardView { rows: matrix.rows(py)?, groups: None, weights }]
        }
        (None, None) => Vec::new(),
    })
}

/// Rows of each segment of a store or matrix, in order: ranges of work are cut between segments.
#[pyfunction]
fn segments(source: &Bound<'_, PyAny>) -> PyResult<Vec<u64>> {
    let store = source.cast::<Store>().ok().map(|store| store.get().inner().clone());
    let matrix = if store.is_none() { Some(Matrix::borrow(source)?) } else { None };
    let views = views(source.py(), store.as_deref(), matrix.as_ref(), None)?;
    Ok(plan::segments(&views).iter().map(|segment| segment.rows() as u64).collect())
}

/// Sums of kernels over all rows of a store or matrix, exactly.
///
/// `queries` is float32 (Q, d); `kernels` lists (name, bandwidth); `exclude_rows` int64 (Q,) with −1 for none;
/// `weights` float32 (n,) belongs to a matrix (a store brings its own); `group_map` uint32 renames group codes (4 bytes a row
/// are taken for that).
/// `progress(done, total)` is called about ten times a second with pairs of rows and queries.
#[pyfunction]
#[pyo3(signature = (source, queries, kernels, *, neighbors=0, by_group=false, group_map=None, exclude_rows=None, exclude_within=0.0,
    row_rounding=0.0, max_cosine=false, row_sum=false, weights=None, precision="float32", threads=0, memory=1_073_741_824, io="mmap", progress=None))]
#[allow(clippy::too_many_arguments)] // keyword-only in Python, each with its default
fn scan(
    py: Python<'_>,
    source: &Bound<'_, PyAny>,
    queries: PyReadonlyArray2<'_, f32>,
    kernels: Vec<(String, f64)>,
    neighbors: usize,
    by_group: bool,
    group_map: Option<PyReadonlyArray1<'_, u32>>,
    exclude_rows: Option<PyReadonlyArray1<'_, i64>>,
    exclude_within: f64,
    row_rounding: f64,
    max_cosine: bool,
    row_sum: bool,
    weights: Option<PyReadonlyArray1<'_, f32>>,
    precision: &str,
    threads: usize,
    memory: usize,
    io: &str,
    progress: Option<Py<PyAny>>,
) -> PyResult<PyScan> {
    let count = queries.as_array().nrows();
    let arguments = Arguments::new(
        source,
        queries,
        &kernels,
        neighbors,
        by_group,
        group_map,
        exclude_rows,
        exclude_within,
        row_rounding,
        max_cosine,
        row_sum,
        weights,
        precision,
        threads,
        memory,
        io,
    )?;
    let mut fold = Fold::new(count, kernels.len(), neighbors, 0);
    arguments.run(None, progress, |py, part| fold.add(&part).map_err(|error| to_python(py, &error)))?;
    PyScan::new(py, fold.finish(), count, kernels.len(), neighbors, arguments.level)
}

/// Scans the segments from `start` to before `end` and gives `sink` each segment's part for each batch of queries, in order:
/// segments ascending, and of each the queries ascending. What the sink raises stops the scan and is raised here.
///
/// A part is a dict of arrays (see `parts.rs`), to be kept or sent and given to a `Fold`. The other arguments are those of `scan`.
#[pyfunction]
#[pyo3(signature = (source, queries, kernels, start, end, sink, *, neighbors=0, by_group=false, group_map=None, exclude_rows=None,
    exclude_within=0.0, row_rounding=0.0, max_cosine=false, row_sum=false, weights=None, precision="float32", threads=0,
    memory=1_073_741_824, io="mmap", progress=None))]
#[allow(clippy::too_many_arguments)] // keyword-only in Python, each with its default
fn scan_parts(
    source: &Bound<'_, PyAny>,
    queries: PyReadonlyArray2<'_, f32>,
    kernels: Vec<(String, f64)>,
    start: usize,
    end: usize,
    sink: Py<PyAny>,
    neighbors: usize,
    by_group: bool,
    group_map: Option<PyReadonlyArray1<'_, u32>>,
    exclude_rows: Option<PyReadonlyArray1<'_, i64>>,
    exclude_within: f64,
    row_rounding: f64,
    max_cosine: bool,
    row_sum: bool,
    weights: Option<PyReadonlyArray1<'_, f32>>,
    precision: &str,
    threads: usize,
    memory: usize,
    io: &str,
    progress: Option<Py<PyAny>>,
) -> PyResult<()> {
    let arguments = Arguments::new(
        source,
        queries,
        &kernels,
        neighbors,
        by_group,
        group_map,
        exclude_rows,
        exclude_within,
        row_rounding,
        max_cosine,
        row_sum,
        weights,
        precision,
        threads,
        memory,
        io,
    )?;
    arguments
        .run(Some(start..end), progress, |py, part| sink.call1(py, (parts::to_dict(py, part)?,)).map(|_| ()))
}

/// Folds parts into the result of a scan: segments in ascending order from 0, and of each the queries in order.
#[pyclass(name = "Fold", module = "lmd3._lmd3")]
struct PyFold {
    fold: Option<Fold>,
    queries: usize,
    kernels: usize,
    neighbors: usize,
    level: Level,
}

#[pymethods]
impl PyFold {
    #[new]
    fn new(py: Python<'_>, queries: usize, kernels: usize, neighbors: usize, level: &str) -> PyResult<Self> {
        let level = Level::from_name(level).map_err(|error| to_python(py, &error))?;
        let fold = Some(Fold::new(queries, kernels, neighbors, 0));
        Ok(Self { fold, queries, kernels, neighbors, level })
    }

    /// Adds the next part; one that is not the next, or of another shape, is refused.
    fn add(&mut self, py: Python<'_>, part: &Bound<'_, PyDict>) -> PyResult<()> {
        let part = parts::from_dict(part, self.kernels)?;
        let fold = self.fold.as_mut().ok_or_else(|| ended(py))?;
        py.detach(|| fold.add(&part)).map_err(|error| to_python(py, &error))
    }

    /// The segment and the query that are to come next.
    #[getter]
    fn next(&self, py: Python<'_>) -> PyResult<(usize, usize)> {
        Ok(self.fold.as_ref().ok_or_else(|| ended(py))?.next())
    }

    /// The result; the fold is empty then.
    fn finish(&mut self, py: Python<'_>) -> PyResult<PyScan> {
        let fold = self.fold.take().ok_or_else(|| ended(py))?;
        let scan = py.detach(|| fold.finish());
        PyScan::new(py, scan, self.queries, self.kernels, self.neighbors, self.level)
    }
}

fn ended(py: Python<'_>) -> PyErr {
    to_python(py, &Error::new(ErrorKind::Parameter, "the fold was finished"))
}

/// Turns a global row into a file and its row.
fn place(store: &crate::store::Store, error: Error, row: u64) -> Error {
    let shards = store.shards();
    let index = shards.partition_point(|shard| shard.first_row() <= row).saturating_sub(1);
    match shards.get(index) {
        Some(shard) => error.file(shard.path()).row(row - shard.first_row()),
        None => error,
    }
}

/// Adds this part's classes and functions to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyEstimate>()?;
    module.add_class::<PyScan>()?;
    module.add_class::<PyFold>()?;
    module.add_function(wrap_pyfunction!(segments, module)?)?;
    module.add_function(wrap_pyfunction!(scan_parts, module)?)?;
    module.add_function(wrap_pyfunction!(scan, module)?)
}
