//! Nearest rows by the index: the nearest lists are read whole, and the best candidates are taken again from the rows as stored.

use rayon::prelude::*;

use super::gather::{Asked, Run, gather, read_row, view_starts};
use super::{Index, Neighbors};
use crate::error::{Error, ErrorKind, Result};
use crate::rows::{Dtype, ShardView};
use crate::topk::{Neighbor, TopK};

/// Distances in flight.
const BATCH: u64 = 1 << 24;

/// Searches an index with a fixed number of lists, ranking again by the rows of a store.
pub struct Searcher<'a> {
    /// The index.
    pub index: &'a Index,
    /// The store's shards; the copy's rows decide where there are none.
    pub source: Option<&'a [ShardView<'a>]>,
    /// Lists read for each query.
    pub probes: usize,
}

impl Neighbors for Searcher<'_> {
    fn query(&self, queries: &[f32], k: usize) -> Result<Vec<Vec<Neighbor>>> {
        let index = self.index;
        if self.probes == 0 {
            return Err(Error::new(ErrorKind::Parameter, "no lists to look in: give one probe or more"));
        }
        let d = index.d();
        let view = index.view();
        let asked = Asked::new(queries, d, view.rows.dtype() == Dtype::I8, index.level())?;
        let width = index.panel_width();
        let panels: Vec<Vec<Vec<u32>>> = asked
            .queries
            .par_chunks(width * d)
            .zip(asked.sq_norms.par_chunks(width))
            .map(|(queries, norms)| {
                let ranked = index.rank(queries, norms);
                let mut chosen = Vec::new();
                let each = (0..norms.len()).map(|lane| {
                    index.nearest_lists(&ranked, lane, self.probes, &mut chosen);
                    chosen.clone()
                });
                each.collect()
            })
            .collect();
        let chosen = panels.concat();
        let copies = [view];
        let starts = self.source.map(view_starts);
        let mut results = Vec::with_capacity(asked.len());
        let mut next = 0;
        while next < chosen.len() {
            let (first, mut rows) = (next, 0);
            let mut runs: Vec<Run> = Vec::new();
            let mut ends = Vec::new();
            while next < chosen.len() && (next == first || rows < BATCH) {
                for &list in &chosen[next] {
                    let list = &index.lists()[list as usize];
                    rows += list.n;
                    runs.push(Run { query: next as u32, start: list.start, len: list.n as u32 });
                }
                ends.push(runs.len());
                next += 1;
            }
            let found = gather(&copies, &asked, &runs);
            let part: Vec<Vec<Neighbor>> = (0..ends.len())
                .into_par_iter()
                .map(|at| {
                    let query = asked.query(first + at);
                    // More than wanted, since the copy may be rounded.
                    let mut nearest = TopK::new(k + k.max(10));
                    let before = if at == 0 { 0 } else { ends[at - 1] };
                    for (number, run) in runs.iter().enumerate().take(ends[at]).skip(before) {
                        for (i, &sq) in found.run(number, run.len).iter().enumerate() {
                            let sq = f64::from(sq);
                            if sq <= nearest.bound() {
                                nearest.push(Neighbor { sq_distance: sq, row: run.start + i as u64 });
                            }
                        }
                    }
                    let mut row = vec![0.0; d];
                    let mut exact = TopK::new(k);
                    for candidate in nearest.iter() {
                        let id = u64::from(index.ids()[candidate.row as usize]);
                        match (self.source, &starts) {
                            (Some(source), Some(starts)) => read_row(source, starts, id, &mut row),
                            _ => view.rows.read_f32(candidate.row as usize, &mut row),
                        }
                        exact.push(Neighbor { sq_distance: index.level().sq_distance(&row, query), row: id });
                    }
                    exact.drain_sorted()
                })
                .collect();
            results.extend(part);
        }
        Ok(results)
    }
}
