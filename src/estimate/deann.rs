//! DEANN (Karppa, Aumüller, Pagh; arXiv 2107.02736): the rows that a neighbour index returns exactly, the others by random
//! sampling: Ẑ = Σ_{near} w k + (n − k) · mean of w k over m random rows that are not among them. Unbiased at any recall.

use rayon::prelude::*;

use super::sample::values;
use super::{Guess, flags, profile};
use crate::error::{Error, ErrorKind, Result};
use crate::index::gather::{Asked, Run, gather};
use crate::index::random::Rng;
use crate::kernel::ScaledKernel;
use crate::rows::ShardView;

/// Estimates of the kernel sums of each query, per kernel.
///
/// `near` lists rows of the store for each query, each row once; what a provider says of their distances is not trusted.
///
/// # Errors
/// `Parameter` for rows outside the store or named twice, or fewer than 2 draws; `NotFinite`.
pub fn deann(
    views: &[ShardView<'_>],
    asked: &Asked<'_>,
    keys: &[u64],
    kernels: &[ScaledKernel],
    near: &[Vec<u64>],
    m: usize,
    seed: u64,
) -> Result<Vec<Vec<Guess>>> {
    profile::check(kernels)?;
    let n: u64 = views.iter().map(|view| view.rows.len() as u64).sum();
    if m < 2 {
        return Err(Error::new(
            ErrorKind::Parameter,
            "DEANN needs at least 2 random rows besides the neighbours",
        ));
    }
    let parts: Vec<Result<Vec<Guess>>> = (0..asked.len())
        .into_par_iter()
        .map(|query| {
            let mut sorted = near[query].clone();
            sorted.sort_unstable();
            if sorted.windows(2).any(|pair| pair[0] == pair[1]) || sorted.last().is_some_and(|&row| row >= n)
            {
                let message = format!("neighbours of query {query} are not different rows of the store");
                return Err(Error::new(ErrorKind::Parameter, message));
            }
            let others = n - sorted.len() as u64;
            let m = m.min(others as usize);
            let mut rng = Rng::new(&[seed, keys[query], 21]);
            // The i-th row that is no neighbour, for m different i.
            let drawn = rng.distinct(others, m).into_iter().map(|at| complement(&sorted, at));
            let rows: Vec<u64> = sorted.iter().copied().chain(drawn).collect();
            let runs: Vec<Run> =
                rows.iter().map(|&start| Run { query: query as u32, start, len: 1 }).collect();
            let found = gather(views, asked, &runs);
            let (sq, weights) = values(views, &runs, &found, 0..runs.len());
            Ok(kernels.iter().map(|kernel| one(kernel, &sq, &weights, sorted.len(), others as f64)).collect())
        })
        .collect();
    parts.into_iter().collect()
}

/// The row number of the `at`-th row (from 0) that is not in the ascending list.
fn complement(near: &[u64], at: u64) -> u64 {
    let (mut low, mut high) = (0, near.len());
    while low < high {
        let middle = usize::midpoint(low, high);
        if near[middle] - middle as u64 <= at { low = middle + 1 } else { high = middle }
    }
    at + low as u64
}

fn one(kernel: &ScaledKernel, sq: &[f64], weights: &[f64], near: usize, others: f64) -> Guess {
    let logs: Vec<f64> = sq.iter().map(|&sq| kernel.log_weight(sq)).collect();
    let shift = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let terms: Vec<f64> =
        logs.iter().zip(weights).map(|(log, weight)| weight * (log - shift).exp()).collect();
    let (exact, drawn) = terms.split_at(near);
    let m = drawn.len() as f64;
    let mean = if drawn.is_empty() { 0.0 } else { drawn.iter().sum::<f64>() / m };
    let squares: f64 = drawn.iter().map(|k| (k - mean).powi(2)).sum();
    let total = exact.iter().sum::<f64>() + others * mean;
    let variance = if m > 1.0 { others * others * (1.0 - m / others) * squares / (m - 1.0) / m } else { 0.0 };
    let sum_sq = exact.iter().map(|k| k * k).sum::<f64>()
        + if m > 0.0 { others * drawn.iter().map(|k| k * k).sum::<f64>() / m } else { 0.0 };
    Guess {
        log_sum: if total > 0.0 { shift + total.ln() } else { f64::NEG_INFINITY },
        variance: variance / (total * total),
        df: (m - 1.0).max(1.0),
        ess: if sum_sq > 0.0 { total * total / sum_sq } else { 0.0 },
        flags: if total > 0.0 { 0 } else { flags::NOT_POSITIVE },
    }
}

#[cfg(test)]
mod tests {
    use super::complement;

    #[test]
    fn the_complement_is_counted_through() {
        let near = [0, 3, 4, 9];
        let expected = [1, 2, 5, 6, 7, 8, 10, 11];
        for (at, row) in expected.into_iter().enumerate() {
            assert_eq!(complement(&near, at as u64), row);
        }
        assert_eq!(complement(&[], 7), 7);
    }
}
