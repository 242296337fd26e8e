//! Squared distances of queries to chosen runs of rows: the one place where estimators and the index touch embeddings.
//!
//! Runs are taken in the order of the rows, whatever query they are for, so that rows near each other are read together
//! and a run that several queries ask for is converted once. Each value is a function of its row and query alone.

use rayon::prelude::*;

use crate::error::{Error, ErrorKind, Result};
use crate::rows::{Dtype, ShardView};
use crate::simd::{Level, fetch};

/// Rows converted together.
const TILE: usize = 128;

/// Runs in front whose rows are asked for.
const AHEAD: usize = 2;

/// Largest norm of a query of 16-bit integers: products with rows of bytes stay far below 2³¹ up to 2¹⁴ dimensions.
const INTEGER_NORM: f64 = 32_000.0;

/// Below this share of ‖x‖² + ‖q‖² a squared distance is taken again in double precision.
pub(crate) fn near_share(bytes: bool) -> f64 {
    if bytes { 0.1 } else { 0.02 }
}

/// Largest norm that single precision squares and adds without overflow.
const LARGEST_SQ_NORM: f32 = f32::from_bits((127 + 97) << 23);

/// A run of rows that a query asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The query.
    pub query: u32,
    /// Rows, ≥ 1.
    pub len: u32,
    /// First row, counted over all views.
    pub start: u64,
}

/// Queries in the forms that distances take.
#[derive(Debug)]
pub struct Asked<'a> {
    /// Row-major, d values each.
    pub queries: &'a [f32],
    /// Dimensions.
    pub d: usize,
    /// ‖q‖².
    pub sq_norms: Vec<f64>,
    even: usize,
    integers: Vec<i16>,
    scales: Vec<f64>,
    level: Level,
}

impl<'a> Asked<'a> {
    /// Prepares queries; `integers`: rows are bytes.
    ///
    /// # Errors
    /// `Shape`, `NotFinite` with the query.
    pub fn new(queries: &'a [f32], d: usize, integers: bool, level: Level) -> Result<Self> {
        if d == 0 || !queries.len().is_multiple_of(d) {
            return Err(Error::new(ErrorKind::Shape, format!("queries are not rows of {d} values")));
        }
        let n = queries.len() / d;
        let mut norms = vec![0.0_f32; n];
        level.sq_norms(queries, d, &mut norms);
        if let Some(row) = norms.iter().position(|norm| !(norm.is_finite() && *norm <= LARGEST_SQ_NORM)) {
            let message = "query holds NaN, infinity or values too large to square";
            return Err(Error::new(ErrorKind::NotFinite, message).row(row as u64));
        }
        let sq_norms: Vec<f64> = queries
            .chunks_exact(d)
            .map(|query| query.iter().map(|&x| f64::from(x) * f64::from(x)).sum())
            .collect();
        let even = d.next_multiple_of(2);
        let mut asked = Self { queries, d, sq_norms, even, integers: Vec::new(), scales: Vec::new(), level };
        if integers {
            asked.integers = vec![0; n * even];
            let norms = asked.sq_norms.iter();
            for ((query, into), norm) in
                queries.chunks_exact(d).zip(asked.integers.chunks_exact_mut(even)).zip(norms)
            {
                let factor = (INTEGER_NORM / norm.sqrt()) as f32;
                let factor = if factor.is_finite() { factor } else { 0.0 };
                level.quantise(query, factor, &mut into[..d]);
                asked.scales.push(if factor > 0.0 { 1.0 / f64::from(factor) } else { 0.0 });
            }
        }
        Ok(asked)
    }

    /// Number of queries.
    pub fn len(&self) -> usize {
        self.sq_norms.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.sq_norms.is_empty()
    }

    /// Whether they are held as integers too.
    pub(crate) fn has_integers(&self) -> bool {
        !self.integers.is_empty()
    }

    /// A query as integers, an even number of them, and the scale that makes it of them.
    pub(crate) fn integers(&self, index: usize) -> (&[i16], f64) {
        (&self.integers[index * self.even..][..self.even], self.scales[index])
    }

    /// A query.
    pub fn query(&self, index: usize) -> &'a [f32] {
        &self.queries[index * self.d..(index + 1) * self.d]
    }
}

/// Squared distances found, and where those of each run are.
#[derive(Debug)]
pub struct Found {
    sq: Vec<f32>,
    at: Vec<usize>,
}

impl Found {
    /// The squared distances of a run, by its number in the list that was asked for.
    pub fn run(&self, index: usize, len: u32) -> &[f32] {
        &self.sq[self.at[index]..self.at[index] + len as usize]
    }
}

/// Squared distances of all runs, on the threads of the current pool.
pub fn gather(views: &[ShardView<'_>], asked: &Asked<'_>, runs: &[Run]) -> Found {
    let starts = view_starts(views);
    let mut order: Vec<u32> = (0..runs.len() as u32).collect();
    order.par_sort_unstable_by_key(|&index| {
        let run = &runs[index as usize];
        (run.start, run.len, run.query)
    });
    let mut at = vec![0; runs.len()];
    let mut total = 0;
    for &index in &order {
        at[index as usize] = total;
        total += runs[index as usize].len as usize;
    }
    let mut sq = vec![0.0_f32; total];
    // Pieces of about equal work, never cut between runs of the same rows.
    let target = (total / (rayon::current_num_threads() * 16)).max(1024);
    let mut pieces = Vec::new();
    let (mut rest_order, mut rest_sq) = (&order[..], &mut sq[..]);
    while !rest_order.is_empty() {
        let (mut taken, mut size) = (0, 0);
        while taken < rest_order.len() {
            let run = &runs[rest_order[taken] as usize];
            let same = taken > 0 && {
                let before = &runs[rest_order[taken - 1] as usize];
                (before.start, before.len) == (run.start, run.len)
            };
            if size >= target && !same {
                break;
            }
            size += run.len as usize;
            taken += 1;
        }
        let (here, after) = rest_order.split_at(taken);
        let (mine, later) = rest_sq.split_at_mut(size);
        pieces.push((here, mine));
        (rest_order, rest_sq) = (after, later);
    }
    pieces.into_par_iter().for_each_init(Tile::default, |tile, (order, out)| {
        let mut out = out;
        let mut coming = order.iter().skip(AHEAD);
        for same in order.chunk_by(|&a, &b| {
            let (a, b) = (&runs[a as usize], &runs[b as usize]);
            (a.start, a.len) == (b.start, b.len)
        }) {
            // Short runs lie anywhere: without asking for them in time each waits for memory.
            for &next in coming.by_ref().take(same.len()) {
                let run = &runs[next as usize];
                if (run.len as usize) <= TILE {
                    fetch_rows(views, &starts, run);
                }
            }
            let len = runs[same[0] as usize].len as usize;
            let (mine, later) = std::mem::take(&mut out).split_at_mut(len * same.len());
            let queries = same.iter().map(|&index| runs[index as usize].query as usize);
            tile.fill(views, &starts, asked, runs[same[0] as usize].start, len, queries, mine);
            out = later;
        }
    });
    Found { sq, at }
}

/// Asks for the rows of a run.
fn fetch_rows(views: &[ShardView<'_>], starts: &[u64], run: &Run) {
    let view = starts.partition_point(|&first| first <= run.start) - 1;
    let rows = &views[view].rows;
    let inside = (run.start - starts[view]) as usize;
    fetch(rows.slice(inside, (inside + run.len as usize).min(rows.len())).bytes());
}

/// First row of each view, counted over all.
pub fn view_starts(views: &[ShardView<'_>]) -> Vec<u64> {
    let mut next = 0;
    let each = views.iter().map(|view| {
        let start = next;
        next += view.rows.len() as u64;
        start
    });
    each.collect()
}

/// A row in single precision.
pub fn read_row(views: &[ShardView<'_>], starts: &[u64], row: u64, out: &mut [f32]) {
    let view = starts.partition_point(|&start| start <= row) - 1;
    views[view].rows.read_f32((row - starts[view]) as usize, out);
}

/// Buffers of one thread.
#[derive(Default)]
struct Tile {
    singles: Vec<f32>,
    integers: Vec<i16>,
    squares: Vec<i32>,
    norms: Vec<f32>,
    dots: Vec<f32>,
    integer_dots: Vec<i32>,
    row: Vec<f32>,
}

impl Tile {
    /// Distances of several queries to one run of rows: `out` holds `len` values for each query.
    #[allow(clippy::too_many_arguments)] // the places of one run
    fn fill(
        &mut self,
        views: &[ShardView<'_>],
        starts: &[u64],
        asked: &Asked<'_>,
        start: u64,
        len: usize,
        queries: impl Iterator<Item = usize> + Clone,
        out: &mut [f32],
    ) {
        let mut done = 0;
        // One query alone reads bytes as they are.
        let alone = queries.clone().count() == 1 && asked.even == asked.d;
        while done < len {
            let row = start + done as u64;
            let view = starts.partition_point(|&first| first <= row) - 1;
            let inside = (row - starts[view]) as usize;
            let count = (len - done).min(TILE).min(views[view].rows.len() - inside);
            let rows = views[view].rows.slice(inside, inside + count);
            let (d, level) = (asked.d, asked.level);
            let bytes = rows.dtype() == Dtype::I8 && !asked.integers.is_empty();
            self.norms.resize(count, 0.0);
            if bytes {
                self.squares.resize(count, 0);
                self.integer_dots.resize(count, 0);
                let (dots, squares) = (&mut self.integer_dots, &mut self.squares);
                if let (true, Some(query)) = (alone, queries.clone().next()) {
                    level.dots_one_i8(rows.bytes(), asked.integers(query).0, 0, dots, squares);
                } else {
                    self.integers.clear();
                    self.integers.resize(count * asked.even, 0);
                    level.widen_i8(rows.bytes(), d, asked.even, &mut self.integers, squares);
                }
                self.norms.iter_mut().zip(&self.squares).for_each(|(norm, &sum)| *norm = sum as f32);
            } else {
                self.singles.resize(count * d, 0.0);
                level.widen(&rows, &mut self.singles, &mut self.norms);
                self.dots.resize(count, 0.0);
            }
            for (which, query) in queries.clone().enumerate() {
                let to = &mut out[which * len + done..][..count];
                let norm = asked.sq_norms[query];
                let share = near_share(bytes);
                if !bytes {
                    level.dots_one_f32(&self.singles, asked.query(query), &mut self.dots, &mut self.norms);
                } else if !alone {
                    level.dots_one_i16(&self.integers, asked.integers(query).0, &mut self.integer_dots);
                }
                for (i, to) in to.iter_mut().enumerate() {
                    let (own, dot) = if bytes {
                        let scale = rows.scales().map_or(1.0, |scales| f64::from(scales[i]));
                        let dot = f64::from(self.integer_dots[i]) * scale * asked.scales[query];
                        (f64::from(self.norms[i]) * scale * scale, dot)
                    } else {
                        (f64::from(self.norms[i]), f64::from(self.dots[i]))
                    };
                    let mut sq = own + norm - 2.0 * dot;
                    if sq < share * (own + norm) {
                        self.row.resize(d, 0.0);
                        rows.read_f32(i, &mut self.row);
                        sq = level.sq_distance(&self.row, asked.query(query));
                    }
                    *to = sq.max(0.0) as f32;
                }
            }
            done += count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::random::Rng;
    use crate::rows::Rows;

    #[test]
    fn distances_are_those_of_the_rows_in_any_order_and_company() {
        let (n, d, q) = (300_usize, 31_usize, 5_usize);
        let mut rng = Rng::new(&[3]);
        let bytes: Vec<u8> = (0..n * d).map(|_| rng.next() as u8).collect();
        let scales: Vec<f32> = (0..n).map(|i| 0.01 + i as f32 * 1e-5).collect();
        let queries: Vec<f32> = (0..q * d).map(|_| rng.uniform() as f32 - 0.5).collect();
        let singles: Vec<f32> = (0..n * d).map(|_| rng.uniform() as f32).collect();
        let level = Level::current().unwrap();
        let split = 170;
        let plain: Vec<u8> = singles.iter().flat_map(|x| x.to_le_bytes()).collect();
        let whole = [
            Rows::new(&bytes, Dtype::I8, n, d, Some(&scales)).unwrap(),
            Rows::new(&plain, Dtype::F32, n, d, None).unwrap(),
        ];
        for rows in whole {
            let view = |rows| ShardView { rows, groups: None, weights: None };
            let views = [view(rows.slice(0, split)), view(rows.slice(split, n))];
            let asked = Asked::new(&queries, d, rows.dtype() == Dtype::I8, level).unwrap();
            let runs: Vec<Run> = (0..200)
                .map(|_| {
                    let start = rng.below(n as u64);
                    let len = (1 + rng.below(40)).min(n as u64 - start) as u32;
                    Run { query: rng.below(q as u64) as u32, len, start }
                })
                .chain([Run { query: 0, len: n as u32, start: 0 }, Run { query: 4, len: n as u32, start: 0 }])
                .collect();
            let found = gather(&views, &asked, &runs);
            let mut row = vec![0.0; d];
            for (index, run) in runs.iter().enumerate() {
                for (i, &sq) in found.run(index, run.len).iter().enumerate() {
                    rows.read_f32(run.start as usize + i, &mut row);
                    let query = asked.query(run.query as usize);
                    let truth: f64 = row.iter().zip(query).map(|(x, q)| f64::from(x - q).powi(2)).sum();
                    let norms = asked.sq_norms[run.query as usize]
                        + row.iter().map(|x| f64::from(x * x)).sum::<f64>();
                    assert!((f64::from(sq) - truth).abs() < 2e-5 * norms, "{sq} {truth}");
                }
            }
        }
    }
}
