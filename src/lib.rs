//! Kernel density of a training corpus at test queries.
//!
//! A *store* holds embeddings on disk, a *scan* turns a store and queries into sums of kernels, an *estimator*
//! turns sums into log densities with their doubt. This crate is the engine; the encoding, the statistics, the
//! command line and the report are the Python package `lmd3`.

pub mod error;
pub mod estimate;
pub mod index;
pub mod kernel;
pub mod logsum;
pub mod rows;
pub mod scan;
pub mod simd;
pub mod store;
pub mod text;
pub mod topk;

#[cfg(feature = "python")]
mod python;

pub use error::{Error, ErrorKind, Result};
pub use rows::{Dtype, Rows, ShardView};
