//! The exact moments of a list, and of each group in it, from the rows as the copy holds them.

use super::record::{RECORD, decode_row};
use super::state::Build;

/// What is known of a list when its rows are gathered.
pub(super) struct Facts {
    pub mean: Vec<f32>,
    /// Weight, mean and variance of ‖x − m‖², spread of the weights, smallest and largest ‖x − m‖².
    pub moments: [f64; 6],
    pub sq_norm: f64,
    pub groups: Vec<(u32, Vec<f32>, [f64; 3])>,
}

impl Build<'_> {
    /// Mean row and moments of a list's rows, as its records hold them.
    pub fn moments(&self, bytes: &[u8], members: &[(u32, u64, u32)], with_groups: bool) -> Facts {
        let (d, record) = (self.d, self.record());
        let number = |record: &[u8], at: usize| {
            f32::from_le_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]])
        };
        let mut row = vec![0.0_f32; d];
        let decode = |at: u32, row: &mut Vec<f32>| -> (f64, u32) {
            let entry = &bytes[at as usize * record..][..record];
            decode_row(&entry[RECORD..], self.options.dtype, number(entry, 16), row);
            (f64::from(number(entry, 12)), u32::from_le_bytes([entry[8], entry[9], entry[10], entry[11]]))
        };
        #[derive(Default)]
        struct Sum {
            n: f64,
            weight: f64,
            row: Vec<f64>,
            sq: f64,
        }
        let mut all = Sum { row: vec![0.0; d], ..Sum::default() };
        let mut groups: std::collections::BTreeMap<u32, Sum> = std::collections::BTreeMap::new();
        let (mut weight_sq, mut sq_norm) = (0.0, 0.0);
        for &(_, _, at) in members {
            let (weight, code) = decode(at, &mut row);
            all.n += 1.0;
            all.weight += weight;
            weight_sq += weight * weight;
            let mut norm = 0.0;
            for (sum, &x) in all.row.iter_mut().zip(&row) {
                *sum += weight * f64::from(x);
                norm += f64::from(x) * f64::from(x);
            }
            sq_norm += weight * norm;
            if with_groups {
                let sum = groups.entry(code).or_insert_with(|| Sum { row: vec![0.0; d], ..Sum::default() });
                sum.n += 1.0;
                sum.weight += weight;
                sum.row.iter_mut().zip(&row).for_each(|(sum, &x)| *sum += weight * f64::from(x));
            }
        }
        let mean_of = |sum: &Sum| -> Vec<f32> {
            sum.row
                .iter()
                .map(|total| if sum.weight > 0.0 { (total / sum.weight) as f32 } else { 0.0 })
                .collect()
        };
        let mean = mean_of(&all);
        let group_means: std::collections::BTreeMap<u32, Vec<f32>> =
            groups.iter().map(|(&code, sum)| (code, mean_of(sum))).collect();
        let sq = |row: &[f32], mean: &[f32]| -> f64 {
            row.iter().zip(mean).map(|(x, m)| (f64::from(*x) - f64::from(*m)).powi(2)).sum()
        };
        let (mut first, mut second) = (0.0, 0.0);
        let mut around = Vec::with_capacity(members.len());
        for &(_, _, at) in members {
            let (weight, code) = decode(at, &mut row);
            let distance = sq(&row, &mean);
            first += weight * distance;
            around.push((weight, distance));
            if with_groups && let (Some(sum), Some(mean)) = (groups.get_mut(&code), group_means.get(&code)) {
                sum.sq += weight * sq(&row, mean);
            }
        }
        let per = |total: f64| if all.weight > 0.0 { total / all.weight } else { 0.0 };
        let tr = per(first);
        let (mut inner, mut outer) = (f64::INFINITY, 0.0_f64);
        for (weight, distance) in around {
            second += weight * (distance - tr).powi(2);
            (inner, outer) = (inner.min(distance), outer.max(distance));
        }
        let spread = if all.weight > 0.0 { weight_sq * all.n / (all.weight * all.weight) } else { 1.0 };
        let groups = groups
            .into_iter()
            .zip(group_means.into_values())
            .map(|((code, sum), mean)| {
                (code, mean, [sum.n, sum.weight, if sum.weight > 0.0 { sum.sq / sum.weight } else { 0.0 }])
            })
            .collect();
        let inner = if inner.is_finite() { inner } else { 0.0 };
        Facts { mean, moments: [all.weight, tr, per(second), spread, inner, outer], sq_norm, groups }
    }
}
