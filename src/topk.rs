//! The k nearest rows seen so far: a bounded heap under a total order (distance, then row), so that the result does
//! not depend on the order of arrival.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// A row with its squared distance to a query.
#[derive(Clone, Copy, Debug)]
pub struct Neighbor {
    /// Squared distance; never NaN.
    pub sq_distance: f64,
    /// Global row: counted over all shards from 0.
    pub row: u64,
}

impl Ord for Neighbor {
    fn cmp(&self, other: &Self) -> Ordering {
        self.sq_distance.total_cmp(&other.sq_distance).then(self.row.cmp(&other.row))
    }
}

impl PartialOrd for Neighbor {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Neighbor {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Neighbor {}

/// The k smallest neighbours pushed so far.
#[derive(Clone, Debug)]
pub struct TopK {
    k: usize,
    heap: BinaryHeap<Neighbor>,
}

impl TopK {
    /// An empty heap for k neighbours.
    pub fn new(k: usize) -> Self {
        Self { k, heap: BinaryHeap::new() }
    }

    /// Pushes a neighbour; keeps the k smallest.
    pub fn push(&mut self, neighbor: Neighbor) {
        if self.heap.len() < self.k {
            self.heap.push(neighbor);
        } else if let Some(mut worst) = self.heap.peek_mut()
            && neighbor < *worst
        {
            *worst = neighbor;
        }
    }

    /// Squared distance above which nothing can enter: +∞ until k have been pushed.
    pub fn bound(&self) -> f64 {
        match self.heap.peek() {
            Some(worst) if self.heap.len() == self.k => worst.sq_distance,
            _ if self.k == 0 => f64::NEG_INFINITY,
            _ => f64::INFINITY,
        }
    }

    /// Takes all neighbours out, nearest first.
    pub fn drain_sorted(&mut self) -> Vec<Neighbor> {
        std::mem::take(&mut self.heap).into_sorted_vec()
    }

    /// The neighbours in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = &Neighbor> {
        self.heap.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn keeps_the_smallest_in_any_order_of_arrival(
            distances in prop::collection::vec(0_u8..8, 0..60), k in 0_usize..12, seed in any::<u64>(),
        ) {
            let mut all: Vec<Neighbor> = distances.iter().enumerate()
                .map(|(row, &distance)| Neighbor { sq_distance: f64::from(distance), row: row as u64 }).collect();
            let mut arrival = all.clone();
            arrival.sort_by_key(|n| n.row.wrapping_mul(seed | 1).rotate_left(17));
            let mut top = TopK::new(k);
            arrival.into_iter().for_each(|n| top.push(n));
            all.sort();
            all.truncate(k);
            prop_assert_eq!(top.drain_sorted(), all);
        }
    }
}
