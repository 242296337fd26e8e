//! Seeded k-means in two levels, and the assignment it leads to: a vector goes to the nearest list centroid among those
//! of the few nearest coarse cells. The route is a function of the vector alone, so an exact copy of a row takes the row's own route.
//!
//! Rows at very different distances from one centroid (a dense core and what strayed to it) are kept in lists of their own:
//! *shells*, told apart by the distance alone. The moments of either then describe it, where those of both together describe neither.

use rayon::prelude::*;

use super::random::Rng;
use crate::error::{Error, ErrorKind, Result};
use crate::simd::{Level, pack_panel};

/// Coarse cells whose lists are looked at.
const PROBES: usize = 4;

/// Lloyd passes inside a cell, then over all lists.
const CELL_PASSES: usize = 6;
const GLOBAL_PASSES: usize = 2;

/// Rows routed together.
const TILE: usize = 512;

/// Centroids packed for dot products with many rows.
#[derive(Clone, Debug)]
struct Packed {
    d: usize,
    count: usize,
    width: usize,
    panels: Vec<f32>,
    /// ‖c‖²/2.
    halves: Vec<f32>,
}

impl Packed {
    fn new(centroids: &[f32], d: usize, level: Level) -> Self {
        let width = level.panel_width(usize::MAX);
        let count = centroids.len() / d;
        let mut panels = vec![0.0; count.div_ceil(width) * d * width];
        for (panel, some) in panels.chunks_exact_mut(d * width).zip(centroids.chunks(d * width)) {
            pack_panel(some, d, width, panel);
        }
        let mut norms = vec![0.0; count];
        level.sq_norms(centroids, d, &mut norms);
        Self { d, count, width, panels, halves: norms.iter().map(|norm| norm / 2.0).collect() }
    }

    /// Calls `take(row, centroid, ‖c‖²/2 − ⟨x, c⟩)` for all pairs: half the squared distance but for ‖x‖²/2. NaN becomes +∞.
    fn each(&self, rows: &[f32], level: Level, dots: &mut Vec<f32>, mut take: impl FnMut(usize, usize, f32)) {
        let n = rows.len() / self.d;
        for (index, panel) in self.panels.chunks_exact(self.d * self.width).enumerate() {
            dots.resize(n * self.width, 0.0);
            level.dots(rows, self.d, self.d, panel, 0, dots);
            let first = index * self.width;
            let lanes = self.width.min(self.count - first);
            for (row, dots) in dots.chunks_exact(self.width).enumerate() {
                for (lane, dot) in dots[..lanes].iter().enumerate() {
                    take(row, first + lane, self.halves[first + lane] - dot);
                }
            }
        }
    }

    /// The nearest centroid of each row, the lower number where two are as near.
    fn nearest(&self, rows: &[f32], level: Level, dots: &mut Vec<f32>, best: &mut Vec<(f32, u32)>) {
        best.clear();
        best.resize(rows.len() / self.d, (f32::INFINITY, 0));
        self.each(rows, level, dots, |row, centroid, half| {
            if half < best[row].0 {
                best[row] = (half, centroid as u32);
            }
        });
    }
}

/// Centroids under coarse cells: `cells[j]..cells[j + 1]` are those of cell j. Each has one list, or one for each shell.
#[derive(Clone, Debug)]
pub struct Tree {
    d: usize,
    coarse: Vec<f32>,
    lists: Vec<f32>,
    cells: Vec<u32>,
    /// First list of each centroid, and the number of lists at the end.
    first: Vec<u32>,
    /// Largest ‖x − c‖² of each list; +∞ for the outermost of a centroid.
    outer: Vec<f32>,
    packed_coarse: Packed,
    packed_cells: Vec<Packed>,
    level: Level,
}

impl Tree {
    /// A tree of given centroids, row-major.
    ///
    /// # Errors
    /// `Format` where the cells do not divide the lists.
    pub fn new(d: usize, coarse: Vec<f32>, lists: Vec<f32>, cells: Vec<u32>, level: Level) -> Result<Self> {
        let fits = d > 0
            && coarse.len() == (cells.len().max(1) - 1) * d
            && cells.first() == Some(&0)
            && cells.is_sorted()
            && cells.last().is_some_and(|&end| end as usize * d == lists.len())
            && !lists.is_empty();
        if !fits {
            return Err(Error::new(ErrorKind::Format, "the cells of the index do not divide its lists"));
        }
        let packed_cells = cells
            .windows(2)
            .map(|ends| Packed::new(&lists[ends[0] as usize * d..ends[1] as usize * d], d, level))
            .collect();
        let packed_coarse = Packed::new(&coarse, d, level);
        let count = lists.len() / d;
        let (first, outer) = ((0..=count as u32).collect(), vec![f32::INFINITY; count]);
        Ok(Self { d, coarse, lists, cells, first, outer, packed_coarse, packed_cells, level })
    }

    /// The same centroids with shells: the largest ‖x − c‖² of each list, ascending for each centroid and ending with +∞.
    ///
    /// # Errors
    /// `Format` where they are not so.
    pub fn with_shells(mut self, outer: Vec<f32>) -> Result<Self> {
        let mut first = vec![0_u32];
        let mut ascending = true;
        for (at, &radius) in outer.iter().enumerate() {
            let begins = at == first[first.len() - 1] as usize;
            ascending &= radius >= 0.0 && (begins || radius > outer[at - 1]);
            if radius == f32::INFINITY {
                first.push(at as u32 + 1);
            }
        }
        let complete = first.last() == Some(&(outer.len() as u32)) && first.len() == self.first.len();
        if !ascending || !complete {
            return Err(Error::new(ErrorKind::Format, "the shells of the index do not fit its centroids"));
        }
        (self.first, self.outer) = (first, outer);
        Ok(self)
    }

    /// Number of lists.
    pub fn len(&self) -> usize {
        self.outer.len()
    }

    /// Number of centroids.
    pub fn centroids(&self) -> usize {
        self.lists.len() / self.d
    }

    /// First list of each centroid, and the number of lists at the end.
    pub fn first(&self) -> &[u32] {
        &self.first
    }

    /// Largest ‖x − c‖² of each list.
    pub fn outer(&self) -> &[f32] {
        &self.outer
    }

    /// The list of a row by its centroid and ‖x − c‖².
    pub fn shell(&self, centroid: u32, radius: f32) -> u32 {
        let shells = self.first[centroid as usize]..self.first[centroid as usize + 1];
        let inside = |list: &u32| radius <= self.outer[*list as usize];
        shells.clone().find(inside).unwrap_or(shells.end - 1)
    }

    /// Whether there are no lists: never.
    pub fn is_empty(&self) -> bool {
        self.lists.is_empty()
    }

    /// Centroids, row-major.
    pub fn lists(&self) -> &[f32] {
        &self.lists
    }

    /// Centroids of the coarse cells, row-major.
    pub fn coarse(&self) -> &[f32] {
        &self.coarse
    }

    /// First centroid of each cell, and the number of centroids at the end.
    pub fn cells(&self) -> &[u32] {
        &self.cells
    }

    /// The list of each row.
    pub fn route(&self, rows: &[f32], out: &mut [u32]) {
        let mut radii = vec![0.0; out.len()];
        self.route_centroids(rows, out, &mut radii);
        for (out, &radius) in out.iter_mut().zip(&radii) {
            *out = self.shell(*out, radius);
        }
    }

    /// The centroid of each row and ‖x − c‖², as single precision has it.
    pub fn route_centroids(&self, rows: &[f32], out: &mut [u32], radii: &mut [f32]) {
        let tiles = rows.chunks(TILE * self.d).zip(out.chunks_mut(TILE));
        for ((rows, out), radii) in tiles.zip(radii.chunks_mut(TILE)) {
            self.route_tile(rows, out, radii);
        }
    }

    fn route_tile(&self, rows: &[f32], out: &mut [u32], radii: &mut [f32]) {
        let (d, n) = (self.d, out.len());
        let mut dots = Vec::new();
        let mut nearest = vec![[(f32::INFINITY, u32::MAX); PROBES]; n];
        self.packed_coarse.each(rows, self.level, &mut dots, |row, cell, half| {
            let kept = &mut nearest[row];
            if half < kept[PROBES - 1].0 {
                let at = kept.partition_point(|&(other, _)| other <= half);
                kept.copy_within(at..PROBES - 1, at + 1);
                kept[at] = (half, cell as u32);
            }
        });
        let mut visits: Vec<(u32, u32)> = Vec::with_capacity(n * PROBES);
        for (row, kept) in nearest.iter().enumerate() {
            visits.extend(
                kept.iter().filter(|(_, cell)| *cell != u32::MAX).map(|&(_, cell)| (cell, row as u32)),
            );
        }
        visits.sort_unstable();
        let mut best = vec![(f32::INFINITY, u32::MAX); n];
        let mut gathered = Vec::new();
        for group in visits.chunk_by(|left, right| left.0 == right.0) {
            let cell = group[0].0 as usize;
            gathered.clear();
            for &(_, row) in group {
                gathered.extend_from_slice(&rows[row as usize * d..(row as usize + 1) * d]);
            }
            let first = self.cells[cell];
            self.packed_cells[cell].each(&gathered, self.level, &mut dots, |at, list, half| {
                let kept = &mut best[group[at].1 as usize];
                let list = first + list as u32;
                if half < kept.0 || half == kept.0 && list < kept.1 {
                    *kept = (half, list);
                }
            });
        }
        self.level.sq_norms(rows, d, radii);
        for ((out, radius), (half, list)) in out.iter_mut().zip(radii).zip(best) {
            *out = if list == u32::MAX { 0 } else { list };
            *radius = (*radius + 2.0 * half).max(0.0);
        }
    }

    /// Centroids of many rows, on all threads of the current pool.
    pub fn route_all(&self, rows: &[f32]) -> Vec<u32> {
        let mut out = vec![0; rows.len() / self.d];
        out.par_chunks_mut(TILE)
            .zip(rows.par_chunks(TILE * self.d))
            .for_each(|(out, rows)| self.route_tile(rows, out, &mut vec![0.0; out.len()]));
        out
    }

    /// Splits centroids into several each: (centroid, rows that stand for its members, number of parts). Those whose members are
    /// all alike stay whole.
    pub fn split(&self, wide: &[(u32, Vec<f32>, usize)], seed: u64) -> Result<Self> {
        let mut parts: std::collections::BTreeMap<u32, Vec<f32>> = std::collections::BTreeMap::new();
        for (list, members, count) in wide {
            let found = lloyd(
                members,
                self.d,
                *count,
                CELL_PASSES,
                &mut Rng::new(&[seed, u64::from(*list)]),
                self.level,
            );
            if found.len() > self.d {
                parts.insert(*list, found);
            }
        }
        self.replace(|list| parts.remove(&list))
    }

    /// Puts other centroids (none, one or more) in the place of a list's one.
    fn replace(&self, mut by: impl FnMut(u32) -> Option<Vec<f32>>) -> Result<Self> {
        let mut lists = Vec::with_capacity(self.lists.len());
        let mut cells = vec![0];
        for ends in self.cells.windows(2) {
            for list in ends[0]..ends[1] {
                match by(list) {
                    Some(centroids) => lists.extend(centroids),
                    None => lists.extend_from_slice(&self.lists[list as usize * self.d..][..self.d]),
                }
            }
            cells.push((lists.len() / self.d) as u32);
        }
        Self::new(self.d, self.coarse.clone(), lists, cells, self.level)
    }

    /// Trains a tree of about `count` lists on sampled rows.
    pub fn train(sample: &[f32], d: usize, count: usize, seed: u64, level: Level) -> Result<Self> {
        let n = sample.len() / d;
        let count = count.clamp(1, n);
        let cells = (count as f64).sqrt().round().max(1.0) as usize;
        let coarse = lloyd(sample, d, cells, CELL_PASSES + 4, &mut Rng::new(&[seed, 0]), level);
        let packed = Packed::new(&coarse, d, level);
        let of_row = assign(&packed, sample, level);
        let mut members: Vec<Vec<u32>> = vec![Vec::new(); packed.count];
        for (row, &cell) in of_row.iter().enumerate() {
            members[cell as usize].push(row as u32);
        }
        let parts: Vec<Vec<f32>> = members
            .par_iter()
            .enumerate()
            .map(|(cell, members)| {
                let rows = gather(sample, d, members);
                let share = (count as f64 * members.len() as f64 / n as f64).round().max(1.0) as usize;
                if members.is_empty() {
                    return coarse[cell * d..(cell + 1) * d].to_vec();
                }
                lloyd(&rows, d, share, CELL_PASSES, &mut Rng::new(&[seed, 1, cell as u64]), level)
            })
            .collect();
        let mut ends = vec![0_u32];
        for part in &parts {
            ends.push(ends[ends.len() - 1] + (part.len() / d) as u32);
        }
        let mut tree = Self::new(d, coarse, parts.concat(), ends, level)?;
        for pass in 0..=GLOBAL_PASSES {
            let routes = tree.route_all(sample);
            let mut members: Vec<Vec<u32>> = vec![Vec::new(); tree.len()];
            for (row, &list) in routes.iter().enumerate() {
                members[list as usize].push(row as u32);
            }
            let typical = n as f64 / count as f64;
            let last = pass == GLOBAL_PASSES;
            let centroids: Vec<Vec<f32>> = members
                .par_iter()
                .enumerate()
                .map(|(list, members)| {
                    let rows = gather(sample, d, members);
                    if members.is_empty() {
                        return Vec::new();
                    }
                    if !last && members.len() as f64 > 2.0 * typical && members.len() >= 8 {
                        let parts = (members.len() as f64 / typical).round() as usize;
                        let mut rng = Rng::new(&[seed, 2, pass as u64, list as u64]);
                        return lloyd(&rows, d, parts, CELL_PASSES, &mut rng, level);
                    }
                    mean(&rows, d)
                })
                .collect();
            let mut centroids: Vec<Option<Vec<f32>>> = centroids.into_iter().map(Some).collect();
            tree = tree.replace(|list| centroids[list as usize].take())?;
        }
        Ok(tree)
    }
}

/// Radii (‖x − c‖²) that cut the rows of a centroid into shells, given theirs: the outer radius of each but the last.
///
/// A cut is made where it parts the logarithms best, if the parts' geometric means then differ by more than `RATIO`: rows spread
/// evenly in more than a few dimensions lie at like distances and are not cut.
pub fn shells(radii: &mut [f32]) -> Vec<f32> {
    /// A centroid has at most so many.
    const MOST: usize = 4;
    const RATIO: f64 = 4.0;
    radii.sort_unstable_by(f32::total_cmp);
    let mean = radii.iter().map(|&r| f64::from(r)).sum::<f64>() / radii.len().max(1) as f64;
    let logs: Vec<f64> = radii.iter().map(|&r| (f64::from(r) + 1e-6 * mean + 1e-30).ln()).collect();
    let mut sums = vec![0.0];
    for log in &logs {
        sums.push(sums[sums.len() - 1] + log);
    }
    // The best cut of a range, and how far its parts lie from each other.
    let best = |start: usize, end: usize| -> Option<(f64, usize)> {
        let mut found: Option<(f64, f64, usize)> = None;
        for at in start + 1..end {
            if radii[at] <= radii[at - 1] {
                continue;
            }
            let (left, right) = ((at - start) as f64, (end - at) as f64);
            let apart = (sums[end] - sums[at]) / right - (sums[at] - sums[start]) / left;
            let between = apart * apart * left * right;
            if found.is_none_or(|(most, _, _)| between > most) {
                found = Some((between, apart, at));
            }
        }
        found.filter(|&(_, apart, _)| apart > RATIO.ln()).map(|(_, apart, at)| (apart, at))
    };
    let mut ends = vec![0, radii.len()];
    while ends.len() <= MOST {
        let cut =
            ends.windows(2).filter_map(|ends| best(ends[0], ends[1])).max_by(|a, b| a.0.total_cmp(&b.0));
        let Some((_, at)) = cut else { break };
        ends.push(at);
        ends.sort_unstable();
    }
    ends[1..ends.len() - 1].iter().map(|&at| radii[at - 1]).collect()
}

fn gather(rows: &[f32], d: usize, chosen: &[u32]) -> Vec<f32> {
    let mut out = Vec::with_capacity(chosen.len() * d);
    for &row in chosen {
        out.extend_from_slice(&rows[row as usize * d..(row as usize + 1) * d]);
    }
    out
}

fn mean(rows: &[f32], d: usize) -> Vec<f32> {
    let mut sum = vec![0.0_f64; d];
    for row in rows.chunks_exact(d) {
        sum.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x));
    }
    let n = (rows.len() / d).max(1) as f64;
    sum.iter().map(|sum| (sum / n) as f32).collect()
}

fn assign(packed: &Packed, rows: &[f32], level: Level) -> Vec<u32> {
    let parts: Vec<Vec<u32>> = rows
        .par_chunks(TILE * packed.d)
        .map(|rows| {
            let (mut dots, mut best) = (Vec::new(), Vec::new());
            packed.nearest(rows, level, &mut dots, &mut best);
            best.iter().map(|&(_, centroid)| centroid).collect()
        })
        .collect();
    parts.concat()
}

/// Lloyd's k-means from `k` random rows: centroids, fewer than `k` where the rows have fewer different values. A
/// centroid that loses all its rows takes over a random row.
fn lloyd(rows: &[f32], d: usize, k: usize, passes: usize, rng: &mut Rng, level: Level) -> Vec<f32> {
    let n = rows.len() / d;
    let k = k.clamp(1, n.max(1));
    if k == 1 {
        return mean(rows, d);
    }
    let chosen: Vec<u32> = rng.distinct(n as u64, k).into_iter().map(|row| row as u32).collect();
    let mut centroids = gather(rows, d, &chosen);
    for pass in 0..passes {
        let packed = Packed::new(&centroids, d, level);
        let of_row = assign(&packed, rows, level);
        let mut sums = vec![0.0_f64; k * d];
        let mut counts = vec![0_u64; k];
        for (row, &centroid) in rows.chunks_exact(d).zip(&of_row) {
            let centroid = centroid as usize;
            counts[centroid] += 1;
            sums[centroid * d..][..d].iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x));
        }
        let last = pass + 1 == passes;
        for (centroid, &count) in counts.iter().enumerate() {
            let place = &mut centroids[centroid * d..][..d];
            if count > 0 {
                place
                    .iter_mut()
                    .zip(&sums[centroid * d..][..d])
                    .for_each(|(to, sum)| *to = (sum / count as f64) as f32);
            } else if !last {
                let row = rng.below(n as u64) as usize;
                place.copy_from_slice(&rows[row * d..(row + 1) * d]);
            }
        }
        if last && counts.contains(&0) {
            let kept = centroids.chunks_exact(d).zip(&counts).filter(|(_, count)| **count > 0);
            return kept.flat_map(|(centroid, _)| centroid.iter().copied()).collect();
        }
    }
    centroids
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(n: usize, d: usize, seed: u64) -> Vec<f32> {
        let mut rng = Rng::new(&[seed]);
        let mut normal = || (0..12).map(|_| rng.uniform()).sum::<f64>() - 6.0;
        (0..n * d).map(|at| (normal() + 3.0 * f64::from((at / d % 7) as u32)) as f32).collect()
    }

    #[test]
    fn routes_are_nearly_nearest_and_the_same_in_any_company() {
        let level = Level::current().unwrap();
        let (n, d) = (3000, 20);
        let data = rows(n, d, 1);
        let tree = Tree::train(&data, d, 60, 5, level).unwrap();
        assert!((45..=90).contains(&tree.len()), "{}", tree.len());
        let together = tree.route_all(&data);
        let mut nearest = 0;
        for row in 0..n {
            let x = &data[row * d..(row + 1) * d];
            let mut alone = [0];
            tree.route(x, &mut alone);
            assert_eq!(alone[0], together[row]);
            let distance = |list: usize| -> f64 {
                tree.lists()[list * d..][..d].iter().zip(x).map(|(c, x)| f64::from(c - x).powi(2)).sum()
            };
            let best = (0..tree.len()).min_by(|&a, &b| distance(a).total_cmp(&distance(b))).unwrap();
            nearest += usize::from(distance(together[row] as usize) <= distance(best) * (1.0 + 1e-5));
        }
        assert!(nearest > n * 95 / 100, "{nearest}");
        let again = Tree::train(&data, d, 60, 5, level).unwrap();
        assert_eq!(again.lists(), tree.lists());
    }

    #[test]
    fn shells_part_a_core_from_what_strayed_and_nothing_else() {
        let mut rng = Rng::new(&[4]);
        // ‖x‖² of normal vectors of 20 dimensions: one shell.
        let mut even: Vec<f32> = (0..500)
            .map(|_| {
                (0..20).map(|_| ((0..12).map(|_| rng.uniform()).sum::<f64>() - 6.0).powi(2)).sum::<f64>()
                    as f32
            })
            .collect();
        assert!(shells(&mut even.clone()).is_empty());
        let core = even.iter().copied().fold(0.0, f32::max);
        even.extend([5e4, 6e4, 7e4, 9e9]);
        assert_eq!(shells(&mut even), [core, 7e4]);
        assert!(shells(&mut [1.0; 9]).is_empty() && shells(&mut []).is_empty());
        assert_eq!(shells(&mut [0.0, 0.0, 3.0]), [0.0]);
        let level = Level::current().unwrap();
        let tree = Tree::new(1, vec![0.0], vec![0.0, 10.0], vec![0, 2], level).unwrap();
        assert!(tree.clone().with_shells(vec![4.0, 1.0, f32::INFINITY]).is_err());
        assert!(tree.clone().with_shells(vec![4.0, f32::INFINITY]).is_err());
        assert!(tree.clone().with_shells(vec![f32::INFINITY, 4.0]).is_err());
        let tree = tree.with_shells(vec![4.0, f32::INFINITY, f32::INFINITY]).unwrap();
        let mut lists = [9; 4];
        tree.route(&[1.0, 2.0, -3.0, 40.0], &mut lists);
        assert_eq!((tree.len(), tree.centroids(), lists), (3, 2, [0, 0, 1, 2]));
    }

    #[test]
    fn copies_of_one_row_and_more_lists_than_rows_are_no_trouble() {
        let level = Level::current().unwrap();
        let data = [1.0, 2.0, 3.0].repeat(50);
        let tree = Tree::train(&data, 3, 10, 0, level).unwrap();
        assert!(tree.route_all(&data).windows(2).all(|pair| pair[0] == pair[1]));
        let few = rows(3, 4, 2);
        assert!(Tree::train(&few, 4, 100, 0, level).unwrap().len() <= 3);
    }
}
