//! Lists that are read whole: what their rows come to for all queries that ask for them, tile by tile.
//!
//! A list near one query of a batch is near to many. It is converted once and met by panels of queries, as in a scan, and no distance
//! outlives its tile. A query's sums over a list are a function of the two alone: products of a row and a query take the same steps in
//! a panel of any width, and tiles begin where the list does.

use rayon::prelude::*;

use crate::error::Result;
use crate::index::Index;
use crate::index::gather::{Asked, near_share};
use crate::kernel::ScaledKernel;
use crate::rows::Dtype;
use crate::scan::{TileRows, exponent};
use crate::simd::{Exponent, FAR, Level, PanelSums, RowScales, pack_panel, pack_panel_i16};

use super::request::NO_ROW;

/// Rows of a tile: in the second-level cache beside the panels.
const TILE: usize = 96;

/// Queries that one thread takes through a list together.
const TOGETHER: usize = 256;

/// A list that a query reads whole.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asking {
    pub list: u32,
    /// The query.
    pub query: u32,
}

/// The sums of a list for a query under one kernel: Σ w k and Σ (w k)², relative to e^shift and its square.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct KernelSums {
    pub shift: f64,
    pub sum: f64,
    pub square: f64,
}

/// What a list holds for a query beside its sums.
#[derive(Clone, Copy, Debug)]
pub(super) struct Met {
    /// Smallest D², of rows that are not left out; infinite where there is none.
    pub nearest: f64,
    /// Weight of the row to leave out, where the list holds it.
    pub excluded: Option<f64>,
}

/// What was found, entry by entry.
#[derive(Debug, Default)]
pub(super) struct Whole {
    kernels: usize,
    /// Where each entry is.
    at: Vec<u32>,
    met: Vec<Met>,
    sums: Vec<KernelSums>,
}

impl Whole {
    /// What a list holds for a query, by the number of the entry.
    pub fn met(&self, entry: usize) -> Met {
        self.met[self.at[entry] as usize]
    }

    /// Its sums under a kernel.
    pub fn sums(&self, entry: usize, kernel: usize) -> KernelSums {
        self.sums[self.at[entry] as usize * self.kernels + kernel]
    }
}

/// Reads all rows of each list for all queries that ask for it, on the threads of the current pool.
///
/// # Errors
/// `NotFinite` for rows that no index should hold.
pub(super) fn read(
    index: &Index,
    asked: &Asked<'_>,
    kernels: &[ScaledKernel],
    own: Option<&[u32]>,
    entries: &[Asking],
) -> Result<Whole> {
    let mut order: Vec<u32> = (0..entries.len() as u32).collect();
    order.par_sort_unstable_by_key(|&entry| {
        let asking = entries[entry as usize];
        (asking.list, asking.query)
    });
    let mut at = vec![0; entries.len()];
    for (place, &entry) in order.iter().enumerate() {
        at[entry as usize] = place as u32;
    }
    let exponents: Vec<Exponent> = kernels.iter().map(exponent).collect();
    let none = Met { nearest: f64::INFINITY, excluded: None };
    let (mut met, mut sums) =
        (vec![none; entries.len()], vec![KernelSums::default(); entries.len() * kernels.len()]);
    let mut pieces = Vec::new();
    let (mut rest_met, mut rest_sums) = (&mut met[..], &mut sums[..]);
    for same in order.chunk_by(|&a, &b| entries[a as usize].list == entries[b as usize].list) {
        for some in same.chunks(TOGETHER) {
            let (here, later) = rest_met.split_at_mut(some.len());
            let (mine, after) = rest_sums.split_at_mut(some.len() * kernels.len());
            pieces.push((some, here, mine));
            (rest_met, rest_sums) = (later, after);
        }
    }
    pieces.into_par_iter().try_for_each_init(
        || Worker::new(index, asked, &exponents),
        |worker, (some, met, sums)| {
            let queries: Vec<u32> = some.iter().map(|&entry| entries[entry as usize].query).collect();
            worker.list(entries[some[0] as usize].list as usize, &queries, own, met, sums)
        },
    )?;
    Ok(Whole { kernels: kernels.len(), at, met, sums })
}

/// Some queries side by side.
struct Panel {
    /// First of the queries, and how many.
    first: usize,
    count: usize,
    width: usize,
    singles: Vec<f32>,
    integers: Vec<i16>,
    norms: Vec<f32>,
    scales: Vec<f32>,
    cuts: Vec<f32>,
    min: Vec<f32>,
    /// Shifts [width] and sums [2 · kernels · width].
    shifts: Vec<f32>,
    sums: Vec<f64>,
}

/// One thread's buffers.
struct Worker<'a> {
    index: &'a Index,
    asked: &'a Asked<'a>,
    exponents: &'a [Exponent],
    level: Level,
    /// Whether products are taken in integers.
    bytes: bool,
    rows: TileRows,
    tile: Vec<f32>,
    row: Vec<f32>,
    weights: Vec<f32>,
    hits: Vec<(u32, u32)>,
    singles: Vec<f32>,
    integers: Vec<i16>,
}

impl<'a> Worker<'a> {
    fn new(index: &'a Index, asked: &'a Asked<'a>, exponents: &'a [Exponent]) -> Self {
        Self {
            index,
            asked,
            exponents,
            level: index.level(),
            bytes: index.view().rows.dtype() == Dtype::I8 && asked.has_integers(),
            rows: TileRows::default(),
            tile: Vec::new(),
            row: vec![0.0; index.d()],
            weights: Vec::new(),
            hits: Vec::new(),
            singles: Vec::new(),
            integers: Vec::new(),
        }
    }

    /// Queries in panels as wide as the instructions take, the last one narrow where that holds what is left.
    fn panels(&mut self, queries: &[u32]) -> Vec<Panel> {
        let (d, widest) = (self.asked.d, self.level.panel_width(usize::MAX));
        let mut panels = Vec::with_capacity(queries.len().div_ceil(widest));
        for (number, some) in queries.chunks(widest).enumerate() {
            let width = self.level.panel_width(some.len());
            let mut panel = Panel {
                first: number * widest,
                count: some.len(),
                width,
                singles: Vec::new(),
                integers: Vec::new(),
                norms: vec![0.0; width],
                scales: vec![0.0; width],
                cuts: vec![f32::NEG_INFINITY; width],
                min: vec![0.0; width],
                shifts: vec![FAR; width],
                sums: vec![0.0; 2 * self.exponents.len() * width],
            };
            self.singles.clear();
            self.integers.clear();
            for (lane, &query) in some.iter().enumerate() {
                let query = query as usize;
                panel.norms[lane] = self.asked.sq_norms[query] as f32;
                if self.bytes {
                    let (integers, scale) = self.asked.integers(query);
                    self.integers.extend_from_slice(integers);
                    panel.scales[lane] = scale as f32;
                } else {
                    self.singles.extend_from_slice(self.asked.query(query));
                }
            }
            if self.bytes {
                let even = d.next_multiple_of(2);
                panel.integers.resize(even * width, 0);
                pack_panel_i16(&self.integers, even, width, &mut panel.integers);
            } else {
                panel.singles.resize(d * width, 0.0);
                pack_panel(&self.singles, d, width, &mut panel.singles);
            }
            panels.push(panel);
        }
        panels
    }

    /// Weights of a list in units of a power of two, so that their squares stay in range; returns the unit.
    fn load_weights(&mut self, start: usize, end: usize) -> f64 {
        self.weights.clear();
        let Some(weights) = self.index.view().weights else { return 1.0 };
        let weights = &weights[start..end];
        let largest = weights.iter().copied().fold(0.0_f32, f32::max);
        let unit = if largest > 0.0 { f64::from(largest).log2().floor().exp2() } else { 1.0 };
        self.weights.extend(weights.iter().map(|&weight| (f64::from(weight) / unit) as f32));
        unit
    }

    /// Positions in a list of the rows that its queries leave out: (position, query's place), ascending.
    fn left_out(
        &self,
        start: usize,
        end: usize,
        queries: &[u32],
        own: Option<&[u32]>,
    ) -> Vec<(usize, usize)> {
        let Some(own) = own else { return Vec::new() };
        let mut wanted: Vec<(u32, usize)> = queries
            .iter()
            .enumerate()
            .map(|(place, &query)| (own[query as usize], place))
            .filter(|&(row, _)| row != NO_ROW)
            .collect();
        wanted.sort_unstable();
        let mut found = Vec::new();
        for (position, id) in self.index.ids()[start..end].iter().enumerate() {
            let first = wanted.partition_point(|&(row, _)| row < *id);
            let same = wanted[first..].iter().take_while(|&&(row, _)| row == *id);
            found.extend(same.map(|&(_, place)| (position, place)));
        }
        found
    }

    fn list(
        &mut self,
        list: usize,
        queries: &[u32],
        own: Option<&[u32]>,
        met: &mut [Met],
        sums: &mut [KernelSums],
    ) -> Result<()> {
        let (view, entry) = (self.index.view(), self.index.lists()[list]);
        let (start, end) = (entry.start as usize, (entry.start + entry.n) as usize);
        let unit = self.load_weights(start, end);
        let left_out = self.left_out(start, end, queries, own);
        for &(position, place) in &left_out {
            let weight = view.weights.map_or(1.0, |weights| f64::from(weights[start + position]));
            met[place].excluded = Some(weight);
        }
        let mut panels = self.panels(queries);
        let mut next = 0;
        for first in (start..end).step_by(TILE) {
            let rows = view.rows.slice(first, (first + TILE).min(end));
            let stride = if self.bytes {
                self.rows.quantise(&rows, self.level)?;
                self.asked.d
            } else {
                self.rows.take_apart(&rows, self.level)?
            };
            let largest = self.rows.norms.iter().copied().fold(0.0_f32, f32::max);
            let offset = first - start;
            let here = next..next + left_out[next..].partition_point(|&(row, _)| row < offset + rows.len());
            next = here.end;
            for panel in &mut panels {
                self.tile.resize(rows.len() * panel.width, 0.0);
                if self.bytes {
                    let dots = bytemuck::cast_slice_mut(&mut self.tile);
                    let even = self.asked.d.next_multiple_of(2);
                    self.level.dots_i16(&self.rows.integers, even, &panel.integers, 0, dots);
                    let scales = RowScales { norms: &self.rows.norms, scales: &self.rows.scales };
                    self.level.sq_distances_i32(
                        &mut self.tile,
                        scales,
                        &panel.norms,
                        &panel.scales,
                        &mut panel.min,
                    );
                } else {
                    let singles = self.rows.singles(&rows);
                    self.level.dots(singles, stride, self.asked.d, &panel.singles, 0, &mut self.tile);
                    self.level.sq_distances(&mut self.tile, &self.rows.norms, &panel.norms, &mut panel.min);
                }
                // Near pairs are taken again in double precision.
                let share = near_share(self.bytes) as f32;
                for (cut, &norm) in panel.cuts[..panel.count].iter_mut().zip(&panel.norms) {
                    *cut = share * (norm + largest);
                }
                self.hits.clear();
                self.level.below(&self.tile, &panel.min, &panel.cuts, &mut self.hits);
                for &(row, lane) in &self.hits {
                    rows.read_f32(row as usize, &mut self.row);
                    let query = queries[panel.first + lane as usize] as usize;
                    let exact = self.level.sq_distance(&self.row, self.asked.query(query));
                    self.tile[row as usize * panel.width + lane as usize] = exact as f32;
                }
                let lanes = panel.first..panel.first + panel.count;
                let mut changed = !self.hits.is_empty();
                for &(position, place) in left_out[here.clone()].iter().filter(|(_, at)| lanes.contains(at)) {
                    self.tile[(position - offset) * panel.width + place - panel.first] = FAR;
                    changed = true;
                }
                if changed {
                    self.level.column_min(&self.tile, &mut panel.min);
                }
                for (met, &min) in met[lanes].iter_mut().zip(&panel.min) {
                    met.nearest = met.nearest.min(f64::from(min));
                }
                let weights = (!self.weights.is_empty()).then(|| &self.weights[offset..offset + rows.len()]);
                let mut into = PanelSums { min: &mut panel.shifts, sums: &mut panel.sums };
                self.level.accumulate(&mut self.tile, &panel.min, weights, self.exponents, &mut into);
            }
        }
        let kernels = self.exponents.len();
        for panel in &panels {
            for lane in 0..panel.count {
                let place = panel.first + lane;
                // A list of nothing but the row left out holds nothing.
                let empty = met[place].nearest >= f64::from(FAR);
                if empty {
                    met[place].nearest = f64::INFINITY;
                }
                for (h, exponent) in self.exponents.iter().enumerate() {
                    let at = 2 * h * panel.width + lane;
                    sums[place * kernels + h] = if empty {
                        KernelSums::default()
                    } else {
                        KernelSums {
                            shift: exponent.shift(panel.shifts[lane]) * std::f64::consts::LN_2,
                            sum: panel.sums[at] * unit,
                            square: panel.sums[at + panel.width] * unit * unit,
                        }
                    };
                }
            }
        }
        Ok(())
    }
}
