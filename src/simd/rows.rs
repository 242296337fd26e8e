//! The rows of a tile in the form that its arithmetic takes: norms, single precision, integers; and dot products with
//! one query, where nothing is worth writing down in between.
//!
//! Written once over `Lanes` and `Element`, as in `tile`. Rows are read where they lie, whatever their alignment.

use super::tile::Lanes;

/// Accumulators of a sum along a row: enough to hide the latency of a multiply-add.
const CHAINS: usize = 4;

/// The stored type of a floating row.
///
/// # Safety
/// `SIZE` is the size of an element; the functions read no more than they say.
pub(super) unsafe trait Element {
    const SIZE: usize;
    /// # Safety
    /// `from` points to `V::N` readable elements.
    unsafe fn load<V: Lanes>(from: *const u8) -> V;
    /// # Safety
    /// `from` points to a readable element.
    unsafe fn one(from: *const u8) -> f32;
}

/// float32.
pub(super) struct Single;
/// float16.
pub(super) struct Half;

// SAFETY: 4 bytes an element.
unsafe impl Element for Single {
    const SIZE: usize = 4;
    #[inline(always)]
    unsafe fn load<V: Lanes>(from: *const u8) -> V {
        // SAFETY: the caller's.
        unsafe { V::load(from.cast()) }
    }
    #[inline(always)]
    unsafe fn one(from: *const u8) -> f32 {
        // SAFETY: the caller's; the read may be unaligned.
        f32::from_le_bytes(unsafe { from.cast::<[u8; 4]>().read_unaligned() })
    }
}

// SAFETY: 2 bytes an element.
unsafe impl Element for Half {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load<V: Lanes>(from: *const u8) -> V {
        // SAFETY: the caller's.
        unsafe { V::load_half(from) }
    }
    #[inline(always)]
    unsafe fn one(from: *const u8) -> f32 {
        // SAFETY: the caller's; the read may be unaligned.
        half::f16::from_le_bytes(unsafe { from.cast::<[u8; 2]>().read_unaligned() }).to_f32()
    }
}

/// Sum of all lanes of all chains.
#[inline(always)]
fn sum_lanes<V: Lanes>(sums: [V; CHAINS]) -> f64 {
    sums[0].add(sums[1]).add(sums[2].add(sums[3])).total()
}

/// ‖x‖² of each row of d elements: single precision along chains, double precision across them.
#[inline(always)]
pub(super) fn sq_norms<V: Lanes, E: Element>(rows: &[u8], d: usize, norms: &mut [f32]) {
    assert!(rows.len() == norms.len() * d * E::SIZE);
    for (row, norm) in rows.chunks_exact(d * E::SIZE).zip(norms) {
        *norm = widen_row::<V, E, false>(row, d, std::ptr::null_mut());
    }
}

/// Rows in single precision, with their ‖x‖².
#[inline(always)]
pub(super) fn widen<V: Lanes, E: Element>(rows: &[u8], d: usize, to: &mut [f32], norms: &mut [f32]) {
    assert!(rows.len() == norms.len() * d * E::SIZE && to.len() == norms.len() * d);
    for ((row, to), norm) in rows.chunks_exact(d * E::SIZE).zip(to.chunks_exact_mut(d)).zip(norms) {
        *norm = widen_row::<V, E, true>(row, d, to.as_mut_ptr());
    }
}

/// ‖x‖² of a row, which is written to `to` (d values) where `WRITE` says so.
#[inline(always)]
fn widen_row<V: Lanes, E: Element, const WRITE: bool>(row: &[u8], d: usize, to: *mut f32) -> f32 {
    let mut sums = [V::splat(0.0); CHAINS];
    let mut tail = 0.0;
    let from = row.as_ptr();
    let (chained, whole) = (d - d % (CHAINS * V::N), d - d % V::N);
    let mut k = 0;
    // SAFETY: elements k .. k + N lie inside the row, and inside `to` where that is written.
    unsafe {
        while k < chained {
            for sum in &mut sums {
                let x = E::load::<V>(from.add(k * E::SIZE));
                if WRITE {
                    x.store(to.add(k));
                }
                *sum = x.mul_add(x, *sum);
                k += V::N;
            }
        }
        while k < whole {
            let x = E::load::<V>(from.add(k * E::SIZE));
            if WRITE {
                x.store(to.add(k));
            }
            sums[0] = x.mul_add(x, sums[0]);
            k += V::N;
        }
        while k < d {
            let x = E::one(from.add(k * E::SIZE));
            if WRITE {
                *to.add(k) = x;
            }
            tail += f64::from(x) * f64::from(x);
            k += 1;
        }
    }
    (sum_lanes(sums) + tail) as f32
}

/// Where rows go as 16-bit integers: x ≈ scale · integers.
pub(crate) struct Integers<'a> {
    /// Values from one row to the next, at least d; what lies beyond d is left as it is.
    pub stride: usize,
    /// The integers.
    pub values: &'a mut [i16],
    /// ‖x‖² of each row as stored.
    pub norms: &'a mut [f32],
    /// The scale of each row, 0 for one without direction.
    pub scales: &'a mut [f32],
}

/// Rows scaled to a norm and rounded to 16-bit integers.
#[inline(always)]
pub(super) fn quantise_rows<V: Lanes, E: Element>(rows: &[u8], d: usize, norm: f64, into: &mut Integers<'_>) {
    const FEW: usize = 8;
    let n = into.norms.len();
    assert!(rows.len() == n * d * E::SIZE && into.values.len() == n * into.stride && into.stride >= d);
    assert!(into.scales.len() == n);
    // A few rows at a time: they stay in the first-level cache, and their divisions overlap.
    for first in (0..n).step_by(FEW) {
        let few = first..(first + FEW).min(n);
        let row = |i: usize| &rows[i * d * E::SIZE..(i + 1) * d * E::SIZE];
        for i in few.clone() {
            into.norms[i] = widen_row::<V, E, false>(row(i), d, std::ptr::null_mut());
        }
        let mut factors = [0.0; FEW];
        for (factor, i) in factors.iter_mut().zip(few.clone()) {
            let exact = (norm / f64::from(into.norms[i]).sqrt()) as f32;
            *factor = if exact.is_finite() { exact } else { 0.0 };
            into.scales[i] = if *factor > 0.0 { 1.0 / *factor } else { 0.0 };
        }
        for (factor, i) in factors.into_iter().zip(few) {
            quantise::<V, E>(row(i), factor, &mut into.values[i * into.stride..][..d]);
        }
    }
}

/// Values times a factor, rounded to the nearest 16-bit integer (ties to even). |value · factor| stays below 2¹⁵.
#[inline(always)]
pub(super) fn quantise<V: Lanes, E: Element>(row: &[u8], factor: f32, out: &mut [i16]) {
    let d = out.len();
    assert!(row.len() == d * E::SIZE);
    let by = V::splat(factor);
    let whole = d - d % V::N;
    // SAFETY: elements k .. k + N lie inside both.
    unsafe {
        for k in (0..whole).step_by(V::N) {
            E::load::<V>(row.as_ptr().add(k * E::SIZE)).mul(by).store_i16(out.as_mut_ptr().add(k));
        }
        for (k, out) in out.iter_mut().enumerate().skip(whole) {
            *out = round_i16(E::one(row.as_ptr().add(k * E::SIZE)) * factor);
        }
    }
}

/// To the nearest integer, ties to even; |value| < 2¹⁵.
#[inline(always)]
pub(super) fn round_i16(value: f32) -> i16 {
    /// Adding it leaves the rounded integer in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    (value + ROUND).to_bits() as i16
}

/// Dot products of each row with one query, along the dimensions, and ‖x‖² of each.
///
/// `ahead` bytes in front of what is read are fetched: with one query a scan waits for memory alone.
#[inline(always)]
pub(super) fn dots_one<V: Lanes, E: Element>(
    rows: &[u8],
    query: &[f32],
    ahead: usize,
    dots: &mut [f32],
    norms: &mut [f32],
) {
    let d = query.len();
    assert!(rows.len() == norms.len() * d * E::SIZE && dots.len() == norms.len());
    let (chained, whole) = (d - d % (CHAINS * V::N), d - d % V::N);
    let with = query.as_ptr();
    for ((row, dot), norm) in rows.chunks_exact(d * E::SIZE).zip(dots).zip(norms) {
        let from = row.as_ptr();
        let (mut products, mut squares) = ([V::splat(0.0); CHAINS], [V::splat(0.0); CHAINS]);
        let (mut product, mut square) = (0.0, 0.0);
        let mut k = 0;
        // SAFETY: elements k .. k + N lie inside the row and the query; prefetches may point anywhere.
        unsafe {
            while k < chained {
                for line in (0..CHAINS * V::N * E::SIZE).step_by(64) {
                    V::prefetch(from.wrapping_add(k * E::SIZE + line + ahead).cast());
                }
                for c in 0..CHAINS {
                    let x = E::load::<V>(from.add(k * E::SIZE));
                    products[c] = x.mul_add(V::load(with.add(k)), products[c]);
                    squares[c] = x.mul_add(x, squares[c]);
                    k += V::N;
                }
            }
            while k < whole {
                let x = E::load::<V>(from.add(k * E::SIZE));
                products[0] = x.mul_add(V::load(with.add(k)), products[0]);
                squares[0] = x.mul_add(x, squares[0]);
                k += V::N;
            }
            while k < d {
                let x = f64::from(E::one(from.add(k * E::SIZE)));
                product += x * f64::from(*with.add(k));
                square += x * x;
                k += 1;
            }
        }
        *dot = (sum_lanes(products) + product) as f32;
        *norm = (sum_lanes(squares) + square) as f32;
    }
}

/// Dot products of 16-bit rows with one query, exact in 32 bits.
#[inline(always)]
pub(super) fn dots_one_i16(rows: &[i16], query: &[i16], dots: &mut [i32]) {
    assert!(rows.len() == query.len() * dots.len());
    for (row, dot) in rows.chunks_exact(query.len()).zip(dots) {
        *dot = row.iter().zip(query).map(|(&x, &q)| i32::from(x) * i32::from(q)).sum();
    }
}

/// Rows of 8-bit integers to 16 bits, `stride` ≥ d apart, with ‖x‖² of each, exact in 32 bits.
#[inline(always)]
pub(super) fn widen_i8<V: Lanes>(rows: &[u8], d: usize, stride: usize, out: &mut [i16], squares: &mut [i32]) {
    assert!(rows.len() == squares.len() * d && out.len() == squares.len() * stride && stride >= d);
    for ((row, out), square) in rows.chunks_exact(d).zip(out.chunks_exact_mut(stride)).zip(squares) {
        *square = V::widen_row_i8(row, &mut out[..d]);
    }
}

/// ⟨x,q⟩ and ‖x‖² of rows of 8-bit integers with one query of 16 bits, exact in 32 bits.
#[inline(always)]
pub(super) fn dots_one_i8<V: Lanes>(
    rows: &[u8],
    query: &[i16],
    ahead: usize,
    dots: &mut [i32],
    squares: &mut [i32],
) {
    assert!(rows.len() == squares.len() * query.len() && dots.len() == squares.len());
    for ((row, dot), square) in rows.chunks_exact(query.len()).zip(dots).zip(squares) {
        for line in (0..row.len()).step_by(64) {
            V::prefetch(row.as_ptr().wrapping_add(line + ahead).cast());
        }
        (*dot, *square) = V::dot_and_square_i8(row, query);
    }
}

/// ⟨x,q⟩ and ‖x‖² of a row of 8-bit integers, exact in 32 bits.
#[inline(always)]
pub(super) fn dot_and_square_i8(row: &[u8], query: &[i16]) -> (i32, i32) {
    let (mut dot, mut square) = (0, 0);
    for (&byte, &q) in row.iter().zip(query) {
        let x = i32::from(byte.cast_signed());
        dot += x * i32::from(q);
        square += x * x;
    }
    (dot, square)
}

/// A row of 8-bit integers to 16 bits; returns the sum of squares.
#[inline(always)]
pub(super) fn widen_row_i8(row: &[u8], out: &mut [i16]) -> i32 {
    let mut sum = 0;
    for (into, &byte) in out.iter_mut().zip(row) {
        let value = i16::from(byte.cast_signed());
        *into = value;
        sum += i32::from(value) * i32::from(value);
    }
    sum
}

/// Values times a factor, rounded to the nearest 8-bit integer; |value · factor| stays below 127.5. Returns their sum.
#[inline(always)]
pub(super) fn quantise_i8(row: &[f32], factor: f32, out: &mut [i8]) -> i32 {
    let mut sum = 0;
    for (into, &value) in out.iter_mut().zip(row) {
        let integer = round_i16(value * factor) as i8;
        *into = integer;
        sum += i32::from(integer);
    }
    sum
}

/// Copies 8-bit rows; returns Σ x and Σ x².
#[inline(always)]
pub(super) fn copy_i8(row: &[u8], out: &mut [i8]) -> (i32, i32) {
    let (mut sum, mut squares) = (0, 0);
    for (into, &byte) in out.iter_mut().zip(row) {
        *into = byte.cast_signed();
        sum += i32::from(*into);
        squares += i32::from(*into) * i32::from(*into);
    }
    (sum, squares)
}

/// Adds weight · row to `sum` for all rows of a tile.
#[inline(always)]
pub(super) fn add_rows(
    tile: &[f32],
    d: usize,
    weights: Option<&[f32]>,
    scratch: &mut [f32],
    sum: &mut [f64],
) {
    scratch.fill(0.0);
    for (i, row) in tile.chunks_exact(d).enumerate() {
        let weight = weights.map_or(1.0, |weights| weights[i]);
        for (into, x) in scratch.iter_mut().zip(row) {
            *into += weight * x;
        }
    }
    for (into, &x) in sum.iter_mut().zip(scratch.iter()) {
        *into += f64::from(x);
    }
}
