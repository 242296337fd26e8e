//! The plain path of a scan: kernels that are not fused, pair by pair in double precision.
//!
//! It runs inside the same block tasks as the fused path and fills its own columns of the same sums, so that order, groups,
//! weights and rows left out are one matter. Rows near a compact kernel's edge need no second look: every distance is
//! taken from differences in double precision. The sums do not depend on the SIMD level.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::reduce::Sums;
use super::slots::Slots;
use super::{Job, Request};
use crate::error::{Error, ErrorKind, Result};
use crate::kernel::{Kernel, Measure};
use crate::logsum::LogSum;
use crate::rows::ShardView;

/// Rows taken together: they stay in the first-level cache while all queries pass.
const TILE_ROWS: usize = 16;

/// What a norm may differ from 1 beside the rounding of stored values: normalisation in single precision.
const NORM_SLACK: f64 = 1e-5;

/// Rounding granted to queries, which may come from a half-precision store.
const QUERY_ROUNDING: f64 = 1.0 / 2048.0;

/// One thread's buffers for the columns of the plain kernels.
pub(super) struct Plain {
    /// Columns of the request's kernels that take this path.
    columns: Vec<usize>,
    needs_unit: bool,
    needs_distance: bool,
    needs_manhattan: bool,
    rows: Vec<f32>,
    log_weights: Vec<f64>,
    /// [slot][query][column].
    sums: Vec<LogSum>,
}

/// A block of rows and a batch of queries.
pub(super) struct Place<'p> {
    pub view: &'p ShardView<'p>,
    /// Rows, counted in the shard.
    pub block: Range<usize>,
    /// Global number of the first.
    pub first_row: u64,
    /// Queries, counted in the job.
    pub queries: Range<usize>,
    pub slots: &'p Slots,
}

impl Plain {
    /// Buffers for a request's kernels.
    pub fn new(request: &Request<'_>) -> Self {
        let columns: Vec<usize> =
            (0..request.kernels.len()).filter(|&column| !request.kernels[column].kernel.is_fused()).collect();
        let needs =
            |measure| columns.iter().any(|&column| request.kernels[column].kernel.measure() == measure);
        Self {
            needs_unit: needs(Measure::Inner),
            needs_distance: needs(Measure::SqDistance),
            needs_manhattan: needs(Measure::Manhattan),
            columns,
            rows: Vec::new(),
            log_weights: Vec::new(),
            sums: Vec::new(),
        }
    }

    /// Adds the block's rows to the plain kernels' columns of `result`.
    ///
    /// # Errors
    /// `Parameter` with the global row where a kernel wants unit vectors and a row is none; `Interrupted`.
    pub fn add(&mut self, job: &Job<'_>, place: &Place<'_>, result: &mut Sums) -> Result<()> {
        if self.columns.is_empty() {
            return Ok(());
        }
        let (d, batch, columns) = (job.request.d, place.queries.len(), self.columns.len());
        self.sums.clear();
        self.sums.resize(place.slots.codes.len() * batch * columns, LogSum::EMPTY);
        self.log_weights.clear();
        if let Some(weights) = place.view.weights {
            self.log_weights
                .extend(weights[place.block.clone()].iter().map(|&weight| f64::from(weight).ln()));
        }
        self.rows.resize(TILE_ROWS * d, 0.0);
        for start in place.block.clone().step_by(TILE_ROWS) {
            if job.control.stop.load(Ordering::Relaxed) {
                return Err(Error::new(ErrorKind::Interrupted, "stopped"));
            }
            let count = TILE_ROWS.min(place.block.end - start);
            for (i, row) in self.rows.chunks_exact_mut(d).take(count).enumerate() {
                place.view.rows.read_f32(start + i, row);
            }
            self.tile(job, place, start - place.block.start, count)?;
        }
        let kernels = job.request.kernels.len();
        for (slot, &code) in place.slots.codes.iter().enumerate() {
            let sums = &mut result.group(code).sums;
            for query in 0..batch {
                let from = &self.sums[(slot * batch + query) * columns..][..columns];
                for (sum, &column) in from.iter().zip(&self.columns) {
                    sums[query * kernels + column] = *sum;
                }
            }
        }
        Ok(())
    }

    /// All queries of the batch against a few rows from `offset` of the block on.
    fn tile(&mut self, job: &Job<'_>, place: &Place<'_>, offset: usize, count: usize) -> Result<()> {
        let request = job.request;
        let (level, d, columns) = (request.level, request.d, self.columns.len());
        let rows = &self.rows[..count * d];
        if self.needs_unit {
            let allowed = 2.0 * request.row_rounding + NORM_SLACK;
            for (i, row) in rows.chunks_exact(d).enumerate() {
                let norm = level.inner_product(row, row).sqrt();
                if (norm - 1.0).abs() > allowed {
                    return Err(not_unit("row", norm).row(place.first_row + (offset + i) as u64));
                }
            }
        }
        let within = request.exclude_within * request.exclude_within;
        for (in_batch, query) in place.queries.clone().enumerate() {
            let vector = &request.queries[query * d..(query + 1) * d];
            let own = request.exclude_rows.map_or(super::NO_ROW, |rows| rows[query]);
            for (i, row) in rows.chunks_exact(d).enumerate() {
                let is_own = own == place.first_row + (offset + i) as u64;
                let mut sq_distance = 0.0;
                if self.needs_distance || is_own || within > 0.0 {
                    sq_distance = level.sq_distance(row, vector);
                    // The same test as on the fused path, which counts the rows left out.
                    if sq_distance < within || is_own && sq_distance < job.queries.duplicate[query] {
                        continue;
                    }
                }
                let manhattan = if self.needs_manhattan { level.manhattan(row, vector) } else { 0.0 };
                let inner = if self.needs_unit { level.inner_product(row, vector) } else { 0.0 };
                let log_weight = self.log_weights.get(offset + i).copied().unwrap_or(0.0);
                let slot = place.slots.of(offset + i);
                let sums = &mut self.sums[(slot * place.queries.len() + in_batch) * columns..][..columns];
                for (sum, &column) in sums.iter_mut().zip(&self.columns) {
                    let kernel = &request.kernels[column];
                    let measure = match kernel.kernel.measure() {
                        Measure::SqDistance => sq_distance,
                        Measure::Manhattan => manhattan,
                        Measure::Inner => inner,
                    };
                    sum.push(kernel.log_weight(measure) + log_weight);
                }
            }
        }
        Ok(())
    }
}

/// Refuses queries that are not unit vectors where a kernel wants them so.
pub(super) fn check_queries(request: &Request<'_>) -> Result<()> {
    if !request.kernels.iter().any(|kernel| kernel.kernel == Kernel::VonMisesFisher) {
        return Ok(());
    }
    let allowed = 2.0 * request.row_rounding.max(QUERY_ROUNDING) + NORM_SLACK;
    for (index, query) in request.queries.chunks_exact(request.d).enumerate() {
        let norm = request.level.inner_product(query, query).sqrt();
        // A query that is not finite is refused by its own name.
        if (norm - 1.0).abs() > allowed {
            return Err(not_unit(&format!("query {index}"), norm));
        }
    }
    Ok(())
}

fn not_unit(what: &str, norm: f64) -> Error {
    let message =
        format!("{what} is not a unit vector: its norm is {norm:.6}, and the vmf kernel lives on the sphere");
    Error::new(ErrorKind::Parameter, message)
        .remedy("normalise the vectors, or choose the gaussian kernel, which equals vmf on the sphere")
}
