//! The proof of a level at first use: every kernel of it against the portable one, on a small tile.
//!
//! A CPU (or an emulator, or a compiler) that gets an instruction wrong would give wrong densities without a sign. The
//! check takes about a millisecond.

use super::{Exponent, Integers, Level, PanelSums, RowScales, pack_panel, pack_panel_i8, pack_panel_i16};
use crate::rows::{Dtype, Rows};

/// Dimensions and rows of the check: whole steps and rests of every loop.
const D: usize = 86;
const ROWS: usize = 53;

/// Whether the kernels of a level agree with the portable ones.
pub(super) fn agrees(level: Level) -> bool {
    [1, 1000].into_iter().all(|queries| {
        let width = level.panel_width(queries);
        let (ours, reference) = (results(level, width), results(Level::PORTABLE, width));
        ours.len() == reference.len()
            && ours.iter().zip(&reference).all(|(a, b)| (a - b).abs() <= 2e-5 * b.abs().max(1.0))
    })
}

/// What the kernels of a level make of one tile, as one list of numbers.
fn results(level: Level, width: usize) -> Vec<f64> {
    let wave = |n: usize, step: f32| -> Vec<f32> { (0..n).map(|i| (i as f32 * step).sin()).collect() };
    let (rows, queries) = (wave(ROWS * D, 0.37), wave(width * D, 0.23));
    let (mut norms, mut query_norms) = (vec![0.0; ROWS], vec![0.0; width]);
    level.sq_norms(&rows, D, &mut norms);
    level.sq_norms(&queries, D, &mut query_norms);
    let mut all: Vec<f64> = norms.iter().chain(&query_norms).map(|&x| f64::from(x)).collect();

    let mut panel = vec![0.0; width * D];
    pack_panel(&queries, D, width, &mut panel);
    let (mut tile, mut min) = (vec![0.0; ROWS * width], vec![0.0; width]);
    all.extend(one_query(level, &rows, &queries[..D]));
    level.sq_differences(&rows, D, &panel, &mut tile, &mut min);
    all.extend(tile.iter().chain(&min).map(|&x| f64::from(x)));
    // The portable path knows its own two widths only; other widths are summed up here.
    if level == Level::PORTABLE && width != level.panel_width(1) && width != level.panel_width(1000) {
        for (row, out) in rows.chunks_exact(D).zip(tile.chunks_exact_mut(width)) {
            for (query, out) in queries.chunks_exact(D).zip(out) {
                *out = row.iter().zip(query).map(|(x, q)| x * q).sum();
            }
        }
    } else {
        level.dots(&rows, D, D, &panel, 0, &mut tile);
    }
    level.sq_distances(&mut tile, &norms, &query_norms, &mut min);
    all.extend(tile.iter().chain(&min).map(|&x| f64::from(x)));
    let mut projection = vec![0.0; width];
    level.max_projection(&tile, &norms, &vec![0.05; ROWS], &query_norms, &mut projection);
    all.extend(projection.iter().map(|&x| f64::from(x)));
    let mut hits = Vec::new();
    level.below(&tile, &min, &vec![80.0; width], &mut hits);
    hits.sort_unstable();
    all.push(hits.len() as f64);

    let exponents =
        [(true, 0.7), (false, 0.01), (true, 3.0)].map(|(root, coefficient)| Exponent { root, coefficient });
    let (mut shifts, mut sums) = (vec![super::FAR; width], vec![0.0; 2 * width * exponents.len()]);
    let weights = wave(ROWS, 0.5).iter().map(|x| x.abs()).collect::<Vec<_>>();
    level.accumulate(
        &mut tile,
        &min,
        Some(&weights),
        &exponents,
        &mut PanelSums { min: &mut shifts, sums: &mut sums },
    );
    all.extend(&sums);

    let (mut integers, mut query_integers) = (vec![0; ROWS * D], vec![0; width * D]);
    level.quantise(&rows, 2000.0, &mut integers);
    level.quantise(&queries, 3000.0, &mut query_integers);
    let mut packed = vec![0; width * D];
    pack_panel_i16(&query_integers, D, width, &mut packed);
    let mut dots = vec![0_i32; ROWS * width];
    if level == Level::PORTABLE && width != level.panel_width(1) && width != level.panel_width(1000) {
        for (row, out) in integers.chunks_exact(D).zip(dots.chunks_exact_mut(width)) {
            for (query, out) in query_integers.chunks_exact(D).zip(out) {
                *out = row.iter().zip(query).map(|(&x, &q)| i32::from(x) * i32::from(q)).sum();
            }
        }
    } else {
        level.dots_i16(&integers, D, &packed, 0, &mut dots);
    }
    all.extend(dots.iter().map(|&x| f64::from(x)));
    let mut tile: Vec<f32> = dots.iter().map(|&dot| f32::from_bits(dot.cast_unsigned())).collect();
    let scales = RowScales { norms: &norms, scales: &vec![1.0 / 2000.0; ROWS] };
    level.sq_distances_i32(&mut tile, scales, &query_norms, &vec![1.0 / 3000.0; width], &mut min);
    all.extend(tile.iter().map(|&x| f64::from(x)));
    let padded = D.next_multiple_of(4);
    let (mut bytes, mut query_bytes) = (vec![0_i8; ROWS * padded], vec![0_i8; width * padded]);
    let sums: Vec<i32> = rows
        .chunks_exact(D)
        .zip(bytes.chunks_exact_mut(padded))
        .map(|(row, into)| level.quantise_i8(row, 120.0, &mut into[..D]))
        .collect();
    for (query, into) in queries.chunks_exact(D).zip(query_bytes.chunks_exact_mut(padded)) {
        level.quantise_i8(query, 110.0, &mut into[..D]);
    }
    let mut packed = vec![0; width * padded];
    pack_panel_i8(&query_bytes, padded, width, &mut packed);
    level.dots_i8(&bytes, &sums, padded, &packed, 0, &mut dots);
    all.extend(dots.iter().map(|&x| f64::from(x)));
    all
}

/// What the kernels of one query make of rows of every type.
fn one_query(level: Level, rows: &[f32], query: &[f32]) -> Vec<f64> {
    let halves: Vec<u8> = rows.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect();
    let mut all = Vec::new();
    let exponents = [(true, 0.7), (false, 0.01)].map(|(root, coefficient)| Exponent { root, coefficient });
    for (bytes, dtype) in [(bytemuck::cast_slice(rows), Dtype::F32), (&halves[..], Dtype::F16)] {
        let Ok(rows) = Rows::new(bytes, dtype, ROWS, D, None) else { return Vec::new() };
        let (mut tile, mut norms, mut min) = ([0.0; ROWS], [0.0; ROWS], [0.0]);
        level.dots_one(&rows, query, 0, &mut tile, &mut norms);
        all.extend(tile.iter().chain(&norms).map(|&x| f64::from(x)));
        level.sq_distances(&mut tile, &norms, &[30.0], &mut min);
        let (mut shift, mut sums) = ([super::FAR], [0.0; 4]);
        let mut into = PanelSums { min: &mut shift, sums: &mut sums };
        level.accumulate(&mut tile, &min, None, &exponents, &mut into);
        all.extend(sums.into_iter().chain([f64::from(min[0])]));
        let (mut values, mut scales) = (vec![0; ROWS * D], [0.0; ROWS]);
        let mut into = Integers { stride: D, values: &mut values, norms: &mut norms, scales: &mut scales };
        level.quantise_rows(&rows, 1000.0, &mut into);
        all.extend(values.iter().map(|&x| f64::from(x)).chain(scales.iter().map(|&x| f64::from(x))));
        let mut widened = vec![0.0; ROWS * D];
        level.widen(&rows, &mut widened, &mut norms);
        all.extend(widened.iter().chain(&norms).map(|&x| f64::from(x)));
    }
    let bytes: Vec<u8> = (0..ROWS * D).map(|i| (i * 37 % 255) as u8 ^ 0x80).collect();
    let query: Vec<i16> = (0..D).map(|i| (i * 331 % 30_000) as i16 - 15_000).collect();
    let (mut dots, mut squares, mut wide) = ([0; ROWS], [0; ROWS], vec![0; ROWS * D]);
    level.dots_one_i8(&bytes, &query, 0, &mut dots, &mut squares);
    all.extend(dots.iter().chain(&squares).map(|&x| f64::from(x)));
    level.widen_i8(&bytes, D, D, &mut wide, &mut squares);
    all.extend(wide.iter().map(|&x| f64::from(x)).chain(squares.iter().map(|&x| f64::from(x))));
    level.dots_one_i16(&wide, &query, &mut dots);
    all.extend(dots.iter().map(|&x| f64::from(x)));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_of_this_cpu_is_proven() {
        for level in Level::available() {
            assert!(agrees(level), "{}", level.name());
        }
    }
}
