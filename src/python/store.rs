//! To be written.

use pyo3::prelude::*;

/// Adds this part's classes and functions to the module.
pub fn register(_module: &Bound<'_, PyModule>) -> PyResult<()> {
    Ok(())
}
