//! How the draws are shared out among the lists, and which lists are read whole instead.

use super::{Planner, dot, largest};

/// A list that is to give this share of its rows is read whole.
pub(super) const WHOLE: f64 = 0.97;

/// Parts of the draws that do not go by predicted residuals: to rows whatever is predicted of them, and by predicted weight, so that a
/// list whose residual is misjudged is drawn from as its share of the sum deserves. Chosen on 240 queries that the bench does not use.
pub(super) const FLOOR: f64 = 0.05;
pub(super) const MASS: f64 = 0.25;

impl Planner<'_> {
    /// Decides how many rows are drawn of each list: each kernel's share goes by its residuals, and a part to rows whatever is
    /// predicted of them. Returns the largest residual of each kernel's, to which `relative` holds the others.
    ///
    /// What one list may hide can be e^100 times what all others may. When it is read whole, what is left is shared out anew.
    pub(super) fn rates(&mut self, draws: f64) -> Vec<f64> {
        const ROUNDS: usize = 12;
        let kernels = self.request.kernels.len() as f64;
        let mut left = draws;
        let mut peaks = self.peaks();
        for round in 1.. {
            self.draws.fill(0.0);
            for ((found, relative), &peak) in self.predictions.iter().zip(&mut self.relative).zip(&peaks) {
                if peak == f64::NEG_INFINITY {
                    relative.fill(0.0);
                    continue;
                }
                relative.iter_mut().zip(&found.log_residual).for_each(|(into, log)| *into = log - peak);
                self.index.level().exponentials(relative);
                let total = dot(&self.open, relative);
                if total > 0.0 {
                    let part = (1.0 - FLOOR - MASS) / (total * kernels);
                    self.draws.iter_mut().zip(relative).for_each(|(rate, r)| *rate += part * *r);
                }
            }
            for mu in &self.mu {
                let total = dot(&self.weights, mu);
                if total > 0.0 {
                    let part = MASS / (total * kernels);
                    for ((rate, mu), weight) in self.draws.iter_mut().zip(mu).zip(&self.mean_weights) {
                        *rate += part * mu * weight;
                    }
                }
            }
            let taken = self.allocate(left);
            let after = self.peaks();
            let fell = peaks.iter().zip(&after).any(|(before, after)| before - after > 30.0);
            if taken == 0.0 || !fell || round == ROUNDS {
                break;
            }
            left = (left - taken).max(4.0 * f64::from(self.request.block));
            peaks = after;
        }
        peaks
    }

    /// The largest residual among the lists that are not read whole, for each kernel.
    fn peaks(&self) -> Vec<f64> {
        let each = self.predictions.iter().map(|found| &found.log_residual);
        each.map(|residual| largest(residual)).collect()
    }

    /// Turns rates into expected draws of each list, never more than it has rows. Where reading all of a list costs no more than
    /// the rows to be drawn of it, it is read whole. Returns what these cost.
    fn allocate(&mut self, draws: f64) -> f64 {
        let cost = self.request.whole_cost;
        let rest: f64 = self.open.iter().sum();
        if rest == 0.0 {
            self.draws.fill(0.0);
            return 0.0;
        }
        let floor = FLOOR / rest;
        // Where nothing is predicted to vary the floor is all there is.
        let flat = if dot(&self.open, &self.draws) > 0.0 { floor } else { 1.0 / rest };
        for (rate, &n) in self.draws.iter_mut().zip(&self.open) {
            *rate = if n > 0.0 { *rate + flat } else { 0.0 };
        }
        let mut open = dot(&self.open, &self.draws);
        let (mut factor, mut left) = (draws / open.max(1e-300), draws);
        let mut closed = Vec::new();
        for _ in 0..20 {
            let (limit, before) = (WHOLE * cost / factor, closed.len());
            for list in 0..self.draws.len() {
                let rate = self.draws[list];
                if rate >= limit && rate > 0.0 && self.open[list] > 0.0 {
                    left -= self.open[list] * cost;
                    open -= self.open[list] * rate;
                    closed.push(list);
                    self.close(list);
                }
            }
            if closed.len() == before || open <= 0.0 || left <= 0.0 {
                break;
            }
            factor = left / open;
        }
        let mut taken = 0.0;
        for list in closed {
            self.whole[list] = true;
            self.draws[list] = 0.0;
            taken += self.sizes[list] * cost;
        }
        for (rate, &n) in self.draws.iter_mut().zip(&self.open) {
            *rate = if n > 0.0 { (factor * *rate).min(WHOLE) * n } else { 0.0 };
        }
        taken
    }
}
