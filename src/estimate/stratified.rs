//! Near lists read whole, far lists sampled, and a control variate whose sum is known exactly.
//!
//! The mean of D² over a list is known exactly for any query: ‖q − m‖² + tr. So a linear function of D² is subtracted from
//! the kernel and its known sum added back; only the residual is sampled:
//!
//! ```text
//! e_i = w_i (k_i − μ_c − b_c (D_i² − mean D²_c)),     b_c = g′ μ_c, fixed before any draw
//! Z   = Σ_{lists not read whole} W_c μ_c + Σ_{lists read whole} w k + Σ_heavy n_c mean(e) + Σ_light
//! ```
//! *Heavy* lists get one run of rows each, from a random start (rows lie in random order inside a list); *light* ones share
//! strata of equal expected draws, two independent short runs each. Every list has a positive chance, so Ẑ is unbiased
//! whatever the predictions are worth. The predictions decide where draws go, and a part of their variance is added to the
//! empirical one, which cannot see what was never drawn.

use rayon::prelude::*;

use super::shares::{Shares, Stretched, Total};
use super::{Guess, flags, profile};
use crate::error::{Error, ErrorKind, Result};
use crate::index::format::{RANKS, rank_bin};
use crate::index::gather::{Asked, Found, Run, gather};
use crate::index::random::Rng;
use crate::index::{Index, Ranked};
use crate::kernel::ScaledKernel;
use crate::simd::pack_panel;

/// Share of the rows that near lists may take to be read whole, and lists that always are.
const NEAR_SHARE: f64 = 0.4;
const NEAR_LISTS: usize = 2;

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

/// Effective draws that the sampled part must rest on where its error by their number alone would miss the target.
const FEWEST: f64 = 50.0;

/// A variance of which the model makes more than this is no finding of the draws; that matters where the standard error is more than
/// the second number times the target.
const MODEL_SHARE: f64 = 0.9;
const MATTERS: f64 = 0.5;

/// Draws that a group needs for an estimate of its own.
const GROUP_DRAWS: u64 = 50;

/// Queries' rows gathered together.
const BATCH: u64 = 1 << 24;

/// No row is left out for this query.
pub const NO_ROW: u32 = u32::MAX;

/// One stage of sampling.
#[derive(Clone, Debug)]
pub struct Stage<'a> {
    /// Kernels; the first is the primary one.
    pub kernels: &'a [ScaledKernel],
    /// One key per query: draws depend on it, the seed and the stage alone.
    pub keys: &'a [u64],
    /// Rows for each query, centroids not counted.
    pub rows: &'a [u64],
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
    /// Rows read, and those of them drawn at random.
    pub rows: u64,
    /// Random draws.
    pub draws: u64,
    /// Weight of the row left out; 0 where there was none.
    pub excluded: f64,
}

/// Rows drawn from a list in one stretch.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    list: u32,
    /// Number of its first run (it has two where it goes round the list's end).
    run: u32,
    len: u32,
    /// Light: draws expected of the list over those of a stratum; heavy: unused.
    share: f64,
    /// ‖q − m‖² of the list, and the variance predicted for D² in it.
    to_mean: f64,
    variance: f64,
}

/// What is decided for one query before any row is read.
#[derive(Debug, Default)]
struct Plan {
    whole: Vec<(u32, u32)>,
    heavy: Vec<Stretch>,
    /// Two of each stratum, one after the other.
    light: Vec<Stretch>,
    /// Per kernel: shift, and relative to its exponential Σ W μ over lists not read whole, and the logarithm of the model's variance.
    known: Vec<(f64, f64, f64)>,
    /// Per group and kernel the same sum.
    known_groups: Vec<f64>,
    /// Whether anything is left to sampling.
    sampled: bool,
    runs: Vec<Run>,
}

/// Runs a stage for all queries, on the threads of the current pool.
///
/// # Errors
/// `Parameter`, `NotFinite`.
pub fn stage(index: &Index, asked: &Asked<'_>, request: &Stage<'_>) -> Result<Vec<Outcome>> {
    profile::check(request.kernels)?;
    let q = asked.len();
    let fits =
        request.keys.len() == q && request.rows.len() == q && request.own.is_none_or(|own| own.len() == q);
    if !fits || request.kernels.is_empty() || request.block == 0 {
        return Err(Error::new(ErrorKind::Shape, "keys, rows or rows to leave out are not one per query"));
    }
    let codes = index.manifest().groups as usize;
    if request
        .groups
        .is_some_and(|(map, count)| map.len() != codes || map.iter().any(|&to| to as usize >= count))
    {
        return Err(Error::new(
            ErrorKind::Shape,
            format!("the groups kept apart do not fit the store's {codes}"),
        ));
    }
    let width = index.panel_width();
    // The distances to all lists of the panels in flight, and the rows gathered, are what takes memory.
    let per_query = request.rows.iter().max().copied().unwrap_or(0)
        + NEAR_LISTS as u64 * index.n().div_ceil(index.lists().len() as u64) * 2;
    let batch = ((BATCH / per_query.max(1)) as usize).clamp(1, 4096).next_multiple_of(width);
    let mut out = Vec::with_capacity(q);
    for first in (0..q).step_by(batch) {
        let end = (first + batch).min(q);
        let panels: Vec<usize> = (first..end).step_by(width).collect();
        let mut plans: Vec<Plan> = panels
            .par_iter()
            .map(|&start| {
                let stop = (start + width).min(end);
                let queries = &asked.queries[start * asked.d..stop * asked.d];
                let norms = &asked.sq_norms[start..stop];
                let ranked = index.rank(queries, norms);
                let groups = request.groups.map(|_| group_distances(index, queries, norms));
                let mut planner = Planner::new(index, request);
                (start..stop)
                    .map(|query| planner.plan(query, &ranked, query - start, groups.as_deref()))
                    .collect::<Vec<_>>()
            })
            .flatten_iter()
            .collect();
        let mut runs = Vec::with_capacity(plans.iter().map(|plan| plan.runs.len()).sum());
        let mut starts = Vec::with_capacity(plans.len());
        for plan in &mut plans {
            starts.push(runs.len() as u32);
            runs.append(&mut plan.runs);
        }
        let found = gather(&[index.view()], asked, &runs);
        let part: Vec<Outcome> = plans
            .par_iter()
            .zip(&starts)
            .enumerate()
            .map(|(at, (plan, &start))| {
                Reader { index, request, found: &found, runs: &runs, first: start }.read(first + at, plan)
            })
            .collect();
        out.extend(part);
    }
    Ok(out)
}

/// ‖q − m‖² of each entry of the groups' moments: [entry][lane].
fn group_distances(index: &Index, queries: &[f32], sq_norms: &[f64]) -> Vec<f32> {
    let Some(groups) = index.groups() else { return Vec::new() };
    let (d, width) = (index.d(), index.panel_width());
    let mut panel = vec![0.0; d * width];
    pack_panel(queries, d, width, &mut panel);
    let mut out = vec![0.0; groups.codes.len() * width];
    index.level().dots(&groups.means, d, d, &panel, 0, &mut out);
    let mut norms = vec![0.0; groups.codes.len()];
    index.level().sq_norms(&groups.means, d, &mut norms);
    for (out, &norm) in out.chunks_exact_mut(width).zip(&norms) {
        for (out, &query) in out.iter_mut().zip(sq_norms) {
            *out = (f64::from(norm) + query - 2.0 * f64::from(*out)).max(0.0) as f32;
        }
    }
    out
}

/// One thread's buffers for planning.
struct Planner<'a> {
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
    fn new(index: &'a Index, request: &'a Stage<'a>) -> Self {
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

    fn plan(&mut self, query: usize, ranked: &Ranked, lane: usize, groups: Option<&[f32]>) -> Plan {
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
        groups: &crate::index::GroupMoments,
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

/// Turns the distances of one query's rows into its estimates.
struct Reader<'a> {
    index: &'a Index,
    request: &'a Stage<'a>,
    found: &'a Found,
    runs: &'a [Run],
    /// The query's first run.
    first: u32,
}

/// Sums for one kernel, relative to the exponential of a shift.
#[derive(Clone, Copy, Default)]
struct Sums {
    z: f64,
    variance: f64,
    /// Σ variance²/df.
    quartic: f64,
    sampled: f64,
    sampled_sq: f64,
    /// Σ of the squares of what single draws bring to the sampled part.
    drawn_sq: f64,
    whole_sq: f64,
    /// What the rounding of the copied rows does to the sum: Σ k δ where it is one-sided, Σ (k δ)² where it is random.
    blur: f64,
    blur_sq: f64,
}

impl Sums {
    fn vary(&mut self, variance: f64, df: f64) {
        self.variance += variance;
        self.quartic += variance * variance / df;
    }
}

/// How far the rounding of a copied row moves log k: D² grows by ρ² in the mean, and by 2Dρ/√d at random.
struct Blur {
    /// ρ²: of the mean row, by the largest relative rounding of any.
    square: f64,
    d: f64,
}

impl Blur {
    fn of(index: &Index) -> Self {
        let manifest = index.manifest();
        Self { square: manifest.rounding.powi(2) * manifest.sq_norm, d: index.d() as f64 }
    }

    /// The one-sided part, and the square of the random one.
    #[inline]
    fn at(&self, kernel: &ScaledKernel, sq: f64) -> (f64, f64) {
        // Within the rounding itself the distance is anything from 0 to ρ.
        let (_, slope, _) = profile::derivatives(kernel, sq.max(0.25 * self.square));
        let slope = slope.abs();
        (slope * self.square, slope * slope * 4.0 * sq * self.square / self.d)
    }
}

impl Reader<'_> {
    /// Calls `take(position, D²)` for the rows of a stretch from its first run on.
    fn rows(&self, run: u32, len: u32, mut take: impl FnMut(u64, f64)) {
        let mut left = len;
        let mut run = (self.first + run) as usize;
        while left > 0 {
            let here = &self.runs[run];
            for (i, &sq) in self.found.run(run, here.len).iter().enumerate() {
                take(here.start + i as u64, f64::from(sq));
            }
            left -= here.len;
            run += 1;
        }
    }

    fn read(&self, query: usize, plan: &Plan) -> Outcome {
        let (index, request) = (self.index, self.request);
        let view = index.view();
        let own = request.own.map_or(NO_ROW, |own| own[query]);
        let (map, count) = request.groups.unwrap_or((&[], 0));
        // With moments of their own, or by their shares of the draws.
        let (groups, shared) = if index.groups().is_some() { (count, 0) } else { (0, count) };
        let lists = index.lists();
        let mut outcome = Outcome { total: Vec::new(), groups: Vec::new(), rows: 0, draws: 0, excluded: 0.0 };
        let weight = |row: u64| view.weights.map_or(1.0, |weights| f64::from(weights[row as usize]));
        let group = |row: u64| view.groups.map_or(0, |groups| map[groups[row as usize] as usize] as usize);
        let is_own = |row: u64| own != NO_ROW && index.ids()[row as usize] == own;
        // The row left out weighs nothing wherever it is met; known to be gone only where its list is read whole.
        let (mut met, mut nearest) = (own == NO_ROW, f64::INFINITY);
        let mut in_groups = vec![0_u64; count];
        let mut drawn_groups = vec![0_u64; count];
        for &(list, run) in &plan.whole {
            outcome.rows += lists[list as usize].n;
            self.rows(run, lists[list as usize].n as u32, |row, sq| {
                if is_own(row) {
                    met = true;
                    outcome.excluded = weight(row);
                } else {
                    nearest = nearest.min(sq);
                }
                if count > 0 {
                    in_groups[group(row)] += 1;
                }
            });
        }
        for stretch in plan.heavy.iter().chain(&plan.light) {
            outcome.draws += u64::from(stretch.len);
            if count > 0 {
                self.rows(stretch.run, stretch.len, |row, _| drawn_groups[group(row)] += 1);
            }
        }
        outcome.rows += outcome.draws;
        let blur = Blur::of(index);
        for (h, kernel) in request.kernels.iter().enumerate() {
            let (shift, known, model) = plan.known[h];
            let top = shift.max(kernel.log_weight(nearest));
            let scale = if shift.is_finite() { (shift - top).exp() } else { 0.0 };
            let mut sums = Sums { z: known * scale, ..Sums::default() };
            let mut by_group = vec![Sums::default(); groups];
            let mut shares = Shares::new(shared);
            for (code, sums) in by_group.iter_mut().enumerate() {
                sums.z = plan.known_groups[code * request.kernels.len() + h] * scale;
            }
            for &(list, run) in &plan.whole {
                self.rows(run, lists[list as usize].n as u32, |row, sq| {
                    if is_own(row) {
                        return;
                    }
                    let k = weight(row) * (kernel.log_weight(sq) - top).exp();
                    sums.z += k;
                    sums.whole_sq += k * k;
                    if blur.square > 0.0 {
                        let (one_sided, random) = blur.at(kernel, sq);
                        sums.blur += k * one_sided;
                        sums.blur_sq += k * k * random;
                    }
                    if groups > 0 {
                        by_group[group(row)].z += k;
                    } else if shared > 0 {
                        let whole = &mut shares.whole[group(row)];
                        *whole = (whole.0 + k, whole.1 + k * k);
                    }
                });
            }
            // Σ over a stretch of e and e², in all and by group, and of k and k².
            let stretch_sums = |stretch: &Stretch, parts: &mut Vec<(f64, f64)>| {
                let u = stretch.to_mean + lists[stretch.list as usize].tr;
                let found = profile::mean(kernel, u, stretch.variance);
                let mu = (found.0 - top).exp();
                let b = found.1 * mu;
                let (mut sum, mut square, mut k_sum, mut k_square) = (0.0, 0.0, 0.0, 0.0);
                let (mut blurred, mut stretched) = ((0.0, 0.0), Stretched::default());
                parts.clear();
                parts.resize(groups, (0.0, 0.0));
                self.rows(stretch.run, stretch.len, |row, sq| {
                    let weight = weight(row);
                    let k = if is_own(row) { 0.0 } else { weight * (kernel.log_weight(sq) - top).exp() };
                    let e = k - weight * (mu + b * (sq - u));
                    sum += e;
                    square += e * e;
                    k_sum += k;
                    k_square += k * k;
                    if blur.square > 0.0 {
                        let (one_sided, random) = blur.at(kernel, sq);
                        blurred.0 += k * one_sided;
                        blurred.1 += k * k * random;
                    }
                    if groups > 0 {
                        let part = &mut parts[group(row)];
                        part.0 += e;
                        part.1 += e * e;
                    } else if shared > 0 {
                        stretched.add(group(row) as u32, e, k);
                    }
                });
                (sum, square, k_sum, k_square, blurred, stretched.merge())
            };
            let mut parts = Vec::new();
            for stretch in &plan.heavy {
                let (sum, square, k_sum, k_square, blurred, stretched) = stretch_sums(stretch, &mut parts);
                let (n, a) = (lists[stretch.list as usize].n as f64, f64::from(stretch.len));
                if shared > 0 {
                    shares.heavy.push((n, a, stretched));
                }
                let variance = |sum: f64, square: f64| {
                    n * n * (1.0 - a / n).max(0.0) * ((square - sum * sum / a) / (a - 1.0)).max(0.0) / a
                };
                sums.z += n * sum / a;
                sums.vary(variance(sum, square), a - 1.0);
                sums.sampled += n * k_sum / a;
                sums.sampled_sq += n * k_square / a;
                sums.drawn_sq += (n / a).powi(2) * k_square;
                sums.blur += n * blurred.0 / a;
                sums.blur_sq += n * blurred.1 / a;
                for (sums, &(sum, square)) in by_group.iter_mut().zip(&parts) {
                    sums.z += n * sum / a;
                    sums.vary(variance(sum, square), a - 1.0);
                }
            }
            let mut other = Vec::new();
            for pair in plan.light.chunks_exact(2) {
                let factor = |stretch: &Stretch| {
                    lists[stretch.list as usize].n as f64 / (f64::from(stretch.len) * stretch.share)
                };
                let factors = [factor(&pair[0]), factor(&pair[1])];
                let (first, _, k_first, kk_first, blur_first, one) = stretch_sums(&pair[0], &mut parts);
                let (second, _, k_second, kk_second, blur_second, two) = stretch_sums(&pair[1], &mut other);
                if shared > 0 {
                    shares.light.push([(factors[0], one), (factors[1], two)]);
                }
                let (left, right) = (factors[0] * first, factors[1] * second);
                sums.z += 0.5 * (left + right);
                sums.vary(0.25 * (left - right).powi(2), 1.0);
                sums.sampled += 0.5 * (factors[0] * k_first + factors[1] * k_second);
                sums.sampled_sq += 0.5 * (factors[0] * kk_first + factors[1] * kk_second);
                sums.drawn_sq += 0.25 * (factors[0].powi(2) * kk_first + factors[1].powi(2) * kk_second);
                sums.blur += 0.5 * (factors[0] * blur_first.0 + factors[1] * blur_second.0);
                sums.blur_sq += 0.5 * (factors[0] * blur_first.1 + factors[1] * blur_second.1);
                for ((sums, left), right) in by_group.iter_mut().zip(&parts).zip(&other) {
                    let (left, right) = (factors[0] * left.0, factors[1] * right.0);
                    sums.z += 0.5 * (left + right);
                    sums.vary(0.25 * (left - right).powi(2), 1.0);
                }
            }
            let model = if model > f64::NEG_INFINITY { (model + 2.0 * (shift - top)).exp() } else { 0.0 };
            let mut bits = 0;
            if !met {
                bits |= flags::OWN_ROW;
            }
            if sums.z.is_nan() || sums.z <= 0.0 {
                bits |= flags::NOT_POSITIVE;
            }
            // The sampled part rests on `local` draws: its own error is about its share over their root.
            let local =
                if sums.drawn_sq > 0.0 { sums.sampled * sums.sampled / sums.drawn_sq } else { f64::INFINITY };
            if plan.sampled && local < FEWEST && sums.sampled > request.target * sums.z * local.sqrt() {
                bits |= flags::FEW_ROWS;
            }
            let total = sums.variance + model;
            // What is far below the target is no matter of doubt.
            let matters = total.sqrt() > MATTERS * request.target * sums.z;
            if plan.sampled && matters && model > MODEL_SHARE * total {
                bits |= flags::MODEL;
            }
            outcome.total.push(guess(&sums, model, top, bits));
            let rounding = sums.blur * sums.blur + sums.blur_sq;
            let mut found: Vec<Guess> = by_group
                .iter()
                .map(|group| {
                    let share = (group.z / sums.z).clamp(0.0, 1.0);
                    let hidden = if sums.sampled > 0.0 { model * share } else { 0.0 };
                    guess(group, hidden + rounding * share * share, top, 0)
                })
                .collect();
            if shared > 0 {
                let square = sums.z * sums.z;
                let (model, rounding) = (if plan.sampled { model / square } else { 0.0 }, rounding / square);
                found = shares.finish(Total { z: sums.z, top, model, rounding });
            }
            for (code, guess) in found.iter_mut().enumerate() {
                // Nothing is missing of a group where every row was read, nor is there more to know of one that has none.
                let drawn = in_groups[code] + drawn_groups[code];
                let few = drawn < GROUP_DRAWS && plan.sampled && (shared > 0 || drawn_groups[code] > 0);
                guess.flags = if few { flags::FEW_DRAWS } else { 0 };
                guess.flags |= if guess.log_sum.is_finite() { 0 } else { flags::NOT_POSITIVE };
            }
            outcome.groups.append(&mut found);
        }
        if count > 0 {
            // [kernel][group] as they came → [group][kernel].
            let kernels = request.kernels.len();
            let found = std::mem::take(&mut outcome.groups);
            outcome.groups =
                (0..count * kernels).map(|at| found[at % kernels * count + at / kernels]).collect();
        }
        outcome
    }
}

fn guess(sums: &Sums, model: f64, top: f64, bits: u32) -> Guess {
    let variance = sums.variance + model + sums.blur * sums.blur + sums.blur_sq;
    // Satterthwaite; the model's part has no degrees of its own.
    let df = if sums.quartic > 0.0 { (variance * variance / sums.quartic).max(1.0) } else { f64::INFINITY };
    let square = sums.whole_sq + sums.sampled_sq;
    let positive = sums.z > 0.0;
    Guess {
        log_sum: if positive { top + sums.z.ln() } else { f64::NEG_INFINITY },
        variance: if positive { variance / (sums.z * sums.z) } else { f64::INFINITY },
        df,
        ess: if square > 0.0 { sums.z * sums.z / square } else { 0.0 },
        flags: bits,
    }
}
