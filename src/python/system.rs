//! What this machine can do.

use pyo3::prelude::*;

use super::errors::to_python;
use crate::simd::Level;

/// The SIMD level that scans run at: the highest this CPU has, or that of `LMD3_SIMD`.
#[pyfunction]
fn simd_level(py: Python<'_>) -> PyResult<&'static str> {
    Level::current().map(Level::name).map_err(|error| to_python(py, &error))
}

/// Levels that failed their proof against the portable path, in words; None where all passed.
#[pyfunction]
fn simd_notice() -> Option<String> {
    Level::current_notice()
}

/// All SIMD levels this CPU has, lowest first.
#[pyfunction]
fn simd_levels() -> Vec<&'static str> {
    Level::available().into_iter().map(Level::name).collect()
}

/// Adds this part's functions to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(simd_level, module)?)?;
    module.add_function(wrap_pyfunction!(simd_notice, module)?)?;
    module.add_function(wrap_pyfunction!(simd_levels, module)?)
}
