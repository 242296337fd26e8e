//! What a scan adds up, and the fixed order in which blocks fold into segments and segments into the result.

use std::collections::{BTreeMap, HashMap};

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

    fn fold(&mut self, other: &Self) {
        self.rows += other.rows;
        self.weight += other.weight;
        for (sum, part) in self.sums.iter_mut().zip(&other.sums) {
            sum.fold(part);
        }
        for (&query, &(rows, weight)) in &other.excluded {
            let entry = self.excluded.entry(query).or_default();
            entry.0 += rows;
            entry.1 += weight;
        }
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

    /// Adds the sums of the rows that follow.
    pub fn fold(&mut self, next: &Self) {
        for (&code, sums) in &next.groups {
            self.group(code).fold(sums);
        }
        for (sum, part) in self.duplicates.iter_mut().zip(&next.duplicates) {
            *sum += part;
        }
        for (max, part) in self.max_projection.iter_mut().zip(&next.max_projection) {
            *max = max.max(*part);
        }
        if self.row_sum.is_empty() {
            self.row_sum.clone_from(&next.row_sum);
        } else {
            for (sum, part) in self.row_sum.iter_mut().zip(&next.row_sum) {
                *sum += part;
            }
        }
    }
}

impl Sums {
    /// The sums of all batches of queries side by side.
    pub fn concatenate(batches: Vec<Self>, kernels: usize) -> Self {
        if batches.len() == 1 {
            return batches.into_iter().next().unwrap_or_else(|| Self::empty(0, kernels));
        }
        let queries = batches.iter().map(|batch| batch.queries).sum();
        let mut all = Self::empty(queries, kernels);
        let mut first = 0;
        for batch in batches {
            for (code, part) in batch.groups {
                let group = all.group(code);
                (group.rows, group.weight) = (part.rows, part.weight);
                group.sums[first * kernels..][..part.sums.len()].copy_from_slice(&part.sums);
                group
                    .excluded
                    .extend(part.excluded.into_iter().map(|(query, left)| (query + first as u32, left)));
            }
            all.duplicates[first..][..batch.queries].copy_from_slice(&batch.duplicates);
            all.max_projection[first..][..batch.queries].copy_from_slice(&batch.max_projection);
            if first == 0 {
                all.row_sum = batch.row_sum;
            }
            first += batch.queries;
        }
        all
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
