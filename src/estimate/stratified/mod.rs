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

mod plan;
mod read;
mod request;

use rayon::prelude::*;

use super::profile;
use crate::error::{Error, ErrorKind, Result};
use crate::index::Index;
use crate::index::gather::{Asked, gather};
use crate::simd::pack_panel;
use plan::{NEAR_LISTS, Plan, Planner};
use read::Reader;

pub use request::{NO_ROW, Outcome, Stage};

/// Queries' rows gathered together.
const BATCH: u64 = 1 << 24;

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
