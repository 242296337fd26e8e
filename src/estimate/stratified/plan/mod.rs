//! What is decided for a query before any row is read: which lists are read whole, how many rows of the others are drawn, and what is
//! known of their sum.

mod budget;
mod draw;
mod share;

use super::request::Stage;
use crate::estimate::profile::{self, Predictions};
use crate::index::format::{RANKS, rank_bin};
use crate::index::gather::Run;
use crate::index::random::Rng;
use crate::index::{GroupMoments, Index, List, Ranked};

/// Share of the rows that near lists may take to be read whole, and lists that always are.
const NEAR_SHARE: f64 = 0.4;
const NEAR_LISTS: usize = 2;

/// Kappa is a mean over lists, and single lists scatter around it by about two: predicting on the high side errs on the side
/// of coverage.
const KAPPA: f64 = 2.0;

/// Part of the model's variance that is added to the empirical one; where few rows of a list may decide its sum, draws that met none
/// of them know nothing, and the model counts for more. These, `KAPPA`, `NEAR_SHARE` and the profile's `TAIL` were chosen together on
/// 120 queries of one corpus that the bench does not use; what they do on others is in its record.
const MODEL: f64 = 0.3;
const TAIL: f64 = 0.8;

/// Rows drawn from a list in one stretch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stretch {
    pub list: u32,
    /// Number of its first run (it has two where it goes round the list's end).
    pub run: u32,
    pub len: u32,
    /// Light: draws expected of the list over those of a stratum; heavy: unused.
    pub share: f64,
    /// ‖q − m‖² of the list, and the variance predicted for D² in it.
    pub to_mean: f64,
    pub variance: f64,
}

/// What is known of one kernel's sum over the lists not read whole.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    /// All is relative to its exponential, or the square of that.
    pub shift: f64,
    /// Σ W μ.
    pub sum: f64,
    /// Logarithm of the variance that the model predicts, as it counts in that of the estimate.
    pub model: f64,
}

/// What is decided for one query before any row is read.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// Lists, each with the number of its run where single rows are looked at.
    pub whole: Vec<(u32, u32)>,
    /// ‖q − m‖² of these.
    pub to_means: Vec<f64>,
    pub heavy: Vec<Stretch>,
    /// Two of each stratum, one after the other.
    pub light: Vec<Stretch>,
    /// Per kernel.
    pub known: Vec<Known>,
    /// Per group and kernel the same sum.
    pub known_groups: Vec<f64>,
    /// Whether anything is left to sampling.
    pub sampled: bool,
    pub runs: Vec<Run>,
}

/// One thread's buffers for planning. Arrays have an entry per list.
pub(super) struct Planner<'a> {
    index: &'a Index,
    request: &'a Stage<'a>,
    /// Whether lists read whole are read for many queries together, not as runs.
    together: bool,
    /// Facts of the lists, the mean weight of their rows, and the logarithm of the root of the mean square weight of their rows.
    sizes: Vec<f64>,
    log_sizes: Vec<f64>,
    weights: Vec<f64>,
    mean_weights: Vec<f64>,
    tr: Vec<f64>,
    s4: Vec<f64>,
    log_scales: Vec<f64>,
    /// First rank of each bin.
    bin_starts: [usize; RANKS.len()],
    /// Of one query: lists in order of nearness, the bin of each, mean and variance of D², and which are read whole.
    keys: Vec<u64>,
    bins: Vec<u8>,
    mean_sq: Vec<f64>,
    variance: Vec<f64>,
    whole: Vec<bool>,
    /// Per kernel; of lists that are read whole both logarithms are −∞.
    predictions: Vec<Predictions>,
    /// Per kernel: the residual relative to the largest.
    relative: Vec<Vec<f64>>,
    /// Rows to draw of each list; 0 where it is read whole.
    draws: Vec<f64>,
    /// Rows of lists that are not read whole.
    open: Vec<f64>,
    /// One kernel's μ over the largest.
    mu: Vec<Vec<f64>>,
    /// Rows, and their parts in the model's variance, by residual.
    binned: Vec<[f64; 2]>,
    /// Of each list the factors of its variance.
    left: Vec<f64>,
    squares: Vec<f64>,
}

impl<'a> Planner<'a> {
    pub fn new(index: &'a Index, request: &'a Stage<'a>, together: bool) -> Self {
        let lists = index.lists();
        let (count, kernels) = (lists.len(), request.kernels.len());
        let scale = |list: &List| (list.weight / list.n.max(1) as f64 * list.spread.sqrt()).ln();
        Self {
            index,
            request,
            together,
            sizes: lists.iter().map(|list| list.n as f64).collect(),
            log_sizes: lists.iter().map(|list| (list.n.max(1) as f64).ln()).collect(),
            weights: lists.iter().map(|list| list.weight).collect(),
            mean_weights: lists.iter().map(|list| list.weight / list.n.max(1) as f64).collect(),
            tr: lists.iter().map(|list| list.tr).collect(),
            s4: lists.iter().map(|list| list.s4).collect(),
            log_scales: lists.iter().map(|list| if list.n > 0 { scale(list) } else { 0.0 }).collect(),
            bin_starts: std::array::from_fn(|bin| {
                (0..count).find(|&rank| rank_bin(rank, count) >= bin).unwrap_or(count)
            }),
            keys: vec![0; count],
            bins: vec![0; count],
            mean_sq: vec![0.0; count],
            variance: vec![0.0; count],
            whole: vec![false; count],
            predictions: vec![Predictions::default(); kernels],
            relative: vec![vec![0.0; count]; kernels],
            draws: vec![0.0; count],
            open: vec![0.0; count],
            mu: vec![vec![0.0; count]; kernels],
            binned: Vec::new(),
            left: vec![0.0; count],
            squares: vec![0.0; count],
        }
    }

    /// Orders the nearest lists first in `keys` (the list is the lower half) and gives every list its bin.
    fn rank(&mut self, ranked: &Ranked, lane: usize) {
        let centroids = self.index.centroids();
        let (distances, own) = (ranked.to_centroids(lane), ranked.own(lane) as usize);
        for (list, key) in self.keys.iter_mut().enumerate() {
            let distance = if list == own { 0.0 } else { distances[centroids[list] as usize] };
            // Positive floats order as their bits do; lists without rows come last.
            let bits =
                if self.sizes[list] == 0.0 { u32::MAX } else { distance.to_bits() + u32::from(list != own) };
            *key = u64::from(bits) << 32 | list as u64;
        }
        let mut end = centroids.len();
        for bin in (0..RANKS.len()).rev() {
            let start = self.bin_starts[bin].min(end);
            if start > 0 && start < end {
                self.keys[..end].select_nth_unstable(start);
            }
            for key in &self.keys[start..end] {
                self.bins[(*key & 0xffff_ffff) as usize] = bin as u8;
            }
            // All up to the middle bins is put in order: near lists are taken from there.
            if bin == 2 {
                self.keys[..end].sort_unstable();
            }
            end = start;
            if end == 0 {
                break;
            }
        }
    }

    pub fn plan(&mut self, query: usize, ranked: &Ranked, lane: usize, groups: Option<&[f32]>) -> Plan {
        let (index, request) = (self.index, self.request);
        let (lists, kernels) = (index.lists(), request.kernels);
        let count = lists.len();
        self.rank(ranked, lane);
        self.predict(ranked.to_means(lane));
        let mut budget = request.rows[query] as f64;
        if let Some(aims) = request.aims {
            // Kernels that share the draws have up to 1.3 times the error that each would have alone.
            let shared = if kernels.len() > 1 { 1.7 } else { 1.0 };
            budget = budget.min((shared * self.budget(aims[query])).max(budget::least(index.n())));
        }
        self.whole.fill(false);
        let mut plan = Plan::default();
        let mut spent = 0.0;
        for (place, key) in self.keys.iter().enumerate() {
            let list = (*key & 0xffff_ffff) as usize;
            let after = spent + self.sizes[list] * request.whole_cost;
            if lists[list].n == 0 || place >= NEAR_LISTS && after > NEAR_SHARE * budget {
                break;
            }
            self.whole[list] = true;
            spent = after;
        }
        // Where the two nearest lists eat most of the budget a part still goes to the rest.
        let draws = (budget - spent).max((0.25 * budget).floor()).max(4.0 * f64::from(request.block));
        let to_means = ranked.to_means(lane);
        for list in 0..count {
            if self.whole[list] || self.sizes[list] == 0.0 {
                self.close(list);
            } else {
                self.open[list] = self.sizes[list];
            }
        }
        let mut shifts: Vec<f64> = (0..kernels.len()).map(|h| self.weigh(h)).collect();
        let peaks = self.rates(draws);
        plan.sampled = self.draws.iter().any(|&draws| draws > 0.0);
        if plan.sampled {
            let mut rng = Rng::new(&[request.seed, request.keys[query], request.stage, 22]);
            self.draw(query, &mut plan, &mut rng);
        }
        for (list, entry) in lists.iter().enumerate() {
            if self.whole[list] && entry.n > 0 {
                plan.whole.push((list as u32, plan.runs.len() as u32));
                plan.to_means.push(f64::from(to_means[list]));
                if !self.together {
                    plan.runs.push(Run { query: query as u32, start: entry.start, len: entry.n as u32 });
                }
            }
        }
        for h in 0..kernels.len() {
            // Where lists that were large are read whole by now, what is left is seen from nearer.
            if largest(&self.predictions[h].log_mu) < shifts[h] - 30.0 {
                shifts[h] = self.weigh(h);
            }
            let (shift, sum, model) = (shifts[h], dot(&self.weights, &self.mu[h]), self.model(h));
            let model = if model > 0.0 { model.ln() + 2.0 * (peaks[h] - shift) } else { f64::NEG_INFINITY };
            plan.known.push(Known { shift, sum, model });
        }
        for stretch in plan.heavy.iter_mut().chain(&mut plan.light) {
            let list = stretch.list as usize;
            stretch.to_mean = f64::from(to_means[list]);
            stretch.variance = self.variance[list];
        }
        if let (Some(distances), Some(moments), Some(groups)) = (groups, index.groups(), request.groups) {
            self.known_of_groups(&mut plan, moments, groups, distances, lane, &shifts);
        }
        plan
    }

    /// Mean and variance of D² in every list, and what they make of each kernel.
    fn predict(&mut self, to_means: &[f32]) {
        let (index, lists) = (self.index, self.index.lists());
        let factors: [f64; RANKS.len()] =
            std::array::from_fn(|bin| KAPPA * 4.0 * index.manifest().kappa[bin] / index.d() as f64);
        for list in 0..lists.len() {
            let dm = f64::from(to_means[list]);
            self.mean_sq[list] = dm + self.tr[list];
            self.variance[list] = self.s4[list] + factors[self.bins[list] as usize] * dm * self.tr[list];
        }
        for (kernel, found) in self.request.kernels.iter().zip(&mut self.predictions) {
            let least = |list: usize| lists[list].nearest_sq(f64::from(to_means[list]));
            found.predict(kernel, &self.mean_sq, &self.variance, least, &self.log_sizes);
            for (residual, scale) in found.log_residual.iter_mut().zip(&self.log_scales) {
                *residual += scale;
            }
        }
    }

    /// Fills in one kernel's μ relative to the exponential of the largest logarithm, which is returned: −∞ where no list is open.
    fn weigh(&mut self, h: usize) -> f64 {
        let (mu, logs) = (&mut self.mu[h], &self.predictions[h].log_mu);
        let shift = largest(logs);
        if shift == f64::NEG_INFINITY {
            mu.fill(0.0);
            return shift;
        }
        mu.iter_mut().zip(logs).for_each(|(mu, log)| *mu = log - shift);
        self.index.level().exponentials(mu);
        shift
    }

    /// The variance that the model predicts of one kernel's sum, relative to the square of its largest residual.
    fn model(&mut self, h: usize) -> f64 {
        let count = self.sizes.len();
        let (tails, relative) = (&self.predictions[h].tails[..count], &self.relative[h][..count]);
        let (sizes, draws) = (&self.sizes[..count], &self.draws[..count]);
        let (left, squares) = (&mut self.left[..count], &mut self.squares[..count]);
        for list in 0..count {
            let part = if tails[list] { TAIL } else { MODEL };
            let r = sizes[list] * relative[list];
            squares[list] = part * r * r;
            left[list] = if draws[list] > 0.0 { 1.0 / draws[list] - 1.0 / sizes[list] } else { 0.0 };
        }
        dot(left, squares)
    }

    /// Leaves a list out of what is predicted and drawn.
    fn close(&mut self, list: usize) {
        self.open[list] = 0.0;
        for found in &mut self.predictions {
            found.log_mu[list] = f64::NEG_INFINITY;
            found.log_residual[list] = f64::NEG_INFINITY;
        }
        for mu in &mut self.mu {
            mu[list] = 0.0;
        }
    }

    /// Σ of the control variate over each group's rows in the lists not read whole: their mean D² is known exactly too.
    fn known_of_groups(
        &self,
        plan: &mut Plan,
        groups: &GroupMoments,
        (map, kept): (&[u32], usize),
        distances: &[f32],
        lane: usize,
        shifts: &[f64],
    ) {
        let (kernels, width) = (self.request.kernels, self.index.panel_width());
        plan.known_groups = vec![0.0; kept * kernels.len()];
        for list in (0..self.open.len()).filter(|&list| self.open[list] > 0.0) {
            let u = self.mean_sq[list];
            for (h, kernel) in kernels.iter().enumerate() {
                let mu = (self.predictions[h].log_mu[list] - shifts[h]).exp();
                let (_, slope, _) = profile::derivatives(kernel, u.max(1e-12));
                for entry in groups.first[list] as usize..groups.first[list + 1] as usize {
                    let [_, weight, tr] = groups.moments[entry];
                    let own = f64::from(distances[entry * width + lane]) + tr;
                    plan.known_groups[map[groups.codes[entry] as usize] as usize * kernels.len() + h] +=
                        weight * mu * (1.0 + slope * (own - u));
                }
            }
        }
    }
}

/// The largest value, −∞ where there is none; in eight lanes side by side.
fn largest(values: &[f64]) -> f64 {
    let greater = |a: f64, b: f64| if a > b { a } else { b };
    let mut most = [f64::NEG_INFINITY; 8];
    let (whole, rest) = values.as_chunks::<8>();
    for values in whole {
        for lane in 0..8 {
            most[lane] = greater(values[lane], most[lane]);
        }
    }
    most.iter().chain(rest).copied().fold(f64::NEG_INFINITY, greater)
}

/// Σ a b, in eight sums side by side.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (left, right) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (a, b) in left.0.iter().zip(right.0) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f64 = left.1.iter().zip(right.1).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f64>() + rest
}
