//! Takes block results in any order and folds them in the one order that defines the sums.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::reduce::{BlockResult, SegmentState, Sums};
use super::{Job, Scan};
use crate::error::{Error, Result};
use crate::topk::{Neighbor, TopK};

/// Takes block results in any order and folds them in the one order.
pub(super) struct Reducer<'j, 'a> {
    job: &'j Job<'a>,
    state: Mutex<ReducerState>,
    turn: Condvar,
    /// How far a worker may run ahead of the fold: bounds the results waiting.
    window: usize,
}

pub(super) struct ReducerState {
    next: usize,
    waiting: BTreeMap<usize, BlockResult>,
    current: Option<SegmentState>,
    /// Sums of each batch of queries.
    totals: Vec<Sums>,
    neighbors: Vec<TopK>,
    error: Option<Error>,
}

impl<'j, 'a> Reducer<'j, 'a> {
    pub fn new(job: &'j Job<'a>) -> Self {
        let kernels = job.request.kernels.len();
        let totals =
            (0..job.batches).map(|batch| Sums::empty(job.batch_range(batch).len(), kernels)).collect();
        let state = ReducerState {
            next: 0,
            waiting: BTreeMap::new(),
            current: None,
            totals,
            neighbors: vec![TopK::new(job.request.neighbors); job.query_count()],
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
    pub fn wait_for_turn(&self, index: usize) -> bool {
        let mut state = self.lock();
        while state.error.is_none() && index >= state.next + self.window {
            state = self.turn.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.error.is_none()
    }

    pub fn deliver(&self, index: usize, result: Result<BlockResult>) {
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

    pub fn finish(self) -> Result<Scan> {
        let mut state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = state.error {
            return Err(error);
        }
        let rows = self.job.segments.iter().map(|segment| segment.rows() as u64).sum();
        let neighbors = state.neighbors.iter_mut().map(TopK::drain_sorted).collect();
        Ok(Scan { sums: Sums::concatenate(state.totals, self.job.request.kernels.len()), neighbors, rows })
    }
}
