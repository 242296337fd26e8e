//! What a scan adds up, and the fixed order in which blocks fold into segments and segments into the result.

use std::collections::{BTreeMap, HashMap};

use super::Scan;
use crate::error::{Error, ErrorKind, Result};
use crate::logsum::LogSum;
use crate::topk::{Neighbor, TopK};

/// Sums over the rows of one group, for a batch of queries.
#[derive(Clone, Debug)]
pub struct GroupSums {
    /// Rows of the group that were read.
    pub rows: u64,
    /// Their weight.
    pub weight: f64,
    /// Sum of each query and kernel: [query · kernels + kernel].
    pub sums: Vec<LogSum>,
    /// Rows and weight left out (the query itself, near copies), by query; only those that are not zero.
    pub excluded: BTreeMap<u32, (u64, f64)>,
}

impl GroupSums {
    fn empty(sums: usize) -> Self {
        Self { rows: 0, weight: 0.0, sums: vec![LogSum::EMPTY; sums], excluded: BTreeMap::new() }
    }
}

/// What a run of rows adds to the result for a batch of queries. Blocks, segments and whole stores have this form.
#[derive(Clone, Debug)]
pub struct Sums {
    kernels: usize,
    queries: usize,
    /// Sums of each group present, by code.
    pub groups: BTreeMap<u32, GroupSums>,
    /// Rows within the duplicate radius of each query.
    pub duplicates: Vec<u64>,
    /// Largest cosine · ‖q‖ of each query, −∞ where not asked for.
    pub max_projection: Vec<f32>,
    /// Σ weight · row, empty where not asked for.
    pub row_sum: Vec<f64>,
}

impl Sums {
    /// Nothing, for so many queries and kernels.
    pub fn empty(queries: usize, kernels: usize) -> Self {
        Self {
            kernels,
            queries,
            groups: BTreeMap::new(),
            duplicates: vec![0; queries],
            max_projection: vec![f32::NEG_INFINITY; queries],
            row_sum: Vec::new(),
        }
    }

    /// The sums of a group, made empty where absent.
    pub fn group(&mut self, code: u32) -> &mut GroupSums {
        let size = self.queries * self.kernels;
        self.groups.entry(code).or_insert_with(|| GroupSums::empty(size))
    }

    /// Adds the sums of the rows that follow, for the same queries.
    pub fn fold(&mut self, next: &Self) {
        self.fold_at(0, next);
    }

    /// Adds the sums of the rows that follow for the queries from `first` on. Facts on rows alone (their number, weight and
    /// sum) are taken from the first query's part, since every part of a segment brings them.
    pub fn fold_at(&mut self, first: usize, next: &Self) {
        let kernels = self.kernels;
        for (&code, part) in &next.groups {
            let group = self.group(code);
            if first == 0 {
                group.rows += part.rows;
                group.weight += part.weight;
            }
            for (sum, part) in group.sums[first * kernels..].iter_mut().zip(&part.sums) {
                sum.fold(part);
            }
            for (&query, &(rows, weight)) in &part.excluded {
                let entry = group.excluded.entry(first as u32 + query).or_default();
                entry.0 += rows;
                entry.1 += weight;
            }
        }
        for (sum, part) in self.duplicates[first..].iter_mut().zip(&next.duplicates) {
            *sum += part;
        }
        for (max, part) in self.max_projection[first..].iter_mut().zip(&next.max_projection) {
            *max = max.max(*part);
        }
        if first > 0 {
            return;
        }
        if self.row_sum.is_empty() {
            self.row_sum.clone_from(&next.row_sum);
        } else {
            for (sum, part) in self.row_sum.iter_mut().zip(&next.row_sum) {
                *sum += part;
            }
        }
    }

    /// Queries that the sums are for.
    pub fn queries(&self) -> usize {
        self.queries
    }

    /// Kernels with their bandwidths.
    pub fn kernels(&self) -> usize {
        self.kernels
    }
}

/// What one segment adds for a run of queries: the unit of merging. Parts may be kept, sent and folded elsewhere; folding
/// them in order gives the bytes of one scan over everything.
#[derive(Clone, Debug)]
pub struct Part {
    /// Number of the segment in the store.
    pub segment: usize,
    /// First query, counted in the job.
    pub first_query: usize,
    /// Sums over the segment's rows.
    pub sums: Sums,
    /// Nearest rows of each query in the segment, nearest first, distances in double precision.
    pub neighbors: Vec<Vec<Neighbor>>,
}

/// Folds parts into the result of a scan: segments in ascending order, and the queries of each from first to last. What
/// comes in another order is refused, so nothing is counted twice or left out.
#[derive(Debug)]
pub struct Fold {
    sums: Sums,
    nearest: Vec<TopK>,
    rows: u64,
    segment: usize,
    query: usize,
}

impl Fold {
    /// Nothing yet; the first part is to be that of `segment`.
    pub fn new(queries: usize, kernels: usize, neighbors: usize, segment: usize) -> Self {
        let nearest = if neighbors == 0 { Vec::new() } else { vec![TopK::new(neighbors); queries] };
        Self { sums: Sums::empty(queries, kernels), nearest, rows: 0, segment, query: 0 }
    }

    /// Adds the next part.
    ///
    /// # Errors
    /// `Parameter` where it is not the next one, `Shape` where it is for other queries or kernels.
    pub fn add(&mut self, part: &Part) -> Result<()> {
        if (part.segment, part.first_query) != (self.segment, self.query) {
            let message = format!(
                "segment {} from query {} does not follow: segment {} from query {} does",
                part.segment, part.first_query, self.segment, self.query
            );
            return Err(Error::new(ErrorKind::Parameter, message));
        }
        let end = self.query + part.sums.queries;
        let has_neighbors = part.neighbors.len() == part.sums.queries || self.nearest.is_empty();
        if part.sums.queries == 0
            || end > self.sums.queries
            || part.sums.kernels != self.sums.kernels
            || !has_neighbors
        {
            return Err(Error::new(ErrorKind::Shape, "a part is of another scan: its shapes differ"));
        }
        self.sums.fold_at(self.query, &part.sums);
        for (nearest, found) in self.nearest.iter_mut().skip(self.query).zip(&part.neighbors) {
            found.iter().for_each(|&neighbor| nearest.push(neighbor));
        }
        if self.query == 0 {
            self.rows += part.sums.groups.values().map(|group| group.rows).sum::<u64>();
        }
        (self.segment, self.query) =
            if end == self.sums.queries { (self.segment + 1, 0) } else { (self.segment, end) };
        Ok(())
    }

    /// The segment and query that are to come next.
    pub fn next(&self) -> (usize, usize) {
        (self.segment, self.query)
    }

    /// The result.
    pub fn finish(mut self) -> Scan {
        let queries = self.sums.queries;
        let mut neighbors: Vec<_> = self.nearest.iter_mut().map(TopK::drain_sorted).collect();
        neighbors.resize(queries, Vec::new());
        Scan { sums: self.sums, neighbors, rows: self.rows }
    }
}

/// One block's contribution: its sums and the rows that may be among a query's nearest.
#[derive(Debug)]
pub struct BlockResult {
    /// Sums.
    pub sums: Sums,
    /// (query of the batch, candidate).
    pub candidates: Vec<(u32, Neighbor)>,
}

/// Near rows of one block, summed in double precision in row order: (group slot, query) → one sum per kernel.
#[derive(Debug, Default)]
pub struct NearSums {
    sums: HashMap<(u32, u32), Vec<LogSum>>,
}

impl NearSums {
    /// Adds a row's log weights.
    pub fn push(&mut self, slot: u32, query: u32, log_weights: impl ExactSizeIterator<Item = f64>) {
        let sums = self.sums.entry((slot, query)).or_insert_with(|| vec![LogSum::EMPTY; log_weights.len()]);
        for (sum, log_weight) in sums.iter_mut().zip(log_weights) {
            sum.push(log_weight);
        }
    }

    /// All sums, in no particular order (each is folded into a place of its own).
    pub fn drain(&mut self) -> impl Iterator<Item = ((u32, u32), Vec<LogSum>)> {
        self.sums.drain()
    }
}

/// A segment's sums and candidates for one batch, growing block by block in order.
pub struct SegmentState {
    /// Sums so far.
    pub sums: Sums,
    nearest: Vec<TopK>,
}

impl SegmentState {
    /// Nothing yet. `keep` candidates are held per query.
    pub fn new(queries: usize, kernels: usize, keep: usize) -> Self {
        let nearest = if keep == 0 { Vec::new() } else { vec![TopK::new(keep); queries] };
        Self { sums: Sums::empty(queries, kernels), nearest }
    }

    /// Adds the next block.
    pub fn fold(&mut self, block: &BlockResult) {
        self.sums.fold(&block.sums);
        for &(query, candidate) in &block.candidates {
            self.nearest[query as usize].push(candidate);
        }
    }

    /// The sums and each query's candidates, nearest first.
    pub fn finish(mut self) -> (Sums, Vec<Vec<Neighbor>>) {
        let nearest = self.nearest.iter_mut().map(TopK::drain_sorted).collect();
        (self.sums, nearest)
    }
}
