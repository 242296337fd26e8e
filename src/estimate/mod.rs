//! Estimators: from the sums of a scan to log densities with their doubt.

pub mod exact;

/// Log densities under one set of rows (the whole corpus or one group of it). Arrays are [query · kernels + kernel].
#[derive(Clone, Debug)]
pub struct Estimate {
    /// log(Σ w k / Σ w), −∞ where nothing has weight.
    pub log_density: Vec<f64>,
    /// log Σ w k.
    pub log_sum: Vec<f64>,
    /// Effective sample size (Σ w k)² / Σ (w k)²; 0 for an empty sum.
    pub ess: Vec<f64>,
    /// Rows left out of each query's sum.
    pub excluded: Vec<u64>,
    /// Rows of the set.
    pub rows: u64,
    /// Their weight.
    pub weight: f64,
}
