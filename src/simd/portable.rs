//! The readable reference: plain Rust that every CPU runs. The other levels must agree with it.

use super::exponential;
use super::rows;
use super::tile::{self, Lanes};

/// Queries of one panel.
pub(super) const WIDTH: usize = 16;
/// Queries of one panel where there are few queries.
pub(super) const NARROW: usize = 8;

/// Eight values; the compiler makes of it what the target has.
#[derive(Clone, Copy)]
struct Eight([f32; 8]);

impl Eight {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

// SAFETY: no CPU feature beyond the target's baseline is used.
unsafe impl Lanes for Eight {
    const N: usize = 8;
    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; 8])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for 8 values; the read may be unaligned.
        Self(unsafe { from.cast::<[f32; 8]>().read_unaligned() })
    }
    #[inline(always)]
    fn integers(self) -> Self {
        Self(self.0.map(|value| value.to_bits().cast_signed() as f32))
    }
    #[inline(always)]
    unsafe fn load_half(from: *const u8) -> Self {
        // SAFETY: the caller vouches for 16 readable bytes; the read may be unaligned.
        let halves = unsafe { from.cast::<[[u8; 2]; 8]>().read_unaligned() };
        Self(halves.map(|bytes| half::f16::from_le_bytes(bytes).to_f32()))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for 8 values; the write may be unaligned.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn store_i16(self, to: *mut i16) {
        // SAFETY: the caller vouches for 8 integers; the write may be unaligned.
        unsafe { to.cast::<[i16; 8]>().write_unaligned(self.0.map(rows::round_i16)) }
    }
    #[inline(always)]
    fn prefetch(_: *const f32) {}
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        // Two roundings on purpose: a fused multiply-add is a library call on a baseline x86-64.
        self.mul(factor).add(term)
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        Self(self.0.map(f32::sqrt))
    }
    #[inline(always)]
    fn less(self, other: Self) -> u32 {
        (0..8).map(|i| u32::from(self.0[i] < other.0[i]) << i).sum()
    }
    #[inline(always)]
    fn total(self) -> f64 {
        self.0.into_iter().map(f64::from).sum()
    }
    #[inline(always)]
    fn widen_row_i8(row: &[u8], out: &mut [i16]) -> i32 {
        rows::widen_row_i8(row, out)
    }
    #[inline(always)]
    fn dot_and_square_i8(row: &[u8], query: &[i16]) -> (i32, i32) {
        rows::dot_and_square_i8(row, query)
    }
    #[inline(always)]
    fn exp2(self) -> Self {
        /// Adding it leaves the rounded integer in the low bits of the mantissa.
        const ROUND: f32 = 12_582_912.0;
        let t = self.max(Self::splat(-125.0));
        let rounded = t.add(Self::splat(ROUND));
        let power = tile::exp2_polynomial(t.sub(rounded.sub(Self::splat(ROUND))));
        power.zip(rounded, |p, n| f32::from_bits(p.to_bits().wrapping_add(n.to_bits() << 23)))
    }
}

/// Dot products of each row with the queries of a panel: out[row][lane]. `panel` is [d][width].
pub(super) fn dots(rows: &[f32], stride: usize, d: usize, panel: &[f32], _ahead: usize, out: &mut [f32]) {
    match panel.len() / d {
        NARROW => dots_wide::<NARROW>(rows, stride, d, panel, out),
        _ => dots_wide::<WIDTH>(rows, stride, d, panel, out),
    }
}

fn dots_wide<const WIDTH: usize>(rows: &[f32], stride: usize, d: usize, panel: &[f32], out: &mut [f32]) {
    for (row, out) in rows.chunks_exact(stride).zip(out.chunks_exact_mut(WIDTH)) {
        out.fill(0.0);
        for (row, panel) in row[..d].chunks(super::CHAIN).zip(panel.chunks(super::CHAIN * WIDTH)) {
            let mut sums = [0.0_f32; WIDTH];
            for (x, queries) in row.iter().zip(panel.chunks_exact(WIDTH)) {
                for (sum, query) in sums.iter_mut().zip(queries) {
                    *sum += x * query;
                }
            }
            for (out, sum) in out.iter_mut().zip(sums) {
                *out += sum;
            }
        }
    }
}

/// Dot products of 16-bit rows with a panel of 16-bit queries ([d/2][width][2]): out[row][lane], exact in 32 bits.
pub(super) fn dots_i16(rows: &[i16], d: usize, panel: &[i16], _ahead: usize, out: &mut [i32]) {
    match panel.len() / d {
        NARROW => tile::dots_i16::<NARROW>(rows, d, panel, out),
        _ => tile::dots_i16::<WIDTH>(rows, d, panel, out),
    }
}

/// Dot products of 8-bit rows with a panel of shifted 8-bit queries: out[row][lane], exact in 32 bits.
pub(super) fn dots_i8(rows: &[i8], sums: &[i32], d: usize, panel: &[u8], _ahead: usize, out: &mut [i32]) {
    tile::dots_i8(rows, sums, d, panel, out);
}

super::instantiate!(Eight);
