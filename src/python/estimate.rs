//! The scan and its exact estimates.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use numpy::{IntoPyArray, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2};
use pyo3::prelude::*;

use super::convert::Matrix;
use super::errors::to_python;
use super::store::Store;
use crate::error::{Error, ErrorKind, Result};
use crate::estimate::{Estimate, exact};
use crate::kernel::{Kernel, ScaledKernel};
use crate::rows::ShardView;
use crate::scan::{Control, NO_ROW, Precision, Request, Scan, scan as run_scan};
use crate::simd::Level;

/// How often a running scan looks for Ctrl-C and reports progress.
const TICK: Duration = Duration::from_millis(100);

/// Exact sums and densities under one set of rows, for Q queries and B kernels.
#[pyclass(name = "Estimate", module = "lmd3._lmd3", frozen)]
struct PyEstimate {
    estimate: Estimate,
    queries: usize,
}

impl PyEstimate {
    fn matrix<'py>(&self, py: Python<'py>, values: &[f64]) -> PyResult<Bound<'py, PyArray2<f64>>> {
        let kernels = values.len().checked_div(self.queries).unwrap_or(0);
        values.to_vec().into_pyarray(py).reshape([self.queries, kernels])
    }
}

#[pymethods]
impl PyEstimate {
    /// log(Σ w k / Σ w), float64 (Q, B).
    #[getter]
    fn log_density<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<f64>>> {
        self.matrix(py, &self.estimate.log_density)
    }

    /// log Σ w k, float64 (Q, B).
    #[getter]
    fn log_sum<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<f64>>> {
        self.matrix(py, &self.estimate.log_sum)
    }

    /// Effective sample size, float64 (Q, B).
    #[getter]
    fn ess<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<f64>>> {
        self.matrix(py, &self.estimate.ess)
    }

    /// Rows left out for each query, uint64 (Q,).
    #[getter]
    fn excluded<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u64>> {
        self.estimate.excluded.clone().into_pyarray(py)
    }

    /// Rows of the set.
    #[getter]
    fn rows(&self) -> u64 {
        self.estimate.rows
    }

    /// Their weight.
    #[getter]
    fn weight(&self) -> f64 {
        self.estimate.weight
    }
}

/// The result of a scan.
#[pyclass(name = "Scan", module = "lmd3._lmd3", frozen)]
struct PyScan {
    scan: Scan,
    total: Py<PyEstimate>,
    groups: BTreeMap<u32, Py<PyEstimate>>,
    neighbors: usize,
    level: &'static str,
}

#[pymethods]
impl PyScan {
    /// Estimate under all rows.
    #[getter]
    fn total(&self, py: Python<'_>) -> Py<PyEstimate> {
        self.total.clone_ref(py)
    }

    /// Estimate under each group of rows, by code; group 0 alone where groups were not asked for.
    #[getter]
    fn groups(&self, py: Python<'_>) -> BTreeMap<u32, Py<PyEstimate>> {
        self.groups.iter().map(|(&code, estimate)| (code, estimate.clone_ref(py))).collect()
    }

    /// Global rows of the nearest neighbours, int64 (Q, k), −1 where there are fewer than k.
    #[getter]
    fn neighbor_rows<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<i64>>> {
        self.neighbor_values(py, -1, |neighbor| neighbor.row.cast_signed())
    }

    /// Their distances, float64 (Q, k), nearest first, NaN where there are fewer than k.
    #[getter]
    fn neighbor_distances<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<f64>>> {
        self.neighbor_values(py, f64::NAN, |neighbor| neighbor.sq_distance.sqrt())
    }

    /// Rows within the duplicate radius of each query, uint64 (Q,).
    #[getter]
    fn duplicates<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u64>> {
        self.scan.sums.duplicates.clone().into_pyarray(py)
    }

    /// Largest ⟨x, q⟩/‖x‖ over all rows, float32 (Q,), −∞ unless asked for.
    #[getter]
    fn max_projection<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f32>> {
        self.scan.sums.max_projection.clone().into_pyarray(py)
    }

    /// Σ w x, float64 (d,), empty unless asked for.
    #[getter]
    fn row_sum<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f64>> {
        self.scan.sums.row_sum.clone().into_pyarray(py)
    }

    /// Rows read.
    #[getter]
    fn rows(&self) -> u64 {
        self.scan.rows
    }

    /// SIMD level that computed it.
    #[getter]
    fn level(&self) -> &'static str {
        self.level
    }
}

impl PyScan {
    fn neighbor_values<'py, T: numpy::Element + Copy>(
        &self,
        py: Python<'py>,
        missing: T,
        value: impl Fn(&crate::topk::Neighbor) -> T,
    ) -> PyResult<Bound<'py, PyArray2<T>>> {
        let mut values = Vec::with_capacity(self.scan.neighbors.len() * self.neighbors);
        for found in &self.scan.neighbors {
            values.extend(found.iter().map(&value));
            values.extend(std::iter::repeat_n(missing, self.neighbors - found.len()));
        }
        values.into_pyarray(py).reshape([self.scan.neighbors.len(), self.neighbors])
    }
}

/// Sums of kernels over all rows of a store or matrix, exactly.
///
/// `queries` is float32 (Q, d); `kernels` lists (name, bandwidth); `exclude_rows` int64 (Q,) with −1 for none;
/// `weights` float32 (n,) belongs to a matrix (a store brings its own).
/// `progress(done, total)` is called about ten times a second with pairs of rows and queries.
#[pyfunction]
#[pyo3(signature = (source, queries, kernels, *, neighbors=0, by_group=false, exclude_rows=None, exclude_within=0.0,
    row_rounding=0.0, max_cosine=false, row_sum=false, weights=None, precision="float32", threads=0, memory=1_073_741_824, progress=None))]
#[allow(clippy::too_many_arguments)] // keyword-only in Python, each with its default
fn scan(
    py: Python<'_>,
    source: &Bound<'_, PyAny>,
    queries: PyReadonlyArray2<'_, f32>,
    kernels: Vec<(String, f64)>,
    neighbors: usize,
    by_group: bool,
    exclude_rows: Option<PyReadonlyArray1<'_, i64>>,
    exclude_within: f64,
    row_rounding: f64,
    max_cosine: bool,
    row_sum: bool,
    weights: Option<PyReadonlyArray1<'_, f32>>,
    precision: &str,
    threads: usize,
    memory: usize,
    progress: Option<Py<PyAny>>,
) -> PyResult<PyScan> {
    let raise = |error: Error| to_python(py, &error);
    let level = Level::current().map_err(raise)?;
    let precision = Precision::from_name(precision).map_err(raise)?;
    let kernels: Vec<ScaledKernel> = kernels
        .iter()
        .map(|(name, bandwidth)| ScaledKernel::new(Kernel::from_name(name)?, *bandwidth))
        .collect::<Result<_>>()
        .map_err(raise)?;
    let exclude_rows: Option<Vec<u64>> = match exclude_rows {
        Some(rows) => {
            Some(rows.as_slice()?.iter().map(|&row| u64::try_from(row).unwrap_or(NO_ROW)).collect())
        }
        None => None,
    };
    let count = queries.as_array().nrows();
    let request = Request {
        queries: queries.as_slice()?,
        d: queries.as_array().ncols(),
        kernels,
        neighbors,
        by_group,
        exclude_rows: exclude_rows.as_deref(),
        exclude_within,
        row_rounding,
        max_cosine,
        row_sum,
        precision,
        level,
        threads,
        memory,
    };
    let store = source.cast::<Store>().ok().map(|store| store.get().inner().clone());
    let matrix = if store.is_none() { Some(Matrix::borrow(source)?) } else { None };
    let views: Vec<ShardView<'_>> = match (&store, &matrix) {
        (Some(store), _) => store.shards().iter().map(|shard| shard.view()).collect(),
        (None, Some(matrix)) => {
            let weights = weights.as_ref().map(|weights| weights.as_slice()).transpose()?;
            vec![ShardView { rows: matrix.rows(py)?, groups: None, weights }]
        }
        (None, None) => Vec::new(),
    };
    let scan = watched(py, &views, &request, progress).map_err(|error| match error {
        Failure::Python(error) => error,
        Failure::Scan(error) => raise(match (&store, error.row, error.kind) {
            (Some(store), Some(row), ErrorKind::NotFinite | ErrorKind::Parameter) => place(store, error, row),
            _ => error,
        }),
    })?;
    let kernels = request.kernels.len();
    let wrap = |estimate| Py::new(py, PyEstimate { estimate, queries: count });
    let total = wrap(exact::total(&scan.sums, count, kernels))?;
    let groups = exact::by_group(&scan.sums, count, kernels)
        .into_iter()
        .map(|(code, estimate)| Ok((code, wrap(estimate)?)))
        .collect::<PyResult<_>>()?;
    Ok(PyScan { scan, total, groups, neighbors, level: level.name() })
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

enum Failure {
    Scan(Error),
    Python(PyErr),
}

/// Runs a scan on a thread of its own while this one answers signals and reports progress.
fn watched(
    py: Python<'_>,
    views: &[ShardView<'_>],
    request: &Request<'_>,
    progress: Option<Py<PyAny>>,
) -> std::result::Result<Scan, Failure> {
    let control = Control::default();
    let rows: u64 = views.iter().map(|view| view.rows.len() as u64).sum();
    let total = rows * (request.queries.len() / request.d.max(1)) as u64;
    let tick = |py: Python<'_>| -> PyResult<()> {
        py.check_signals()?;
        if let Some(progress) = &progress {
            progress.call1(py, (control.pairs.load(Ordering::Relaxed), total))?;
        }
        Ok(())
    };
    py.detach(|| {
        std::thread::scope(|scope| {
            let (sender, receiver) = channel();
            let control = &control;
            scope.spawn(move || {
                // The receiver waits until this is sent.
                let _ = sender.send(run_scan(views, request, None, control));
            });
            let mut failure = None;
            let result = loop {
                match receiver.recv_timeout(TICK) {
                    Ok(result) => break result,
                    Err(RecvTimeoutError::Timeout) => {
                        if failure.is_none()
                            && let Err(error) = Python::attach(tick)
                        {
                            control.stop.store(true, Ordering::Relaxed);
                            failure = Some(error);
                        }
                    }
                    Err(RecvTimeoutError::Disconnected) => {
                        break Err(Error::new(ErrorKind::Internal, "the scan ended without a result"));
                    }
                }
            };
            match failure {
                Some(error) => Err(Failure::Python(error)),
                None => result.map_err(Failure::Scan),
            }
        })
    })
}

/// Adds this part's classes and functions to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyEstimate>()?;
    module.add_class::<PyScan>()?;
    module.add_function(wrap_pyfunction!(scan, module)?)
}
