//! The tile kernels of every instruction set behind one dispatch.
//!
//! A scan asks a `Level` for the operations on a tile of rows × one panel of queries. Dispatch happens here, once a
//! tile, never per pair. `portable` is the readable reference; `agree` holds the others to it.

mod exponential;
mod level;
mod one;
pub mod peak;
mod portable;
mod prove;
mod rows;
mod tile;

#[cfg(test)]
mod agree;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

pub use level::Level;
use level::Set;
pub(crate) use rows::Integers;
pub(crate) use tile::{Exponent, FAR, PanelSums, RowScales};

use crate::rows::{Dtype, Rows};

/// Products summed in one chain of single precision; longer dot products are sums of such chains. The rounding error
/// of a chain grows with its length and with the size of its partial sums: on GSM8K under MiniLM (d = 384, h = .05) the
/// worst error of a log density fell from 1.5e-5 with one chain to 6.4e-6 with three.
const CHAIN: usize = 128;

/// Stamps out the generic functions of tiles and rows for one instruction set.
macro_rules! instantiate {
    ($(#[$features:meta],)? $lanes:ty) => {
        $(#[$features])?
        pub(super) fn sq_distances(tile: &mut [f32], row_norms: &[f32], query_norms: &[f32], min: &mut [f32])  {
            tile::sq_distances::<$lanes>(tile, min.len(), row_norms, query_norms, min)
        }

        $(#[$features])?
        pub(super) fn sq_distances_i32(tile: &mut [f32], rows: crate::simd::RowScales<'_>, query_norms: &[f32], query_scales: &[f32], min: &mut [f32])  {
            tile::sq_distances_i32::<$lanes>(tile, min.len(), rows, query_norms, query_scales, min)
        }

        $(#[$features])?
        pub(super) fn sq_differences(rows: &[f32], d: usize, panel: &[f32], tile: &mut [f32], min: &mut [f32])  {
            tile::sq_differences::<$lanes>(rows, d, panel, min.len(), tile, min)
        }

        $(#[$features])?
        pub(super) fn column_min(tile: &[f32], min: &mut [f32])  {
            tile::column_min::<$lanes>(tile, min.len(), min)
        }

        $(#[$features])?
        pub(super) fn max_projection(tile: &[f32], row_norms: &[f32], halves: &[f32], query_norms: &[f32], max: &mut [f32])  {
            tile::max_projection::<$lanes>(tile, max.len(), row_norms, halves, query_norms, max)
        }

        $(#[$features])?
        pub(super) fn below(tile: &[f32], min: &[f32], cut: &[f32], hits: &mut Vec<(u32, u32)>)  {
            tile::below::<$lanes>(tile, min.len(), min, cut, hits)
        }

        $(#[$features])?
        pub(super) fn accumulate(tile: &mut [f32], min: &[f32], weights: Option<&[f32]>, exponents: &[crate::simd::Exponent], into: &mut crate::simd::PanelSums<'_>)  {
            tile::accumulate::<$lanes>(tile, min.len(), min, weights, exponents, into)
        }

        $(#[$features])?
        pub(super) fn sq_norms_f32(rows: &[u8], d: usize, norms: &mut [f32])  {
            rows::sq_norms::<$lanes, rows::Single>(rows, d, norms)
        }

        $(#[$features])?
        pub(super) fn widen_f16(rows: &[u8], d: usize, to: &mut [f32], norms: &mut [f32])  {
            rows::widen::<$lanes, rows::Half>(rows, d, to, norms)
        }

        $(#[$features])?
        pub(super) fn quantise_f32(rows: &[u8], d: usize, norm: f64, into: &mut crate::simd::Integers<'_>)  {
            rows::quantise_rows::<$lanes, rows::Single>(rows, d, norm, into)
        }

        $(#[$features])?
        pub(super) fn quantise_f16(rows: &[u8], d: usize, norm: f64, into: &mut crate::simd::Integers<'_>)  {
            rows::quantise_rows::<$lanes, rows::Half>(rows, d, norm, into)
        }

        $(#[$features])?
        pub(super) fn quantise(row: &[u8], factor: f32, out: &mut [i16])  {
            rows::quantise::<$lanes, rows::Single>(row, factor, out)
        }

        $(#[$features])?
        pub(super) fn widen_i8(rows: &[u8], d: usize, stride: usize, out: &mut [i16], squares: &mut [i32])  {
            rows::widen_i8::<$lanes>(rows, d, stride, out, squares)
        }

        $(#[$features])?
        pub(super) fn dots_one_f32(rows: &[u8], query: &[f32], ahead: usize, dots: &mut [f32], norms: &mut [f32])  {
            rows::dots_one::<$lanes, rows::Single>(rows, query, ahead, dots, norms)
        }

        $(#[$features])?
        pub(super) fn dots_one_f16(rows: &[u8], query: &[f32], ahead: usize, dots: &mut [f32], norms: &mut [f32])  {
            rows::dots_one::<$lanes, rows::Half>(rows, query, ahead, dots, norms)
        }

        $(#[$features])?
        pub(super) fn dots_one_i8(rows: &[u8], query: &[i16], ahead: usize, dots: &mut [i32], squares: &mut [i32])  {
            rows::dots_one_i8::<$lanes>(rows, query, ahead, dots, squares)
        }

        $(#[$features])?
        pub(super) fn dots_one_i16(rows: &[i16], query: &[i16], dots: &mut [i32])  {
            rows::dots_one_i16(rows, query, dots)
        }

        $(#[$features])?
        pub(super) fn quantise_i8(row: &[f32], factor: f32, out: &mut [i8]) -> i32 {
            rows::quantise_i8(row, factor, out)
        }

        $(#[$features])?
        pub(super) fn copy_i8(row: &[u8], out: &mut [i8]) -> (i32, i32) {
            rows::copy_i8(row, out)
        }

        $(#[$features])?
        pub(super) fn add_rows(tile: &[f32], d: usize, weights: Option<&[f32]>, scratch: &mut [f32], sum: &mut [f64])  {
            rows::add_rows(tile, d, weights, scratch, sum)
        }

        $(#[$features])?
        pub(super) fn exponentials(values: &mut [f64]) {
            exponential::exponentials(values)
        }

        $(#[$features])?
        pub(super) fn sq_distance(row: &[f32], query: &[f32]) -> f64 {
            tile::sq_distance(row, query)
        }

        $(#[$features])?
        pub(super) fn manhattan(row: &[f32], query: &[f32]) -> f64 {
            tile::manhattan(row, query)
        }

        $(#[$features])?
        pub(super) fn inner_product(row: &[f32], query: &[f32]) -> f64 {
            tile::inner_product(row, query)
        }
    };
}
use instantiate;

/// Runs a kernel that needs at least `least` rows on fewer: on a copy filled up with zeros.
#[cfg(target_arch = "x86_64")]
fn with_padding<T: Copy + Default, U: Copy + Default>(
    rows: &[T],
    d: usize,
    least: usize,
    width: usize,
    out: &mut [U],
    run: impl FnOnce(&[T], &mut [U]),
) {
    if rows.is_empty() {
        return;
    }
    let mut padded = vec![T::default(); least * d];
    padded[..rows.len()].copy_from_slice(rows);
    let mut padded_out = vec![U::default(); least * width];
    run(&padded, &mut padded_out);
    out.copy_from_slice(&padded_out[..out.len()]);
}

/// Calls `run` with the first row of each micro-tile of `size` rows among `n ≥ size`. The last one overlaps the one
/// before, where `size` does not divide n: the same bits are written again.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn each_micro_tile(n: usize, size: usize, mut run: impl FnMut(usize)) {
    let mut row = 0;
    loop {
        run(row);
        if row + size == n {
            break;
        }
        row = (row + size).min(n - size);
    }
}

/// Calls the function of the level's module.
macro_rules! dispatch {
    ($level:expr, $function:ident($($argument:expr),*)) => {
        match $level.set() {
            Set::Portable => portable::$function($($argument),*),
            // SAFETY: a `Level` of this set exists only where its features were detected.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { avx2::$function($($argument),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { avx512::$function($($argument),*) },
        }
    };
}

impl Level {
    /// Queries of one panel in a job of so many: narrow panels waste nothing where there are few.
    pub(crate) fn panel_width(self, queries: usize) -> usize {
        let (narrow, wide) = match self.set() {
            Set::Portable => (portable::NARROW, portable::WIDTH),
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => (avx2::NARROW, avx2::WIDTH),
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => (avx512::NARROW, avx512::WIDTH),
        };
        if queries <= narrow { narrow } else { wide }
    }

    /// Dot products of rows, `stride` values apart, with a packed panel ([d][width]): out[row][lane]. As much memory as the rows
    /// take is fetched `ahead` bytes (modulo 2⁶⁴) from them.
    pub(crate) fn dots(
        self,
        rows: &[f32],
        stride: usize,
        d: usize,
        panel: &[f32],
        ahead: usize,
        out: &mut [f32],
    ) {
        dispatch!(self, dots(rows, stride, d, panel, ahead, out));
    }

    /// Dot products of rows with one query and ‖x‖² of each row, in one pass over memory `ahead` bytes of which are fetched
    /// in front; false, and nothing done, where rows of this type are not read in place.
    pub(crate) fn dots_one(
        self,
        rows: &Rows<'_>,
        query: &[f32],
        ahead: usize,
        dots: &mut [f32],
        norms: &mut [f32],
    ) -> bool {
        match rows.dtype() {
            Dtype::F32 => dispatch!(self, dots_one_f32(rows.bytes(), query, ahead, dots, norms)),
            Dtype::F16 => dispatch!(self, dots_one_f16(rows.bytes(), query, ahead, dots, norms)),
            _ => return false,
        }
        true
    }

    /// The same of rows that are in single precision already.
    pub(crate) fn dots_one_f32(self, rows: &[f32], query: &[f32], dots: &mut [f32], norms: &mut [f32]) {
        dispatch!(self, dots_one_f32(bytemuck::cast_slice(rows), query, 0, dots, norms));
    }

    /// Dot products of 8-bit rows with one 16-bit query, and ‖x‖² of the integers, exact in 32 bits.
    pub(crate) fn dots_one_i8(
        self,
        rows: &[u8],
        query: &[i16],
        ahead: usize,
        dots: &mut [i32],
        squares: &mut [i32],
    ) {
        dispatch!(self, dots_one_i8(rows, query, ahead, dots, squares));
    }

    /// Dot products of 16-bit rows with one query, exact in 32 bits.
    pub(crate) fn dots_one_i16(self, rows: &[i16], query: &[i16], dots: &mut [i32]) {
        dispatch!(self, dots_one_i16(rows, query, dots));
    }

    /// Dot products of 16-bit rows with a packed panel ([d/2][width][2], d even): out[row][lane], exact in 32 bits. As much
    /// memory as the rows take is fetched `ahead` bytes (modulo 2⁶⁴) from them.
    pub(crate) fn dots_i16(self, rows: &[i16], d: usize, panel: &[i16], ahead: usize, out: &mut [i32]) {
        dispatch!(self, dots_i16(rows, d, panel, ahead, out));
    }

    /// Integer dot products (the bits of the tile) to squared distances, in place, with the smallest of each column.
    pub(crate) fn sq_distances_i32(
        self,
        tile: &mut [f32],
        rows: RowScales<'_>,
        query_norms: &[f32],
        query_scales: &[f32],
        min: &mut [f32],
    ) {
        dispatch!(self, sq_distances_i32(tile, rows, query_norms, query_scales, min));
    }

    /// Whether dot products of 8-bit integers are faster than those of 16 bits: where VNNI multiplies them four at a time.
    pub(crate) fn has_fast_int8(self) -> bool {
        match self.set() {
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => is_x86_feature_detected!("avx512vnni"),
            _ => false,
        }
    }

    /// Dot products of 8-bit rows (sums Σ x) with a packed panel of queries shifted by 128 ([d/4][width][4], d a
    /// multiple of 4): out[row][lane], exact in 32 bits. `ahead` as for `dots_i16`.
    pub(crate) fn dots_i8(
        self,
        rows: &[i8],
        sums: &[i32],
        d: usize,
        panel: &[u8],
        ahead: usize,
        out: &mut [i32],
    ) {
        dispatch!(self, dots_i8(rows, sums, d, panel, ahead, out));
    }

    /// Values times a factor as 8-bit integers, |value · factor| < 127.5; returns their sum.
    pub(crate) fn quantise_i8(self, row: &[f32], factor: f32, out: &mut [i8]) -> i32 {
        dispatch!(self, quantise_i8(row, factor, out))
    }

    /// Copies 8-bit values; returns their sum and the sum of their squares.
    pub(crate) fn copy_i8(self, row: &[u8], out: &mut [i8]) -> (i32, i32) {
        dispatch!(self, copy_i8(row, out))
    }

    /// 8-bit rows to 16 bits, `stride` apart, with the sum of squares of each.
    pub(crate) fn widen_i8(self, rows: &[u8], d: usize, stride: usize, out: &mut [i16], squares: &mut [i32]) {
        dispatch!(self, widen_i8(rows, d, stride, out, squares));
    }

    /// Values times a factor as 16-bit integers; |value · factor| must stay below 2¹⁵.
    pub(crate) fn quantise(self, row: &[f32], factor: f32, out: &mut [i16]) {
        dispatch!(self, quantise(bytemuck::cast_slice(row), factor, out));
    }

    /// Rows as stored, scaled to a norm and rounded to 16-bit integers; false, and nothing done, where rows of this type
    /// are not read in place.
    pub(crate) fn quantise_rows(self, rows: &Rows<'_>, norm: f64, into: &mut Integers<'_>) -> bool {
        match rows.dtype() {
            Dtype::F32 => dispatch!(self, quantise_f32(rows.bytes(), rows.dim(), norm, into)),
            Dtype::F16 => dispatch!(self, quantise_f16(rows.bytes(), rows.dim(), norm, into)),
            _ => return false,
        }
        true
    }

    /// Dot products to squared distances, in place, with the smallest of each column.
    pub(crate) fn sq_distances(
        self,
        tile: &mut [f32],
        row_norms: &[f32],
        query_norms: &[f32],
        min: &mut [f32],
    ) {
        dispatch!(self, sq_distances(tile, row_norms, query_norms, min));
    }

    /// Squared distances from differences, with the smallest of each column: for few dimensions.
    pub(crate) fn sq_differences(
        self,
        rows: &[f32],
        d: usize,
        panel: &[f32],
        tile: &mut [f32],
        min: &mut [f32],
    ) {
        dispatch!(self, sq_differences(rows, d, panel, tile, min));
    }

    /// The smallest of each column, `FAR` where there are no rows.
    pub(crate) fn column_min(self, tile: &[f32], min: &mut [f32]) {
        dispatch!(self, column_min(tile, min));
    }

    /// Folds the largest projection on a row's direction of each column of squared distances into `max`.
    pub(crate) fn max_projection(
        self,
        tile: &[f32],
        row_norms: &[f32],
        halves: &[f32],
        query_norms: &[f32],
        max: &mut [f32],
    ) {
        dispatch!(self, max_projection(tile, row_norms, halves, query_norms, max));
    }

    /// Appends (row, column) of every value below its column's cut.
    pub(crate) fn below(self, tile: &[f32], min: &[f32], cut: &[f32], hits: &mut Vec<(u32, u32)>) {
        dispatch!(self, below(tile, min, cut, hits));
    }

    /// Adds the kernel weights of a tile of squared distances to sums. Overwrites the tile.
    pub(crate) fn accumulate(
        self,
        tile: &mut [f32],
        min: &[f32],
        weights: Option<&[f32]>,
        exponents: &[Exponent],
        into: &mut PanelSums<'_>,
    ) {
        dispatch!(self, accumulate(tile, min, weights, exponents, into));
    }

    /// ‖x‖² of each row of d values.
    pub(crate) fn sq_norms(self, tile: &[f32], d: usize, norms: &mut [f32]) {
        dispatch!(self, sq_norms_f32(bytemuck::cast_slice(tile), d, norms));
    }

    /// Adds weight · row to `sum`; `scratch` has d values.
    pub(crate) fn add_rows(
        self,
        tile: &[f32],
        d: usize,
        weights: Option<&[f32]>,
        scratch: &mut [f32],
        sum: &mut [f64],
    ) {
        dispatch!(self, add_rows(tile, d, weights, scratch, sum));
    }

    /// Replaces every value x, which is no NaN, by eˣ. A value does not depend on its place.
    pub(crate) fn exponentials(self, values: &mut [f64]) {
        dispatch!(self, exponentials(values));
    }

    /// ‖x − q‖² from differences in double precision.
    pub(crate) fn sq_distance(self, row: &[f32], query: &[f32]) -> f64 {
        dispatch!(self, sq_distance(row, query))
    }

    /// ‖x − q‖₁ in double precision.
    pub(crate) fn manhattan(self, row: &[f32], query: &[f32]) -> f64 {
        dispatch!(self, manhattan(row, query))
    }

    /// ⟨x, q⟩ in double precision.
    pub(crate) fn inner_product(self, row: &[f32], query: &[f32]) -> f64 {
        dispatch!(self, inner_product(row, query))
    }

    /// Writes rows as stored (scales applied) in single precision, with ‖x‖² of each.
    pub(crate) fn widen(self, rows: &Rows<'_>, to: &mut [f32], norms: &mut [f32]) {
        match rows.dtype() {
            Dtype::F16 => dispatch!(self, widen_f16(rows.bytes(), rows.dim(), to, norms)),
            _ => {
                for (i, row) in to.chunks_exact_mut(rows.dim()).enumerate() {
                    rows.read_f32(i, row);
                }
                self.sq_norms(to, rows.dim(), norms);
            }
        }
    }
}

/// Asks for bytes that are needed soon.
#[inline]
pub(crate) fn fetch(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in bytes.chunks(64) {
        // SAFETY: a prefetch changes nothing, whatever the address; every x86-64 has it.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.as_ptr().cast())
        };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bytes;
}

/// Queries of a panel side by side, [d][width], zeros where there are fewer than width: a value of a row meets all of them at once.
pub(crate) fn pack_panel(queries: &[f32], d: usize, width: usize, panel: &mut [f32]) {
    assert!(panel.len() == d * width && queries.len() <= panel.len());
    panel.fill(0.0);
    for (lane, query) in queries.chunks_exact(d).enumerate() {
        for (k, &value) in query.iter().enumerate() {
            panel[k * width + lane] = value;
        }
    }
}

/// 16-bit queries of a panel side by side, [d/2][width][2]. Rows of `queries` have d values, d even.
pub(crate) fn pack_panel_i16(queries: &[i16], d: usize, width: usize, panel: &mut [i16]) {
    assert!(panel.len() == d * width && queries.len() <= panel.len() && d.is_multiple_of(2));
    panel.fill(0);
    for (lane, query) in queries.chunks_exact(d).enumerate() {
        for (k, pair) in query.as_chunks::<2>().0.iter().enumerate() {
            panel[(k * width + lane) * 2..][..2].copy_from_slice(pair);
        }
    }
}

/// 8-bit queries of a panel side by side, shifted by 128, [d/4][width][4]. Rows of `queries` have d values, d a multiple
/// of 4.
pub(crate) fn pack_panel_i8(queries: &[i8], d: usize, width: usize, panel: &mut [u8]) {
    assert!(panel.len() == d * width && queries.len() <= panel.len() && d.is_multiple_of(4));
    panel.fill(128);
    for (lane, query) in queries.chunks_exact(d).enumerate() {
        for (k, &value) in query.iter().enumerate() {
            panel[(k / 4 * width + lane) * 4 + k % 4] = value.cast_unsigned() ^ 0x80;
        }
    }
}
