//! Random sampling: Ẑ = n · mean of w k over m random rows, with or without one control variate for the whole corpus.
//!
//! With it, a linear function of D² is subtracted, whose mean over all rows is known exactly for any query:
//! ‖q − m‖² + tr. The slope of either half of the rows comes from the other half, so the estimate stays unbiased.

use rayon::prelude::*;

use super::{Guess, flags, profile};
use crate::error::{Error, ErrorKind, Result};
use crate::index::gather::{Asked, Found, Run, gather, view_starts};
use crate::index::random::Rng;
use crate::kernel::ScaledKernel;
use crate::rows::ShardView;

/// Draws gathered together.
const BATCH: usize = 1 << 22;

/// First and second moments of all rows.
#[derive(Clone, Debug)]
pub struct Moments {
    /// Σ w x / Σ w.
    pub mean: Vec<f64>,
    /// Σ w ‖x‖² / Σ w.
    pub sq_norm: f64,
}

/// How rows are drawn.
#[derive(Clone, Copy, Debug)]
pub struct Draw {
    /// Rows for each query.
    pub rows: usize,
    /// Whether the store's rows lie in random order, so that one run from a random start is a random sample.
    pub permuted: bool,
    /// Seed.
    pub seed: u64,
}

/// Estimates of the kernel sums of each query, per kernel.
///
/// # Errors
/// `Parameter`, `NotFinite`.
pub fn random(
    views: &[ShardView<'_>],
    asked: &Asked<'_>,
    keys: &[u64],
    kernels: &[ScaledKernel],
    draw: Draw,
    variate: Option<&Moments>,
) -> Result<Vec<Vec<Guess>>> {
    profile::check(kernels)?;
    let n: u64 = views.iter().map(|view| view.rows.len() as u64).sum();
    let m = draw.rows.min(n as usize);
    if m < 4 {
        return Err(Error::new(ErrorKind::Parameter, format!("{m} rows are too few for an estimate")));
    }
    let mut out = Vec::with_capacity(asked.len());
    let step = (BATCH / m).max(1);
    for first in (0..asked.len()).step_by(step) {
        let queries = first..(first + step).min(asked.len());
        let mut runs = Vec::new();
        let mut ends = Vec::new();
        for query in queries.clone() {
            let mut rng = Rng::new(&[draw.seed, keys[query], 20]);
            let run = |start, len| Run { query: query as u32, start, len };
            if draw.permuted {
                let start = rng.below(n);
                let before = (n - start).min(m as u64) as u32;
                runs.push(run(start, before));
                runs.extend((before < m as u32).then(|| run(0, m as u32 - before)));
            } else {
                runs.extend(rng.distinct(n, m).into_iter().map(|row| run(row, 1)));
            }
            ends.push(runs.len());
        }
        let found = gather(views, asked, &runs);
        let part: Vec<Vec<Guess>> = (0..ends.len())
            .into_par_iter()
            .map(|at| {
                let mine = if at == 0 { 0 } else { ends[at - 1] }..ends[at];
                let (sq, weights) = values(views, &runs, &found, mine);
                let query = first + at;
                let known = variate.map(|moments| mean_sq_distance(moments, asked, query));
                kernels.iter().map(|kernel| one(kernel, &sq, &weights, n as f64, known)).collect()
            })
            .collect();
        out.extend(part);
    }
    Ok(out)
}

/// Squared distances and weights of the rows of some runs.
pub(super) fn values(
    views: &[ShardView<'_>],
    runs: &[Run],
    found: &Found,
    range: std::ops::Range<usize>,
) -> (Vec<f64>, Vec<f64>) {
    let starts = view_starts(views);
    let weighted = views.iter().any(|view| view.weights.is_some());
    let (mut sq, mut weights) = (Vec::new(), Vec::new());
    for index in range {
        let run = &runs[index];
        sq.extend(found.run(index, run.len).iter().map(|&sq| f64::from(sq)));
        for row in run.start..run.start + u64::from(run.len) {
            let view = if weighted { starts.partition_point(|&start| start <= row) - 1 } else { 0 };
            let weight = if weighted {
                views[view].weights.map(|weights| weights[(row - starts[view]) as usize])
            } else {
                None
            };
            weights.push(f64::from(weight.unwrap_or(1.0)));
        }
    }
    (sq, weights)
}

/// The mean of D² over all rows.
fn mean_sq_distance(moments: &Moments, asked: &Asked<'_>, query: usize) -> f64 {
    let dot: f64 = asked.query(query).iter().zip(&moments.mean).map(|(&q, m)| f64::from(q) * m).sum();
    asked.sq_norms[query] + moments.sq_norm - 2.0 * dot
}

fn one(kernel: &ScaledKernel, sq: &[f64], weights: &[f64], n: f64, known: Option<f64>) -> Guess {
    let m = sq.len();
    let logs: Vec<f64> = sq.iter().map(|&sq| kernel.log_weight(sq)).collect();
    let shift = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut terms: Vec<f64> =
        logs.iter().zip(weights).map(|(log, weight)| weight * (log - shift).exp()).collect();
    let (sum, sum_sq) = terms.iter().fold((0.0, 0.0), |(sum, sq), k| (sum + k, sq + k * k));
    let ess = if sum_sq > 0.0 { n / m as f64 * sum * sum / sum_sq } else { 0.0 };
    if let Some(known) = known {
        let variate: Vec<f64> = sq.iter().zip(weights).map(|(sq, weight)| weight * (sq - known)).collect();
        // Halves are every other draw: within a run from a random order they are as random as any.
        let slope = |parity: usize| -> f64 {
            let half = || (parity..m).step_by(2);
            let count = half().count() as f64;
            let mean_k = half().map(|i| terms[i]).sum::<f64>() / count;
            let mean_u = half().map(|i| variate[i]).sum::<f64>() / count;
            let cross: f64 = half().map(|i| (terms[i] - mean_k) * (variate[i] - mean_u)).sum();
            let square: f64 = half().map(|i| (variate[i] - mean_u).powi(2)).sum();
            if square > 0.0 { cross / square } else { 0.0 }
        };
        let slopes = [slope(1), slope(0)];
        for (i, term) in terms.iter_mut().enumerate() {
            *term -= slopes[i % 2] * variate[i];
        }
    }
    let mean = terms.iter().sum::<f64>() / m as f64;
    let variance = terms.iter().map(|term| (term - mean).powi(2)).sum::<f64>() / (m - 1) as f64;
    let rest = (1.0 - m as f64 / n).max(0.0);
    let mut bits = if mean > 0.0 { 0 } else { flags::NOT_POSITIVE };
    let local = if sum_sq > 0.0 { sum * sum / sum_sq } else { 0.0 };
    if local < 50.0 {
        bits |= flags::FEW_ROWS;
    }
    Guess {
        log_sum: if mean > 0.0 { shift + (n * mean).ln() } else { f64::NEG_INFINITY },
        variance: rest * variance / m as f64 / (mean * mean),
        df: (m - 1) as f64,
        ess,
        flags: bits,
    }
}
