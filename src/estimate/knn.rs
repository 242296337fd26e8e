//! The kernel sum of the k nearest rows alone: Ẑ = Σ_{i ≤ k} w k. A lower bound, with no error to state: in wide
//! kernels most of the sum lies beyond any neighbours.

use super::Guess;
use crate::kernel::ScaledKernel;
use crate::logsum::LogSum;

/// Sums over neighbours (distances, and weights where there are any) for each kernel.
pub fn truncated(distances: &[f64], weights: Option<&[f32]>, kernels: &[ScaledKernel]) -> Vec<Guess> {
    let each = kernels.iter().map(|kernel| {
        let mut sum = LogSum::EMPTY;
        for (at, distance) in distances.iter().enumerate().filter(|(_, distance)| distance.is_finite()) {
            let weight = weights.map_or(1.0, |weights| f64::from(weights[at]));
            sum.push(kernel.log_weight(distance * distance) + weight.ln());
        }
        let ess = if sum.sum > 0.0 { sum.sum * sum.sum / sum.sum_sq } else { 0.0 };
        Guess { log_sum: sum.log_sum(), variance: f64::NAN, df: f64::NAN, ess, flags: 0 }
    });
    each.collect()
}
