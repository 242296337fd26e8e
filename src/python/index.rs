//! Building, opening and searching an index.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use numpy::{
    IntoPyArray, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2,
    PyUntypedArrayMethods,
};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::PyDict;

use super::convert::Matrix;
use super::errors::to_python;
use super::estimate::{scaled_kernels, views};
use super::store::Store;
use crate::error::{Error, ErrorKind};
use crate::estimate::sample::{self, Draw, Moments};
use crate::estimate::stratified::{NO_ROW, Stage, stage as run_stage};
use crate::estimate::{Guess, deann, knn};
use crate::index::gather::Asked;
use crate::index::ivf::{BuildOptions, Progress, build, route};
use crate::index::search::Searcher;
use crate::index::{Index, Neighbors};
use crate::rows::Dtype;
use crate::simd::Level;

/// How often running work looks for Ctrl-C and reports progress.
const TICK: Duration = Duration::from_millis(100);

/// Builds an index of a store's or matrix's rows into a folder. `progress(stage, rows)` is called about ten times a second;
/// stages: 0 train, 1 assign, 2 spread, 3 gather, 4 measure. An unfinished build of the same kind is continued. With `pause` it
/// stops where rows are to be assigned, and returns false.
#[pyfunction]
#[pyo3(signature = (source, folder, *, fingerprint, lists=0, dtype="int8", seed=0, groups=0, weights=None, threads=0,
    memory=1_073_741_824, pause=false, progress=None))]
#[allow(clippy::too_many_arguments)] // keyword-only in Python, each with its default
fn build_index(
    py: Python<'_>,
    source: &Bound<'_, PyAny>,
    folder: PathBuf,
    fingerprint: String,
    lists: usize,
    dtype: &str,
    seed: u64,
    groups: usize,
    weights: Option<PyReadonlyArray1<'_, f32>>,
    threads: usize,
    memory: usize,
    pause: bool,
    progress: Option<Py<PyAny>>,
) -> PyResult<bool> {
    let raise = |error: Error| to_python(py, &error);
    let store = source.cast::<Store>().ok().map(|store| store.get().inner().clone());
    let matrix = if store.is_none() { Some(Matrix::borrow(source)?) } else { None };
    let views = views(py, store.as_deref(), matrix.as_ref(), weights.as_ref())?;
    let dtype = Dtype::from_name(dtype).ok_or_else(|| {
        raise(Error::new(ErrorKind::Dtype, format!("elements of type {dtype:?} are not known")))
    })?;
    let options = BuildOptions { fingerprint, lists, dtype, seed, groups, threads, memory, pause };
    let state = Progress::default();
    let mut failure = None;
    let result = py.detach(|| {
        std::thread::scope(|scope| {
            let (views, state) = (&views, &state);
            let worker = scope.spawn(move || build(views, &folder, &options, state));
            while !worker.is_finished() {
                std::thread::sleep(TICK);
                if failure.is_some() {
                    continue;
                }
                let tick = |py: Python<'_>| -> PyResult<()> {
                    py.check_signals()?;
                    if let Some(progress) = &progress {
                        let at = (state.stage.load(Ordering::Relaxed), state.rows.load(Ordering::Relaxed));
                        progress.call1(py, at)?;
                    }
                    Ok(())
                };
                if let Err(error) = Python::attach(tick) {
                    state.stop.store(true, Ordering::Relaxed);
                    failure = Some(error);
                }
            }
            worker
                .join()
                .unwrap_or_else(|_| Err(Error::new(ErrorKind::Internal, "the build of the index panicked")))
        })
    });
    match failure {
        Some(error) => Err(error),
        None => result.map_err(raise),
    }
}

/// The route of each row of a range of a store's or matrix's rows, by the tree in the folder of an unfinished build: uint64.
#[pyfunction]
#[pyo3(signature = (source, partial, start, end, threads=0))]
fn route_rows<'py>(
    py: Python<'py>,
    source: &Bound<'py, PyAny>,
    partial: PathBuf,
    start: u64,
    end: u64,
    threads: usize,
) -> PyResult<Bound<'py, PyArray1<u64>>> {
    let store = source.cast::<Store>().ok().map(|store| store.get().inner().clone());
    let matrix = if store.is_none() { Some(Matrix::borrow(source)?) } else { None };
    let views = views(py, store.as_deref(), matrix.as_ref(), None)?;
    let found = py.detach(|| route(&views, &partial, start..end, threads));
    Ok(found.map_err(|error| to_python(py, &error))?.into_pyarray(py))
}

/// An open index.
#[pyclass(name = "Index", module = "lmd3._lmd3", frozen)]
pub struct PyIndex {
    inner: Arc<Index>,
}

/// The whole of a panic-free call on a pool of its own.
pub(super) fn on_pool<T: Send>(
    py: Python<'_>,
    threads: usize,
    work: impl FnOnce() -> crate::error::Result<T> + Send,
) -> PyResult<T> {
    let run = || crate::index::on_threads(threads, work);
    py.detach(run).map_err(|error| to_python(py, &error))
}

#[pymethods]
impl PyIndex {
    /// Opens an index; sizes are checked, and the checksums of the files that are read whole.
    #[new]
    fn new(py: Python<'_>, folder: PathBuf) -> PyResult<Self> {
        let inner = py.detach(|| Index::open(&folder)).map_err(|error| to_python(py, &error))?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// What `index.json` says, as JSON.
    #[getter]
    fn manifest(&self) -> String {
        serde_json::to_string(self.inner.manifest()).unwrap_or_default()
    }

    /// Rows of each list, uint64 (lists,).
    #[getter]
    fn sizes<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u64>> {
        let sizes: Vec<u64> = self.inner.lists().iter().map(|list| list.n).collect();
        sizes.into_pyarray(py)
    }

    /// Number in the store of each row, list after list, uint32 (n,).
    #[getter]
    fn ids<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u32>> {
        self.inner.ids().to_vec().into_pyarray(py)
    }

    /// Per list, float64 (lists, 4): Σ w, mean and variance of ‖x − m‖², Σ w² relative to equal weights.
    #[getter]
    fn moments<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<f64>>> {
        let flat: Vec<f64> =
            self.inner.lists().iter().flat_map(|list| [list.weight, list.tr, list.s4, list.spread]).collect();
        flat.into_pyarray(py).reshape([self.inner.lists().len(), 4])
    }

    /// Mean row of each list, float32 (lists, d).
    #[getter]
    fn means<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<f32>>> {
        self.inner.means().to_vec().into_pyarray(py).reshape([self.inner.lists().len(), self.inner.d()])
    }

    /// The lists nearest to each query (Q, count), its own first; −1 where there are fewer.
    fn nearest_lists<'py>(
        &self,
        py: Python<'py>,
        queries: PyReadonlyArray2<'py, f32>,
        count: usize,
    ) -> PyResult<Bound<'py, PyArray2<i64>>> {
        let (index, values) = (&self.inner, queries.as_slice()?);
        check_width(py, index, &queries)?;
        let (d, width, n) = (index.d(), index.panel_width(), queries.as_array().nrows());
        let mut out = vec![-1_i64; n * count];
        py.detach(|| {
            let mut chosen = Vec::new();
            for (panel, queries) in values.chunks(width * d).enumerate() {
                let norms: Vec<f64> = queries
                    .chunks_exact(d)
                    .map(|query| query.iter().map(|&x| f64::from(x) * f64::from(x)).sum())
                    .collect();
                let ranked = index.rank(queries, &norms);
                for lane in 0..norms.len() {
                    index.nearest_lists(&ranked, lane, count, &mut chosen);
                    let into = &mut out[(panel * width + lane) * count..][..chosen.len()];
                    into.iter_mut().zip(&chosen).for_each(|(to, &list)| *to = i64::from(list));
                }
            }
        });
        out.into_pyarray(py).reshape([n, count])
    }

    /// Rows and distances of the k nearest rows found in `probes` lists: int64 (Q, k) and float64 (Q, k); −1 and NaN
    /// where there are fewer. `source`: the store, whose rows then decide the order and the distances.
    #[pyo3(signature = (queries, k, probes, source=None, threads=0))]
    #[allow(clippy::type_complexity)] // two arrays
    fn search<'py>(
        &self,
        py: Python<'py>,
        queries: PyReadonlyArray2<'py, f32>,
        k: usize,
        probes: usize,
        source: Option<&Bound<'py, PyAny>>,
        threads: usize,
    ) -> PyResult<(Bound<'py, PyArray2<i64>>, Bound<'py, PyArray2<f64>>)> {
        check_width(py, &self.inner, &queries)?;
        let values = queries.as_slice()?;
        let store =
            source.and_then(|source| source.cast::<Store>().ok().map(|store| store.get().inner().clone()));
        let matrix = match source {
            Some(source) if store.is_none() => Some(Matrix::borrow(source)?),
            _ => None,
        };
        let views = views(py, store.as_deref(), matrix.as_ref(), None)?;
        let rows: u64 = views.iter().map(|view| view.rows.len() as u64).sum();
        if source.is_some() && rows != self.inner.n() {
            let message = format!("the index is of {} rows, the store has {rows}", self.inner.n());
            return Err(to_python(py, &Error::new(ErrorKind::Shape, message)));
        }
        let searcher =
            Searcher { index: &self.inner, source: source.is_some().then_some(&views[..]), probes };
        let found = on_pool(py, threads, || searcher.query(values, k))?;
        let n = found.len();
        let (mut rows, mut distances) = (vec![-1_i64; n * k], vec![f64::NAN; n * k]);
        for (query, found) in found.iter().enumerate() {
            for (rank, neighbor) in found.iter().enumerate() {
                rows[query * k + rank] = neighbor.row.cast_signed();
                distances[query * k + rank] = neighbor.sq_distance.sqrt();
            }
        }
        Ok((rows.into_pyarray(py).reshape([n, k])?, distances.into_pyarray(py).reshape([n, k])?))
    }

    /// One stage of stratified sampling: arrays by name, see `stage_arrays`.
    ///
    /// `keys` uint64 (Q,) and `rows` uint64 (Q,): what draws depend on, and how many rows (centroids not counted);
    /// `own` int64 (Q,) with −1 for none; `group_map` uint32 (groups of the store,): the group, of `group_count`, that each code
    /// counts to in the sums by group.
    #[pyo3(signature = (queries, keys, kernels, rows, *, own=None, aims=None, whole_cost=1.0, target=0.01, block=8, group_map=None, group_count=0, seed=0, stage=1, threads=0))]
    #[allow(clippy::too_many_arguments)] // keyword-only in Python, each with its default
    fn stage<'py>(
        &self,
        py: Python<'py>,
        queries: PyReadonlyArray2<'py, f32>,
        keys: PyReadonlyArray1<'py, u64>,
        kernels: Vec<(String, f64)>,
        rows: PyReadonlyArray1<'py, u64>,
        own: Option<PyReadonlyArray1<'py, i64>>,
        aims: Option<PyReadonlyArray1<'py, f64>>,
        whole_cost: f64,
        target: f64,
        block: u32,
        group_map: Option<PyReadonlyArray1<'py, u32>>,
        group_count: usize,
        seed: u64,
        stage: u64,
        threads: usize,
    ) -> PyResult<Bound<'py, PyDict>> {
        check_width(py, &self.inner, &queries)?;
        let kernels = scaled_kernels(&kernels).map_err(|error| to_python(py, &error))?;
        let own: Option<Vec<u32>> = match own {
            Some(own) => {
                Some(own.as_slice()?.iter().map(|&row| u32::try_from(row).unwrap_or(NO_ROW)).collect())
            }
            None => None,
        };
        let request = Stage {
            kernels: &kernels,
            keys: keys.as_slice()?,
            rows: rows.as_slice()?,
            aims: match &aims {
                Some(aims) => Some(aims.as_slice()?),
                None => None,
            },
            own: own.as_deref(),
            whole_cost,
            target,
            block,
            groups: match &group_map {
                Some(map) => Some((map.as_slice()?, group_count)),
                None => None,
            },
            seed,
            stage,
        };
        let (index, values) = (&self.inner, queries.as_slice()?);
        let outcomes = on_pool(py, threads, || {
            let bytes = index.view().rows.dtype() == Dtype::I8;
            let asked = Asked::new(values, index.d(), bytes, index.level())?;
            run_stage(index, &asked, &request)
        })?;
        let out = PyDict::new(py);
        let n = outcomes.len();
        let totals: Vec<Guess> = outcomes.iter().flat_map(|outcome| outcome.total.iter().copied()).collect();
        guesses(&out, "", &totals, &[n, kernels.len()])?;
        if group_map.is_some() {
            let found: Vec<Guess> =
                outcomes.iter().flat_map(|outcome| outcome.groups.iter().copied()).collect();
            guesses(&out, "group_", &found, &[n, group_count, kernels.len()])?;
        }
        out.set_item(
            "rows",
            outcomes.iter().map(|outcome| outcome.rows).collect::<Vec<_>>().into_pyarray(py),
        )?;
        out.set_item(
            "draws",
            outcomes.iter().map(|outcome| outcome.draws).collect::<Vec<_>>().into_pyarray(py),
        )?;
        let predicted: Vec<f64> =
            outcomes.iter().flat_map(|outcome| outcome.predicted.iter().copied()).collect();
        out.set_item("predicted", predicted.into_pyarray(py).reshape([n, kernels.len()])?)?;
        let excluded: Vec<f64> = outcomes.iter().map(|outcome| outcome.excluded).collect();
        out.set_item("excluded", excluded.into_pyarray(py))?;
        Ok(out)
    }

    /// Checks all checksums.
    fn verify(&self, py: Python<'_>) -> PyResult<()> {
        let inner = &self.inner;
        py.detach(|| inner.manifest().verify(inner.folder(), u64::MAX)).map_err(|error| to_python(py, &error))
    }
}

/// Puts estimates into a dict: `log_sum`, `variance` (of the log), `df`, `ess`, float64, and `flags`, uint32.
fn guesses(out: &Bound<'_, PyDict>, prefix: &str, found: &[Guess], shape: &[usize]) -> PyResult<()> {
    let py = out.py();
    type Column = (&'static str, fn(&Guess) -> f64);
    let columns: [Column; 4] = [
        ("log_sum", |guess| guess.log_sum),
        ("variance", |guess| guess.variance),
        ("df", |guess| guess.df),
        ("ess", |guess| guess.ess),
    ];
    for (name, column) in columns {
        let values = found.iter().map(column).collect::<Vec<_>>().into_pyarray(py);
        out.set_item(format!("{prefix}{name}"), values.reshape(shape.to_vec())?)?;
    }
    let flags = found.iter().map(|guess| guess.flags).collect::<Vec<_>>().into_pyarray(py);
    out.set_item(format!("{prefix}flags"), flags.reshape(shape.to_vec())?)
}

/// A key for the draws of each query, by its id: uint64 (Q,).
#[pyfunction]
fn draw_keys<'py>(py: Python<'py>, ids: Vec<PyBackedStr>) -> Bound<'py, PyArray1<u64>> {
    let keys: Vec<u64> = ids.iter().map(|id| xxhash_rust::xxh3::xxh3_64(id.as_bytes())).collect();
    keys.into_pyarray(py)
}

/// Kernel sums estimated from random rows of a store or matrix: a dict as that of `Index.stage`.
///
/// `near` (per query: int64 rows): DEANN with these neighbours; else plain random sampling, `permuted` where the rows lie in
/// random order; `mean` float64 (d,) and `sq_norm` of all rows: with the control variate that they allow.
#[pyfunction]
#[pyo3(signature = (source, queries, keys, kernels, rows, *, near=None, permuted=false, mean=None, sq_norm=0.0, weights=None, seed=0, threads=0))]
#[allow(clippy::too_many_arguments)] // keyword-only in Python, each with its default
fn sample_rows<'py>(
    py: Python<'py>,
    source: &Bound<'py, PyAny>,
    queries: PyReadonlyArray2<'py, f32>,
    keys: PyReadonlyArray1<'py, u64>,
    kernels: Vec<(String, f64)>,
    rows: usize,
    near: Option<PyReadonlyArray2<'py, i64>>,
    permuted: bool,
    mean: Option<PyReadonlyArray1<'py, f64>>,
    sq_norm: f64,
    weights: Option<PyReadonlyArray1<'py, f32>>,
    seed: u64,
    threads: usize,
) -> PyResult<Bound<'py, PyDict>> {
    let raise = |error: Error| to_python(py, &error);
    let kernels = scaled_kernels(&kernels).map_err(raise)?;
    let store = source.cast::<Store>().ok().map(|store| store.get().inner().clone());
    let matrix = if store.is_none() { Some(Matrix::borrow(source)?) } else { None };
    let views = views(py, store.as_deref(), matrix.as_ref(), weights.as_ref())?;
    let d = views.first().map_or(0, |view| view.rows.dim());
    let (n, width) = (queries.shape()[0], queries.shape()[1]);
    let keys = keys.as_slice()?;
    let near: Option<Vec<Vec<u64>>> = near.map(|near| {
        let rows = near.as_array();
        // −1 stands for nothing.
        rows.outer_iter().map(|row| row.iter().filter_map(|&row| u64::try_from(row).ok()).collect()).collect()
    });
    let moments = match mean {
        Some(mean) => Some(Moments { mean: mean.as_slice()?.to_vec(), sq_norm }),
        None => None,
    };
    if width != d
        || keys.len() != n
        || near.as_ref().is_some_and(|near| near.len() != n)
        || moments.as_ref().is_some_and(|moments| moments.mean.len() != d)
    {
        return Err(raise(Error::new(
            ErrorKind::Shape,
            "queries, keys, neighbours or moments do not fit each other",
        )));
    }
    let values = queries.as_slice()?;
    let found = on_pool(py, threads, || {
        let bytes = views.iter().all(|view| view.rows.dtype() == Dtype::I8);
        let asked = Asked::new(values, d, bytes, Level::current()?)?;
        match &near {
            Some(near) => deann::deann(&views, &asked, keys, &kernels, near, rows, seed),
            None => {
                let draw = Draw { rows, permuted, seed };
                sample::random(&views, &asked, keys, &kernels, draw, moments.as_ref())
            }
        }
    })?;
    let out = PyDict::new(py);
    guesses(&out, "", &found.concat(), &[n, kernels.len()])?;
    Ok(out)
}

/// Kernel sums of neighbours alone: `distances` float64 (Q, k), NaN for none. A dict as that of `Index.stage`; the variance is NaN.
#[pyfunction]
#[pyo3(signature = (distances, kernels, weights=None))]
fn neighbor_sums<'py>(
    py: Python<'py>,
    distances: PyReadonlyArray2<'py, f64>,
    kernels: Vec<(String, f64)>,
    weights: Option<PyReadonlyArray2<'py, f32>>,
) -> PyResult<Bound<'py, PyDict>> {
    let kernels = scaled_kernels(&kernels).map_err(|error| to_python(py, &error))?;
    let (n, k) = (distances.shape()[0], distances.shape()[1]);
    let values = distances.as_slice()?;
    let weights = weights.as_ref().map(|weights| weights.as_slice()).transpose()?;
    if weights.is_some_and(|weights| weights.len() != n * k) {
        return Err(to_python(py, &Error::new(ErrorKind::Shape, "weights are not one per neighbour")));
    }
    let found: Vec<Guess> = (0..n)
        .flat_map(|query| {
            let part = query * k..(query + 1) * k;
            knn::truncated(&values[part.clone()], weights.map(|weights| &weights[part]), &kernels)
        })
        .collect();
    let out = PyDict::new(py);
    guesses(&out, "", &found, &[n, kernels.len()])?;
    Ok(out)
}

/// Refuses queries of other dimensions.
pub(super) fn check_width(
    py: Python<'_>,
    index: &Index,
    queries: &PyReadonlyArray2<'_, f32>,
) -> PyResult<()> {
    let found = queries.shape()[1];
    if found == index.d() {
        return Ok(());
    }
    let message = format!("queries have {found} dimensions, the index {}", index.d());
    Err(to_python(py, &Error::new(ErrorKind::Shape, message)))
}

/// Adds this part's classes and functions to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyIndex>()?;
    module.add_function(wrap_pyfunction!(draw_keys, module)?)?;
    module.add_function(wrap_pyfunction!(sample_rows, module)?)?;
    module.add_function(wrap_pyfunction!(neighbor_sums, module)?)?;
    module.add_function(wrap_pyfunction!(route_rows, module)?)?;
    module.add_function(wrap_pyfunction!(build_index, module)?)
}
