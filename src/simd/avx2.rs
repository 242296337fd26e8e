//! AVX2 with FMA and F16C: panels of 16 queries, micro-tiles of 6 rows × 2 vectors.

use std::arch::asm;
use std::arch::x86_64::*;

use super::exponential;
use super::rows;
use super::tile::{self, Lanes};

/// Queries of one panel.
pub(super) const WIDTH: usize = 16;
/// Queries of one panel where there are few queries.
pub(super) const NARROW: usize = 8;
/// Rows of one micro-tile: 12 accumulators, 2 query vectors and a broadcast fill the 16 registers.
const ROWS: usize = 6;
/// Rows of one micro-tile of a narrow panel.
const NARROW_ROWS: usize = 12;

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
    fn integers(self) -> Self {
        // SAFETY: see `splat`.
        Self(unsafe { _mm256_cvtepi32_ps(_mm256_castps_si256(self.0)) })
    }
    #[inline(always)]
    unsafe fn load_half(from: *const u8) -> Self {
        // SAFETY: the caller vouches for 16 readable bytes.
        Self(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for 8 writable values.
        unsafe { _mm256_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn store_i16(self, to: *mut i16) {
        // SAFETY: the caller vouches for 8 writable integers.
        unsafe {
            let integers = _mm256_cvtps_epi32(self.0);
            let (low, high) = (_mm256_castsi256_si128(integers), _mm256_extracti128_si256::<1>(integers));
            _mm_storeu_si128(to.cast(), _mm_packs_epi32(low, high));
        }
    }
    #[inline(always)]
    fn prefetch(at: *const f32) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
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
    fn total(self) -> f64 {
        // SAFETY: see `splat`; there is room for four.
        unsafe {
            let low = _mm256_cvtps_pd(_mm256_castps256_ps128(self.0));
            let high = _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(self.0));
            let mut sums = [0.0; 4];
            _mm256_storeu_pd(sums.as_mut_ptr(), _mm256_add_pd(low, high));
            (sums[0] + sums[1]) + (sums[2] + sums[3])
        }
    }
    #[inline(always)]
    fn widen_row_i8(row: &[u8], out: &mut [i16]) -> i32 {
        assert!(row.len() == out.len());
        let whole = row.len() - row.len() % 16;
        // SAFETY: see `splat`; k + 16 ≤ the length of both.
        let sum = unsafe {
            let mut squares = _mm256_setzero_si256();
            for k in (0..whole).step_by(16) {
                let x = _mm256_cvtepi8_epi16(_mm_loadu_si128(row.as_ptr().add(k).cast()));
                _mm256_storeu_si256(out.as_mut_ptr().add(k).cast(), x);
                squares = _mm256_add_epi32(squares, _mm256_madd_epi16(x, x));
            }
            sum_integers(squares)
        };
        sum + rows::widen_row_i8(&row[whole..], &mut out[whole..])
    }
    #[inline(always)]
    fn dot_and_square_i8(row: &[u8], query: &[i16]) -> (i32, i32) {
        assert!(row.len() == query.len());
        let whole = row.len() - row.len() % 16;
        let (dot, square) = rows::dot_and_square_i8(&row[whole..], &query[whole..]);
        // SAFETY: see `splat`; k + 16 ≤ the length of both.
        unsafe {
            let (mut dots, mut squares) = (_mm256_setzero_si256(), _mm256_setzero_si256());
            for k in (0..whole).step_by(16) {
                let x = _mm256_cvtepi8_epi16(_mm_loadu_si128(row.as_ptr().add(k).cast()));
                dots = _mm256_add_epi32(
                    dots,
                    _mm256_madd_epi16(x, _mm256_loadu_si256(query.as_ptr().add(k).cast())),
                );
                squares = _mm256_add_epi32(squares, _mm256_madd_epi16(x, x));
            }
            (dot + sum_integers(dots), square + sum_integers(squares))
        }
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

/// Sum of the eight integers.
#[inline(always)]
fn sum_integers(integers: __m256i) -> i32 {
    let mut lanes = [0_i32; 8];
    // SAFETY: AVX2 was detected (contract of `Lanes`); there is room for eight.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), integers) };
    lanes.into_iter().sum()
}

/// Dot products of each row with the queries of a panel: out[row][lane]. `panel` is [d][width].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dots(rows: &[f32], stride: usize, d: usize, panel: &[f32], ahead: usize, out: &mut [f32]) {
    let (n, width) = (rows.len() / stride, panel.len() / d);
    assert!(stride >= d && rows.len() == stride * n && panel.len() == d * width && out.len() == n * width);
    assert!(width == WIDTH || width == NARROW);
    let size = if width == WIDTH { ROWS } else { NARROW_ROWS };
    if n < size {
        return super::with_padding(rows, stride, size, width, out, |rows, out| {
            dots(rows, stride, d, panel, ahead, out)
        });
    }
    super::each_micro_tile(n, size, |row| {
        // SAFETY: rows row..row + size lie inside both.
        unsafe {
            let from = rows.as_ptr().add(row * stride);
            let to = out.as_mut_ptr().add(row * width);
            for k in (0..d).step_by(super::CHAIN) {
                let steps = k..(k + super::CHAIN).min(d);
                if width == WIDTH {
                    micro::<ROWS, 2>(from, stride, steps, panel.as_ptr(), ahead, to);
                } else {
                    micro::<NARROW_ROWS, 1>(from, stride, steps, panel.as_ptr(), ahead, to);
                }
            }
        }
    });
}

/// R rows × C vectors of queries, the dimensions `steps`; added to `out` unless they are the first.
///
/// # Safety
/// `rows` points to R rows `stride` values apart, which hold the steps, `panel` to d × 8·C, `out` to R × 8·C.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn micro<const R: usize, const C: usize>(
    rows: *const f32,
    stride: usize,
    steps: std::ops::Range<usize>,
    panel: *const f32,
    ahead: usize,
    out: *mut f32,
) {
    let mut sums = [[_mm256_setzero_ps(); C]; R];
    // SAFETY: all offsets stay inside what the caller vouches for; prefetches may point anywhere.
    unsafe {
        let adding = steps.start > 0;
        for k in steps {
            if k % 16 == 0 {
                for r in 0..R {
                    _mm_prefetch::<_MM_HINT_T0>(
                        rows.wrapping_add(r * stride + k).wrapping_byte_add(ahead).cast(),
                    );
                }
            }
            let mut queries = [_mm256_setzero_ps(); C];
            for (c, query) in queries.iter_mut().enumerate() {
                *query = _mm256_loadu_ps(panel.add((k * C + c) * 8));
            }
            for (r, sum) in sums.iter_mut().enumerate() {
                let x = _mm256_set1_ps(*rows.add(r * stride + k));
                for (sum, &query) in sum.iter_mut().zip(&queries) {
                    *sum = _mm256_fmadd_ps(query, x, *sum);
                }
            }
        }
        for (r, sum) in sums.iter().enumerate() {
            for (c, &sum) in sum.iter().enumerate() {
                let to = out.add((r * C + c) * 8);
                let sum = if adding { _mm256_add_ps(_mm256_loadu_ps(to), sum) } else { sum };
                _mm256_storeu_ps(to, sum);
            }
        }
    }
}

/// One row of a step: broadcast a pair, multiply-add it with both query vectors into 32 bits, add to the sums.
macro_rules! row {
    ($base:literal, $x:literal, $left:literal, $right:literal) => {
        concat!(
            "vpbroadcastd ymm14, dword ptr [",
            $base,
            " + ",
            $x,
            "]\n",
            "vpmaddwd ymm15, ymm12, ymm14\n",
            "vpmaddwd ymm14, ymm13, ymm14\n",
            "vpaddd ",
            $left,
            ", ",
            $left,
            ", ymm15\n",
            "vpaddd ",
            $right,
            ", ",
            $right,
            ", ymm14\n",
        )
    };
}

/// One step of two values: `x` and `q` are byte offsets into a row and into the panel.
macro_rules! step {
    ($x:literal, $q:literal) => {
        concat!(
            "vmovdqu ymm12, ymmword ptr [{q} + ",
            $q,
            "]\n",
            "vmovdqu ymm13, ymmword ptr [{q} + ",
            $q,
            " + 32]\n",
            row!("{b0}", $x, "ymm0", "ymm1"),
            row!("{b0} + {s}", $x, "ymm2", "ymm3"),
            row!("{b0} + 2*{s}", $x, "ymm4", "ymm5"),
            row!("{b1}", $x, "ymm6", "ymm7"),
            row!("{b1} + {s}", $x, "ymm8", "ymm9"),
            row!("{b1} + 2*{s}", $x, "ymm10", "ymm11"),
        )
    };
}

/// 6 rows × 16 queries of 16-bit integers, summed in 32 bits. In assembly: the compiler spills here.
///
/// # Safety
/// `rows` points to ROWS rows of `steps` pairs, `panel` to `steps` × WIDTH pairs, `out` to ROWS × WIDTH values.
#[target_feature(enable = "avx2,fma,f16c")]
#[rustfmt::skip]
unsafe fn micro_i16(rows: *const i16, steps: usize, panel: *const i16, ahead: usize, out: *mut i32) {
    let stride = 4 * steps;
    // SAFETY: reads and writes stay inside what the caller vouches for; prefetches may point anywhere.
    unsafe {
        asm!(
            "vpxor ymm0, ymm0, ymm0", "vpxor ymm1, ymm1, ymm1", "vpxor ymm2, ymm2, ymm2", "vpxor ymm3, ymm3, ymm3",
            "vpxor ymm4, ymm4, ymm4", "vpxor ymm5, ymm5, ymm5", "vpxor ymm6, ymm6, ymm6", "vpxor ymm7, ymm7, ymm7",
            "vpxor ymm8, ymm8, ymm8", "vpxor ymm9, ymm9, ymm9", "vpxor ymm10, ymm10, ymm10",
            "vpxor ymm11, ymm11, ymm11",
            "test {fours}, {fours}",
            "jz 3f",
            "2:",
            // As many bytes as the six rows take here.
            "prefetcht0 byte ptr [{ahead}]", "prefetcht0 byte ptr [{ahead} + 64]", "add {ahead}, 96",
            step!("0", "0"), step!("4", "64"), step!("8", "128"), step!("12", "192"),
            "add {b0}, 16", "add {b1}, 16", "add {q}, 256",
            "dec {fours}",
            "jnz 2b",
            "3:",
            "test {rest}, {rest}",
            "jz 5f",
            "4:",
            step!("0", "0"),
            "add {b0}, 4", "add {b1}, 4", "add {q}, 64",
            "dec {rest}",
            "jnz 4b",
            "5:",
            "vmovdqu [{out}], ymm0", "vmovdqu [{out} + 32], ymm1", "vmovdqu [{out} + 64], ymm2",
            "vmovdqu [{out} + 96], ymm3", "vmovdqu [{out} + 128], ymm4", "vmovdqu [{out} + 160], ymm5",
            "vmovdqu [{out} + 192], ymm6", "vmovdqu [{out} + 224], ymm7", "vmovdqu [{out} + 256], ymm8",
            "vmovdqu [{out} + 288], ymm9", "vmovdqu [{out} + 320], ymm10", "vmovdqu [{out} + 352], ymm11",
            b0 = inout(reg) rows => _,
            b1 = inout(reg) rows.wrapping_byte_add(3 * stride) => _,
            q = inout(reg) panel => _,
            s = in(reg) stride,
            ahead = inout(reg) rows.wrapping_byte_add(ahead) => _,
            fours = inout(reg) steps / 4 => _,
            rest = inout(reg) steps % 4 => _,
            out = in(reg) out,
            out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _,
            out("ymm6") _, out("ymm7") _, out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
            out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
            options(nostack),
        );
    }
}

/// Dot products of 16-bit rows with a panel of 16-bit queries: out[row][lane], exact in 32 bits. `d` is even, `panel`
/// is [d/2][width][2].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dots_i16(rows: &[i16], d: usize, panel: &[i16], ahead: usize, out: &mut [i32]) {
    let (n, width) = (rows.len() / d, panel.len() / d);
    assert!(rows.len() == d * n && d.is_multiple_of(2) && panel.len() == d * width && out.len() == n * width);
    if width == NARROW {
        return tile::dots_i16::<NARROW>(rows, d, panel, out);
    }
    assert!(width == WIDTH);
    if n < ROWS {
        return super::with_padding(rows, d, ROWS, WIDTH, out, |rows, out| {
            dots_i16(rows, d, panel, ahead, out)
        });
    }
    super::each_micro_tile(n, ROWS, |row| {
        // SAFETY: rows row..row + ROWS lie inside both.
        unsafe {
            micro_i16(
                rows.as_ptr().add(row * d),
                d / 2,
                panel.as_ptr(),
                ahead,
                out.as_mut_ptr().add(row * WIDTH),
            )
        }
    });
}

/// Dot products of 8-bit rows with a panel of shifted 8-bit queries: the compiler's own code, never the faster choice here.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dots_i8(rows: &[i8], sums: &[i32], d: usize, panel: &[u8], _ahead: usize, out: &mut [i32]) {
    tile::dots_i8(rows, sums, d, panel, out);
}

super::instantiate!(#[target_feature(enable = "avx2,fma,f16c")], V8);
