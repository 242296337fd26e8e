//! What a stage of sampling is asked for, and what it answers.

use crate::estimate::Guess;
use crate::kernel::ScaledKernel;

/// No row is left out for this query.
pub const NO_ROW: u32 = u32::MAX;

/// One stage of sampling.
#[derive(Clone, Debug)]
pub struct Stage<'a> {
    /// Kernels; the first is the primary one.
    pub kernels: &'a [ScaledKernel],
    /// One key per query: draws depend on it, the seed and the stage alone.
    pub keys: &'a [u64],
    /// Rows for each query, centroids not counted, in rows drawn.
    pub rows: &'a [u64],
    /// For each query the logarithm of a variance of the primary kernel's sum: no more rows are taken than bring what the model predicts
    /// of it down to that, `rows` at most.
    pub aims: Option<&'a [f64]>,
    /// What a row of a list read whole costs, in rows drawn: 1 where rows are counted; less where time is, since near lists are
    /// read for many queries together.
    pub whole_cost: f64,
    /// Row of the store to leave out of each query's sums, `NO_ROW` for none.
    pub own: Option<&'a [u32]>,
    /// Share of a sum below which the sampled part may rest on few rows.
    pub target: f64,
    /// Rows of a short run.
    pub block: u32,
    /// The group that each code of the store counts to, and how many there are: these are kept apart. With the index's moments of
    /// groups each has a control variate of its own, without them it shares the total's.
    pub groups: Option<(&'a [u32], usize)>,
    /// Seed.
    pub seed: u64,
    /// Number of the stage: each has draws of its own.
    pub stage: u64,
}

/// What a stage found for one query.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Per kernel.
    pub total: Vec<Guess>,
    /// Per group and kernel: [group · kernels + kernel]; empty unless asked for.
    pub groups: Vec<Guess>,
    /// Per kernel the part of the variance of log Z that is predicted, not found by the draws.
    pub predicted: Vec<f64>,
    /// Rows read, and those of them drawn at random.
    pub rows: u64,
    /// Random draws.
    pub draws: u64,
    /// Weight of the row left out; 0 where there was none.
    pub excluded: f64,
}
