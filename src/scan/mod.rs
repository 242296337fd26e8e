//! The fused scan: rows stream past packed queries; distances become kernel sums before they leave the cache.
//!
//! ```text
//! for each segment, batch of queries, block (in parallel):
//!   for each tile of rows:                     rows widened to float32 where stored otherwise; norms
//!     for each panel of queries:               dot products → squared distances
//!       near rows and candidates are picked out; near rows are taken again in double precision
//!       the rest becomes weights and is added, for every fused kernel and bandwidth, by runs of one group
//!   the other kernels are added pair by pair in double precision
//!   blocks fold in order into the segment, segments in order into the result
//! ```
//! Threads only decide who computes a block, never what is added to what in which order.

mod order;
mod plain;
pub mod plan;
mod queries;
pub mod reduce;
mod rows;
mod slots;
mod worker;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use crate::error::{Error, ErrorKind, Result};
use crate::kernel::ScaledKernel;
use crate::rows::{Dtype, ShardView};
use crate::simd::{Exponent, Level};
use crate::topk::Neighbor;
use order::Reducer;
use plan::{Segment, batch_size, chunks, groups_together, segments};
pub use queries::Precision;
use queries::Queries;
use reduce::{Fold, Part, Sums};
pub(crate) use rows::TileRows;
use worker::Worker;

/// No row is left out for this query.
pub const NO_ROW: u64 = u64::MAX;

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
    /// Rounding of a stored row relative to its norm: a row within twice of it (or 1e-3) times ‖q‖ of a query counts as
    /// its duplicate.
    pub row_rounding: f64,
    /// Whether to find the largest cosine of each query (needed where rows are not unit vectors).
    pub max_cosine: bool,
    /// Whether to sum the rows themselves.
    pub row_sum: bool,
    /// Arithmetic of the dot products.
    pub precision: Precision,
    /// Instructions to use.
    pub level: Level,
    /// Threads; 0 takes all.
    pub threads: usize,
    /// Bytes that sums in flight may take.
    pub memory: usize,
    /// How rows of files come.
    pub io: Io,
}

/// How rows of files come into memory. The sums are the same to the bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Io {
    /// By the map.
    #[default]
    Map,
    /// Read block by block into buffers of the scan.
    Read,
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
    queries: Queries,
    /// Columns of the request's kernels that are fused, and their exponents; the others take the plain path.
    fused: Vec<usize>,
    exponents: Vec<Exponent>,
    /// Queries of one batch; a multiple of the panel width.
    batch: usize,
    /// Tasks before each segment.
    offsets: Vec<usize>,
    /// Number in the store of the job's first segment, and in the scan of its first query.
    first_segment: usize,
    first_query: usize,
    control: &'a Control,
}

impl<'a> Job<'a> {
    fn query_count(&self) -> usize {
        self.queries.count
    }

    fn batch_range(&self, batch: usize) -> Range<usize> {
        batch * self.batch..((batch + 1) * self.batch).min(self.query_count())
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

/// Takes the parts of a scan: segments in order, and of each the queries in order. An error stops the scan.
pub type Sink<'s> = dyn FnMut(Part) -> Result<()> + Send + 's;

/// Scans the segments `range` of the shards (all of them: `None`).
///
/// # Errors
/// `Shape`, `Parameter`, `NotFinite` for bad input (rows are counted over all shards); `Interrupted` where `control` stopped it.
pub fn scan(
    shards: &[ShardView<'_>],
    request: &Request<'_>,
    range: Option<Range<usize>>,
    control: &Control,
) -> Result<Scan> {
    let queries = request.queries.len() / request.d.max(1);
    let first = range.as_ref().map_or(0, |range| range.start);
    let mut fold = Fold::new(queries, request.kernels.len(), request.neighbors, first);
    scan_parts(shards, request, range, control, &mut |part| fold.add(&part))?;
    Ok(fold.finish())
}

/// Checks that all queries are finite and can be squared, as `scan_parts` does; for callers who have to tell a query's row
/// from one of the store.
///
/// # Errors
/// `Shape` where the queries are not of d values each, `NotFinite` with the query's number as the row.
pub fn check_queries(request: &Request<'_>) -> Result<()> {
    if request.d == 0 || !request.queries.len().is_multiple_of(request.d) {
        return Err(Error::new(ErrorKind::Shape, "queries are not rows of d values"));
    }
    queries::sq_norms(request).map(|_| ())
}

/// Scans the segments `range` of the shards (all of them: `None`) and hands on each segment's part for each batch of queries.
///
/// More queries than fit the memory packed are taken in chunks; each segment still meets all of them before the next one.
///
/// # Errors
/// Those of `scan`, and those of the sink.
pub fn scan_parts(
    shards: &[ShardView<'_>],
    request: &Request<'_>,
    range: Option<Range<usize>>,
    control: &Control,
    sink: &mut Sink<'_>,
) -> Result<()> {
    validate(shards, request)?;
    let all = segments(shards);
    let range = range.unwrap_or(0..all.len());
    if all.get(range.clone()).is_none() {
        return Err(Error::new(ErrorKind::Parameter, "segment range outside the store"));
    }
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(request.threads)
        .build()
        .map_err(|error| Error::new(ErrorKind::Parameter, format!("can't start threads: {error}")))?;
    let queries = request.queries.len() / request.d;
    let groups = if request.by_group { groups_together(shards) } else { (1, 1) };
    let room = Room { groups, workers: pool.current_num_threads() };
    let chunks = chunks(queries, request.d, request.memory);
    if chunks == 1 {
        let job = prepare(shards, &all, range, 0, request, control, room)?;
        return run(&job, &pool, sink);
    }
    for segment in range {
        for index in 0..chunks {
            // Of one size to the query: a small last chunk would take the path of few queries, and other bytes.
            let part = index * queries / chunks..(index + 1) * queries / chunks;
            let first = part.start;
            let request = Request {
                queries: &request.queries[part.start * request.d..part.end * request.d],
                exclude_rows: request.exclude_rows.map(|rows| &rows[part.clone()]),
                row_sum: request.row_sum && first == 0,
                ..request.clone()
            };
            let job = prepare(shards, &all, segment..segment + 1, first, &request, control, room).map_err(
                |error| match error.row {
                    Some(row) => error.row(row + first as u64),
                    None => error,
                },
            )?;
            run(&job, &pool, sink)?;
        }
    }
    Ok(())
}

/// Does a job's tasks on the pool's threads.
fn run(job: &Job<'_>, pool: &rayon::ThreadPool, sink: &mut Sink<'_>) -> Result<()> {
    let mut hand_on = |part| sink(part);
    let reducer = Reducer::new(job, &mut hand_on);
    let next = AtomicUsize::new(0);
    pool.broadcast(|_| {
        let mut worker = Worker::new(job);
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
    if request.precision == Precision::Int8 && !request.level.has_fast_int8() {
        let message =
            format!("int8 arithmetic needs AVX-512 with VNNI; this run is at level {}", request.level.name());
        return Err(Error::new(ErrorKind::Parameter, message)
            .remedy("use int16: as fast here, and far more accurate"));
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
    plain::check_queries(request)
}

/// What decides how many queries' sums fit the memory: the most groups in a block and in a segment, and the threads.
#[derive(Clone, Copy)]
struct Room {
    groups: (usize, usize),
    workers: usize,
}

/// A fused kernel as the tile loop sees it.
pub(crate) fn exponent(kernel: &ScaledKernel) -> Exponent {
    let coefficient = (kernel.coefficient() * std::f64::consts::LOG2_E) as f32;
    Exponent { root: kernel.kernel.takes_root(), coefficient }
}

fn prepare<'a>(
    shards: &'a [ShardView<'a>],
    all: &'a [Segment],
    range: Range<usize>,
    first_query: usize,
    request: &'a Request<'a>,
    control: &'a Control,
    room: Room,
) -> Result<Job<'a>> {
    let first_segment = range.start;
    let segments = &all[range];
    let integer_rows = shards.iter().all(|view| view.rows.dtype() == Dtype::I8);
    let packed = Queries::new(request, integer_rows)?;
    let (queries, width) = (packed.count, packed.width);
    let batch = batch_size(queries, request.kernels.len(), room.groups, room.workers, request.memory / 2)
        .next_multiple_of(width);
    let batches = queries.div_ceil(batch);
    let mut offsets = vec![0];
    for segment in segments {
        offsets.push(offsets[offsets.len() - 1] + segment.blocks() * batches);
    }
    let fused: Vec<usize> =
        (0..request.kernels.len()).filter(|&column| request.kernels[column].kernel.is_fused()).collect();
    let exponents =
        fused.iter().map(|&column| request.kernels[column]).map(|kernel| exponent(&kernel)).collect();
    Ok(Job {
        shards,
        segments,
        request,
        queries: packed,
        fused,
        exponents,
        batch,
        offsets,
        first_segment,
        first_query,
        control,
    })
}
