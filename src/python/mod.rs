//! The Python extension `lmd3._lmd3`: converts, releases the interpreter, converts back; nothing else.

use pyo3::prelude::*;

mod convert;
mod errors;
mod estimate;
mod index;
mod parts;
mod results;
mod store;
mod system;
mod text;
mod watch;

/// The native core of lmd3.
#[pymodule]
fn _lmd3(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    estimate::register(module)?;
    index::register(module)?;
    store::register(module)?;
    system::register(module)?;
    text::register(module)?;
    // pyo3 lists every name here; a private module has no use for it, and the stubs would have to repeat it.
    module.delattr("__all__")
}
