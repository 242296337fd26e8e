//! The fused scan: rows stream past packed queries; distances become kernel sums before they leave the cache.
//!
//! ```text
//! for each segment, batch of queries, block (in parallel):
//!   for each tile of rows:                     rows widened to float32 where stored otherwise; norms
//!     for each panel of queries:               dot products → squared distances
//!       near rows and candidates are picked out; near rows are taken again in double precision
//!       the rest becomes weights and is added, for every kernel and bandwidth, by runs of one group
//!   blocks fold in order into the segment, segments in order into the result
//! ```
//! Threads only decide who computes a block, never what is added to what in which order.

pub mod plan;
pub mod reduce;

use std::collections::{BTreeMap, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, ErrorKind, Result};
use crate::kernel::ScaledKernel;
use crate::logsum::LogSum;
use crate::rows::{Dtype, Rows, ShardView};
use crate::simd::{Exponent, FAR, Level, PanelSums, pack_panel};
use crate::topk::{Neighbor, TopK};
use plan::{Segment, batch_size, groups_per_block, segments};
use reduce::{BlockResult, NearSums, SegmentState, Sums};

/// No row is left out for this query.
pub const NO_ROW: u64 = u64::MAX;

/// Norms beyond this can't be squared and added in single precision.
const LARGEST_SQ_NORM: f32 = f32::from_bits((127 + 97) << 23);

/// What to compute.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// Queries, row-major, d values each; finite.
    pub queries: &'a [f32],
    /// Dimensions.
    pub d: usize,
    /// Kernels with their bandwidths.
    pub kernels: Vec<ScaledKernel>,
    /// Nearest rows wanted per query.
    pub neighbors: usize,
    /// Whether to keep the sums of each group of rows apart.
    pub by_group: bool,
    /// Global row to leave out for each query (the query itself), `NO_ROW` for none.
    pub exclude_rows: Option<&'a [u64]>,
    /// Leave out rows nearer than this distance; 0 leaves none out.
    pub exclude_within: f64,
    /// Rounding of a stored row as a distance: a row within twice of it (or 1e-3·‖q‖) of a query counts as its duplicate.
    pub row_rounding: f64,
    /// Whether to find the largest cosine of each query (needed where rows are not unit vectors).
    pub max_cosine: bool,
    /// Whether to sum the rows themselves.
    pub row_sum: bool,
    /// Instructions to use.
    pub level: Level,
    /// Threads; 0 takes all.
    pub threads: usize,
    /// Bytes that sums in flight may take.
    pub memory: usize,
}

/// Progress of a scan and the wish to stop it, shared with whoever watches.
#[derive(Debug, Default)]
pub struct Control {
    /// Set to stop at the next tile.
    pub stop: AtomicBool,
    /// Pairs of rows and queries done.
    pub pairs: AtomicU64,
}

/// The result of a scan over a whole store (or any range of segments).
#[derive(Debug)]
pub struct Scan {
    /// Sums over everything read.
    pub sums: Sums,
    /// Nearest rows of each query, nearest first, distances in double precision; fewer than asked for where there are fewer rows.
    pub neighbors: Vec<Vec<Neighbor>>,
    /// Rows read.
    pub rows: u64,
}

/// Up to here distances are taken from differences: no cancellation, and hardly slower.
const FEW_DIMENSIONS: usize = 32;

/// Per query: the norm, and the squared distances below which a pair is looked at again.
struct QueryFacts {
    /// ‖q‖².
    sq_norms: Vec<f32>,
    /// τ: below it the distance is taken again in double precision.
    near: Vec<f32>,
    /// Below it (exact) a row is a duplicate.
    duplicate: Vec<f64>,
}

impl QueryFacts {
    fn new(request: &Request<'_>) -> Result<Self> {
        let d = request.d;
        let count = request.queries.len() / d;
        let mut facts = Self {
            sq_norms: vec![0.0; count],
            near: Vec::with_capacity(count),
            duplicate: Vec::with_capacity(count),
        };
        request.level.sq_norms(request.queries, d, &mut facts.sq_norms);
        for (index, &sq_norm) in facts.sq_norms.iter().enumerate() {
            if !sq_norm.is_finite() || sq_norm > LARGEST_SQ_NORM {
                return Err(Error::new(
                    ErrorKind::NotFinite,
                    "query holds NaN, infinity or values too large to square",
                )
                .row(index as u64));
            }
            let duplicate = (1e-3 * f64::from(sq_norm).sqrt()).max(2.0 * request.row_rounding).powi(2);
            facts.near.push(near_threshold(f64::from(sq_norm), duplicate, request));
            facts.duplicate.push(duplicate);
        }
        Ok(facts)
    }
}

/// τ(q): the squared distance below which cancellation in ‖x‖² + ‖q‖² − 2⟨x,q⟩ could matter.
///
/// With δ the error of the approximate D², the error of a row's log weight is δ/(2Dh) (exponential) or δ/(2h²)
/// (gaussian). It stays below ε·max(1, |log weight|) where D² ≥ δ/2ε resp. δ/ε, or where h is large enough.
fn near_threshold(sq_norm: f64, duplicate: f64, request: &Request<'_>) -> f32 {
    /// Half of what the contract allows on |Δ log density| / max(1, |log density|).
    const EPSILON: f64 = 5e-6;
    let rounding = f64::from(f32::EPSILON) / 2.0;
    let delta = rounding * (8.0 + 2.0 * (request.d as f64).sqrt()) * sq_norm;
    let mut near = (duplicate.max(request.exclude_within.powi(2)) + 2.0 * delta) * (1.0 + 1e-5);
    if request.d <= FEW_DIMENSIONS {
        return (near as f32).min(FAR / 2.0);
    }
    for kernel in &request.kernels {
        let h = kernel.bandwidth;
        let limit = if kernel.kernel.takes_root() {
            (delta / (2.0 * EPSILON)).min((delta / (2.0 * h * EPSILON)).powi(2))
        } else if delta / (2.0 * h * h) <= EPSILON {
            0.0
        } else {
            delta / EPSILON
        };
        near = near.max(limit);
    }
    (near as f32).min(FAR / 2.0)
}

/// One unit of work: a block of rows and a batch of queries.
#[derive(Clone, Copy)]
struct Task {
    segment: usize,
    batch: usize,
    block: usize,
}

/// Everything the workers share.
struct Job<'a> {
    shards: &'a [ShardView<'a>],
    segments: &'a [Segment],
    request: &'a Request<'a>,
    facts: QueryFacts,
    exponents: Vec<Exponent>,
    /// Queries packed in panels, [panel][d][width].
    panels: Vec<f32>,
    /// Queries of one batch; a multiple of the panel width.
    batch: usize,
    batches: usize,
    /// Tasks before each segment.
    offsets: Vec<usize>,
    control: &'a Control,
}

impl<'a> Job<'a> {
    fn queries(&self) -> usize {
        self.facts.sq_norms.len()
    }

    fn batch_range(&self, batch: usize) -> std::ops::Range<usize> {
        batch * self.batch..((batch + 1) * self.batch).min(self.queries())
    }

    fn tasks(&self) -> usize {
        self.offsets[self.segments.len()]
    }

    /// Tasks are ordered by segment, then batch, then block: a segment goes through all batches while it is in memory.
    fn task(&self, index: usize) -> Task {
        let segment = self.offsets.partition_point(|&offset| offset <= index) - 1;
        let blocks = self.segments[segment].blocks();
        let within = index - self.offsets[segment];
        Task { segment, batch: within / blocks, block: within % blocks }
    }

    /// Candidates kept per query and segment; more than wanted, since the approximate order may differ from the exact one.
    fn candidates(&self) -> usize {
        match self.request.neighbors {
            0 => 0,
            k => k + k.max(10),
        }
    }
}

/// Scans the segments `range` of the shards (all of them: `None`).
///
/// `finished` is called in order with each segment's index, its first query and its sums, before they are folded.
///
/// # Errors
/// `Shape`, `Parameter`, `NotFinite` for bad input (rows are counted over all shards); `Interrupted` where `control` stopped it.
pub fn scan(
    shards: &[ShardView<'_>],
    request: &Request<'_>,
    range: Option<std::ops::Range<usize>>,
    control: &Control,
) -> Result<Scan> {
    validate(shards, request)?;
    let all = segments(shards);
    let range = range.unwrap_or(0..all.len());
    let segments =
        all.get(range).ok_or_else(|| Error::new(ErrorKind::Parameter, "segment range outside the store"))?;
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(request.threads)
        .build()
        .map_err(|error| Error::new(ErrorKind::Parameter, format!("can't start threads: {error}")))?;
    let job = prepare(shards, segments, request, control, pool.current_num_threads())?;
    let reducer = Reducer::new(&job);
    let next = AtomicUsize::new(0);
    pool.broadcast(|_| {
        let mut worker = Worker::new(&job);
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= job.tasks() || !reducer.wait_for_turn(index) {
                break;
            }
            // A panic must neither reach Python nor leave the other workers waiting for this task.
            let result = catch_unwind(AssertUnwindSafe(|| worker.run(job.task(index))))
                .unwrap_or_else(|_| Err(Error::new(ErrorKind::Internal, "a worker of the scan panicked")));
            reducer.deliver(index, result);
        }
    });
    reducer.finish()
}

fn validate(shards: &[ShardView<'_>], request: &Request<'_>) -> Result<()> {
    let shape = |message: String| Err(Error::new(ErrorKind::Shape, message));
    let d = request.d;
    if d == 0 || !request.queries.len().is_multiple_of(d) {
        return shape(format!("queries are not rows of {d} values"));
    }
    if let Some(view) = shards.iter().find(|view| view.rows.dim() != d) {
        return shape(format!("rows have {} dimensions, queries {d}", view.rows.dim()));
    }
    for view in shards {
        let n = view.rows.len();
        if view.groups.is_some_and(|groups| groups.len() != n)
            || view.weights.is_some_and(|weights| weights.len() != n)
        {
            return shape(format!("groups or weights are not one per row of {n}"));
        }
    }
    if request.exclude_rows.is_some_and(|rows| rows.len() != request.queries.len() / d) {
        return shape("rows to leave out are not one per query".into());
    }
    if !(request.exclude_within >= 0.0 && request.exclude_within.is_finite()) {
        return Err(Error::new(
            ErrorKind::Parameter,
            "the distance to leave out must be finite and not negative",
        ));
    }
    Ok(())
}

fn prepare<'a>(
    shards: &'a [ShardView<'a>],
    segments: &'a [Segment],
    request: &'a Request<'a>,
    control: &'a Control,
    workers: usize,
) -> Result<Job<'a>> {
    let facts = QueryFacts::new(request)?;
    let width = request.level.panel_width();
    let d = request.d;
    let queries = facts.sq_norms.len();
    let mut panels = vec![0.0; queries.div_ceil(width) * d * width];
    for (panel, queries) in panels.chunks_exact_mut(d * width).zip(request.queries.chunks(d * width)) {
        pack_panel(queries, d, width, panel);
    }
    let groups = if request.by_group { groups_per_block(shards) } else { 1 };
    let batch =
        batch_size(queries, request.kernels.len(), groups, workers, request.memory).next_multiple_of(width);
    let batches = queries.div_ceil(batch);
    let mut offsets = vec![0];
    for segment in segments {
        offsets.push(offsets[offsets.len() - 1] + segment.blocks() * batches);
    }
    let exponents = request
        .kernels
        .iter()
        .map(|kernel| Exponent {
            root: kernel.kernel.takes_root(),
            coefficient: (kernel.coefficient() * std::f64::consts::LOG2_E) as f32,
        })
        .collect();
    Ok(Job { shards, segments, request, facts, exponents, panels, batch, batches, offsets, control })
}

/// One thread's buffers.
struct Worker<'j, 'a> {
    job: &'j Job<'a>,
    width: usize,
    /// Rows of a tile in single precision, where they are not stored so.
    widened: Vec<f32>,
    /// Squared distances of a tile and a panel.
    tile: Vec<f32>,
    norms: Vec<f32>,
    halves: Vec<f32>,
    weights: Vec<f32>,
    weight_unit: f64,
    min: Vec<f32>,
    run_min: Vec<f32>,
    query_norms: Vec<f32>,
    cut: Vec<f32>,
    hits: Vec<(u32, u32)>,
    runs: Vec<(usize, usize, usize)>,
    row_scratch: Vec<f32>,
    /// Per slot and panel: shifts [width], sums [2 · kernels · width].
    shifts: Vec<f32>,
    sums: Vec<f64>,
    near: NearSums,
    /// The nearest rows this worker met in the segment and batch it is in: they decide what is worth reporting.
    nearest: Vec<TopK>,
    nearest_of: Option<(usize, usize)>,
}

impl<'j, 'a> Worker<'j, 'a> {
    fn new(job: &'j Job<'a>) -> Self {
        let width = job.request.level.panel_width();
        Self {
            job,
            width,
            widened: Vec::new(),
            tile: Vec::new(),
            norms: Vec::new(),
            halves: Vec::new(),
            weights: Vec::new(),
            weight_unit: 1.0,
            min: vec![0.0; width],
            run_min: vec![0.0; width],
            query_norms: vec![0.0; width],
            cut: vec![0.0; width],
            hits: Vec::new(),
            runs: Vec::new(),
            row_scratch: vec![0.0; job.request.d],
            shifts: Vec::new(),
            sums: Vec::new(),
            near: NearSums::default(),
            nearest: Vec::new(),
            nearest_of: None,
        }
    }

    /// Rows of one tile: small enough to stay in the second-level cache for all panels. A function of d alone, since it decides an order of summation.
    fn tile_rows(&self) -> usize {
        match self.job.request.d {
            0..=1024 => 96,
            1025..=2048 => 48,
            _ => 24,
        }
    }

    fn run(&mut self, task: Task) -> Result<BlockResult> {
        let job = self.job;
        let request = job.request;
        let segment = &job.segments[task.segment];
        let view = &job.shards[segment.shard];
        let block = segment.block(task.block);
        let first_row = segment.first_row + (block.start - segment.start) as u64;
        let queries = job.batch_range(task.batch);
        let panels = queries.len().div_ceil(self.width);
        let (kernels, width) = (request.kernels.len(), self.width);

        if self.nearest_of != Some((task.segment, task.batch)) {
            self.nearest =
                vec![TopK::new(job.candidates()); if request.neighbors == 0 { 0 } else { queries.len() }];
            self.nearest_of = Some((task.segment, task.batch));
        }
        let slots = Slots::new(view, block.clone(), request.by_group);
        self.shifts.clear();
        self.shifts.resize(slots.codes.len() * panels * width, FAR);
        self.sums.clear();
        self.sums.resize(slots.codes.len() * panels * 2 * kernels * width, 0.0);
        let mut result = Sums::empty(queries.len(), kernels);
        if request.row_sum && task.batch == 0 {
            result.row_sum = vec![0.0; request.d];
        }
        self.load_weights(view, block.clone(), &slots, &mut result);

        let tile_rows = self.tile_rows();
        for start in block.clone().step_by(tile_rows) {
            if job.control.stop.load(Ordering::Relaxed) {
                return Err(Error::new(ErrorKind::Interrupted, "stopped"));
            }
            let range = start..(start + tile_rows).min(block.end);
            let offset = start - block.start;
            let place = TilePlace { offset, rows: range.len(), first_row: first_row + offset as u64 };
            let mut widened = std::mem::take(&mut self.widened);
            let rows = as_f32(&view.rows.slice(range.start, range.end), request.level, &mut widened);
            let outcome = self.tile(rows, &place, &queries, &slots, &mut result);
            self.widened = widened;
            outcome.map_err(|error| match error.row {
                Some(row) => error.row(row + place.first_row),
                None => error,
            })?;
        }
        job.control.pairs.fetch_add(block.len() as u64 * queries.len() as u64, Ordering::Relaxed);
        self.collect(&slots, &queries, &mut result);
        let candidates = self.new_candidates(first_row);
        Ok(BlockResult { sums: result, candidates })
    }

    /// Weights of the block, in units of a power of two so that squares stay in range.
    fn load_weights(
        &mut self,
        view: &ShardView<'_>,
        block: std::ops::Range<usize>,
        slots: &Slots,
        result: &mut Sums,
    ) {
        for (position, &code) in slots.codes.iter().enumerate() {
            let rows = slots.rows[position];
            let group = result.group(code);
            group.rows = rows;
            group.weight = rows as f64;
        }
        self.weights.clear();
        self.weight_unit = 1.0;
        let Some(weights) = view.weights else { return };
        let weights = &weights[block];
        for &code in &slots.codes {
            result.group(code).weight = 0.0;
        }
        for (i, &weight) in weights.iter().enumerate() {
            result.group(slots.codes[slots.of(i)]).weight += f64::from(weight);
        }
        let largest = weights.iter().copied().fold(0.0_f32, f32::max);
        if largest > 0.0 {
            self.weight_unit = f64::from(largest).log2().floor().exp2();
        }
        self.weights.extend(weights.iter().map(|&weight| (f64::from(weight) / self.weight_unit) as f32));
    }

    /// All panels of the batch against one tile of rows.
    fn tile(
        &mut self,
        rows: &[f32],
        place: &TilePlace,
        queries: &std::ops::Range<usize>,
        slots: &Slots,
        result: &mut Sums,
    ) -> Result<()> {
        let job = self.job;
        let request = job.request;
        let (level, d, width) = (request.level, request.d, self.width);
        self.norms.resize(place.rows, 0.0);
        level.sq_norms(rows, d, &mut self.norms);
        // The norm is the proof that a row is finite: every value is squared into it.
        if let Some(row) = self.norms.iter().position(|norm| !norm.is_finite() || *norm > LARGEST_SQ_NORM) {
            return Err(Error::new(
                ErrorKind::NotFinite,
                "row holds NaN, infinity or values too large to square",
            )
            .row(row as u64));
        }
        let weights =
            (!self.weights.is_empty()).then(|| &self.weights[place.offset..place.offset + place.rows]);
        if !result.row_sum.is_empty() {
            level.add_rows(rows, d, weights, &mut self.row_scratch, &mut result.row_sum);
        }
        if request.max_cosine {
            self.halves.clear();
            self.halves
                .extend(self.norms.iter().map(|&norm| if norm > 0.0 { 0.5 / norm.sqrt() } else { 0.0 }));
        }
        slots.runs(place.offset, place.rows, &mut self.runs);
        self.tile.resize(place.rows * width, 0.0);
        let first_panel = queries.start / width;
        for panel in 0..queries.len().div_ceil(width) {
            let lanes = panel * width..((panel + 1) * width).min(queries.len());
            let packed = &job.panels[(first_panel + panel) * d * width..][..d * width];
            self.load_lanes(queries.start, &lanes);
            if d <= FEW_DIMENSIONS {
                level.sq_differences(rows, d, packed, &mut self.tile, &mut self.min);
            } else {
                level.dots(rows, d, packed, &mut self.tile);
                level.sq_distances(&mut self.tile, &self.norms, &self.query_norms, &mut self.min);
            }
            self.hits.clear();
            level.below(&self.tile, &self.min, &self.cut, &mut self.hits);
            if !self.hits.is_empty() && self.take_hits(rows, place, queries.start, lanes.start, slots, result)
            {
                level.column_min(&self.tile, &mut self.min);
            }
            if request.max_cosine {
                self.run_min.fill(f32::NEG_INFINITY);
                let (tile, norms, halves) = (&self.tile, &self.norms, &self.halves);
                level.max_projection(tile, norms, halves, &self.query_norms, &mut self.run_min);
                for (max, &found) in result.max_projection[lanes.clone()].iter_mut().zip(&self.run_min) {
                    *max = max.max(found);
                }
            }
            if !job.exponents.is_empty() {
                self.add(panel, queries.len().div_ceil(width), place.offset);
            }
        }
        Ok(())
    }

    /// Norms and cuts of a panel's queries; lanes beyond the last query never hit.
    fn load_lanes(&mut self, first_query: usize, lanes: &std::ops::Range<usize>) {
        let facts = &self.job.facts;
        for lane in 0..self.width {
            let query = lanes.start + lane;
            if query < lanes.end {
                self.query_norms[lane] = facts.sq_norms[first_query + query];
                let bound = self.nearest.get(query).map_or(f64::NEG_INFINITY, TopK::bound);
                // Ties may still enter (by a lower row), so the bound itself passes.
                let bound = (bound.min(f64::from(FAR)) as f32).next_up();
                self.cut[lane] = facts.near[first_query + query].max(bound);
            } else {
                self.query_norms[lane] = 0.0;
                self.cut[lane] = f32::NEG_INFINITY;
            }
        }
    }

    /// Looks again at the pairs below their cut. Near ones are summed in double precision and masked in the tile (then true is returned).
    fn take_hits(
        &mut self,
        rows: &[f32],
        place: &TilePlace,
        first_query: usize,
        first_lane: usize,
        slots: &Slots,
        result: &mut Sums,
    ) -> bool {
        let job = self.job;
        let request = job.request;
        let d = request.d;
        let mut masked = false;
        for index in 0..self.hits.len() {
            let (row, lane) = (self.hits[index].0 as usize, self.hits[index].1 as usize);
            let in_batch = first_lane + lane;
            let query = first_query + in_batch;
            let global_row = place.first_row + row as u64;
            let approximate = self.tile[row * self.width + lane];
            if approximate >= job.facts.near[query] {
                let candidate = Neighbor { sq_distance: f64::from(approximate), row: global_row };
                self.nearest[in_batch].push(candidate);
                continue;
            }
            masked = true;
            self.tile[row * self.width + lane] = FAR;
            let vector = &request.queries[query * d..(query + 1) * d];
            let exact = request.level.sq_distance(&rows[row * d..(row + 1) * d], vector);
            let is_duplicate = exact < job.facts.duplicate[query];
            let is_self = is_duplicate && request.exclude_rows.is_some_and(|rows| rows[query] == global_row);
            let slot = slots.of(place.offset + row);
            let weight =
                if self.weights.is_empty() { 1.0 } else { f64::from(self.weights[place.offset + row]) };
            if is_self || exact < request.exclude_within * request.exclude_within {
                let entry = result.group(slots.codes[slot]).excluded.entry(in_batch as u32).or_default();
                entry.0 += 1;
                entry.1 += weight * self.weight_unit;
                continue;
            }
            if request.max_cosine && self.norms[row] > 0.0 {
                let both = f64::from(self.norms[row]) + f64::from(job.facts.sq_norms[query]);
                let projection = ((both - exact) * f64::from(self.halves[row])) as f32;
                result.max_projection[in_batch] = result.max_projection[in_batch].max(projection);
            }
            result.duplicates[in_batch] += u64::from(is_duplicate);
            let log_weight = weight.ln();
            let log_weights = request.kernels.iter().map(|kernel| kernel.log_weight(exact) + log_weight);
            self.near.push(slot as u32, in_batch as u32, log_weights);
            if request.neighbors > 0 {
                self.nearest[in_batch].push(Neighbor { sq_distance: exact, row: global_row });
            }
        }
        masked
    }

    /// Adds the weights of a tile to the sums of its groups, run by run.
    fn add(&mut self, panel: usize, panels: usize, offset: usize) {
        let (level, width, kernels) = (self.job.request.level, self.width, self.job.exponents.len());
        let single = self.runs.len() == 1;
        for &(start, end, slot) in &self.runs {
            let cell = slot * panels + panel;
            let values = &mut self.tile[start * width..end * width];
            let min = if single {
                &self.min
            } else {
                level.column_min(values, &mut self.run_min);
                &self.run_min
            };
            let weights = (!self.weights.is_empty()).then(|| &self.weights[offset + start..offset + end]);
            let mut into = PanelSums {
                min: &mut self.shifts[cell * width..(cell + 1) * width],
                sums: &mut self.sums[cell * 2 * kernels * width..(cell + 1) * 2 * kernels * width],
            };
            level.accumulate(values, min, weights, &self.job.exponents, &mut into);
        }
    }

    /// Turns the block's lanes into log sums and adds the near rows.
    fn collect(&mut self, slots: &Slots, queries: &std::ops::Range<usize>, result: &mut Sums) {
        let job = self.job;
        let (width, kernels) = (self.width, job.exponents.len());
        let panels = queries.len().div_ceil(width);
        let scale = self.weight_unit.ln();
        for (slot, &code) in slots.codes.iter().enumerate() {
            let group = result.group(code);
            for query in 0..queries.len() {
                let cell = slot * panels + query / width;
                let lane = query % width;
                let shift = self.shifts[cell * width + lane];
                if shift >= FAR {
                    continue;
                }
                for (index, kernel) in job.request.kernels.iter().enumerate() {
                    // The same single-precision g that the exponents were taken from.
                    let g = if kernel.kernel.takes_root() { shift.sqrt() } else { shift };
                    let at = cell * 2 * kernels * width + 2 * width * index + lane;
                    let max = -kernel.coefficient() * f64::from(g) + scale;
                    group.sums[query * kernels + index] =
                        LogSum::scaled(max, self.sums[at], self.sums[at + width]);
                }
            }
        }
        let codes = &slots.codes;
        for ((slot, query), near) in self.near.drain() {
            let sums = &mut result.group(codes[slot as usize]).sums[query as usize * kernels..][..kernels];
            for (sum, mut near) in sums.iter_mut().zip(near) {
                near.max += scale;
                sum.fold(&near);
            }
        }
    }

    /// The worker's nearest rows that lie in the block just read.
    fn new_candidates(&self, first_row: u64) -> Vec<(u32, Neighbor)> {
        let mut candidates = Vec::new();
        for (query, nearest) in self.nearest.iter().enumerate() {
            candidates.extend(nearest.iter().filter(|n| n.row >= first_row).map(|&n| (query as u32, n)));
        }
        candidates
    }
}

/// Where a tile lies: its offset in the block and its first global row.
struct TilePlace {
    offset: usize,
    rows: usize,
    first_row: u64,
}

/// The groups of a block, numbered by first appearance.
struct Slots {
    codes: Vec<u32>,
    /// Rows of each slot.
    rows: Vec<u64>,
    /// Slot of each row of the block; empty where there is one slot.
    of_row: Vec<u32>,
}

impl Slots {
    fn new(view: &ShardView<'_>, block: std::ops::Range<usize>, by_group: bool) -> Self {
        let count = block.len() as u64;
        let Some(groups) = view.groups.filter(|_| by_group) else {
            return Self { codes: vec![0], rows: vec![count], of_row: Vec::new() };
        };
        let mut slots = Self { codes: Vec::new(), rows: Vec::new(), of_row: Vec::with_capacity(block.len()) };
        let mut known = HashMap::new();
        for &code in &groups[block] {
            let slot = *known.entry(code).or_insert_with(|| {
                slots.codes.push(code);
                slots.rows.push(0);
                slots.codes.len() - 1
            });
            slots.rows[slot] += 1;
            slots.of_row.push(slot as u32);
        }
        if slots.codes.len() == 1 {
            slots.of_row.clear();
        }
        slots
    }

    /// The slot of a row of the block.
    fn of(&self, row: usize) -> usize {
        self.of_row.get(row).map_or(0, |&slot| slot as usize)
    }

    /// Runs of one slot within a tile: (first row, row after the last, slot), counted in the tile.
    fn runs(&self, offset: usize, rows: usize, runs: &mut Vec<(usize, usize, usize)>) {
        runs.clear();
        let mut start = 0;
        while start < rows {
            let slot = self.of(offset + start);
            let end = if self.of_row.is_empty() {
                rows
            } else {
                (start + 1..rows).find(|&row| self.of(offset + row) != slot).unwrap_or(rows)
            };
            runs.push((start, end, slot));
            start = end;
        }
    }
}

/// Rows in single precision: in place where they are stored so and aligned, else widened into `buffer`.
fn as_f32<'b>(rows: &Rows<'b>, level: Level, buffer: &'b mut Vec<f32>) -> &'b [f32] {
    if rows.dtype() == Dtype::F32
        && let Ok(values) = bytemuck::try_cast_slice(rows.bytes())
    {
        return values;
    }
    buffer.resize(rows.len() * rows.dim(), 0.0);
    level.widen(rows, buffer);
    buffer
}

/// Takes block results in any order and folds them in the one order.
struct Reducer<'j, 'a> {
    job: &'j Job<'a>,
    state: Mutex<ReducerState>,
    turn: Condvar,
    /// How far a worker may run ahead of the fold: bounds the results waiting.
    window: usize,
}

struct ReducerState {
    next: usize,
    waiting: BTreeMap<usize, BlockResult>,
    current: Option<SegmentState>,
    /// Sums of each batch of queries.
    totals: Vec<Sums>,
    neighbors: Vec<TopK>,
    error: Option<Error>,
}

impl<'j, 'a> Reducer<'j, 'a> {
    fn new(job: &'j Job<'a>) -> Self {
        let kernels = job.request.kernels.len();
        let totals =
            (0..job.batches).map(|batch| Sums::empty(job.batch_range(batch).len(), kernels)).collect();
        let state = ReducerState {
            next: 0,
            waiting: BTreeMap::new(),
            current: None,
            totals,
            neighbors: vec![TopK::new(job.request.neighbors); job.queries()],
            error: None,
        };
        Self {
            job,
            state: Mutex::new(state),
            turn: Condvar::new(),
            window: 2 * rayon::current_num_threads().max(8),
        }
    }

    fn lock(&self) -> MutexGuard<'_, ReducerState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a task may run; false where the scan has ended.
    fn wait_for_turn(&self, index: usize) -> bool {
        let mut state = self.lock();
        while state.error.is_none() && index >= state.next + self.window {
            state = self.turn.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.error.is_none()
    }

    fn deliver(&self, index: usize, result: Result<BlockResult>) {
        let mut state = self.lock();
        match result {
            Err(error) => state.error = state.error.take().or(Some(error)),
            Ok(block) => {
                state.waiting.insert(index, block);
                loop {
                    let next = state.next;
                    let Some(block) = state.waiting.remove(&next) else { break };
                    self.fold(&mut state, next, &block);
                    state.next += 1;
                }
            }
        }
        drop(state);
        self.turn.notify_all();
    }

    fn fold(&self, state: &mut ReducerState, index: usize, block: &BlockResult) {
        let job = self.job;
        let task = job.task(index);
        let queries = job.batch_range(task.batch);
        let mut current = state
            .current
            .take()
            .unwrap_or_else(|| SegmentState::new(queries.len(), job.request.kernels.len(), job.candidates()));
        current.fold(block);
        if task.block + 1 < job.segments[task.segment].blocks() {
            state.current = Some(current);
            return;
        }
        let (sums, candidates) = current.finish();
        state.totals[task.batch].fold(&sums);
        let mut row = vec![0.0; job.request.d];
        for (in_batch, candidates) in candidates.iter().enumerate() {
            let query = queries.start + in_batch;
            for &candidate in candidates {
                state.neighbors[query].push(self.rank_exactly(candidate, task.segment, query, &mut row));
            }
        }
    }

    /// A candidate with its distance from differences in double precision.
    fn rank_exactly(&self, candidate: Neighbor, segment: usize, query: usize, row: &mut [f32]) -> Neighbor {
        let job = self.job;
        let segment = &job.segments[segment];
        let in_shard = segment.start + (candidate.row - segment.first_row) as usize;
        job.shards[segment.shard].rows.read_f32(in_shard, row);
        let d = job.request.d;
        let vector = &job.request.queries[query * d..(query + 1) * d];
        Neighbor { sq_distance: job.request.level.sq_distance(row, vector), row: candidate.row }
    }

    fn finish(self) -> Result<Scan> {
        let mut state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = state.error {
            return Err(error);
        }
        let rows = self.job.segments.iter().map(|segment| segment.rows() as u64).sum();
        let neighbors = state.neighbors.iter_mut().map(TopK::drain_sorted).collect();
        Ok(Scan { sums: Sums::concatenate(state.totals, self.job.request.kernels.len()), neighbors, rows })
    }
}
