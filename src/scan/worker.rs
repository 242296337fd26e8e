//! One thread's part of a scan: blocks of rows against batches of queries.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::plain::{Place, Plain};
use super::queries::Packed;
use super::reduce::{BlockResult, NearSums, Sums};
use super::rows::TileRows;
use super::slots::Slots;
use super::{Io, Job, Task};
use crate::error::{Error, ErrorKind, Result};
use crate::logsum::LogSum;
use crate::rows::{Dtype, Rows, ShardView};
use crate::simd::{FAR, PanelSums, RowScales};
use crate::store::reading::Reader;
use crate::topk::{Neighbor, TopK};

/// Bytes in front that are fetched where one query lets rows pass at the speed of memory.
const AHEAD: usize = 8192;

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
    /// Of each query of the batch the squared distance below which a pair is looked at again; −∞ up to whole panels.
    cuts: Vec<f32>,
    hits: Vec<(u32, u32)>,
    runs: Vec<(usize, usize, usize)>,
    /// Per slot and panel: shifts [width], sums [2 · kernels · width].
    shifts: Vec<f32>,
    sums: Vec<f64>,
    near: NearSums,
    plain: Plain,
    /// The rows of the block in the order in which they are taken, and the bytes and scales of a tile of them; empty where
    /// that is their own order.
    order: Vec<u32>,
    reader: Reader,
    /// Bytes of the block, where they are read.
    block_bytes: Vec<u8>,
    gathered: Vec<u8>,
    gathered_scales: Vec<f32>,
    /// The nearest rows this worker met in the segment and batch it is in: they decide what is worth reporting.
    nearest: Vec<TopK>,
    nearest_of: Option<(usize, usize)>,
    /// Whether the tile is a sample that sets cuts and enters no sum.
    sampling: bool,
    column: Vec<f32>,
}

impl<'j, 'a> Worker<'j, 'a> {
    pub fn new(job: &'j Job<'a>) -> Self {
        let width = job.queries.width;
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
            cuts: Vec::new(),
            hits: Vec::new(),
            runs: Vec::new(),
            shifts: Vec::new(),
            sums: Vec::new(),
            near: NearSums::default(),
            plain: Plain::new(job.request),
            order: Vec::new(),
            reader: Reader::default(),
            block_bytes: Vec::new(),
            gathered: Vec::new(),
            gathered_scales: Vec::new(),
            nearest: Vec::new(),
            nearest_of: None,
            sampling: false,
            column: Vec::new(),
        }
    }

    /// Rows of one tile: small enough to stay in the second-level cache for all panels; more where one query lets them pass. A
    /// function of d and of the path alone, since it decides an order of summation.
    fn tile_rows(&self) -> usize {
        match self.job.request.d {
            _ if self.width == 1 => 512,
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

        let begins = self.nearest_of != Some((task.segment, task.batch));
        if begins {
            self.nearest =
                vec![TopK::new(job.candidates()); if request.neighbors == 0 { 0 } else { queries.len() }];
            self.nearest_of = Some((task.segment, task.batch));
            // Nothing is known yet of the nearest: every row may be one.
            let near = &job.queries.near[queries.start..][..panels * width];
            self.cuts.clear();
            self.cuts.extend(near.iter().map(|&near| {
                if request.neighbors > 0 && near > f32::NEG_INFINITY { FAR.next_up() } else { near }
            }));
        }
        let slots = Slots::new(view, block.clone(), request.by_group);
        slots.order(&mut self.order);
        self.shifts.clear();
        self.shifts.resize(slots.codes.len() * panels * width, FAR);
        self.sums.clear();
        self.sums.resize(slots.codes.len() * panels * 2 * kernels * width, 0.0);
        let mut result = Sums::empty(queries.len(), kernels);
        if request.row_sum && task.batch == 0 {
            result.row_sum = vec![0.0; request.d];
        }
        self.load_weights(view, block.clone(), &slots, &mut result);

        let mut block_bytes = std::mem::take(&mut self.block_bytes);
        let rows_of_block = self.rows_of_block(&task, view, &block, &mut block_bytes)?;
        if begins && request.neighbors > 0 {
            self.seed_cuts(&rows_of_block, &queries, &slots);
        }
        let tile_rows = self.tile_rows();
        for start in block.clone().step_by(tile_rows) {
            if job.control.stop.load(Ordering::Relaxed) {
                return Err(Error::new(ErrorKind::Interrupted, "stopped"));
            }
            let range = start..(start + tile_rows).min(block.end);
            let offset = start - block.start;
            let place = TilePlace { offset, rows: range.len(), first_row };
            let mut rows = std::mem::take(&mut self.rows);
            let outcome = if self.order.is_empty() {
                let slice = rows_of_block.slice(offset, offset + range.len());
                let end = offset + range.len();
                let next = rows_of_block.slice(end, (end + tile_rows).min(block.len()));
                self.tile(&slice, next.bytes(), &mut rows, &place, &queries, &slots, &mut result)
            } else {
                let (mut bytes, mut scales) =
                    (std::mem::take(&mut self.gathered), std::mem::take(&mut self.gathered_scales));
                let numbers = &self.order[place.offset..place.offset + place.rows];
                let gathered = rows_of_block.gather(numbers, &mut bytes, &mut scales);
                let outcome = self.tile(&gathered, &[], &mut rows, &place, &queries, &slots, &mut result);
                (self.gathered, self.gathered_scales) = (bytes, scales);
                outcome
            };
            self.rows = rows;
            outcome.map_err(|error| match error.row {
                Some(row) => error.row(first_row + self.in_block(place.offset + row as usize) as u64),
                None => error,
            })?;
        }
        self.block_bytes = block_bytes;
        job.control.pairs.fetch_add(block.len() as u64 * queries.len() as u64, Ordering::Relaxed);
        self.collect(&slots, &queries, &mut result);
        let place = Place { view, block, first_row, queries, slots: &slots };
        self.plain.add(job, &place, &mut result)?;
        let candidates = self.new_candidates(first_row);
        Ok(BlockResult { sums: result, candidates })
    }

    /// Starts the cuts of a segment and a batch from a strided sample of the first block met, so that rows sorted towards a
    /// query, or merely the first ones, don't all pass for its nearest.
    ///
    /// As many rows as are kept lie within the cut (in this block alone), so nothing that belongs to the segment's
    /// nearest is lost, whichever block came first.
    fn seed_cuts(&mut self, rows: &Rows<'_>, queries: &Range<usize>, slots: &Slots) {
        /// Rows of the sample: one tile.
        const SAMPLE: usize = 96;
        if rows.len() < 4 * SAMPLE || self.job.candidates() > SAMPLE / 2 {
            return;
        }
        let numbers: Vec<u32> = (0..SAMPLE).map(|i| (i * rows.len() / SAMPLE) as u32).collect();
        let (mut bytes, mut scales) =
            (std::mem::take(&mut self.gathered), std::mem::take(&mut self.gathered_scales));
        let mut buffers = std::mem::take(&mut self.rows);
        let sample = rows.gather(&numbers, &mut bytes, &mut scales);
        let place = TilePlace { offset: 0, rows: SAMPLE, first_row: 0 };
        self.sampling = true;
        // A row that is not finite is found, and named, where its own tile is taken.
        let mut nothing = Sums::empty(0, 0);
        let _ = self.tile(&sample, &[], &mut buffers, &place, queries, slots, &mut nothing);
        self.sampling = false;
        (self.gathered, self.gathered_scales, self.rows) = (bytes, scales, buffers);
    }

    /// The cuts of a panel from the sample's squared distances.
    fn seed_panel(&mut self, first_query: usize, lanes: &Range<usize>) {
        /// A product may be rounded otherwise in another tile.
        const ROUNDING: f32 = 1e-3;
        let kept = self.job.candidates();
        for lane in 0..lanes.len() {
            // Near rows may be left out: they hold no place.
            let near = self.job.queries.near[first_query + lane];
            self.column.clear();
            let column = self.tile.iter().skip(lane).step_by(self.width).copied();
            self.column.extend(column.filter(|&sq_distance| sq_distance >= near));
            if self.column.len() < kept {
                continue;
            }
            let (_, &mut bound, _) = self.column.select_nth_unstable_by(kept - 1, f32::total_cmp);
            let cut = &mut self.cuts[lanes.start + lane];
            *cut = cut.min((bound * (1.0 + ROUNDING)).next_up());
        }
    }

    /// The rows of a block: in the map, or read into the buffer.
    fn rows_of_block<'b>(
        &mut self,
        task: &Task,
        view: &ShardView<'b>,
        block: &Range<usize>,
        buffer: &'b mut Vec<u8>,
    ) -> Result<Rows<'b>> {
        /// Blocks in front that are fetched: enough for every worker's next.
        const BLOCKS_AHEAD: usize = 8;
        let rows = view.rows.slice(block.start, block.end);
        let (Io::Read, Some((path, offset))) = (self.job.request.io, rows.file()) else {
            return Ok(rows);
        };
        // Once a segment is in memory its next batches find it there.
        let fetched = if task.batch == 0 { BLOCKS_AHEAD * rows.bytes().len() } else { 0 };
        let next = offset + rows.bytes().len() as u64;
        self.reader.read(path, offset, rows.bytes().len(), next..next + fetched as u64, buffer)?;
        rows.with_bytes(buffer)
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
        let unit = self.weight_unit;
        for position in 0..weights.len() {
            let weight = weights[self.in_block(position)];
            self.weights.push((f64::from(weight) / unit) as f32);
        }
    }

    /// The row of the block that is taken at a position.
    fn in_block(&self, position: usize) -> usize {
        self.order.get(position).map_or(position, |&row| row as usize)
    }

    /// All panels of the batch against one tile of rows; meanwhile the bytes `next` are fetched.
    #[allow(clippy::too_many_arguments)] // the places of one tile
    fn tile(
        &mut self,
        rows: &Rows<'_>,
        next: &[u8],
        buffers: &mut TileRows,
        place: &TilePlace,
        queries: &Range<usize>,
        slots: &Slots,
        result: &mut Sums,
    ) -> Result<()> {
        let job = self.job;
        let request = job.request;
        let facts = &job.queries;
        let (level, d, width) = (request.level, request.d, self.width);
        if !result.row_sum.is_empty() {
            let weights =
                (!self.weights.is_empty()).then(|| &self.weights[place.offset..place.offset + place.rows]);
            buffers.take_singles(rows, level)?;
            level.add_rows(buffers.singles(rows), d, weights, &mut self.row, &mut result.row_sum);
        }
        slots.runs(place.offset, place.rows, &self.order, &mut self.runs);
        self.tile.resize(place.rows * width, 0.0);
        // Rows of the tile in the form that the panels take; with one query, their products at once.
        let mut stride = d;
        match &facts.packed {
            Packed::OneF32 => {
                buffers.dots_one(rows, request.queries, AHEAD, level, &mut self.tile)?;
            }
            Packed::OneI16 { query, .. } => {
                buffers.dots_one_i16(rows, query, AHEAD, level, bytemuck::cast_slice_mut(&mut self.tile))?;
            }
            Packed::I16 { .. } => buffers.quantise(rows, level)?,
            Packed::I8 { .. } => buffers.quantise_i8(rows, level)?,
            Packed::Differences(_) => buffers.take_singles(rows, level)?,
            Packed::F32(_) => stride = buffers.take_apart(rows, level)?,
        }
        let buffers = &*buffers;
        let (singles, norms) = (buffers.singles(rows), &buffers.norms);
        self.load_halves(norms);
        let panels = queries.len().div_ceil(width);
        // The kernels fetch the next tile while the first panels are at work: as many bytes each as the tile takes in the form
        // that the kernel reads.
        let in_place = rows.dtype() == Dtype::F32 && stride == d;
        let fetch = |index: usize, kernel_rows: &[u8]| {
            let from = index * kernel_rows.len();
            let at = if from < next.len() { next[from..].as_ptr() as usize } else { 0 };
            if at == 0 { 4 * 12 * d } else { at.wrapping_sub(kernel_rows.as_ptr() as usize) }
        };
        for index in 0..panels {
            let lanes = index * width..((index + 1) * width).min(queries.len());
            let first = queries.start + lanes.start;
            let panel = first / width;
            let query_norms = &facts.sq_norms[first..first + width];
            let scales = RowScales { norms, scales: &buffers.scales };
            match &facts.packed {
                Packed::Differences(panels) => {
                    let packed = &panels[panel * d * width..][..d * width];
                    level.sq_differences(singles, d, packed, &mut self.tile, &mut self.min);
                }
                Packed::F32(panels) => {
                    let packed = &panels[panel * d * width..][..d * width];
                    // While the first panel is at work the next tile is fetched, later the next rows of this one.
                    let ahead = match (in_place, index == 0 || width <= 16) {
                        (true, true) => 4 * singles.len(),
                        (true, false) => 4 * 12 * d,
                        (false, _) => fetch(index, bytemuck::cast_slice(singles)),
                    };
                    level.dots(singles, stride, d, packed, ahead, &mut self.tile);
                    level.sq_distances(&mut self.tile, norms, query_norms, &mut self.min);
                }
                Packed::OneF32 => level.sq_distances(&mut self.tile, norms, query_norms, &mut self.min),
                Packed::I16 { d, panels, scales: query_scales } => {
                    let packed = &panels[panel * d * width..][..d * width];
                    let ahead = fetch(index, bytemuck::cast_slice(&buffers.integers));
                    let dots = bytemuck::cast_slice_mut(&mut self.tile);
                    level.dots_i16(&buffers.integers, *d, packed, ahead, dots);
                    let query_scales = &query_scales[first..first + width];
                    level.sq_distances_i32(&mut self.tile, scales, query_norms, query_scales, &mut self.min);
                }
                Packed::I8 { d, panels, scales: query_scales } => {
                    let packed = &panels[panel * d * width..][..d * width];
                    let dots = bytemuck::cast_slice_mut(&mut self.tile);
                    let ahead = fetch(index, bytemuck::cast_slice(&buffers.bytes));
                    level.dots_i8(&buffers.bytes, &buffers.sums, *d, packed, ahead, dots);
                    let query_scales = &query_scales[first..first + width];
                    level.sq_distances_i32(&mut self.tile, scales, query_norms, query_scales, &mut self.min);
                }
                Packed::OneI16 { scale, .. } => {
                    level.sq_distances_i32(&mut self.tile, scales, query_norms, &[*scale], &mut self.min);
                }
            }
            self.finish_panel(rows, norms, place, queries, &lanes, slots, result);
        }
        Ok(())
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
        let first = queries.start + lanes.start;
        if self.sampling {
            self.seed_panel(first, lanes);
            return;
        }
        self.hits.clear();
        let cuts = &self.cuts[lanes.start..lanes.start + self.width];
        level.below(&self.tile, &self.min, cuts, &mut self.hits);
        if !self.hits.is_empty()
            && self.take_hits(rows, norms, place, queries.start, lanes.start, slots, result)
        {
            level.column_min(&self.tile, &mut self.min);
        }
        if self.job.request.max_cosine {
            self.run_min.fill(f32::NEG_INFINITY);
            let query_norms = &self.job.queries.sq_norms[first..first + self.width];
            level.max_projection(&self.tile, norms, &self.halves, query_norms, &mut self.run_min);
            for (max, &found) in result.max_projection[lanes.clone()].iter_mut().zip(&self.run_min) {
                *max = max.max(found);
            }
        }
        if !self.job.exponents.is_empty() {
            self.add(lanes.start / self.width, queries.len().div_ceil(self.width), place.offset);
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
            let in_block = self.in_block(place.offset + row);
            let global_row = place.first_row + in_block as u64;
            let approximate = self.tile[row * self.width + lane];
            if approximate >= job.queries.near[query] {
                let candidate = Neighbor { sq_distance: f64::from(approximate), row: global_row };
                self.push_nearest(in_batch, query, candidate);
                continue;
            }
            masked = true;
            self.tile[row * self.width + lane] = FAR;
            let vector = &request.queries[query * d..(query + 1) * d];
            rows.read_f32(row, &mut self.row);
            let exact = request.level.sq_distance(&self.row, vector);
            let is_duplicate = exact < job.queries.duplicate[query];
            let is_self = is_duplicate && request.exclude_rows.is_some_and(|rows| rows[query] == global_row);
            let slot = slots.of(in_block);
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
                self.push_nearest(in_batch, query, Neighbor { sq_distance: exact, row: global_row });
            }
        }
        masked
    }

    /// Takes a candidate for the nearest rows of a query, and what may still enter with it.
    fn push_nearest(&mut self, in_batch: usize, query: usize, candidate: Neighbor) {
        let nearest = &mut self.nearest[in_batch];
        nearest.push(candidate);
        // Ties may still enter (by a lower row), so the bound itself passes.
        let bound = (nearest.bound().min(f64::from(FAR)) as f32).next_up();
        let cut = &mut self.cuts[in_batch];
        *cut = self.job.queries.near[query].max(bound).min(*cut);
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
                    let exponent = &job.exponents[index];
                    // The same single-precision g that the exponents were taken from. What the sum is relative to was rounded
                    // twice, the coefficient and its product with g: only the second belongs to the sum.
                    let g = f64::from(if exponent.root { shift.sqrt() } else { shift });
                    let rounding = exponent.shift(shift) + f64::from(exponent.coefficient) * g;
                    let at = cell * 2 * kernels * width + 2 * width * index + lane;
                    let max = -kernel.coefficient() * g + rounding * std::f64::consts::LN_2 + scale;
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

/// Where a tile lies: its first position in the block, and the global number of the block's first row.
struct TilePlace {
    offset: usize,
    rows: usize,
    first_row: u64,
}
