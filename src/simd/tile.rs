//! The reductions of a tile, written once over `Lanes`: dot products → squared distances → kernel sums.
//!
//! A tile is `rows × width` values, row-major, where the `width` columns are the queries of one panel. All functions
//! are `inline(always)` and are instantiated once per instruction set inside a `target_feature` function. No closure in
//! them may hold a vector operation: closures do not inherit the features and would be compiled for the baseline.
//!
//! ```text
//! sq_distances:  t ← max(x² + q² − 2t, 0),  min over rows
//! accumulate:    g = √t or t;  e = 2^(s − c·g), s = c·g_min;  sum += w e;  sum_sq += (w e)²
//! ```
//! The shift of every exponential is that of the smallest distance met so far in the block (per query and group), so the
//! argument is never positive but by a rounding, and small where it matters: at the rows that decide the sum. s is rounded
//! to single precision once and s − c·g once more (it is fused); `Exponent::shift` says what a sum at that shift stands for.

use super::one;

/// Stands for "no row here": far enough that every kernel is zero, near enough that its square root and sums stay finite.
pub(crate) const FAR: f32 = f32::from_bits((127 + 100) << 23);

/// N single-precision values that are worked on together.
///
/// # Safety
/// A type that implements this with instructions of a CPU feature must only be used where that feature was detected.
pub(super) unsafe trait Lanes: Copy {
    const N: usize;
    fn splat(value: f32) -> Self;
    /// # Safety
    /// `from` points to N readable values.
    unsafe fn load(from: *const f32) -> Self;
    /// The bits of the values as signed 32-bit integers, converted.
    fn integers(self) -> Self;
    /// Half-precision values.
    ///
    /// # Safety
    /// `from` points to 2·N readable bytes.
    unsafe fn load_half(from: *const u8) -> Self;
    /// # Safety
    /// `to` points to N writable values.
    unsafe fn store(self, to: *mut f32);
    /// Rounded to the nearest 16-bit integers, ties to even; all within ±2¹⁵.
    ///
    /// # Safety
    /// `to` points to N writable integers.
    unsafe fn store_i16(self, to: *mut i16);
    /// Asks for the cache line at an address, which need not be valid.
    fn prefetch(at: *const f32);
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    /// self · factor + term.
    fn mul_add(self, factor: Self, term: Self) -> Self;
    fn min(self, other: Self) -> Self;
    fn max(self, other: Self) -> Self;
    fn sqrt(self) -> Self;
    /// Bit i is set where lane i of self is smaller.
    fn less(self, other: Self) -> u32;
    /// 2^self for self ≤ 0; 0 or at most 2^-125 where the argument is below −125.
    fn exp2(self) -> Self;
    /// Sum of the lanes in double precision.
    fn total(self) -> f64;
    /// A row of 8-bit integers to 16 bits; returns ‖x‖².
    fn widen_row_i8(row: &[u8], out: &mut [i16]) -> i32;
    /// ⟨x,q⟩ and ‖x‖² of a row of 8-bit integers, exact in 32 bits.
    fn dot_and_square_i8(row: &[u8], query: &[i16]) -> (i32, i32);
}

/// Coefficients of a polynomial p(f) ≈ 2^f on [−½, ½] with p(0) = 1: greatest relative error 1.6e-7 in single precision.
#[allow(clippy::approx_constant)] // the fitted coefficient is near ln 2, not ln 2
pub(super) const EXP2: [f32; 6] =
    [1.0, 0.693_147, 0.240_222_42, 0.055_507_336, 0.009_671_513, 0.001_326_472_7];

/// Evaluates the polynomial of `EXP2`.
#[inline(always)]
pub(super) fn exp2_polynomial<V: Lanes>(f: V) -> V {
    let mut p = V::splat(EXP2[5]);
    for coefficient in [EXP2[4], EXP2[3], EXP2[2], EXP2[1], EXP2[0]] {
        p = p.mul_add(f, V::splat(coefficient));
    }
    p
}

/// One kernel at one bandwidth as the tile loop sees it: weight = 2^(−coefficient · g).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Exponent {
    /// Whether g is the distance (else its square).
    pub root: bool,
    /// c·log₂e.
    pub coefficient: f32,
}

impl Exponent {
    /// log₂ of the weight to which a sum at the squared distance `min` is relative: −s, in double precision, as `accumulate`
    /// rounds it.
    pub(crate) fn shift(&self, min: f32) -> f64 {
        let g = if self.root { min.sqrt() } else { min };
        -f64::from(g * self.coefficient)
    }
}

/// Sums of one panel (width queries) for one group of rows within a block.
///
/// `sums` holds, for each exponent, `width` sums of weights and then `width` sums of their squares, relative to the
/// weight at `min`.
pub(crate) struct PanelSums<'a> {
    pub min: &'a mut [f32],
    pub sums: &'a mut [f64],
}

/// Dot products to squared distances, in place; `min` gets the smallest of each column.
#[inline(always)]
pub(super) fn sq_distances<V: Lanes>(
    tile: &mut [f32],
    width: usize,
    row_norms: &[f32],
    query_norms: &[f32],
    min: &mut [f32],
) {
    assert!(tile.len() == width * row_norms.len() && query_norms.len() == width && min.len() == width);
    if width == 1 {
        min[0] = one::sq_distances::<V>(tile, row_norms, query_norms[0]);
        return;
    }
    let minus_two = V::splat(-2.0);
    let zero = V::splat(0.0);
    for v in (0..width).step_by(V::N) {
        // SAFETY: v + N ≤ width (width is a multiple of N), and row·width + v + N ≤ tile.len() by the assertion.
        unsafe {
            let query = V::load(query_norms.as_ptr().add(v));
            let mut smallest = V::splat(FAR);
            let mut at = tile.as_mut_ptr().add(v);
            for &norm in row_norms {
                let d2 = V::load(at).mul_add(minus_two, V::splat(norm).add(query)).max(zero);
                d2.store(at);
                smallest = smallest.min(d2);
                at = at.add(width);
            }
            smallest.store(min.as_mut_ptr().add(v));
        }
    }
}

/// Norms and scales of the rows of a tile of integer dot products.
#[derive(Clone, Copy)]
pub(crate) struct RowScales<'a> {
    /// ‖x‖² as stored.
    pub norms: &'a [f32],
    /// x ≈ scale · integers.
    pub scales: &'a [f32],
}

/// Integer dot products (the bits of the tile) to squared distances, in place, with the smallest of each column.
#[inline(always)]
pub(super) fn sq_distances_i32<V: Lanes>(
    tile: &mut [f32],
    width: usize,
    rows: RowScales<'_>,
    query_norms: &[f32],
    query_scales: &[f32],
    min: &mut [f32],
) {
    assert!(tile.len() == width * rows.norms.len() && rows.scales.len() == rows.norms.len());
    assert!(query_norms.len() == width && query_scales.len() == width && min.len() == width);
    if width == 1 {
        min[0] = one::sq_distances_i32::<V>(tile, rows, query_norms[0], query_scales[0]);
        return;
    }
    let zero = V::splat(0.0);
    for v in (0..width).step_by(V::N) {
        // SAFETY: v + N ≤ width (width is a multiple of N), and row·width + v + N ≤ tile.len() by the assertion.
        unsafe {
            let query = V::load(query_norms.as_ptr().add(v));
            let scale = V::load(query_scales.as_ptr().add(v));
            let mut smallest = V::splat(FAR);
            let mut at = tile.as_mut_ptr().add(v);
            for (&norm, &row_scale) in rows.norms.iter().zip(rows.scales) {
                let dot = V::load(at).integers().mul(scale);
                let d2 = dot.mul_add(V::splat(-2.0 * row_scale), V::splat(norm).add(query)).max(zero);
                d2.store(at);
                smallest = smallest.min(d2);
                at = at.add(width);
            }
            smallest.store(min.as_mut_ptr().add(v));
        }
    }
}

/// Dot products of 16-bit rows with a panel [d/2][WIDTH][2], exact in 32 bits.
#[inline(always)]
pub(super) fn dots_i16<const WIDTH: usize>(rows: &[i16], d: usize, panel: &[i16], out: &mut [i32]) {
    assert!(d.is_multiple_of(2) && panel.len() == d * WIDTH && out.len() * d == rows.len() * WIDTH);
    for (row, out) in rows.chunks_exact(d).zip(out.chunks_exact_mut(WIDTH)) {
        let mut sums = [0_i32; WIDTH];
        for (pair, queries) in row.as_chunks::<2>().0.iter().zip(panel.chunks_exact(2 * WIDTH)) {
            let (low, high) = (i32::from(pair[0]), i32::from(pair[1]));
            for (sum, query) in sums.iter_mut().zip(queries.as_chunks::<2>().0) {
                *sum += low * i32::from(query[0]) + high * i32::from(query[1]);
            }
        }
        out.copy_from_slice(&sums);
    }
}

/// Dot products of 8-bit rows with a panel [d/4][width][4] of queries shifted by 128, exact in 32 bits: `sums` holds
/// Σ x of each row, to take the shift back.
#[inline(always)]
pub(super) fn dots_i8(rows: &[i8], sums: &[i32], d: usize, panel: &[u8], out: &mut [i32]) {
    let width = panel.len() / d;
    assert!(d.is_multiple_of(4) && panel.len() == d * width && rows.len() == d * sums.len());
    for ((row, &sum), out) in rows.chunks_exact(d).zip(sums).zip(out.chunks_exact_mut(width)) {
        out.fill(-128 * sum);
        for (four, queries) in row.as_chunks::<4>().0.iter().zip(panel.chunks_exact(4 * width)) {
            for (out, query) in out.iter_mut().zip(queries.as_chunks::<4>().0) {
                for i in 0..4 {
                    *out += i32::from(four[i]) * i32::from(query[i]);
                }
            }
        }
    }
}

/// Squared distances from differences, Σ (x − q)², with the smallest of each column: for few dimensions, where the
/// cancellation in x² + q² − 2⟨x,q⟩ would cost more accuracy than the subtraction costs time.
#[inline(always)]
pub(super) fn sq_differences<V: Lanes>(
    rows: &[f32],
    d: usize,
    panel: &[f32],
    width: usize,
    tile: &mut [f32],
    min: &mut [f32],
) {
    assert!(rows.len() * width == tile.len() * d && panel.len() == d * width && min.len() == width);
    for v in (0..width).step_by(V::N) {
        let mut smallest = V::splat(FAR);
        for (i, row) in rows.chunks_exact(d).enumerate() {
            let mut sum = V::splat(0.0);
            for (k, &x) in row.iter().enumerate() {
                // SAFETY: k·width + v + N ≤ panel.len().
                let difference = V::splat(x).sub(unsafe { V::load(panel.as_ptr().add(k * width + v)) });
                sum = difference.mul_add(difference, sum);
            }
            // SAFETY: i·width + v + N ≤ tile.len().
            unsafe { sum.store(tile.as_mut_ptr().add(i * width + v)) };
            smallest = smallest.min(sum);
        }
        // SAFETY: v + N ≤ width = min.len().
        unsafe { smallest.store(min.as_mut_ptr().add(v)) };
    }
}

/// The smallest of each column.
#[inline(always)]
pub(super) fn column_min<V: Lanes>(tile: &[f32], width: usize, min: &mut [f32]) {
    assert!(tile.len().is_multiple_of(width) && min.len() == width);
    if width == 1 {
        min[0] = one::min::<V>(tile);
        return;
    }
    for v in (0..width).step_by(V::N) {
        let mut smallest = V::splat(FAR);
        for row in 0..tile.len() / width {
            // SAFETY: row·width + v + N ≤ tile.len().
            smallest = smallest.min(unsafe { V::load(tile.as_ptr().add(row * width + v)) });
        }
        // SAFETY: v + N ≤ width = min.len().
        unsafe { smallest.store(min.as_mut_ptr().add(v)) };
    }
}

/// Folds the largest projection ⟨x,q⟩/‖x‖ = (‖x‖² + ‖q‖² − D²)/(2‖x‖) of each column of squared distances into `max`.
///
/// `halves` holds 1/(2‖x‖) of each row (0 for a row without direction).
#[inline(always)]
pub(super) fn max_projection<V: Lanes>(
    tile: &[f32],
    width: usize,
    row_norms: &[f32],
    halves: &[f32],
    query_norms: &[f32],
    max: &mut [f32],
) {
    assert!(tile.len() == width * halves.len() && row_norms.len() == halves.len());
    assert!(max.len() == width && query_norms.len() == width);
    if width == 1 {
        max[0] = one::max_projection::<V>(tile, row_norms, halves, query_norms[0], max[0]);
        return;
    }
    for v in (0..width).step_by(V::N) {
        // SAFETY: v + N ≤ width and row·width + v + N ≤ tile.len().
        unsafe {
            let mut largest = V::load(max.as_ptr().add(v));
            let query = V::load(query_norms.as_ptr().add(v));
            for (row, (&half, &norm)) in halves.iter().zip(row_norms).enumerate() {
                let both = V::splat(norm).add(query);
                let projection = both.sub(V::load(tile.as_ptr().add(row * width + v))).mul(V::splat(half));
                largest = largest.max(projection);
            }
            largest.store(max.as_mut_ptr().add(v));
        }
    }
}

/// Appends (row, column) of every value below its column's cut, where the column's smallest (`min`) is below it.
#[inline(always)]
pub(super) fn below<V: Lanes>(
    tile: &[f32],
    width: usize,
    min: &[f32],
    cut: &[f32],
    hits: &mut Vec<(u32, u32)>,
) {
    assert!(tile.len().is_multiple_of(width) && min.len() == width && cut.len() == width);
    if width == 1 {
        if min[0] < cut[0] {
            one::below::<V>(tile, cut[0], hits);
        }
        return;
    }
    for v in (0..width).step_by(V::N) {
        // SAFETY: v + N ≤ width and row·width + v + N ≤ tile.len().
        unsafe {
            let limit = V::load(cut.as_ptr().add(v));
            if V::load(min.as_ptr().add(v)).less(limit) == 0 {
                continue;
            }
            for row in 0..tile.len() / width {
                let mut mask = V::load(tile.as_ptr().add(row * width + v)).less(limit);
                while mask != 0 {
                    hits.push((row as u32, v as u32 + mask.trailing_zeros()));
                    mask &= mask - 1;
                }
            }
        }
    }
}

/// Adds the weights of all rows of a tile to the sums of one group.
///
/// `min` is the smallest squared distance of each column of this tile. `weights` has one factor per row. The tile is overwritten where
/// some exponent takes the root.
#[inline(always)]
pub(super) fn accumulate<V: Lanes>(
    tile: &mut [f32],
    width: usize,
    min: &[f32],
    weights: Option<&[f32]>,
    exponents: &[Exponent],
    into: &mut PanelSums<'_>,
) {
    let rows = tile.len() / width;
    assert!(tile.len() == rows * width && min.len() == width && into.min.len() == width);
    assert!(
        into.sums.len() == 2 * width * exponents.len() && weights.is_none_or(|weights| weights.len() == rows)
    );
    if width == 1 {
        return one::accumulate::<V>(tile, min[0], weights, exponents, into);
    }
    for v in (0..width).step_by(V::N) {
        // SAFETY: v + N ≤ width, the length of all three.
        let shift = unsafe {
            let old = V::load(into.min.as_ptr().add(v));
            let new = old.min(V::load(min.as_ptr().add(v)));
            if new.less(old) != 0 {
                rescale(old, new, width, v, exponents, into.sums);
                new.store(into.min.as_mut_ptr().add(v));
            }
            new
        };
        // Exponents of the squared distance come first: the roots overwrite the tile.
        for (index, exponent) in exponents.iter().enumerate().filter(|(_, exponent)| !exponent.root) {
            let sums = &mut into.sums[2 * width * index..][..2 * width];
            add_weights::<V, false, false>(tile, width, v, shift, exponent.coefficient, weights, sums);
        }
        let shift = shift.sqrt();
        let mut roots = exponents.iter().enumerate().filter(|(_, exponent)| exponent.root).peekable();
        let mut first = true;
        while let Some((index, exponent)) = roots.next() {
            let sums = &mut into.sums[2 * width * index..][..2 * width];
            let c = exponent.coefficient;
            match (first, roots.peek().is_some()) {
                (true, false) => add_weights::<V, true, false>(tile, width, v, shift, c, weights, sums),
                (true, true) => add_weights::<V, true, true>(tile, width, v, shift, c, weights, sums),
                (false, _) => add_weights::<V, false, false>(tile, width, v, shift, c, weights, sums),
            }
            first = false;
        }
    }
}

/// Moves the sums of N columns from the shift at `old` to the shift at `new` (smaller).
#[inline(always)]
unsafe fn rescale<V: Lanes>(
    old: V,
    new: V,
    width: usize,
    v: usize,
    exponents: &[Exponent],
    sums: &mut [f64],
) {
    let mut factors = [0.0_f32; 16];
    for (index, exponent) in exponents.iter().enumerate() {
        let (new, old) = if exponent.root { (new.sqrt(), old.sqrt()) } else { (new, old) };
        let c = V::splat(exponent.coefficient);
        // SAFETY: N ≤ 16.
        unsafe { new.mul(c).sub(old.mul(c)).exp2().store(factors.as_mut_ptr()) };
        let (plain, squares) = sums[2 * width * index..][..2 * width].split_at_mut(width);
        for lane in 0..V::N {
            let factor = f64::from(factors[lane]);
            plain[v + lane] *= factor;
            squares[v + lane] *= factor * factor;
        }
    }
}

/// The inner loop: N columns of a tile, one exponent. `ROOT`: the tile holds squares, take roots; `KEEP`: store them.
#[inline(always)]
fn add_weights<V: Lanes, const ROOT: bool, const KEEP: bool>(
    tile: &mut [f32],
    width: usize,
    v: usize,
    shift: V,
    coefficient: f32,
    weights: Option<&[f32]>,
    sums: &mut [f64],
) {
    /// Rows worked on together, to hide the latency of the exponential and to shorten the chains of single-precision sums.
    const UNROLL: usize = 4;
    let rows = tile.len() / width;
    let shift = shift.mul(V::splat(coefficient));
    let c = V::splat(-coefficient);
    let mut sum = [V::splat(0.0); UNROLL];
    let mut sum_sq = [V::splat(0.0); UNROLL];
    let base = tile.as_mut_ptr();
    let whole = rows - rows % UNROLL;
    let mut row = 0;
    while row < whole {
        for i in 0..UNROLL {
            // SAFETY: row + i < rows, so (row + i)·width + v + N ≤ tile.len().
            let e = unsafe { weight_at::<V, ROOT, KEEP>(base.add((row + i) * width + v), shift, c) };
            let e = if let Some(weights) = weights { e.mul(V::splat(weights[row + i])) } else { e };
            sum[i] = sum[i].add(e);
            sum_sq[i] = e.mul_add(e, sum_sq[i]);
        }
        row += UNROLL;
    }
    for row in whole..rows {
        // SAFETY: row < rows, so row·width + v + N ≤ tile.len().
        let e = unsafe { weight_at::<V, ROOT, KEEP>(base.add(row * width + v), shift, c) };
        let e = if let Some(weights) = weights { e.mul(V::splat(weights[row])) } else { e };
        sum[0] = sum[0].add(e);
        sum_sq[0] = e.mul_add(e, sum_sq[0]);
    }
    let (plain, squares) = sums.split_at_mut(width);
    for (parts, into) in [(sum, plain), (sum_sq, squares)] {
        let mut values = [0.0_f32; 16];
        let total = parts[0].add(parts[1]).add(parts[2].add(parts[3]));
        // SAFETY: N ≤ 16.
        unsafe { total.store(values.as_mut_ptr()) };
        for lane in 0..V::N {
            into[v + lane] += f64::from(values[lane]);
        }
    }
}

/// Kernel weights of N values of a tile: 2^(shift + coefficient · g).
///
/// # Safety
/// `at` points to N readable and writable values.
#[inline(always)]
unsafe fn weight_at<V: Lanes, const ROOT: bool, const KEEP: bool>(
    at: *mut f32,
    shift: V,
    coefficient: V,
) -> V {
    // SAFETY: the caller's.
    unsafe {
        let mut g = V::load(at);
        if ROOT {
            g = g.sqrt();
            if KEEP {
                g.store(at);
            }
        }
        g.mul_add(coefficient, shift).exp2()
    }
}

/// ‖x − q‖² from differences in double precision, along 8 chains: the truth for near rows.
#[inline(always)]
pub(super) fn sq_distance(row: &[f32], query: &[f32]) -> f64 {
    sum_pairs(row, query, |x, q| (x - q) * (x - q))
}

/// A sum over pairs of elements in double precision, along 8 chains.
#[inline(always)]
fn sum_pairs(row: &[f32], query: &[f32], term: impl Fn(f64, f64) -> f64) -> f64 {
    let mut chains = [0.0_f64; 8];
    let (whole, rest) = row.as_chunks::<8>();
    let (query_whole, query_rest) = query.as_chunks::<8>();
    for (x, q) in whole.iter().zip(query_whole) {
        for i in 0..8 {
            chains[i] += term(f64::from(x[i]), f64::from(q[i]));
        }
    }
    let tail: f64 = rest.iter().zip(query_rest).map(|(&x, &q)| term(f64::from(x), f64::from(q))).sum();
    chains.iter().sum::<f64>() + tail
}

/// ‖x − q‖₁ in double precision.
#[inline(always)]
pub(super) fn manhattan(row: &[f32], query: &[f32]) -> f64 {
    sum_pairs(row, query, |x, q| (x - q).abs())
}

/// ⟨x, q⟩ in double precision.
#[inline(always)]
pub(super) fn inner_product(row: &[f32], query: &[f32]) -> f64 {
    sum_pairs(row, query, |x, q| x * q)
}
