//! AVX2 with FMA and F16C: panels of 16 queries, micro-tiles of 6 rows × 2 vectors.

use std::arch::x86_64::*;

use super::tile::{self, Exponent, Lanes, PanelSums};

/// Queries of one panel.
pub(super) const WIDTH: usize = 16;
/// Rows of one micro-tile: 12 accumulators, 2 query vectors and a broadcast fill the 16 registers.
const ROWS: usize = 6;

#[derive(Clone, Copy)]
struct V8(__m256);

// SAFETY: only the functions below use it, and they require the features.
unsafe impl Lanes for V8 {
    const N: usize = 8;
    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: AVX2 was detected (contract of `Lanes`); so in every method below.
        Self(unsafe { _mm256_set1_ps(value) })
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for 8 readable values.
        Self(unsafe { _mm256_loadu_ps(from) })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for 8 writable values.
        unsafe { _mm256_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        // SAFETY: see `splat`.
        Self(unsafe { _mm256_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        // SAFETY: see `splat`.
        Self(unsafe { _mm256_sub_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        // SAFETY: see `splat`.
        Self(unsafe { _mm256_mul_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        // SAFETY: see `splat`.
        Self(unsafe { _mm256_fmadd_ps(self.0, factor.0, term.0) })
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        // SAFETY: see `splat`.
        Self(unsafe { _mm256_min_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // SAFETY: see `splat`.
        Self(unsafe { _mm256_max_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        // SAFETY: see `splat`.
        Self(unsafe { _mm256_sqrt_ps(self.0) })
    }
    #[inline(always)]
    fn less(self, other: Self) -> u32 {
        // SAFETY: see `splat`.
        unsafe { _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(self.0, other.0)) as u32 }
    }
    #[inline(always)]
    fn exp2(self) -> Self {
        /// Adding it leaves the rounded integer in the low bits of the mantissa.
        const ROUND: f32 = 12_582_912.0;
        let t = self.max(Self::splat(-125.0));
        let rounded = t.add(Self::splat(ROUND));
        let power = tile::exp2_polynomial(t.sub(rounded.sub(Self::splat(ROUND))));
        // SAFETY: see `splat`.
        unsafe {
            let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(rounded.0));
            Self(_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(power.0), exponent)))
        }
    }
}

/// Dot products of each row with the queries of a panel: out[row][lane]. `panel` is [d][WIDTH].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dots(rows: &[f32], d: usize, panel: &[f32], out: &mut [f32]) {
    let n = rows.len() / d;
    assert!(rows.len() == d * n && panel.len() == d * WIDTH && out.len() == n * WIDTH);
    if n < ROWS {
        return super::with_padding(rows, d, ROWS, WIDTH, out, |rows, out| dots(rows, d, panel, out));
    }
    let mut row = 0;
    loop {
        // SAFETY: rows row..row + ROWS lie inside both.
        unsafe {
            let from = rows.as_ptr().add(row * d);
            micro(from, d, panel.as_ptr(), out.as_mut_ptr().add(row * WIDTH));
        }
        if row + ROWS == n {
            break;
        }
        // The last micro-tile overlaps the one before: the same bits are written again.
        row = (row + ROWS).min(n - ROWS);
    }
}

/// # Safety
/// `rows` points to ROWS rows of d values, `panel` to d × WIDTH, `out` to ROWS × WIDTH.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn micro(rows: *const f32, d: usize, panel: *const f32, out: *mut f32) {
    let mut sums = [[_mm256_setzero_ps(); 2]; ROWS];
    // SAFETY: all offsets stay inside what the caller vouches for; prefetches may point anywhere.
    unsafe {
        for k in 0..d {
            if k % 16 == 0 {
                for r in 0..ROWS {
                    _mm_prefetch::<_MM_HINT_T0>(rows.wrapping_add((r + ROWS) * d + k).cast());
                }
            }
            let q0 = _mm256_loadu_ps(panel.add(k * WIDTH));
            let q1 = _mm256_loadu_ps(panel.add(k * WIDTH + 8));
            for (r, sum) in sums.iter_mut().enumerate() {
                let x = _mm256_set1_ps(*rows.add(r * d + k));
                sum[0] = _mm256_fmadd_ps(q0, x, sum[0]);
                sum[1] = _mm256_fmadd_ps(q1, x, sum[1]);
            }
        }
        for (r, sum) in sums.iter().enumerate() {
            _mm256_storeu_ps(out.add(r * WIDTH), sum[0]);
            _mm256_storeu_ps(out.add(r * WIDTH + 8), sum[1]);
        }
    }
}

/// Half to single precision.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn widen_f16(from: &[u8], to: &mut [f32]) {
    let n = to.len();
    assert!(from.len() == 2 * n);
    let whole = n - n % 8;
    for i in (0..whole).step_by(8) {
        // SAFETY: i + 8 ≤ n.
        unsafe {
            let half = _mm_loadu_si128(from.as_ptr().add(2 * i).cast());
            _mm256_storeu_ps(to.as_mut_ptr().add(i), _mm256_cvtph_ps(half));
        }
    }
    super::portable::widen_f16(&from[2 * whole..], &mut to[whole..]);
}

super::instantiate!("avx2,fma,f16c", V8);
