//! The reductions of a tile with one query: its rows lie in the lanes.
//!
//! The same steps as in `tile`, for a column of width 1.

use super::tile::{Exponent, FAR, Lanes, PanelSums, RowScales};

/// Values in a vector at most.
const MOST: usize = 16;

/// Calls `$run` with (first value, vector of values) for all of `$values`, filled up with `$fill` at the end.
macro_rules! each_vector {
    ($lanes:ty, $values:expr, $fill:expr, |$at:ident, $vector:ident| $run:block) => {{
        let values: &[f32] = $values;
        let whole = values.len() - values.len() % <$lanes>::N;
        let mut $at = 0;
        while $at < whole {
            // SAFETY: at + N ≤ values.len().
            let $vector = unsafe { <$lanes>::load(values.as_ptr().add($at)) };
            $run
            $at += <$lanes>::N;
        }
        if $at < values.len() {
            let mut rest = [$fill; MOST];
            rest[..values.len() - $at].copy_from_slice(&values[$at..]);
            // SAFETY: N ≤ MOST.
            let $vector = unsafe { <$lanes>::load(rest.as_ptr()) };
            $run
        }
    }};
}

/// The first `lanes.N` values of a slice, filled up where it is shorter.
#[inline(always)]
fn load_from<V: Lanes>(values: &[f32], at: usize, fill: f32) -> V {
    if at + V::N <= values.len() {
        // SAFETY: at + N ≤ values.len().
        return unsafe { V::load(values.as_ptr().add(at)) };
    }
    let mut rest = [fill; MOST];
    rest[..values.len() - at].copy_from_slice(&values[at..]);
    // SAFETY: N ≤ MOST.
    unsafe { V::load(rest.as_ptr()) }
}

/// Writes the values of a vector from `at` on, as many as there is room for.
#[inline(always)]
fn store_to<V: Lanes>(vector: V, values: &mut [f32], at: usize) {
    if at + V::N <= values.len() {
        // SAFETY: at + N ≤ values.len().
        return unsafe { vector.store(values.as_mut_ptr().add(at)) };
    }
    let mut rest = [0.0; MOST];
    // SAFETY: N ≤ MOST.
    unsafe { vector.store(rest.as_mut_ptr()) };
    let room = values.len() - at;
    values[at..].copy_from_slice(&rest[..room]);
}

/// The smallest lane.
#[inline(always)]
fn smallest<V: Lanes>(vector: V) -> f32 {
    let mut lanes = [FAR; MOST];
    // SAFETY: N ≤ MOST.
    unsafe { vector.store(lanes.as_mut_ptr()) };
    lanes.into_iter().fold(FAR, f32::min)
}

/// Dot products to squared distances, in place; returns the smallest.
#[inline(always)]
pub(super) fn sq_distances<V: Lanes>(tile: &mut [f32], row_norms: &[f32], query_norm: f32) -> f32 {
    assert!(tile.len() == row_norms.len());
    let mut min = V::splat(FAR);
    for at in (0..tile.len()).step_by(V::N) {
        let norm = load_from::<V>(row_norms, at, FAR).add(V::splat(query_norm));
        let d2 = load_from::<V>(tile, at, 0.0).mul_add(V::splat(-2.0), norm).max(V::splat(0.0));
        store_to(d2, tile, at);
        min = min.min(d2);
    }
    smallest(min)
}

/// Integer dot products (the bits of the tile) to squared distances, in place; returns the smallest.
#[inline(always)]
pub(super) fn sq_distances_i32<V: Lanes>(
    tile: &mut [f32],
    rows: RowScales<'_>,
    query_norm: f32,
    query_scale: f32,
) -> f32 {
    assert!(tile.len() == rows.norms.len() && tile.len() == rows.scales.len());
    let mut min = V::splat(FAR);
    for at in (0..tile.len()).step_by(V::N) {
        let bits = load_from::<V>(tile, at, 0.0);
        let dot = bits.integers().mul(V::splat(query_scale));
        let scale = load_from::<V>(rows.scales, at, 0.0).mul(V::splat(-2.0));
        let norm = load_from::<V>(rows.norms, at, FAR).add(V::splat(query_norm));
        let d2 = dot.mul_add(scale, norm).max(V::splat(0.0));
        store_to(d2, tile, at);
        min = min.min(d2);
    }
    smallest(min)
}

/// The smallest value, `FAR` where there is none.
#[inline(always)]
pub(super) fn min<V: Lanes>(tile: &[f32]) -> f32 {
    let mut min = V::splat(FAR);
    each_vector!(V, tile, FAR, |at, values| {
        min = min.min(values);
    });
    smallest(min)
}

/// Appends (row, 0) of every value below the cut.
#[inline(always)]
pub(super) fn below<V: Lanes>(tile: &[f32], cut: f32, hits: &mut Vec<(u32, u32)>) {
    let limit = V::splat(cut);
    each_vector!(V, tile, f32::INFINITY, |at, values| {
        let mut mask = values.less(limit);
        while mask != 0 {
            hits.push((at as u32 + mask.trailing_zeros(), 0));
            mask &= mask - 1;
        }
    });
}

/// The largest projection on a row's direction, as in `tile`.
#[inline(always)]
pub(super) fn max_projection<V: Lanes>(
    tile: &[f32],
    row_norms: &[f32],
    halves: &[f32],
    query_norm: f32,
    max: f32,
) -> f32 {
    assert!(tile.len() == row_norms.len() && tile.len() == halves.len());
    let mut largest = V::splat(max);
    for at in (0..tile.len()).step_by(V::N) {
        let both = load_from::<V>(row_norms, at, 0.0).add(V::splat(query_norm));
        // Beyond the end the distance is far and the projection −∞ or 0 · (−far): never larger.
        let projection = both.sub(load_from::<V>(tile, at, FAR)).mul(load_from::<V>(halves, at, 1.0));
        largest = largest.max(projection);
    }
    let mut lanes = [f32::NEG_INFINITY; MOST];
    // SAFETY: N ≤ MOST.
    unsafe { largest.store(lanes.as_mut_ptr()) };
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// Adds the weights of all rows of a tile to the sums of one group, as in `tile`.
#[inline(always)]
pub(super) fn accumulate<V: Lanes>(
    tile: &mut [f32],
    min: f32,
    weights: Option<&[f32]>,
    exponents: &[Exponent],
    into: &mut PanelSums<'_>,
) {
    assert!(into.min.len() == 1 && into.sums.len() == 2 * exponents.len());
    assert!(weights.is_none_or(|weights| weights.len() == tile.len()));
    let shift = into.min[0].min(min);
    if shift < into.min[0] {
        for (exponent, sums) in exponents.iter().zip(into.sums.chunks_exact_mut(2)) {
            // Both shifts are exact in double precision, and so is a factor between them.
            let factor = (exponent.shift(into.min[0]) - exponent.shift(shift)).exp2();
            sums[0] *= factor;
            sums[1] *= factor * factor;
        }
        into.min[0] = shift;
    }
    for root in [false, true] {
        // Exponents of the squared distance come first: the roots overwrite the tile.
        if root && exponents.iter().any(|exponent| exponent.root) {
            for at in (0..tile.len()).step_by(V::N) {
                let roots = load_from::<V>(tile, at, 0.0).sqrt();
                store_to(roots, tile, at);
            }
        }
        let from = if root { V::splat(shift).sqrt() } else { V::splat(shift) };
        for (exponent, sums) in
            exponents.iter().zip(into.sums.chunks_exact_mut(2)).filter(|(exponent, _)| exponent.root == root)
        {
            let shift = from.mul(V::splat(exponent.coefficient));
            let c = V::splat(-exponent.coefficient);
            let (mut sum, mut sum_sq) = (V::splat(0.0), V::splat(0.0));
            each_vector!(V, tile, FAR, |at, values| {
                let e = values.mul_add(c, shift).exp2();
                let e = match weights {
                    Some(weights) => e.mul(load_from::<V>(weights, at, 0.0)),
                    None => e,
                };
                sum = sum.add(e);
                sum_sq = e.mul_add(e, sum_sq);
            });
            sums[0] += sum.total();
            sums[1] += sum_sq.total();
        }
    }
}
