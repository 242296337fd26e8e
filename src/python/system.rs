//! What this machine can do.

use std::time::Duration;

use pyo3::prelude::*;

use super::errors::to_python;
use crate::simd::{Level, peak};

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

/// The highest rate of single-precision arithmetic at the current level: (operations per second, implied clock in Hz or None).
#[pyfunction]
fn peak_arithmetic(py: Python<'_>, threads: usize, seconds: f64) -> PyResult<(f64, Option<f64>)> {
    let level = Level::current().map_err(|error| to_python(py, &error))?;
    let found = py.detach(|| peak::arithmetic(level, threads.max(1), Duration::from_secs_f64(seconds)));
    Ok((found.operations, found.implied_clock))
}

/// The highest rates of integer arithmetic at the current level, operations per second: (16 bits, 8 bits or None).
#[pyfunction]
fn peak_integers(py: Python<'_>, threads: usize, seconds: f64) -> PyResult<(f64, Option<f64>)> {
    let level = Level::current().map_err(|error| to_python(py, &error))?;
    let (threads, time) = (threads.max(1), Duration::from_secs_f64(seconds));
    Ok(py.detach(|| (peak::arithmetic_i16(level, threads, time), peak::arithmetic_i8(level, threads, time))))
}

/// Operations per second of the micro-kernel of one thread on operands in the first-level cache.
#[pyfunction]
fn cached_dots(py: Python<'_>, seconds: f64) -> PyResult<f64> {
    let level = Level::current().map_err(|error| to_python(py, &error))?;
    Ok(py.detach(|| peak::cached_dots(level, Duration::from_secs_f64(seconds))))
}

/// The clock of one thread in Hz, None where it can't be measured.
#[pyfunction]
fn clock(py: Python<'_>, seconds: f64) -> Option<f64> {
    py.detach(|| peak::clock(Duration::from_secs_f64(seconds)))
}

/// Bytes per second that threads read together from so many bytes of memory.
#[pyfunction]
fn read_bandwidth(py: Python<'_>, threads: usize, bytes: usize, seconds: f64) -> f64 {
    py.detach(|| peak::read_bandwidth(threads.max(1), bytes, Duration::from_secs_f64(seconds)))
}

/// Adds this part's functions to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(simd_level, module)?)?;
    module.add_function(wrap_pyfunction!(simd_notice, module)?)?;
    module.add_function(wrap_pyfunction!(peak_arithmetic, module)?)?;
    module.add_function(wrap_pyfunction!(peak_integers, module)?)?;
    module.add_function(wrap_pyfunction!(cached_dots, module)?)?;
    module.add_function(wrap_pyfunction!(clock, module)?)?;
    module.add_function(wrap_pyfunction!(read_bandwidth, module)?)?;
    module.add_function(wrap_pyfunction!(simd_levels, module)?)
}
