//! Sums of many groups from the draws of the total: Ẑ_g = Ẑ · Ŝ_g/Ŝ, where Ŝ is the sum of the same draws without the control
//! variate and Ŝ_g the part of it that fell into the group.
//!
//! Moments per list and group, which give groups a control variate of their own, are too many beyond some dozen groups. To first
//! order the relative error of Ẑ_g is that of Ẑ, plus that of Ŝ_g, less that of Ŝ, so with weight 1/π for a draw
//!
//! ```text
//! l_i = e_i/Ẑ − k_i/Ŝ + [i in g] k_i/Ŝ_g,     Var(log Ẑ_g) = variance of Σ l_i/π_i by the design of the draws
//! ```

use super::Guess;

/// Sums over the rows of one stretch: of e, k and their products, and of the rows of each group in it.
#[derive(Clone, Debug, Default)]
pub(super) struct Stretched {
    pub e: f64,
    pub ee: f64,
    pub k: f64,
    pub kk: f64,
    pub ek: f64,
    /// (group, Σ k, Σ k², Σ e k), ascending.
    pub parts: Vec<(u32, f64, f64, f64)>,
}

impl Stretched {
    /// Adds a row.
    pub fn add(&mut self, group: u32, e: f64, k: f64) {
        self.e += e;
        self.ee += e * e;
        self.k += k;
        self.kk += k * k;
        self.ek += e * k;
        self.parts.push((group, k, k * k, e * k));
    }

    /// One entry per group.
    pub fn merge(mut self) -> Self {
        self.parts.sort_unstable_by_key(|part| part.0);
        self.parts.dedup_by(|next, kept| {
            let same = next.0 == kept.0;
            if same {
                (kept.1, kept.2, kept.3) = (kept.1 + next.1, kept.2 + next.2, kept.3 + next.3);
            }
            same
        });
        self
    }
}

/// All draws of one query under one kernel, relative to the exponential of a shift.
#[derive(Debug)]
pub(super) struct Shares {
    /// Σ k and Σ k² of each group's rows read whole.
    pub whole: Vec<(f64, f64)>,
    /// Rows of the list, rows drawn, sums.
    pub heavy: Vec<(f64, f64, Stretched)>,
    /// Weights of the two halves of a stratum and their sums.
    pub light: Vec<[(f64, Stretched); 2]>,
}

/// What is known of the total.
#[derive(Clone, Copy, Debug)]
pub(super) struct Total {
    /// Ẑ and its shift.
    pub z: f64,
    pub top: f64,
    /// Variances relative to Ẑ²: what the model adds, and what rounding does.
    pub model: f64,
    pub rounding: f64,
}

impl Shares {
    pub fn new(groups: usize) -> Self {
        Self { whole: vec![(0.0, 0.0); groups], heavy: Vec::new(), light: Vec::new() }
    }

    /// The estimate of each group; without flags.
    pub fn finish(&self, total: Total) -> Vec<Guess> {
        let mut sums = self.whole.clone();
        let mut all: f64 = sums.iter().map(|sum| sum.0).sum();
        let mut add = |stretched: &Stretched, factor: f64| {
            all += factor * stretched.k;
            for &(group, k, kk, _) in &stretched.parts {
                sums[group as usize].0 += factor * k;
                sums[group as usize].1 += factor * kk;
            }
        };
        for (n, a, stretched) in &self.heavy {
            add(stretched, n / a);
        }
        for (factor, stretched) in self.light.iter().flatten() {
            add(stretched, 0.5 * factor);
        }
        let z = total.z;
        // Σ l and Σ l² of a stretch without the group's own rows.
        let base = |s: &Stretched| {
            (s.e / z - s.k / all, s.ee / (z * z) - 2.0 * s.ek / (z * all) + s.kk / (all * all))
        };
        let spread = |n: f64, a: f64, sum: f64, square: f64| {
            n * n * (1.0 - a / n).max(0.0) * ((square - sum * sum / a) / (a - 1.0)).max(0.0) / a
        };
        // Variance and Σ variance²/df that any group has, and what its own rows change of it.
        let (mut common, mut common_quartic) = (0.0, 0.0);
        let mut own = vec![(0.0, 0.0); sums.len()];
        for (n, a, stretched) in &self.heavy {
            let (sum, square) = base(stretched);
            let variance = spread(*n, *a, sum, square);
            common += variance;
            common_quartic += variance * variance / (a - 1.0);
            for &(group, k, kk, ek) in &stretched.parts {
                let s = sums[group as usize].0;
                if s > 0.0 {
                    let square = square + 2.0 * (ek / z - kk / all) / s + kk / (s * s);
                    let with = spread(*n, *a, sum + k / s, square);
                    own[group as usize].0 += with - variance;
                    own[group as usize].1 += (with * with - variance * variance) / (a - 1.0);
                }
            }
        }
        for [(first, one), (second, two)] in &self.light {
            let (left, right) = (first * base(one).0, second * base(two).0);
            let variance = 0.25 * (left - right).powi(2);
            common += variance;
            common_quartic += variance * variance;
            let (mut i, mut j) = (0, 0);
            while i < one.parts.len() || j < two.parts.len() {
                let group =
                    |parts: &[(u32, f64, f64, f64)], at: usize| parts.get(at).map_or(u32::MAX, |p| p.0);
                let next = group(&one.parts, i).min(group(&two.parts, j));
                let take = |parts: &[(u32, f64, f64, f64)], at: &mut usize| {
                    if group(parts, *at) == next {
                        *at += 1;
                        parts[*at - 1].1
                    } else {
                        0.0
                    }
                };
                let (k_one, k_two) = (take(&one.parts, &mut i), take(&two.parts, &mut j));
                let s = sums[next as usize].0;
                if s > 0.0 {
                    let with = 0.25 * (left + first * k_one / s - right - second * k_two / s).powi(2);
                    own[next as usize].0 += with - variance;
                    own[next as usize].1 += with * with - variance * variance;
                }
            }
        }
        let each = sums.iter().zip(&own).map(|(&(sum, square), &(variance, quartic))| {
            let positive = sum > 0.0 && z > 0.0 && all > 0.0;
            let share = if positive { (sum / all).min(1.0) } else { 0.0 };
            let drawn = (common + variance).max(0.0);
            // What may be hidden falls to the groups by their shares.
            let variance = drawn + total.rounding + if positive { total.model / share } else { 0.0 };
            let quartic = (common_quartic + quartic).max(0.0);
            Guess {
                log_sum: if positive { total.top + z.ln() + share.ln() } else { f64::NEG_INFINITY },
                variance: if positive { variance } else { f64::INFINITY },
                df: if quartic > 0.0 { (variance * variance / quartic).max(1.0) } else { f64::INFINITY },
                ess: if square > 0.0 { sum * sum / square } else { 0.0 },
                flags: 0,
            }
        });
        each.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_add_up_and_their_variance_is_that_of_the_linear_form() {
        // Two heavy stretches of which all rows are in plain sight.
        let values =
            [[(0, 0.1, 2.0), (1, -0.2, 1.0), (0, 0.3, 4.0)], [(2, 0.0, 1.0), (0, 0.5, 3.0), (2, -0.4, 2.0)]];
        let mut shares = Shares::new(3);
        shares.whole[1] = (5.0, 25.0);
        for rows in &values {
            let mut stretched = Stretched::default();
            rows.iter().for_each(|&(group, e, k)| stretched.add(group, e, k));
            shares.heavy.push((30.0, 3.0, stretched.merge()));
        }
        let z = 140.0;
        let found = shares.finish(Total { z, top: 0.0, model: 0.0, rounding: 0.0 });
        let total: f64 = found.iter().map(|guess| guess.log_sum.exp()).sum();
        assert!((total - z).abs() < 1e-9);
        let all = 5.0 + 10.0 * 13.0;
        for group in 0..3_u32 {
            let own =
                values.iter().flatten().filter(|row| row.0 == group).map(|row| 10.0 * row.2).sum::<f64>()
                    + if group == 1 { 5.0 } else { 0.0 };
            let expected: f64 = values
                .iter()
                .map(|rows| {
                    let l =
                        rows.map(|(code, e, k)| e / z - k / all + if code == group { k / own } else { 0.0 });
                    let mean = l.iter().sum::<f64>() / 3.0;
                    900.0 * 0.9 * l.iter().map(|l| (l - mean).powi(2)).sum::<f64>() / 2.0 / 3.0
                })
                .sum();
            let guess = &found[group as usize];
            assert!((guess.variance - expected).abs() < 1e-9 * expected, "{} {expected}", guess.variance);
            assert!((guess.log_sum - (z * own / all).ln()).abs() < 1e-12);
        }
    }
}
