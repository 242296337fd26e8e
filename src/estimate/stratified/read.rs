//! What the rows of a query come to: its kernel sums, their variance and what is doubtful about them.

use super::plan::{Known, Plan, Stretch};
use super::request::{NO_ROW, Outcome, Stage};
use super::whole::Whole;
use crate::estimate::shares::{Shares, Stretched, Total};
use crate::estimate::{Guess, flags, profile};
use crate::index::Index;
use crate::index::gather::{Found, Run};
use crate::kernel::ScaledKernel;

/// Effective draws that the sampled part must rest on where its error by their number alone would miss the target.
const FEWEST: f64 = 50.0;

/// A variance of which the model makes more than this is no finding of the draws; that matters where the standard error is more than
/// the second number times the target.
const MODEL_SHARE: f64 = 0.9;
const MATTERS: f64 = 0.5;

/// Draws that a group needs for an estimate of its own.
const GROUP_DRAWS: u64 = 50;

/// Turns the distances of one query's rows into its estimates.
pub(super) struct Reader<'a> {
    pub index: &'a Index,
    pub request: &'a Stage<'a>,
    pub found: &'a Found,
    pub runs: &'a [Run],
    /// The query's first run.
    pub first: u32,
    /// What was found of the lists read whole, and the first entry of the query; None: they are among the runs.
    pub whole: Option<(&'a Whole, usize)>,
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

    /// Bounds of both parts for rows from `nearest` to `farthest`: the mean of D falls where D² is small, its square weighs where it is
    /// large.
    fn bounds(&self, kernel: &ScaledKernel, nearest: f64, farthest: f64) -> (f64, f64) {
        let (near, far) = (self.at(kernel, nearest.max(0.25 * self.square)), self.at(kernel, farthest));
        (near.0, near.1.max(far.1))
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

    pub fn read(&self, query: usize, plan: &Plan) -> Outcome {
        let (index, request) = (self.index, self.request);
        let view = index.view();
        let own = request.own.map_or(NO_ROW, |own| own[query]);
        let (map, count) = request.groups.unwrap_or((&[], 0));
        // With moments of their own, or by their shares of the draws.
        let (groups, shared) = if index.groups().is_some() { (count, 0) } else { (0, count) };
        let lists = index.lists();
        let mut outcome = Outcome {
            total: Vec::new(),
            groups: Vec::new(),
            predicted: Vec::new(),
            rows: 0,
            draws: 0,
            excluded: 0.0,
        };
        let weight = |row: u64| view.weights.map_or(1.0, |weights| f64::from(weights[row as usize]));
        let group = |row: u64| view.groups.map_or(0, |groups| map[groups[row as usize] as usize] as usize);
        let is_own = |row: u64| own != NO_ROW && index.ids()[row as usize] == own;
        // The row left out weighs nothing wherever it is met; known to be gone only where its list is read whole.
        let (mut met, mut nearest) = (own == NO_ROW, f64::INFINITY);
        let mut in_groups = vec![0_u64; count];
        let mut drawn_groups = vec![0_u64; count];
        for (at, &(list, run)) in plan.whole.iter().enumerate() {
            outcome.rows += lists[list as usize].n;
            if let Some((whole, first)) = self.whole {
                let list = whole.met(first + at);
                nearest = nearest.min(list.nearest);
                if let Some(weight) = list.excluded {
                    met = true;
                    outcome.excluded = weight;
                }
                continue;
            }
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
        // Weights of the rows drawn, relative to the largest known.
        let mut drawn: Vec<f64> = Vec::with_capacity(outcome.draws as usize);
        for (h, kernel) in request.kernels.iter().enumerate() {
            let Known { shift, sum: known, model } = plan.known[h];
            drawn.clear();
            for stretch in plan.heavy.iter().chain(&plan.light) {
                self.rows(stretch.run, stretch.len, |_, sq| drawn.push(kernel.log_weight(sq)));
            }
            // Nothing is large beside the largest of what is known and what was met.
            let top = drawn.iter().copied().fold(shift.max(kernel.log_weight(nearest)), f64::max);
            drawn.iter_mut().for_each(|log| *log -= top);
            index.level().exponentials(&mut drawn);
            let scale = if shift.is_finite() { (shift - top).exp() } else { 0.0 };
            let mut sums = Sums { z: known * scale, ..Sums::default() };
            let mut by_group = vec![Sums::default(); groups];
            let mut shares = Shares::new(shared);
            for (code, sums) in by_group.iter_mut().enumerate() {
                sums.z = plan.known_groups[code * request.kernels.len() + h] * scale;
            }
            for (at, &(list, run)) in plan.whole.iter().enumerate() {
                if let Some((whole, first)) = self.whole {
                    let found = whole.sums(first + at, h);
                    if found.sum > 0.0 {
                        let factor = (found.shift - top).exp();
                        let (sum, square) = (factor * found.sum, factor * factor * found.square);
                        sums.z += sum;
                        sums.whole_sq += square;
                        if blur.square > 0.0 {
                            let farthest = lists[list as usize].farthest_sq(plan.to_means[at]);
                            let (one_sided, random) =
                                blur.bounds(kernel, whole.met(first + at).nearest, farthest);
                            sums.blur += sum * one_sided;
                            sums.blur_sq += square * random;
                        }
                    }
                    continue;
                }
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
            let mut drawn = drawn.iter();
            // Σ over a stretch of e and e², in all and by group, and of k and k². Stretches come in the order of the plan.
            let mut stretch_sums = |stretch: &Stretch, parts: &mut Vec<(f64, f64)>| {
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
                    let drawn = drawn.next().copied().unwrap_or_default();
                    let k = if is_own(row) { 0.0 } else { weight * drawn };
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
            outcome.predicted.push(model / (sums.z * sums.z));
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
