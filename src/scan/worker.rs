//! One thread's part of a scan: blocks of rows against batches of queries.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::Ordering;

use super::plain::{Place, Plain};
use super::queries::Packed;
use super::reduce::{BlockResult, NearSums, Sums};
use super::rows::TileRows;
use super::{Job, Task};
use crate::error::{Error, ErrorKind, Result};
use crate::logsum::LogSum;
use crate::rows::{Rows, ShardView};
use crate::simd::{FAR, PanelSums, RowScales};
use crate::topk::{Neighbor, TopK};

/// One thread's buffers.
pub(super) struct Worker<'j, 'a> {
    job: &'j Job<'a>,
    width: usize,
    /// Rows of a tile.
    rows: TileRows,
    /// One row in single precision.
    row: Vec<f32>,
    /// Squared distances of a tile and a panel.
    tile: Vec<f32>,
    halves: Vec<f32>,
    weights: Vec<f32>,
    weight_unit: f64,
    min: Vec<f32>,
    run_min: Vec<f32>,
    query_norms: Vec<f32>,
    query_scales: Vec<f32>,
    cut: Vec<f32>,
    hits: Vec<(u32, u32)>,
    runs: Vec<(usize, usize, usize)>,
    /// Per slot and panel: shifts [width], sums [2 · kernels · width].
    shifts: Vec<f32>,
    sums: Vec<f64>,
    near: NearSums,
    plain: Plain,
    /// The nearest rows this worker met in the segment and batch it is in: they decide what is worth reporting.
    nearest: Vec<TopK>,
    nearest_of: Option<(usize, usize)>,
}

impl<'j, 'a> Worker<'j, 'a> {
    pub fn new(job: &'j Job<'a>) -> Self {
        let width = job.request.level.panel_width(job.query_count());
        Self {
            job,
            width,
            rows: TileRows::default(),
            row: vec![0.0; job.request.d],
            tile: Vec::new(),
            halves: Vec::new(),
            weights: Vec::new(),
            weight_unit: 1.0,
            min: vec![0.0; width],
            run_min: vec![0.0; width],
            query_norms: vec![0.0; width],
            query_scales: vec![0.0; width],
            cut: vec![0.0; width],
            hits: Vec::new(),
            runs: Vec::new(),
            shifts: Vec::new(),
            sums: Vec::new(),
            near: NearSums::default(),
            plain: Plain::new(job.request),
            nearest: Vec::new(),
            nearest_of: None,
        }
    }

    /// Rows of one tile: small enough to stay in the second-level cache for all panels. A function of d alone, since it decides an order of summation.
    fn tile_rows(&self) -> usize {
        match self.job.request.d {
            0..=1024 => 96,
            1025..=2048 => 48,
            _ => 24,
        }
    }

    pub fn run(&mut self, task: Task) -> Result<BlockResult> {
        let job = self.job;
        let request = job.request;
        let segment = &job.segments[task.segment];
        let view = &job.shards[segment.shard];
        let block = segment.block(task.block);
        let first_row = segment.first_row + (block.start - segment.start) as u64;
        let queries = job.batch_range(task.batch);
        let panels = queries.len().div_ceil(self.width);
        let (kernels, width) = (request.kernels.len(), self.width);

        if self.nearest_of != Some((task.segment, task.batch)) {
            self.nearest =
                vec![TopK::new(job.candidates()); if request.neighbors == 0 { 0 } else { queries.len() }];
            self.nearest_of = Some((task.segment, task.batch));
        }
        let slots = Slots::new(view, block.clone(), request.by_group);
        self.shifts.clear();
        self.shifts.resize(slots.codes.len() * panels * width, FAR);
        self.sums.clear();
        self.sums.resize(slots.codes.len() * panels * 2 * kernels * width, 0.0);
        let mut result = Sums::empty(queries.len(), kernels);
        if request.row_sum && task.batch == 0 {
            result.row_sum = vec![0.0; request.d];
        }
        self.load_weights(view, block.clone(), &slots, &mut result);

        let tile_rows = self.tile_rows();
        for start in block.clone().step_by(tile_rows) {
            if job.control.stop.load(Ordering::Relaxed) {
                return Err(Error::new(ErrorKind::Interrupted, "stopped"));
            }
            let range = start..(start + tile_rows).min(block.end);
            let offset = start - block.start;
            let place = TilePlace { offset, rows: range.len(), first_row: first_row + offset as u64 };
            let mut rows = std::mem::take(&mut self.rows);
            let slice = view.rows.slice(range.start, range.end);
            let outcome = self.tile(&slice, &mut rows, &place, &queries, &slots, &mut result);
            self.rows = rows;
            outcome.map_err(|error| match error.row {
                Some(row) => error.row(row + place.first_row),
                None => error,
            })?;
        }
        job.control.pairs.fetch_add(block.len() as u64 * queries.len() as u64, Ordering::Relaxed);
        self.collect(&slots, &queries, &mut result);
        let place = Place { view, block, first_row, queries, slots: &slots };
        self.plain.add(job, &place, &mut result)?;
        let candidates = self.new_candidates(first_row);
        Ok(BlockResult { sums: result, candidates })
    }

    /// Weights of the block, in units of a power of two so that squares stay in range.
    fn load_weights(&mut self, view: &ShardView<'_>, block: Range<usize>, slots: &Slots, result: &mut Sums) {
        for (position, &code) in slots.codes.iter().enumerate() {
            let rows = slots.rows[position];
            let group = result.group(code);
            group.rows = rows;
            group.weight = rows as f64;
        }
        self.weights.clear();
        self.weight_unit = 1.0;
        let Some(weights) = view.weights else { return };
        let weights = &weights[block];
        for &code in &slots.codes {
            result.group(code).weight = 0.0;
        }
        for (i, &weight) in weights.iter().enumerate() {
            result.group(slots.codes[slots.of(i)]).weight += f64::from(weight);
        }
        let largest = weights.iter().copied().fold(0.0_f32, f32::max);
        if largest > 0.0 {
            self.weight_unit = f64::from(largest).log2().floor().exp2();
        }
        self.weights.extend(weights.iter().map(|&weight| (f64::from(weight) / self.weight_unit) as f32));
    }

    /// All panels of the batch against one tile of rows.
    fn tile(
        &mut self,
        rows: &Rows<'_>,
        buffers: &mut TileRows,
        place: &TilePlace,
        queries: &Range<usize>,
        slots: &Slots,
        result: &mut Sums,
    ) -> Result<()> {
        let job = self.job;
        let request = job.request;
        let (level, d, width) = (request.level, request.d, self.width);
        if !result.row_sum.is_empty() {
            let weights =
                (!self.weights.is_empty()).then(|| &self.weights[place.offset..place.offset + place.rows]);
            let (singles, _) = buffers.singles(rows, level)?;
            level.add_rows(singles, d, weights, &mut self.row, &mut result.row_sum);
        }
        slots.runs(place.offset, place.rows, &mut self.runs);
        self.tile.resize(place.rows * width, 0.0);
        if let Packed::I8 { .. } | Packed::I16 { .. } | Packed::OneI16 { .. } = &job.queries.packed {
            match &job.queries.packed {
                Packed::I8 { .. } => buffers.quantise_i8(rows, level)?,
                _ => buffers.quantise(rows, level)?,
            }
            let row_scales = RowScales { norms: &buffers.norms, scales: &buffers.scales };
            self.load_halves(row_scales.norms);
            self.panels(queries, |worker, panel, first, lanes| {
                let dots = bytemuck::cast_slice_mut(&mut worker.tile);
                worker.query_scales.fill(0.0);
                match &job.queries.packed {
                    Packed::I16 { d, panels, scales } => {
                        level.dots_i16(
                            &buffers.integers,
                            *d,
                            &panels[panel * d * width..][..d * width],
                            dots,
                        );
                        worker.query_scales[..lanes.len()]
                            .copy_from_slice(&scales[first..first + lanes.len()]);
                    }
                    Packed::I8 { d, panels, scales } => {
                        let packed = &panels[panel * d * width..][..d * width];
                        level.dots_i8(&buffers.bytes, &buffers.sums, *d, packed, dots);
                        worker.query_scales[..lanes.len()]
                            .copy_from_slice(&scales[first..first + lanes.len()]);
                    }
                    Packed::OneI16 { d, query, scale } => {
                        level.dots_one_i16(&buffers.integers, *d, query, width, dots);
                        worker.query_scales[0] = *scale;
                    }
                    _ => unreachable!("integers only"),
                }
                let (norms, scales) = (&worker.query_norms, &worker.query_scales);
                level.sq_distances_i32(&mut worker.tile, row_scales, norms, scales, &mut worker.min);
                worker.finish_panel(rows, row_scales.norms, place, queries, &lanes, slots, result);
            });
        } else {
            let (singles, norms) = buffers.singles(rows, level)?;
            let first_panel = queries.start / width;
            self.load_halves(norms);
            self.panels(queries, |worker, panel, _, lanes| {
                match &job.queries.packed {
                    Packed::Differences(panels) => {
                        let packed = &panels[panel * d * width..][..d * width];
                        level.sq_differences(singles, d, packed, &mut worker.tile, &mut worker.min);
                    }
                    Packed::F32(panels) => {
                        let packed = &panels[panel * d * width..][..d * width];
                        // While the first panel is at work the next tile is fetched, later the next rows of this one.
                        let ahead = if panel == first_panel || width <= 16 { singles.len() } else { 12 * d };
                        level.dots(singles, d, packed, 4 * ahead, &mut worker.tile);
                        level.sq_distances(&mut worker.tile, norms, &worker.query_norms, &mut worker.min);
                    }
                    Packed::OneF32 => {
                        level.dots_one(
                            singles,
                            d,
                            request.queries,
                            width,
                            4 * singles.len(),
                            &mut worker.tile,
                        );
                        level.sq_distances(&mut worker.tile, norms, &worker.query_norms, &mut worker.min);
                    }
                    Packed::I8 { .. } | Packed::I16 { .. } | Packed::OneI16 { .. } => {
                        unreachable!("taken above")
                    }
                }
                worker.finish_panel(rows, norms, place, queries, &lanes, slots, result);
            });
        }
        Ok(())
    }

    /// Calls `run` for each panel of the batch with its number, its first query and its lanes (counted in the batch).
    fn panels(&mut self, queries: &Range<usize>, mut run: impl FnMut(&mut Self, usize, usize, Range<usize>)) {
        let width = self.width;
        for panel in 0..queries.len().div_ceil(width) {
            let lanes = panel * width..((panel + 1) * width).min(queries.len());
            self.load_lanes(queries.start, &lanes);
            run(self, queries.start / width + panel, queries.start + lanes.start, lanes);
        }
    }

    /// 1/(2‖x‖) of each row, where cosines are asked for.
    fn load_halves(&mut self, norms: &[f32]) {
        if self.job.request.max_cosine {
            self.halves.clear();
            self.halves.extend(norms.iter().map(|&norm| if norm > 0.0 { 0.5 / norm.sqrt() } else { 0.0 }));
        }
    }

    /// Squared distances to sums: near rows and candidates apart, the rest into weights.
    #[allow(clippy::too_many_arguments)] // the places of one tile and one panel
    fn finish_panel(
        &mut self,
        rows: &Rows<'_>,
        norms: &[f32],
        place: &TilePlace,
        queries: &Range<usize>,
        lanes: &Range<usize>,
        slots: &Slots,
        result: &mut Sums,
    ) {
        let level = self.job.request.level;
        self.hits.clear();
        level.below(&self.tile, &self.min, &self.cut, &mut self.hits);
        if !self.hits.is_empty()
            && self.take_hits(rows, norms, place, queries.start, lanes.start, slots, result)
        {
            level.column_min(&self.tile, &mut self.min);
        }
        if self.job.request.max_cosine {
            self.run_min.fill(f32::NEG_INFINITY);
            level.max_projection(&self.tile, norms, &self.halves, &self.query_norms, &mut self.run_min);
            for (max, &found) in result.max_projection[lanes.clone()].iter_mut().zip(&self.run_min) {
                *max = max.max(found);
            }
        }
        if !self.job.exponents.is_empty() {
            self.add(lanes.start / self.width, queries.len().div_ceil(self.width), place.offset);
        }
    }

    /// Norms and cuts of a panel's queries; lanes beyond the last query never hit.
    fn load_lanes(&mut self, first_query: usize, lanes: &Range<usize>) {
        let facts = &self.job.queries;
        for lane in 0..self.width {
            let query = lanes.start + lane;
            if query < lanes.end {
                self.query_norms[lane] = facts.sq_norms[first_query + query];
                let bound = self.nearest.get(query).map_or(f64::NEG_INFINITY, TopK::bound);
                // Ties may still enter (by a lower row), so the bound itself passes.
                let bound = (bound.min(f64::from(FAR)) as f32).next_up();
                self.cut[lane] = facts.near[first_query + query].max(bound);
            } else {
                self.query_norms[lane] = 0.0;
                self.cut[lane] = f32::NEG_INFINITY;
            }
        }
    }

    /// Looks again at the pairs below their cut. Near ones are summed in double precision and masked in the tile (then true is returned).
    #[allow(clippy::too_many_arguments)] // the places of one tile and one panel
    fn take_hits(
        &mut self,
        rows: &Rows<'_>,
        norms: &[f32],
        place: &TilePlace,
        first_query: usize,
        first_lane: usize,
        slots: &Slots,
        result: &mut Sums,
    ) -> bool {
        let job = self.job;
        let request = job.request;
        let d = request.d;
        let mut masked = false;
        for index in 0..self.hits.len() {
            let (row, lane) = (self.hits[index].0 as usize, self.hits[index].1 as usize);
            let in_batch = first_lane + lane;
            let query = first_query + in_batch;
            let global_row = place.first_row + row as u64;
            let approximate = self.tile[row * self.width + lane];
            if approximate >= job.queries.near[query] {
                let candidate = Neighbor { sq_distance: f64::from(approximate), row: global_row };
                self.nearest[in_batch].push(candidate);
                continue;
            }
            masked = true;
            self.tile[row * self.width + lane] = FAR;
            let vector = &request.queries[query * d..(query + 1) * d];
            rows.read_f32(row, &mut self.row);
            let exact = request.level.sq_distance(&self.row, vector);
            let is_duplicate = exact < job.queries.duplicate[query];
            let is_self = is_duplicate && request.exclude_rows.is_some_and(|rows| rows[query] == global_row);
            let slot = slots.of(place.offset + row);
            let weight =
                if self.weights.is_empty() { 1.0 } else { f64::from(self.weights[place.offset + row]) };
            if is_self || exact < request.exclude_within * request.exclude_within {
                let entry = result.group(slots.codes[slot]).excluded.entry(in_batch as u32).or_default();
                entry.0 += 1;
                entry.1 += weight * self.weight_unit;
                continue;
            }
            if request.max_cosine && norms[row] > 0.0 {
                let both = f64::from(norms[row]) + f64::from(job.queries.sq_norms[query]);
                let projection = ((both - exact) * f64::from(self.halves[row])) as f32;
                result.max_projection[in_batch] = result.max_projection[in_batch].max(projection);
            }
            result.duplicates[in_batch] += u64::from(is_duplicate);
            let log_weight = weight.ln();
            let fused = job.fused.iter().map(|&column| &request.kernels[column]);
            let log_weights = fused.map(|kernel| kernel.log_weight(exact) + log_weight);
            self.near.push(slot as u32, in_batch as u32, log_weights);
            if request.neighbors > 0 {
                self.nearest[in_batch].push(Neighbor { sq_distance: exact, row: global_row });
            }
        }
        masked
    }

    /// Adds the weights of a tile to the sums of its groups, run by run.
    fn add(&mut self, panel: usize, panels: usize, offset: usize) {
        let (level, width, kernels) = (self.job.request.level, self.width, self.job.exponents.len());
        let single = self.runs.len() == 1;
        for &(start, end, slot) in &self.runs {
            let cell = slot * panels + panel;
            let values = &mut self.tile[start * width..end * width];
            let min = if single {
                &self.min
            } else {
                level.column_min(values, &mut self.run_min);
                &self.run_min
            };
            let weights = (!self.weights.is_empty()).then(|| &self.weights[offset + start..offset + end]);
            let mut into = PanelSums {
                min: &mut self.shifts[cell * width..(cell + 1) * width],
                sums: &mut self.sums[cell * 2 * kernels * width..(cell + 1) * 2 * kernels * width],
            };
            level.accumulate(values, min, weights, &self.job.exponents, &mut into);
        }
    }

    /// Turns the block's lanes into log sums and adds the near rows.
    fn collect(&mut self, slots: &Slots, queries: &Range<usize>, result: &mut Sums) {
        let job = self.job;
        let (width, kernels, columns) = (self.width, job.exponents.len(), job.request.kernels.len());
        let panels = queries.len().div_ceil(width);
        let scale = self.weight_unit.ln();
        for (slot, &code) in slots.codes.iter().enumerate() {
            let group = result.group(code);
            for query in 0..queries.len() {
                let cell = slot * panels + query / width;
                let lane = query % width;
                let shift = self.shifts[cell * width + lane];
                if shift >= FAR {
                    continue;
                }
                for (index, &column) in job.fused.iter().enumerate() {
                    let kernel = &job.request.kernels[column];
                    // The same single-precision g that the exponents were taken from.
                    let g = if kernel.kernel.takes_root() { shift.sqrt() } else { shift };
                    let at = cell * 2 * kernels * width + 2 * width * index + lane;
                    let max = -kernel.coefficient() * f64::from(g) + scale;
                    group.sums[query * columns + column] =
                        LogSum::scaled(max, self.sums[at], self.sums[at + width]);
                }
            }
        }
        let codes = &slots.codes;
        for ((slot, query), near) in self.near.drain() {
            let sums = &mut result.group(codes[slot as usize]).sums[query as usize * columns..][..columns];
            for (&column, mut near) in job.fused.iter().zip(near) {
                near.max += scale;
                sums[column].fold(&near);
            }
        }
    }

    /// The worker's nearest rows that lie in the block just read.
    fn new_candidates(&self, first_row: u64) -> Vec<(u32, Neighbor)> {
        let mut candidates = Vec::new();
        for (query, nearest) in self.nearest.iter().enumerate() {
            candidates.extend(nearest.iter().filter(|n| n.row >= first_row).map(|&n| (query as u32, n)));
        }
        candidates
    }
}

/// Where a tile lies: its offset in the block and its first global row.
struct TilePlace {
    offset: usize,
    rows: usize,
    first_row: u64,
}

/// The groups of a block, numbered by first appearance.
pub(super) struct Slots {
    pub codes: Vec<u32>,
    /// Rows of each slot.
    rows: Vec<u64>,
    /// Slot of each row of the block; empty where there is one slot.
    of_row: Vec<u32>,
}

impl Slots {
    fn new(view: &ShardView<'_>, block: Range<usize>, by_group: bool) -> Self {
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
    pub fn of(&self, row: usize) -> usize {
        self.of_row.get(row).map_or(0, |&slot| slot as usize)
    }

    /// Runs of one slot within a tile: (first row, row after the last, slot), counted in the tile.
    fn runs(&self, offset: usize, rows: usize, runs: &mut Vec<(usize, usize, usize)>) {
        runs.clear();
        let mut start = 0;
        while start < rows {
            let slot = self.of(offset + start);
            let end = if self.of_row.is_empty() {
                rows
            } else {
                (start + 1..rows).find(|&row| self.of(offset + row) != slot).unwrap_or(rows)
            };
            runs.push((start, end, slot));
            start = end;
        }
    }
}
