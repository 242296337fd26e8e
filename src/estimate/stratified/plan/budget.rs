//! How much must be spent on a query so that its predicted variance comes down to an aim.

use super::share::{FLOOR, MASS, WHOLE};
use super::{MODEL, Planner, TAIL};

/// The least that is spent where a variance is aimed at, in rows drawn: this share of the rows, within bounds. Queries of which the
/// model expects nothing are those where a list that it misjudges matters; most of this goes to near lists, and costs little.
const LEAST: f64 = 0.01;
const LEAST_SPENT: (f64, f64) = (300.0, 4000.0);

/// The least that is spent where a variance is aimed at, with so many rows in all.
pub(super) fn least(n: u64) -> f64 {
    (LEAST * n as f64).clamp(LEAST_SPENT.0, LEAST_SPENT.1)
}

impl Planner<'_> {
    /// What must be spent so that the model's part of the variance of the primary kernel's sum is e^`aim`.
    ///
    /// With λ r draws per row, lists where that is above `whole_cost` are read whole, and of the others Σ part n r (1/λ − r) is left. So
    /// lists are sorted into bins by log r, and one way through them, from the smallest up, gives the variance and the cost of every λ.
    /// Sums are relative to the bin they are at: residuals are anything from 1 to e^−1000 of the largest.
    pub(super) fn budget(&mut self, aim: f64) -> f64 {
        const PER_NAT: f64 = 8.0;
        const BINS: usize = 4096;
        let found = &self.predictions[0];
        let cost = self.request.whole_cost;
        let filled = |list: usize| self.sizes[list] > 0.0;
        let residuals =
            || (0..self.sizes.len()).filter(|&list| filled(list)).map(|list| found.log_residual[list]);
        let peak = residuals().fold(f64::NEG_INFINITY, f64::max);
        if peak == f64::NEG_INFINITY {
            return 0.0;
        }
        self.binned.clear();
        self.binned.resize(BINS, [0.0; 2]);
        let mut last = 0;
        for list in (0..self.sizes.len()).filter(|&list| filled(list)) {
            let bin = (((peak - found.log_residual[list]) * PER_NAT) as usize).min(BINS - 1);
            let part = if found.tails[list] { TAIL } else { MODEL };
            self.binned[bin][0] += self.sizes[list];
            self.binned[bin][1] += part * self.sizes[list];
            last = last.max(bin);
        }
        // Relative to the bin's own residual: Σ n r, Σ part n r and Σ part n r² over it and all smaller ones.
        let step = (-1.0 / PER_NAT).exp();
        let (mut rows, mut first, mut second) = (0.0, 0.0, 0.0);
        let mut above: f64 = self.binned.iter().map(|bin| bin[0]).sum();
        let mut spent = above * cost;
        for bin in (0..=last).rev() {
            let [n, weight] = self.binned[bin];
            above -= n;
            (rows, first, second) = (rows * step + n, first * step + weight, second * step * step + weight);
            let level = 2.0 * (peak - bin as f64 / PER_NAT) - aim;
            let rest = (first / (WHOLE * cost) - second).max(0.0);
            if rest > 0.0 && level + rest.ln() > 0.0 {
                return spent;
            }
            spent = above * cost + WHOLE * cost * rows / (1.0 - FLOOR - MASS);
        }
        // Nothing need be read whole: e^aim = r² (first/share − second).
        let share = first / ((aim - 2.0 * peak).exp() + second);
        share.min(WHOLE * cost) * rows / (1.0 - FLOOR - MASS)
    }
}
