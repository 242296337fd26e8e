//! Measuring a finished index by rows of its own: how the variance of D² grows with distance, and how many lists hold the nearest rows.

use crate::error::Result;
use crate::index::format::{RANKS, rank_bin};
use crate::index::gather::{Asked, Run, gather};
use crate::index::random::Rng;
use crate::index::search::Searcher;
use crate::index::{Index, Neighbors};
use crate::rows::Dtype;

/// How much the variance of D² over a list exceeds s4, in units of 4‖q − m‖² tr/d, by the rank of the list.
pub(super) fn kappa(index: &Index, queries: &[f32]) -> Result<Vec<f64>> {
    /// Lists looked at for each query and bin.
    const LISTS: usize = 6;
    let view = index.view();
    let asked = Asked::new(queries, index.d(), view.rows.dtype() == Dtype::I8, index.level())?;
    let (d, width, lists) = (index.d(), index.panel_width(), index.lists());
    let mut chosen: Vec<(usize, f64, usize)> = Vec::new();
    let mut runs = Vec::new();
    for (panel, queries) in queries.chunks(width * d).enumerate() {
        let norms = &asked.sq_norms[panel * width..][..queries.len() / d];
        let ranked = index.rank(queries, norms);
        let mut order = Vec::new();
        for lane in 0..norms.len() {
            index.nearest_lists(&ranked, lane, lists.len(), &mut order);
            let mut taken = [0; RANKS.len()];
            let mut rng = Rng::new(&[index.manifest().seed, 12, (panel * width + lane) as u64]);
            let mut places: Vec<usize> = (0..order.len()).collect();
            rng.shuffle(&mut places);
            for place in places {
                let (list, bin) = (order[place] as usize, rank_bin(place, lists.len()));
                if taken[bin] == LISTS || lists[list].n < 8 || lists[list].tr <= 0.0 {
                    continue;
                }
                taken[bin] += 1;
                chosen.push((bin, f64::from(ranked.to_means(lane)[list]), list));
                let query = (panel * width + lane) as u32;
                runs.push(Run { query, start: lists[list].start, len: lists[list].n.min(4096) as u32 });
            }
        }
    }
    let found = gather(&[view], &asked, &runs);
    let mut sums = [(0.0, 0.0); RANKS.len()];
    for (at, &(bin, to_mean, list)) in chosen.iter().enumerate() {
        let values = found.run(at, runs[at].len);
        let n = values.len() as f64;
        let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        let variance = values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / (n - 1.0);
        let unit = 4.0 * to_mean * lists[list].tr / d as f64;
        // Sums of both, so that lists near the query, whose unit is small, count for little: their mean of ratios is noise.
        sums[bin].0 += variance - lists[list].s4;
        sums[bin].1 += unit;
    }
    // A bin without lists (there are few) takes its neighbour's.
    let mut table: Vec<f64> = sums
        .iter()
        // The covariance of a list has no direction with more than all of tr.
        .map(|&(sum, units)| if units > 0.0 { (sum / units).clamp(0.0, d as f64) } else { f64::NAN })
        .collect();
    for bin in (0..table.len() - 1).rev() {
        if table[bin].is_nan() {
            table[bin] = table[bin + 1];
        }
    }
    for bin in 0..table.len() {
        if table[bin].is_nan() {
            table[bin] = if bin == 0 { 1.0 } else { table[bin - 1] };
        }
    }
    Ok(table)
}

/// Lists that hold .95 of the 10 nearest rows, each trial row itself left out, and the share that they hold.
pub(super) fn probes(index: &Index, queries: &[f32]) -> Result<(u64, f64)> {
    const K: usize = 10;
    let lists = index.lists().len();
    let search = |probes: usize| Searcher { index, source: None, probes }.query(queries, K + 1);
    // So many lists stand for all: the truth itself would be a scan.
    let most = (lists / 4).clamp(32.min(lists), 512.min(lists));
    let truth = search(most)?;
    let recall = |found: &[Vec<crate::topk::Neighbor>]| -> f64 {
        let (mut hits, mut all) = (0_usize, 0_usize);
        for (found, truth) in found.iter().zip(&truth) {
            let truth = &truth[1.min(truth.len())..];
            all += truth.len();
            hits +=
                truth.iter().filter(|neighbor| found.iter().any(|other| other.row == neighbor.row)).count();
        }
        if all == 0 { 1.0 } else { hits as f64 / all as f64 }
    };
    let mut tried = 1;
    while tried < most {
        let share = recall(&search(tried)?);
        if share >= 0.96 {
            return Ok((tried as u64, share));
        }
        tried = (tried + 1).max(tried * 5 / 4);
    }
    Ok((most as u64, 1.0))
}
