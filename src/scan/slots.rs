//! The groups that the rows of a block belong to, and the order in which rows of one group lie together.

use std::collections::HashMap;
use std::ops::Range;

use crate::rows::ShardView;

/// The groups of a block, numbered by first appearance.
pub(super) struct Slots {
    pub codes: Vec<u32>,
    /// Rows of each slot.
    pub rows: Vec<u64>,
    /// Slot of each row of the block; empty where there is one slot.
    of_row: Vec<u32>,
}

impl Slots {
    pub fn new(view: &ShardView<'_>, block: Range<usize>, by_group: bool) -> Self {
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
    #[inline]
    pub fn of(&self, row: usize) -> usize {
        self.of_row.get(row).map_or(0, |&slot| slot as usize)
    }

    /// The rows of the block with those of one slot together, where they lie in runs too short to be summed at speed;
    /// nothing where they don't. A function of the block alone, since it decides an order of summation.
    pub fn order(&self, order: &mut Vec<u32>) {
        /// Rows of a run from which on it costs little by itself, on average.
        const LONG: usize = 64;
        order.clear();
        let runs = 1 + self.of_row.windows(2).filter(|pair| pair[0] != pair[1]).count();
        if self.of_row.len() >= runs * LONG || runs == self.codes.len() {
            return;
        }
        // A counting sort: stable, so rows of one slot stay in order.
        let mut next: Vec<u64> =
            self.rows.iter().scan(0, |sum, &rows| Some(std::mem::replace(sum, *sum + rows))).collect();
        order.resize(self.of_row.len(), 0);
        for (row, &slot) in self.of_row.iter().enumerate() {
            let position = &mut next[slot as usize];
            order[*position as usize] = row as u32;
            *position += 1;
        }
    }

    /// Runs of one slot within a tile: (first row, row after the last, slot), counted in the tile.
    pub fn runs(&self, offset: usize, rows: usize, order: &[u32], runs: &mut Vec<(usize, usize, usize)>) {
        runs.clear();
        if self.of_row.is_empty() {
            runs.push((0, rows, 0));
            return;
        }
        let slot_at = |row: usize| {
            let position = offset + row;
            self.of(order.get(position).map_or(position, |&row| row as usize))
        };
        let mut start = 0;
        while start < rows {
            let slot = slot_at(start);
            let end = (start + 1..rows).find(|&row| slot_at(row) != slot).unwrap_or(rows);
            runs.push((start, end, slot));
            start = end;
        }
    }
}
