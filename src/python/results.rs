//! What a scan found, as classes of arrays.

use std::collections::BTreeMap;

use numpy::{IntoPyArray, PyArray1, PyArray2, PyArrayMethods};
use pyo3::prelude::*;

use crate::estimate::{Estimate, exact};
use crate::scan::Scan;
use crate::simd::Level;

/// Exact sums and densities under one set of rows, for Q queries and B kernels.
#[pyclass(name = "Estimate", module = "lmd3._lmd3", frozen)]
pub(super) struct PyEstimate {
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
pub(super) struct PyScan {
    scan: Scan,
    total: Py<PyEstimate>,
    queries: usize,
    kernels: usize,
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
    fn groups(&self) -> BTreeMap<u32, PyEstimate> {
        let wrap = |estimate| PyEstimate { estimate, queries: self.queries };
        let estimates = exact::by_group(&self.scan.sums, self.queries, self.kernels);
        estimates.into_iter().map(|(code, estimate)| (code, wrap(estimate))).collect()
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
    pub fn new(
        py: Python<'_>,
        scan: Scan,
        queries: usize,
        kernels: usize,
        neighbors: usize,
        level: Level,
    ) -> PyResult<Self> {
        let estimate = exact::total(&scan.sums, queries, kernels);
        let total = Py::new(py, PyEstimate { estimate, queries })?;
        Ok(Self { scan, total, queries, kernels, neighbors, level: level.name() })
    }

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
