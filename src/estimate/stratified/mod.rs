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
mod whole;

use std::ops::Range;

use rayon::prelude::*;

use super::profile;
use crate::error::{Error, ErrorKind, Result};
use crate::index::Index;
use crate::index::gather::{Asked, gather};
use crate::simd::pack_panel;
use plan::{Plan, Planner};
use read::Reader;
use whole::Asking;

pub use request::{NO_ROW, Outcome, Stage};

/// Rows drawn, and queries, that are read together.
const BATCH: u64 = 1 << 24;
const QUERIES: usize = 4096;

/// Runs a stage for all queries, on the threads of the current pool.
///
/// # Errors
/// `Parameter`, `NotFinite`.
pub fn stage(index: &Index, asked: &Asked<'_>, request: &Stage<'_>) -> Result<Vec<Outcome>> {
    profile::check(request.kernels)?;
    let q = asked.len();
    let fits = request.keys.len() == q
        && request.rows.len() == q
        && request.own.is_none_or(|own| own.len() == q)
        && request.aims.is_none_or(|aims| aims.len() == q);
    if !fits || request.kernels.is_empty() || request.block == 0 {
        return Err(Error::new(
            ErrorKind::Shape,
            "keys, rows, aims or rows to leave out are not one per query",
        ));
    }
    if request.whole_cost.is_nan() || request.whole_cost <= 0.0 || request.whole_cost > 1.0 {
        return Err(Error::new(
            ErrorKind::Parameter,
            format!("a row read costs {}, which is not above 0 and up to 1", request.whole_cost),
        ));
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
    // Sums of groups go by single rows; all else of lists read whole by panels of queries.
    let together = request.groups.is_none();
    let work = Work { index, asked, request, together };
    let wave = 2 * rayon::current_num_threads() * width;
    let mut out = Vec::with_capacity(q);
    while out.len() < q {
        // How much is read for a query is known when it is planned: what is planned waits for others that read the same lists.
        let first = out.len();
        let (mut plans, mut rows) = (Vec::new(), 0);
        while first + plans.len() < q && plans.len() < QUERIES && rows < BATCH {
            let start = first + plans.len();
            let more = work.plan(start..(start + wave).min(q));
            rows += more.iter().flat_map(|plan| &plan.runs).map(|run| u64::from(run.len)).sum::<u64>();
            plans.extend(more);
        }
        out.extend(work.read(first, plans)?);
    }
    Ok(out)
}

/// A stage at work.
struct Work<'a> {
    index: &'a Index,
    asked: &'a Asked<'a>,
    request: &'a Stage<'a>,
    together: bool,
}

impl Work<'_> {
    /// Plans some queries, from the first of a panel on.
    fn plan(&self, range: Range<usize>) -> Vec<Plan> {
        let (index, asked, request) = (self.index, self.asked, self.request);
        let width = index.panel_width();
        let panels: Vec<usize> = range.clone().step_by(width).collect();
        let each = panels.par_iter().map_init(
            || Planner::new(index, request, self.together),
            |planner, &start| {
                let stop = (start + width).min(range.end);
                let queries = &asked.queries[start * asked.d..stop * asked.d];
                let norms = &asked.sq_norms[start..stop];
                let ranked = index.rank(queries, norms);
                let groups = request.groups.map(|_| group_distances(index, queries, norms));
                (start..stop)
                    .map(|query| planner.plan(query, &ranked, query - start, groups.as_deref()))
                    .collect::<Vec<_>>()
            },
        );
        each.flatten_iter().collect()
    }

    /// Reads what was planned for the queries from `first` on.
    fn read(&self, first: usize, mut plans: Vec<Plan>) -> Result<Vec<Outcome>> {
        let (index, asked, request) = (self.index, self.asked, self.request);
        let mut runs = Vec::with_capacity(plans.iter().map(|plan| plan.runs.len()).sum());
        let mut starts = Vec::with_capacity(plans.len());
        let mut entries = Vec::new();
        for (at, plan) in plans.iter_mut().enumerate() {
            starts.push((runs.len() as u32, entries.len()));
            runs.append(&mut plan.runs);
            if self.together {
                let query = (first + at) as u32;
                entries.extend(plan.whole.iter().map(|&(list, _)| Asking { list, query }));
            }
        }
        let whole = whole::read(index, asked, request.kernels, request.own, &entries)?;
        let found = gather(&[index.view()], asked, &runs);
        let each = plans.par_iter().zip(&starts).enumerate().map(|(at, (plan, &(first_run, entry)))| {
            let whole = self.together.then_some((&whole, entry));
            Reader { index, request, found: &found, runs: &runs, first: first_run, whole }
                .read(first + at, plan)
        });
        Ok(each.collect())
    }
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
