//! Takes block results in any order, folds them in the one order that defines the sums, and hands on finished segments.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::reduce::{BlockResult, Part, SegmentState};
use super::{Job, Sink};
use crate::error::{Error, Result};
use crate::topk::{Neighbor, TopK};

/// Takes block results in any order, folds them in the one order and hands finished segments to the sink.
pub(super) struct Reducer<'j, 'a> {
    job: &'j Job<'a>,
    state: Mutex<ReducerState<'j>>,
    turn: Condvar,
    /// How far a worker may run ahead of the fold: bounds the results waiting.
    window: usize,
}

struct ReducerState<'j> {
    next: usize,
    waiting: BTreeMap<usize, BlockResult>,
    current: Option<SegmentState>,
    sink: &'j mut Sink<'j>,
    error: Option<Error>,
}

impl<'j, 'a> Reducer<'j, 'a> {
    pub fn new(job: &'j Job<'a>, sink: &'j mut Sink<'j>) -> Self {
        let state = ReducerState { next: 0, waiting: BTreeMap::new(), current: None, sink, error: None };
        Self {
            job,
            state: Mutex::new(state),
            turn: Condvar::new(),
            window: 2 * rayon::current_num_threads().max(8),
        }
    }

    fn lock(&self) -> MutexGuard<'_, ReducerState<'j>> {
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
                    if state.error.is_some() {
                        break;
                    }
                    if let Err(error) = self.fold(&mut state, next, &block) {
                        state.error = Some(error);
                    }
                    state.next += 1;
                }
            }
        }
        drop(state);
        self.turn.notify_all();
    }

    fn fold(&self, state: &mut ReducerState<'_>, index: usize, block: &BlockResult) -> Result<()> {
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
            return Ok(());
        }
        let (sums, candidates) = current.finish();
        let mut row = vec![0.0; job.request.d];
        let neighbors = candidates.iter().enumerate().map(|(in_batch, candidates)| {
            let query = queries.start + in_batch;
            let mut nearest = TopK::new(job.request.neighbors);
            for &candidate in candidates {
                nearest.push(self.rank_exactly(candidate, task.segment, query, &mut row));
            }
            nearest.drain_sorted()
        });
        let part = Part {
            segment: job.first_segment + task.segment,
            first_query: job.first_query + queries.start,
            neighbors: neighbors.collect(),
            sums,
        };
        (state.sink)(part)
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

    pub fn finish(self) -> Result<()> {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        state.error.map_or(Ok(()), Err)
    }
}
