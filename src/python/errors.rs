//! The one map from the crate's errors to the exception classes of `lmd3.errors`.

use pyo3::exceptions::PyKeyboardInterrupt;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::error::{Error, ErrorKind};

fn class_name(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::FileMissing => "FileMissingError",
        ErrorKind::Format => "FormatError",
        ErrorKind::Shape => "ShapeError",
        ErrorKind::Dtype => "DtypeError",
        ErrorKind::NotFinite => "NotFiniteError",
        ErrorKind::Parameter => "ParameterError",
        ErrorKind::Output => "OutputError",
        ErrorKind::Verification => "VerificationError",
        ErrorKind::Interrupted => "KeyboardInterrupt",
        ErrorKind::Internal => "WorkError",
    }
}

fn build(py: Python<'_>, error: &Error) -> PyResult<PyErr> {
    let details = PyDict::new(py);
    details.set_item("file", error.file.as_ref().map(|file| file.display().to_string()))?;
    details.set_item("row", error.row)?;
    details.set_item("remedy", error.remedy.as_deref())?;
    let class = py.import("lmd3.errors")?.getattr(class_name(error.kind))?;
    Ok(PyErr::from_value(class.call((error.message.as_str(),), Some(&details))?))
}

/// The Python exception of an error.
pub fn to_python(py: Python<'_>, error: &Error) -> PyErr {
    if error.kind == ErrorKind::Interrupted {
        return PyKeyboardInterrupt::new_err(());
    }
    build(py, error).unwrap_or_else(|failure| failure)
}
