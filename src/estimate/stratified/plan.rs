//! What is decided for a query before any row is read: which lists are read whole, how many rows of the others are drawn, and what is
//! known of their sum.

use super::request::Stage;
use crate::estimate::profile;
use crate::index::format::{RANKS, rank_bin};
use crate::index::gather::Run;
use crate::index::random::Rng;
use crate::index::{GroupMoments, Index, Ranked};

/// Share of the rows that near lists may take to be read whole, and lists that always are.
const NEAR_SHARE: f64 = 0.4;
pub(super) const NEAR_LISTS: usize = 2;

/// A list that is to give this share of its rows is read whole.
const WHOLE: f64 = 0.97;

/// Part of the draws that goes to rows whatever is predicted of them.
const FLOOR: f64 = 0.1;

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

/// What is decided for one query before any row is read.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub whole: Vec<(u32, u32)>,
    pub heavy: Vec<Stretch>,
    /// Two of each stratum, one after the other.
    pub light: Vec<Stretch>,
    /// Per kernel: shift, and relative to its exponential Σ W μ over lists not read whole, and the logarithm of the model's variance.
    pub known: Vec<(f64, f64, f64)>,
    /// Per group and kernel the same sum.
    pub known_groups: Vec<f64>,
    /// Whether anything is left to sampling.
    pub sampled: bool,
    pub runs: Vec<Run>,
}

/// One thread's buffers for planning.
pub(super) struct Planner<'a> {
    index: &'a Index,
    request: &'a Stage<'a>,
    keys: Vec<u64>,
    /// First rank of each bin.
    bin_starts: [usize; RANKS.len()],
    bins: Vec<u8>,
    log_sizes: Vec<f64>,
    whole: Vec<bool>,
    /// Logarithm of the root of the mean square weight of each list's rows.
    log_scales: Vec<f64>,
    /// Per kernel and list: log μ, the logarithm of the residual, and the residual relative to the largest.
    log_mu: Vec<f64>,
    residual: Vec<f64>,
    relative: Vec<f64>,
    /// Per kernel and list: whether few of its rows may decide its sum.
    tails: Vec<bool>,
    /// Rows to draw of each list; 0 where it is read whole.
    draws: Vec<f64>,
}

impl<'a> Planner<'a> {
    pub fn new(index: &'a Index, request: &'a Stage<'a>) -> Self {
        let lists = index.lists().len();
        let pairs = lists * request.kernels.len();
        Self {
            index,
            request,
            keys: vec![0; lists],
            bin_starts: std::array::from_fn(|bin| {
                (0..lists).find(|&rank| rank_bin(rank, lists) >= bin).unwrap_or(lists)
            }),
            bins: vec![0; lists],
            log_sizes: index.lists().iter().map(|list| (list.n.max(1) as f64).ln()).collect(),
            whole: vec![false; lists],
            log_mu: vec![0.0; pairs],
            log_scales: index
                .lists()
                .iter()
                .map(
                    |list| {
                        if list.n > 0 { (list.weight / list.n as f64 * list.spread.sqrt()).ln() } else { 0.0 }
                    },
                )
                .collect(),
            residual: vec![0.0; pairs],
            relative: vec![0.0; pairs],
            tails: vec![false; pairs],
            draws: vec![0.0; lists],
        }
    }

    /// Orders the nearest lists first in `keys` (the list is the lower half) and gives every list its bin.
    fn rank(&mut self, ranked: &Ranked, lane: usize) {
        let (lists, centroids) = (self.index.lists(), self.index.centroids());
        let own = ranked.own[lane] as usize;
        for (list, key) in self.keys.iter_mut().enumerate() {
            let centroid = centroids[list] as usize;
            let distance = if list == own { 0.0 } else { ranked.to_centroid[centroid * ranked.width + lane] };
            // Positive floats order as their bits do; lists without rows come last.
            let bits =
                if lists[list].n == 0 { u32::MAX } else { distance.to_bits() + u32::from(list != own) };
            *key = u64::from(bits) << 32 | list as u64;
        }
        let mut end = lists.len();
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
        let (count, d, width) = (lists.len(), index.d() as f64, ranked.width);
        let budget = request.rows[query];
        self.rank(ranked, lane);
        self.whole.fill(false);
        let mut plan = Plan::default();
        let mut rows = 0;
        for (place, key) in self.keys.iter().enumerate() {
            let list = (*key & 0xffff_ffff) as usize;
            let after = rows + lists[list].n;
            if lists[list].n == 0 || place >= NEAR_LISTS && after as f64 > NEAR_SHARE * budget as f64 {
                break;
            }
            self.whole[list] = true;
            rows = after;
        }
        // Where the two nearest lists eat most of the budget a part still goes to the rest.
        let draws = (budget.saturating_sub(rows)).max(budget / 4).max(4 * u64::from(request.block)) as f64;
        let kappa = &index.manifest().kappa;
        let mean_sq = |list: usize| f64::from(ranked.to_mean[list * width + lane]);
        let variance = |list: usize, dm: f64, bins: &[u8]| {
            lists[list].s4 + KAPPA * 4.0 * kappa[bins[list] as usize] * dm * lists[list].tr / d
        };
        let mut shifts = vec![f64::NEG_INFINITY; kernels.len()];
        for (h, kernel) in kernels.iter().enumerate() {
            let (log_mu, residual) =
                (&mut self.log_mu[h * count..][..count], &mut self.residual[h * count..][..count]);
            for (list, entry) in lists.iter().enumerate() {
                if self.whole[list] || entry.n == 0 {
                    continue;
                }
                let dm = mean_sq(list);
                let spread = variance(list, dm, &self.bins);
                let least = || entry.nearest_sq(dm);
                let found = profile::predict(kernel, dm + entry.tr, spread, least, self.log_sizes[list]);
                log_mu[list] = found.log_mu;
                residual[list] = found.log_residual + self.log_scales[list];
                self.tails[h * count + list] = found.tail;
                shifts[h] = shifts[h].max(found.log_mu);
            }
        }
        let peaks = self.rates(draws);
        plan.sampled = self.draws.iter().any(|&draws| draws > 0.0);
        if plan.sampled {
            let mut rng = Rng::new(&[request.seed, request.keys[query], request.stage, 22]);
            self.draw(query, &mut plan, &mut rng);
        }
        for (list, entry) in lists.iter().enumerate() {
            if self.whole[list] && entry.n > 0 {
                plan.whole.push((list as u32, plan.runs.len() as u32));
                plan.runs.push(Run { query: query as u32, start: entry.start, len: entry.n as u32 });
            }
        }
        for (h, &shift) in shifts.iter().enumerate() {
            let (mut sum, mut model) = (0.0, 0.0);
            for list in (0..count).filter(|&list| !self.whole[list] && lists[list].n > 0) {
                let n = lists[list].n as f64;
                sum += lists[list].weight * (self.log_mu[h * count + list] - shift).exp();
                let r = n * self.relative[h * count + list];
                let part = if self.tails[h * count + list] { TAIL } else { MODEL };
                model += part * r * r * (1.0 / self.draws[list] - 1.0 / n);
            }
            let model = if model > 0.0 { model.ln() + 2.0 * (peaks[h] - shift) } else { f64::NEG_INFINITY };
            plan.known.push((shift, sum, model));
        }
        for stretch in plan.heavy.iter_mut().chain(&mut plan.light) {
            stretch.to_mean = mean_sq(stretch.list as usize);
            stretch.variance = variance(stretch.list as usize, stretch.to_mean, &self.bins);
        }
        if let (Some(distances), Some(moments), Some(groups)) = (groups, index.groups(), request.groups) {
            self.known_of_groups(&mut plan, moments, groups, distances, &mean_sq, lane, width, &shifts);
        }
        plan
    }

    /// Σ of the control variate over each group's rows in the lists not read whole: their mean D² is known exactly too.
    #[allow(clippy::too_many_arguments)] // the places of one query
    fn known_of_groups(
        &self,
        plan: &mut Plan,
        groups: &GroupMoments,
        (map, kept): (&[u32], usize),
        distances: &[f32],
        mean_sq: &dyn Fn(usize) -> f64,
        lane: usize,
        width: usize,
        shifts: &[f64],
    ) {
        let (lists, kernels) = (self.index.lists(), self.request.kernels);
        let count = lists.len();
        plan.known_groups = vec![0.0; kept * kernels.len()];
        for list in (0..count).filter(|&list| !self.whole[list] && lists[list].n > 0) {
            let u = mean_sq(list) + lists[list].tr;
            for (h, kernel) in kernels.iter().enumerate() {
                let mu = (self.log_mu[h * count + list] - shifts[h]).exp();
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

    /// Decides how many rows are drawn of each list: each kernel's share goes by its residuals, and a part to rows whatever is
    /// predicted of them. Returns the largest residual of each kernel's, to which `relative` holds the others.
    ///
    /// What one list may hide can be e^100 times what all others may. When it is read whole, what is left is shared out anew.
    fn rates(&mut self, draws: f64) -> Vec<f64> {
        const ROUNDS: usize = 12;
        let lists = self.index.lists();
        let (count, kernels) = (lists.len(), self.request.kernels.len());
        let mut left = draws;
        let mut peaks = self.peaks();
        for round in 1.. {
            self.draws.fill(0.0);
            for (h, &peak) in peaks.iter().enumerate() {
                let mut total = 0.0;
                for (list, entry) in lists.iter().enumerate() {
                    let log = self.residual[h * count + list] - peak;
                    let closed = self.whole[list] || entry.n == 0;
                    let relative = if closed || log < -60.0 { 0.0 } else { log.exp() };
                    self.relative[h * count + list] = relative;
                    total += entry.n as f64 * relative;
                }
                if total > 0.0 {
                    let part = (1.0 - FLOOR) / (total * kernels as f64);
                    let relative = &self.relative[h * count..][..count];
                    self.draws.iter_mut().zip(relative).for_each(|(rate, r)| *rate += part * r);
                }
            }
            let taken = self.allocate(left);
            let after = self.peaks();
            let fell = peaks.iter().zip(&after).any(|(before, after)| before - after > 30.0);
            if taken == 0 || !fell || round == ROUNDS {
                break;
            }
            left = (left - taken as f64).max(4.0 * f64::from(self.request.block));
            peaks = after;
        }
        peaks
    }

    /// The largest residual among the lists that are not read whole, for each kernel.
    fn peaks(&self) -> Vec<f64> {
        let lists = self.index.lists();
        let each = self.residual.chunks_exact(lists.len()).map(|residual| {
            let open = (0..lists.len()).filter(|&list| !self.whole[list] && lists[list].n > 0);
            open.fold(f64::NEG_INFINITY, |peak, list| peak.max(residual[list]))
        });
        each.collect()
    }

    /// Turns rates into expected draws of each list, never more than it has rows; those near all are read whole. Returns the
    /// rows of these.
    fn allocate(&mut self, draws: f64) -> u64 {
        let lists = self.index.lists();
        let rest: u64 =
            lists.iter().zip(&self.whole).map(|(list, &whole)| if whole { 0 } else { list.n }).sum();
        if rest == 0 {
            return 0;
        }
        let floor = FLOOR / rest as f64;
        // Where nothing is predicted to vary the floor is all there is.
        let total: f64 = lists.iter().zip(&self.draws).map(|(list, rate)| list.n as f64 * rate).sum();
        let flat = if total > 0.0 { floor } else { 1.0 / rest as f64 };
        let mut open = 0.0;
        for (list, rate) in self.draws.iter_mut().enumerate() {
            if self.whole[list] || lists[list].n == 0 {
                *rate = 0.0;
                continue;
            }
            *rate += flat;
            open += lists[list].n as f64 * *rate;
        }
        let (mut factor, mut left) = (draws / open.max(1e-300), draws);
        let mut capped = vec![false; lists.len()];
        for _ in 0..20 {
            let mut changed = false;
            for (list, capped) in capped.iter_mut().enumerate() {
                if !*capped && self.draws[list] > 0.0 && factor * self.draws[list] >= WHOLE {
                    *capped = true;
                    changed = true;
                    left -= lists[list].n as f64;
                    open -= lists[list].n as f64 * self.draws[list];
                }
            }
            if !changed || open <= 0.0 || left <= 0.0 {
                break;
            }
            factor = left / open;
        }
        let mut taken = 0;
        for (list, rate) in self.draws.iter_mut().enumerate() {
            if *rate <= 0.0 {
                continue;
            }
            if capped[list] {
                self.whole[list] = true;
                taken += lists[list].n;
                *rate = 0.0;
            } else {
                *rate = (factor * *rate).min(WHOLE) * lists[list].n as f64;
            }
        }
        taken
    }

    fn draw(&self, query: usize, plan: &mut Plan, rng: &mut Rng) {
        let lists = self.index.lists();
        let block = self.request.block;
        let mut light = Vec::new();
        let mut cumulated = Vec::new();
        let mut total = 0.0;
        for (list, &draws) in self.draws.iter().enumerate() {
            if self.whole[list] || draws <= 0.0 {
                continue;
            }
            if draws >= f64::from(2 * block) {
                // Rounded at random, so that the mean is kept; the variance is that of the rows taken.
                let len = (draws + rng.uniform()).floor().min(lists[list].n as f64) as u32;
                let stretch = self.stretch(query, list, len.max(2), 0.0, plan, rng);
                plan.heavy.push(stretch);
            } else {
                total += draws;
                light.push(list);
                cumulated.push(total);
            }
        }
        if light.is_empty() {
            return;
        }
        let strata = (total / f64::from(2 * block)).round().max(1.0);
        for stratum in 0..strata as usize {
            for _ in 0..2 {
                let point = (stratum as f64 + rng.uniform()) / strata * total;
                let at = cumulated.partition_point(|&end| end <= point).min(light.len() - 1);
                let list = light[at];
                let len = block.min(lists[list].n as u32);
                // n mean(e) / (p G) with p = draws/total.
                let share = self.draws[list] * strata / total;
                let stretch = self.stretch(query, list, len, share, plan, rng);
                plan.light.push(stretch);
            }
        }
    }

    fn stretch(
        &self,
        query: usize,
        list: usize,
        len: u32,
        share: f64,
        plan: &mut Plan,
        rng: &mut Rng,
    ) -> Stretch {
        let entry = &self.index.lists()[list];
        let start = rng.below(entry.n);
        let run = plan.runs.len() as u32;
        let before = (entry.n - start).min(u64::from(len)) as u32;
        plan.runs.push(Run { query: query as u32, start: entry.start + start, len: before });
        if before < len {
            plan.runs.push(Run { query: query as u32, start: entry.start, len: len - before });
        }
        Stretch { list: list as u32, run, len, share, to_mean: 0.0, variance: 0.0 }
    }
}
