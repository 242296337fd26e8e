//! NumPy arrays as rows and queries: what does not fit is refused, never cast.

use numpy::{PyArrayDyn, PyArrayMethods, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::prelude::*;

use super::errors::to_python;
use crate::error::{Error, ErrorKind};
use crate::rows::{Dtype, Rows};

fn refuse(py: Python<'_>, kind: ErrorKind, message: String, remedy: &str) -> PyErr {
    to_python(py, &Error::new(kind, message).remedy(remedy))
}

fn element_type(array: &Bound<'_, PyAny>) -> String {
    array.getattr("dtype").map_or_else(|_| array.get_type().to_string(), |dtype| dtype.to_string())
}

/// A borrowed matrix of a NumPy array, float32 or float16, C-contiguous.
pub enum Matrix<'py> {
    /// Single precision.
    F32(PyReadonlyArray2<'py, f32>),
    /// Half precision.
    F16(PyReadonlyArray2<'py, half::f16>),
}

impl<'py> Matrix<'py> {
    /// Borrows an array.
    ///
    /// # Errors
    /// `DtypeError` unless float32 or float16, `ShapeError` unless two-dimensional and C-contiguous.
    pub fn borrow(array: &Bound<'py, PyAny>) -> PyResult<Self> {
        let matrix = if let Ok(array) = array.cast::<PyArrayDyn<f32>>() {
            check_shape(array.as_any(), array.ndim(), array.is_c_contiguous())?;
            Self::F32(array.to_owned().cast_into::<numpy::PyArray2<f32>>()?.try_readonly()?)
        } else if let Ok(array) = array.cast::<PyArrayDyn<half::f16>>() {
            check_shape(array.as_any(), array.ndim(), array.is_c_contiguous())?;
            Self::F16(array.to_owned().cast_into::<numpy::PyArray2<half::f16>>()?.try_readonly()?)
        } else {
            let message = format!("elements of type {} are not embeddings", element_type(array));
            let remedy = "give a NumPy array of float32 or float16";
            return Err(refuse(array.py(), ErrorKind::Dtype, message, remedy));
        };
        Ok(matrix)
    }

    /// The matrix as rows.
    ///
    /// # Errors
    /// `ShapeError` where there are no columns.
    pub fn rows(&self, py: Python<'_>) -> PyResult<Rows<'_>> {
        let (bytes, dtype, shape): (&[u8], _, _) = match self {
            Self::F32(array) => (bytemuck::cast_slice(array.as_slice()?), Dtype::F32, array.shape()),
            Self::F16(array) => (bytemuck::cast_slice(array.as_slice()?), Dtype::F16, array.shape()),
        };
        Rows::new(bytes, dtype, shape[0], shape[1], None).map_err(|error| to_python(py, &error))
    }
}

fn check_shape(array: &Bound<'_, PyAny>, ndim: usize, contiguous: bool) -> PyResult<()> {
    if ndim == 2 && contiguous {
        return Ok(());
    }
    let message = if ndim == 2 {
        "matrix is not C-contiguous".into()
    } else {
        format!("array has {ndim} dimensions, not 2")
    };
    Err(refuse(
        array.py(),
        ErrorKind::Shape,
        message,
        "give a C-contiguous matrix, one row per text: numpy.ascontiguousarray",
    ))
}
