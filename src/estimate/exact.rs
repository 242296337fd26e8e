//! The exact estimate: every row was read, so log f = log Σ w k − log Σ w and there is no standard error.
//!
//! Rows left out for a query (itself, near copies) are missing from both sums, as leave-one-out wants.

use std::collections::BTreeMap;

use super::Estimate;
use crate::logsum::LogSum;
use crate::scan::reduce::{GroupSums, Sums};

/// Estimates under each group, by code.
pub fn by_group(sums: &Sums, queries: usize, kernels: usize) -> BTreeMap<u32, Estimate> {
    sums.groups.iter().map(|(&code, group)| (code, estimate([group].into_iter(), queries, kernels))).collect()
}

/// Estimates under all rows: groups are folded in the order of their codes.
pub fn total(sums: &Sums, queries: usize, kernels: usize) -> Estimate {
    estimate(sums.groups.values(), queries, kernels)
}

fn estimate<'a>(groups: impl Iterator<Item = &'a GroupSums>, queries: usize, kernels: usize) -> Estimate {
    let mut sums = vec![LogSum::EMPTY; queries * kernels];
    let mut excluded = vec![0; queries];
    let mut excluded_weight = vec![0.0; queries];
    let (mut rows, mut weight) = (0, 0.0);
    for group in groups {
        rows += group.rows;
        weight += group.weight;
        for (sum, part) in sums.iter_mut().zip(&group.sums) {
            sum.fold(part);
        }
        for (&query, &(rows, weight)) in &group.excluded {
            excluded[query as usize] += rows;
            excluded_weight[query as usize] += weight;
        }
    }
    let log_sum: Vec<f64> = sums.iter().map(LogSum::log_sum).collect();
    let log_density = log_sum
        .iter()
        .enumerate()
        .map(|(i, &log_sum)| {
            let remaining: f64 = weight - excluded_weight[i / kernels];
            if remaining > 0.0 { log_sum - remaining.ln() } else { f64::NEG_INFINITY }
        })
        .collect();
    let ess =
        sums.iter().map(|sum| if sum.sum > 0.0 { sum.sum * sum.sum / sum.sum_sq } else { 0.0 }).collect();
    Estimate { log_density, log_sum, ess, excluded, rows, weight }
}
