//! What a scan reads in which order: shards cut into segments, segments into blocks, queries into batches.
//!
//! Blocks (4,096 rows counted from the start of their shard) are the unit of summation, segments (2¹⁸ rows) the unit
//! of merging. Neither depends on threads, machines or batches, so neither does any sum.

use std::collections::BTreeSet;

use crate::rows::ShardView;

/// Rows of one block: summed in one fixed order.
pub const BLOCK_ROWS: usize = 4096;
/// Rows of one segment: blocks fold into it in order; ranges of work are cut only between segments.
pub const SEGMENT_ROWS: usize = 1 << 18;

/// A run of rows of one shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Index of the shard.
    pub shard: usize,
    /// First row, counted in the shard.
    pub start: usize,
    /// Row after the last, counted in the shard.
    pub end: usize,
    /// Global number of the first row.
    pub first_row: u64,
}

impl Segment {
    /// Rows.
    pub fn rows(&self) -> usize {
        self.end - self.start
    }

    /// Blocks.
    pub fn blocks(&self) -> usize {
        self.rows().div_ceil(BLOCK_ROWS)
    }

    /// The rows of a block, counted in the shard.
    pub fn block(&self, index: usize) -> std::ops::Range<usize> {
        let start = self.start + index * BLOCK_ROWS;
        start..(start + BLOCK_ROWS).min(self.end)
    }
}

/// All segments of a store, in order.
pub fn segments(shards: &[ShardView<'_>]) -> Vec<Segment> {
    let mut segments = Vec::new();
    let mut first_row = 0;
    for (shard, view) in shards.iter().enumerate() {
        let n = view.rows.len();
        for start in (0..n).step_by(SEGMENT_ROWS) {
            let end = (start + SEGMENT_ROWS).min(n);
            segments.push(Segment { shard, start, end, first_row: first_row + start as u64 });
        }
        first_row += n as u64;
    }
    segments
}

/// The greatest numbers of groups that occur in one block and in one segment.
pub fn groups_together(shards: &[ShardView<'_>]) -> (usize, usize) {
    let mut seen: Vec<u32> = Vec::with_capacity(BLOCK_ROWS);
    let mut most = (1, 1);
    for segment in shards.iter().filter_map(|view| view.groups).flat_map(|groups| groups.chunks(SEGMENT_ROWS))
    {
        let mut here = BTreeSet::new();
        for block in segment.chunks(BLOCK_ROWS) {
            seen.clear();
            seen.extend_from_slice(block);
            seen.sort_unstable();
            seen.dedup();
            most.0 = most.0.max(seen.len());
            here.extend(seen.iter().copied());
        }
        most.1 = most.1.max(here.len());
    }
    most
}

/// Queries taken through a segment together: as many as let the sums of the blocks in flight fit the memory given.
///
/// `groups` are the most in a block and in a segment. A batch never changes a result, only speed: its packed panels should
/// stay in the cache while rows stream past.
pub fn batch_size(
    queries: usize,
    kernels: usize,
    groups: (usize, usize),
    workers: usize,
    memory: usize,
) -> usize {
    /// Enough for the rows of a tile to be read from memory rarely.
    const LARGEST: usize = 2048;
    const STEP: usize = 32;
    // A LogSum per kernel and group, twice: in the worker and waiting to be folded; and the segment's, growing and handed on.
    let per_query = groups.0 * (kernels * 24 * 2 + 16) * 2 * workers + groups.1 * (kernels * 24 + 16) * 3;
    let fit = memory / per_query.max(1);
    fit.clamp(STEP, LARGEST).next_multiple_of(STEP).min(queries.next_multiple_of(STEP).max(STEP))
}

/// Into how many chunks queries are cut so that one of them, packed, fits half of the memory given.
pub fn chunks(queries: usize, d: usize, memory: usize) -> usize {
    /// Far from the paths for few queries, which a chunk of many must not take.
    const FEWEST: usize = 96;
    // Packed single precision, norms and thresholds.
    let fit = (memory / 2 / (4 * d + 32)).max(FEWEST);
    queries.div_ceil(fit).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::{Dtype, Rows};

    #[test]
    fn segments_cover_every_row_once_and_blocks_start_at_the_shard() {
        let bytes = vec![0_u8; (SEGMENT_ROWS + 5000) * 4];
        let view = |n: usize| ShardView {
            rows: Rows::new(&bytes[..4 * n], Dtype::F32, n, 1, None).unwrap(),
            groups: None,
            weights: None,
        };
        let shards = [view(0), view(1), view(SEGMENT_ROWS + 5000), view(BLOCK_ROWS)];
        let segments = segments(&shards);
        assert_eq!(segments.iter().map(Segment::rows).sum::<usize>(), SEGMENT_ROWS + 5001 + BLOCK_ROWS);
        let mut next = 0;
        for segment in &segments {
            assert_eq!(segment.first_row, next);
            next += segment.rows() as u64;
            let covered: usize = (0..segment.blocks()).map(|i| segment.block(i).len()).sum();
            assert_eq!(covered, segment.rows());
            assert!((0..segment.blocks()).all(|i| segment.block(i).start % BLOCK_ROWS == 0));
        }
    }

    #[test]
    fn batches_shrink_with_groups_and_never_vanish() {
        assert_eq!(batch_size(5, 4, (1, 1), 2, 1 << 30), 32);
        assert_eq!(batch_size(1_000_000, 4, (1, 1), 2, 1 << 30), 2048);
        assert_eq!(batch_size(1_000_000, 4, (4096, 4096), 64, 1), 32);
    }

    #[test]
    fn chunks_fit_the_memory_and_are_never_small() {
        assert_eq!(chunks(1000, 384, 1 << 30), 1);
        assert_eq!(chunks(0, 384, 1 << 30), 1);
        assert_eq!(chunks(97, 64, 1), 2);
        let chunk = 1_000_000_usize.div_ceil(chunks(1_000_000, 1024, 1 << 30));
        assert!(chunk * (4 * 1024 + 32) <= 1 << 29);
    }
}
