//! Estimators: from the sums of a scan to log densities with their doubt.

pub mod deann;
pub mod exact;
pub mod knn;
mod profile;
pub mod sample;
mod shares;
pub mod stratified;

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

/// An estimated kernel sum.
#[derive(Clone, Copy, Debug)]
pub struct Guess {
    /// log Σ w k; −∞ where the estimate is not positive, which is never a density.
    pub log_sum: f64,
    /// Var(Ẑ)/Ẑ²: the square of the standard error of `log_sum`; NaN where the method knows none.
    pub variance: f64,
    /// Degrees of freedom of that variance.
    pub df: f64,
    /// Effective sample size, estimated by the same draws.
    pub ess: f64,
    /// Bits of `flags`.
    pub flags: u32,
}

/// What can be wrong with a guess.
pub mod flags {
    /// The estimate is not positive.
    pub const NOT_POSITIVE: u32 = 1;
    /// Few rows decide the part of the sum that was not read whole.
    pub const FEW_ROWS: u32 = 2;
    /// The variance is the model's rather than that of the draws.
    pub const MODEL: u32 = 4;
    /// The row to leave out was not met among those read whole.
    pub const OWN_ROW: u32 = 8;
    /// Too few draws fell into the group.
    pub const FEW_DRAWS: u32 = 16;
}
