//! AVX-512 (F, BW, VL, DQ): panels of 32 queries, micro-tiles of 12 rows × 2 vectors.

use std::arch::asm;
use std::arch::x86_64::*;

use super::exponential;
use super::rows;
use super::tile::{self, Lanes};

/// Queries of one panel.
pub(super) const WIDTH: usize = 32;
/// Queries of one panel where there are few queries.
pub(super) const NARROW: usize = 16;
/// Rows of one micro-tile: 24 accumulators, 2 query vectors and broadcasts fill the 32 registers.
const ROWS: usize = 12;
/// Rows of one micro-tile of a narrow panel.
const NARROW_ROWS: usize = 24;

#[derive(Clone, Copy)]
struct V16(__m512);

// SAFETY: only the functions below use it, and they require the features.
unsafe impl Lanes for V16 {
    const N: usize = 16;
    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: AVX-512 was detected (contract of `Lanes`); so in every method below.
        Self(unsafe { _mm512_set1_ps(value) })
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for 16 readable values.
        Self(unsafe { _mm512_loadu_ps(from) })
    }
    #[inline(always)]
    fn integers(self) -> Self {
        // SAFETY: see `splat`.
        Self(unsafe { _mm512_cvtepi32_ps(_mm512_castps_si512(self.0)) })
    }
    #[inline(always)]
    unsafe fn load_half(from: *const u8) -> Self {
        // SAFETY: the caller vouches for 32 readable bytes.
        Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for 16 writable values.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn store_i16(self, to: *mut i16) {
        // SAFETY: the caller vouches for 16 writable integers.
        unsafe { _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(self.0))) }
    }
    #[inline(always)]
    fn prefetch(at: *const f32) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        // SAFETY: see `splat`.
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        // SAFETY: see `splat`.
        Self(unsafe { _mm512_sub_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        // SAFETY: see `splat`.
        Self(unsafe { _mm512_mul_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        // SAFETY: see `splat`.
        Self(unsafe { _mm512_fmadd_ps(self.0, factor.0, term.0) })
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        // SAFETY: see `splat`.
        Self(unsafe { _mm512_min_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // SAFETY: see `splat`.
        Self(unsafe { _mm512_max_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        // SAFETY: see `splat`.
        Self(unsafe { _mm512_sqrt_ps(self.0) })
    }
    #[inline(always)]
    fn less(self, other: Self) -> u32 {
        // SAFETY: see `splat`.
        u32::from(unsafe { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, other.0) })
    }
    #[inline(always)]
    fn total(self) -> f64 {
        // SAFETY: see `splat`.
        unsafe {
            let low = _mm512_cvtps_pd(_mm512_castps512_ps256(self.0));
            let high = _mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(self.0));
            _mm512_reduce_add_pd(_mm512_add_pd(low, high))
        }
    }
    #[inline(always)]
    fn widen_row_i8(row: &[u8], out: &mut [i16]) -> i32 {
        assert!(row.len() == out.len());
        let whole = row.len() - row.len() % 32;
        // SAFETY: see `splat`; k + 32 ≤ the length of both.
        let sum = unsafe {
            let mut squares = _mm512_setzero_si512();
            for k in (0..whole).step_by(32) {
                let x = _mm512_cvtepi8_epi16(_mm256_loadu_si256(row.as_ptr().add(k).cast()));
                _mm512_storeu_si512(out.as_mut_ptr().add(k).cast(), x);
                squares = _mm512_add_epi32(squares, _mm512_madd_epi16(x, x));
            }
            _mm512_reduce_add_epi32(squares)
        };
        sum + rows::widen_row_i8(&row[whole..], &mut out[whole..])
    }
    #[inline(always)]
    fn dot_and_square_i8(row: &[u8], query: &[i16]) -> (i32, i32) {
        assert!(row.len() == query.len());
        let whole = row.len() - row.len() % 32;
        let (dot, square) = rows::dot_and_square_i8(&row[whole..], &query[whole..]);
        // SAFETY: see `splat`; k + 32 ≤ the length of both.
        unsafe {
            let (mut dots, mut squares) = (_mm512_setzero_si512(), _mm512_setzero_si512());
            for k in (0..whole).step_by(32) {
                let x = _mm512_cvtepi8_epi16(_mm256_loadu_si256(row.as_ptr().add(k).cast()));
                dots = _mm512_add_epi32(
                    dots,
                    _mm512_madd_epi16(x, _mm512_loadu_si512(query.as_ptr().add(k).cast())),
                );
                squares = _mm512_add_epi32(squares, _mm512_madd_epi16(x, x));
            }
            (dot + _mm512_reduce_add_epi32(dots), square + _mm512_reduce_add_epi32(squares))
        }
    }
    #[inline(always)]
    fn exp2(self) -> Self {
        // SAFETY: see `splat`. `scalef` takes care of arguments down to −∞.
        unsafe {
            let t = _mm512_max_ps(self.0, _mm512_set1_ps(-1e4));
            let whole = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(t);
            let power = tile::exp2_polynomial(Self(_mm512_sub_ps(t, whole)));
            Self(_mm512_scalef_ps(power.0, whole))
        }
    }
}

/// Dot products of each row with the queries of a panel: out[row][lane]. `panel` is [d][width].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
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
    let run = |row: usize, k: usize, out: &mut [f32]| {
        // SAFETY: rows row..row + size lie inside both, and steps k.. inside a row.
        unsafe {
            let from = rows.as_ptr().add(row * stride + k).cast();
            let queries = panel.as_ptr().add(k * width).cast();
            let to = out.as_mut_ptr().add(row * width).cast();
            let steps = super::CHAIN.min(d - k);
            if width == WIDTH {
                micro_f32(from, 4 * stride, steps, queries, k > 0, ahead, to);
            } else {
                narrow_f32(from, 4 * stride, steps, queries, k > 0, ahead, to);
            }
        }
    };
    // A chain of the panel stays in the first-level cache for all rows.
    for k in (0..d).step_by(super::CHAIN) {
        for row in (0..n - n % size).step_by(size) {
            run(row, k, out);
        }
    }
    if !n.is_multiple_of(size) {
        // The last micro-tile overlaps the one before, from its first chain on: the same bits are written again.
        for k in (0..d).step_by(super::CHAIN) {
            run(n - size, k, out);
        }
    }
}

/// One row of a step: broadcast 32 bits of it, multiply them with both query vectors.
macro_rules! row {
    ($load:literal, $multiply:literal, $base:literal, $x:literal, $temp:literal, $left:literal, $right:literal) => {
        concat!(
            $load,
            " ",
            $temp,
            ", dword ptr [",
            $base,
            " + ",
            $x,
            "]\n",
            $multiply,
            " ",
            $left,
            ", zmm24, ",
            $temp,
            "\n",
            $multiply,
            " ",
            $right,
            ", zmm25, ",
            $temp,
            "\n",
        )
    };
}

/// One step in k: `x` and `q` are byte offsets into a row and into the panel.
macro_rules! step {
    ($load:literal, $multiply:literal, $x:literal, $q:literal) => {
        concat!(
            "vmovups zmm24, zmmword ptr [{q} + ",
            $q,
            "]\n",
            "vmovups zmm25, zmmword ptr [{q} + ",
            $q,
            " + 64]\n",
            row!($load, $multiply, "{b0}", $x, "zmm26", "zmm0", "zmm1"),
            row!($load, $multiply, "{b0} + {s}", $x, "zmm27", "zmm2", "zmm3"),
            row!($load, $multiply, "{b0} + 2*{s}", $x, "zmm28", "zmm4", "zmm5"),
            row!($load, $multiply, "{b0} + {s3}", $x, "zmm29", "zmm6", "zmm7"),
            row!($load, $multiply, "{b1}", $x, "zmm26", "zmm8", "zmm9"),
            row!($load, $multiply, "{b1} + {s}", $x, "zmm27", "zmm10", "zmm11"),
            row!($load, $multiply, "{b1} + 2*{s}", $x, "zmm28", "zmm12", "zmm13"),
            row!($load, $multiply, "{b1} + {s3}", $x, "zmm29", "zmm14", "zmm15"),
            row!($load, $multiply, "{b2}", $x, "zmm26", "zmm16", "zmm17"),
            row!($load, $multiply, "{b2} + {s}", $x, "zmm27", "zmm18", "zmm19"),
            row!($load, $multiply, "{b2} + 2*{s}", $x, "zmm28", "zmm20", "zmm21"),
            row!($load, $multiply, "{b2} + {s3}", $x, "zmm29", "zmm22", "zmm23"),
        )
    };
}

/// Prefetches one line of each of 4 rows, `ahead` bytes from a base.
macro_rules! prefetch {
    ($base:literal) => {
        concat!(
            "lea {t}, [",
            $base,
            " + {ahead}]\n",
            "prefetcht0 byte ptr [{t}]\n",
            "prefetcht0 byte ptr [{t} + {s}]\n",
            "prefetcht0 byte ptr [{t} + 2*{s}]\n",
            "prefetcht0 byte ptr [{t} + {s3}]\n",
        )
    };
}

/// A micro-kernel: 12 rows × 32 queries, 32 bits of a row at a time, 24 accumulators of 32 bits.
///
/// In assembly because the compiler spills accumulators once the stride is a run-time value.
macro_rules! micro_kernel {
    ($(#[$doc:meta])* $name:ident, $features:literal, $load:literal, $multiply:literal, $add:literal) => {
        $(#[$doc])*
        ///
        /// `stride` is in bytes; with `adding` the products are added to `out`.
        ///
        /// # Safety
        /// `rows` points to ROWS rows of `steps` × 4 bytes, `panel` to `steps` × WIDTH × 4 bytes, `out` to ROWS × WIDTH
        /// initialised values.
        #[target_feature(enable = $features)]
        #[rustfmt::skip]
        #[allow(clippy::too_many_arguments)]
        unsafe fn $name(
            rows: *const u8, stride: usize, steps: usize, panel: *const u8, adding: bool, ahead: usize, out: *mut u8,
        ) {
            // SAFETY: reads and writes stay inside what the caller vouches for; prefetches may point anywhere.
            unsafe {
                asm!(
                    "vpxorq zmm0, zmm0, zmm0", "vpxorq zmm1, zmm1, zmm1", "vpxorq zmm2, zmm2, zmm2",
                    "vpxorq zmm3, zmm3, zmm3", "vpxorq zmm4, zmm4, zmm4", "vpxorq zmm5, zmm5, zmm5",
                    "vpxorq zmm6, zmm6, zmm6", "vpxorq zmm7, zmm7, zmm7", "vpxorq zmm8, zmm8, zmm8",
                    "vpxorq zmm9, zmm9, zmm9", "vpxorq zmm10, zmm10, zmm10", "vpxorq zmm11, zmm11, zmm11",
                    "vpxorq zmm12, zmm12, zmm12", "vpxorq zmm13, zmm13, zmm13", "vpxorq zmm14, zmm14, zmm14",
                    "vpxorq zmm15, zmm15, zmm15", "vpxorq zmm16, zmm16, zmm16", "vpxorq zmm17, zmm17, zmm17",
                    "vpxorq zmm18, zmm18, zmm18", "vpxorq zmm19, zmm19, zmm19", "vpxorq zmm20, zmm20, zmm20",
                    "vpxorq zmm21, zmm21, zmm21", "vpxorq zmm22, zmm22, zmm22", "vpxorq zmm23, zmm23, zmm23",
                    "test {lines}, {lines}",
                    "jz 3f",
                    "2:",
                    prefetch!("{b0}"),
                    step!($load, $multiply, "0", "0"), step!($load, $multiply, "4", "128"),
                    step!($load, $multiply, "8", "256"), step!($load, $multiply, "12", "384"),
                    prefetch!("{b1}"),
                    step!($load, $multiply, "16", "512"), step!($load, $multiply, "20", "640"),
                    step!($load, $multiply, "24", "768"), step!($load, $multiply, "28", "896"),
                    prefetch!("{b2}"),
                    step!($load, $multiply, "32", "1024"), step!($load, $multiply, "36", "1152"),
                    step!($load, $multiply, "40", "1280"), step!($load, $multiply, "44", "1408"),
                    step!($load, $multiply, "48", "1536"), step!($load, $multiply, "52", "1664"),
                    step!($load, $multiply, "56", "1792"), step!($load, $multiply, "60", "1920"),
                    "add {b0}, 64", "add {b1}, 64", "add {b2}, 64", "add {q}, 2048",
                    "dec {lines}",
                    "jnz 2b",
                    "3:",
                    "test {rest}, {rest}",
                    "jz 5f",
                    "4:",
                    step!($load, $multiply, "0", "0"),
                    "add {b0}, 4", "add {b1}, 4", "add {b2}, 4", "add {q}, 128",
                    "dec {rest}",
                    "jnz 4b",
                    "5:",
                    "test {adding}, {adding}",
                    "jz 6f",
                    concat!($add, " zmm0, zmm0, zmmword ptr [{out} + 0]"),
                    concat!($add, " zmm1, zmm1, zmmword ptr [{out} + 64]"),
                    concat!($add, " zmm2, zmm2, zmmword ptr [{out} + 128]"),
                    concat!($add, " zmm3, zmm3, zmmword ptr [{out} + 192]"),
                    concat!($add, " zmm4, zmm4, zmmword ptr [{out} + 256]"),
                    concat!($add, " zmm5, zmm5, zmmword ptr [{out} + 320]"),
                    concat!($add, " zmm6, zmm6, zmmword ptr [{out} + 384]"),
                    concat!($add, " zmm7, zmm7, zmmword ptr [{out} + 448]"),
                    concat!($add, " zmm8, zmm8, zmmword ptr [{out} + 512]"),
                    concat!($add, " zmm9, zmm9, zmmword ptr [{out} + 576]"),
                    concat!($add, " zmm10, zmm10, zmmword ptr [{out} + 640]"),
                    concat!($add, " zmm11, zmm11, zmmword ptr [{out} + 704]"),
                    concat!($add, " zmm12, zmm12, zmmword ptr [{out} + 768]"),
                    concat!($add, " zmm13, zmm13, zmmword ptr [{out} + 832]"),
                    concat!($add, " zmm14, zmm14, zmmword ptr [{out} + 896]"),
                    concat!($add, " zmm15, zmm15, zmmword ptr [{out} + 960]"),
                    concat!($add, " zmm16, zmm16, zmmword ptr [{out} + 1024]"),
                    concat!($add, " zmm17, zmm17, zmmword ptr [{out} + 1088]"),
                    concat!($add, " zmm18, zmm18, zmmword ptr [{out} + 1152]"),
                    concat!($add, " zmm19, zmm19, zmmword ptr [{out} + 1216]"),
                    concat!($add, " zmm20, zmm20, zmmword ptr [{out} + 1280]"),
                    concat!($add, " zmm21, zmm21, zmmword ptr [{out} + 1344]"),
                    concat!($add, " zmm22, zmm22, zmmword ptr [{out} + 1408]"),
                    concat!($add, " zmm23, zmm23, zmmword ptr [{out} + 1472]"),
                    "6:",
                    "vmovups [{out}], zmm0", "vmovups [{out} + 64], zmm1", "vmovups [{out} + 128], zmm2",
                    "vmovups [{out} + 192], zmm3", "vmovups [{out} + 256], zmm4", "vmovups [{out} + 320], zmm5",
                    "vmovups [{out} + 384], zmm6", "vmovups [{out} + 448], zmm7", "vmovups [{out} + 512], zmm8",
                    "vmovups [{out} + 576], zmm9", "vmovups [{out} + 640], zmm10", "vmovups [{out} + 704], zmm11",
                    "vmovups [{out} + 768], zmm12", "vmovups [{out} + 832], zmm13", "vmovups [{out} + 896], zmm14",
                    "vmovups [{out} + 960], zmm15", "vmovups [{out} + 1024], zmm16", "vmovups [{out} + 1088], zmm17",
                    "vmovups [{out} + 1152], zmm18", "vmovups [{out} + 1216], zmm19", "vmovups [{out} + 1280], zmm20",
                    "vmovups [{out} + 1344], zmm21", "vmovups [{out} + 1408], zmm22", "vmovups [{out} + 1472], zmm23",
                    b0 = inout(reg) rows => _,
                    b1 = inout(reg) rows.wrapping_add(4 * stride) => _,
                    b2 = inout(reg) rows.wrapping_add(8 * stride) => _,
                    q = inout(reg) panel => _,
                    s = in(reg) stride,
                    s3 = in(reg) 3 * stride,
                    lines = inout(reg) steps / 16 => _,
                    rest = inout(reg) steps % 16 => _,
                    t = out(reg) _,
                    out = in(reg) out,
                    adding = in(reg) usize::from(adding),
                    ahead = in(reg) ahead,
                    out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _, out("zmm5") _,
                    out("zmm6") _, out("zmm7") _, out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
                    out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _, out("zmm16") _, out("zmm17") _,
                    out("zmm18") _, out("zmm19") _, out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _,
                    out("zmm24") _, out("zmm25") _, out("zmm26") _, out("zmm27") _, out("zmm28") _, out("zmm29") _,
                    options(nostack),
                );
            }
        }
    };
}

micro_kernel!(
    /// Single precision: a step is one value of a row.
    micro_f32, "avx512f,avx512bw,avx512vl,avx512dq", "vbroadcastss", "vfmadd231ps", "vaddps"
);
micro_kernel!(
    /// Pairs of 16-bit integers, summed in 32 bits: a step is two values of a row.
    micro_i16, "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni", "vpbroadcastd", "vpdpwssd", "vpaddd"
);

/// A narrow micro-kernel: 24 rows × 16 queries, the rows' values broadcast inside the multiplications.
macro_rules! narrow_kernel {
    ($(#[$doc:meta])* $name:ident, $features:literal, $multiply:literal, $add:literal) => {
        $(#[$doc])*
        ///
        /// `stride` is in bytes; with `adding` the products are added to `out`.
        ///
        /// # Safety
        /// `rows` points to 24 rows of `steps` × 4 bytes, `panel` to `steps` × 64 bytes, `out` to 24 × 16 values.
        #[target_feature(enable = $features)]
        #[rustfmt::skip]
        #[allow(clippy::too_many_arguments)]
        unsafe fn $name(
            rows: *const u8, stride: usize, steps: usize, panel: *const u8, adding: bool, ahead: usize, out: *mut u8,
        ) {
            // SAFETY: reads and writes stay inside what the caller vouches for; prefetches may point anywhere.
            unsafe {
                for line in (0..4 * steps).step_by(64) {
                    for row in 0..NARROW_ROWS {
                        _mm_prefetch::<_MM_HINT_T0>(rows.wrapping_add(row * stride + line + ahead).cast());
                    }
                }
                asm!(
                    "vpxorq zmm0, zmm0, zmm0", "vpxorq zmm1, zmm1, zmm1", "vpxorq zmm2, zmm2, zmm2",
                    "vpxorq zmm3, zmm3, zmm3", "vpxorq zmm4, zmm4, zmm4", "vpxorq zmm5, zmm5, zmm5",
                    "vpxorq zmm6, zmm6, zmm6", "vpxorq zmm7, zmm7, zmm7", "vpxorq zmm8, zmm8, zmm8",
                    "vpxorq zmm9, zmm9, zmm9", "vpxorq zmm10, zmm10, zmm10", "vpxorq zmm11, zmm11, zmm11",
                    "vpxorq zmm12, zmm12, zmm12", "vpxorq zmm13, zmm13, zmm13", "vpxorq zmm14, zmm14, zmm14",
                    "vpxorq zmm15, zmm15, zmm15", "vpxorq zmm16, zmm16, zmm16", "vpxorq zmm17, zmm17, zmm17",
                    "vpxorq zmm18, zmm18, zmm18", "vpxorq zmm19, zmm19, zmm19", "vpxorq zmm20, zmm20, zmm20",
                    "vpxorq zmm21, zmm21, zmm21", "vpxorq zmm22, zmm22, zmm22", "vpxorq zmm23, zmm23, zmm23",
                    "2:",
                    "vmovups zmm24, zmmword ptr [{q}]",
                    concat!($multiply, " zmm0, zmm24, dword ptr [{b0}]{{1to16}}"),
                    concat!($multiply, " zmm1, zmm24, dword ptr [{b0} + {s}]{{1to16}}"),
                    concat!($multiply, " zmm2, zmm24, dword ptr [{b0} + 2*{s}]{{1to16}}"),
                    concat!($multiply, " zmm3, zmm24, dword ptr [{b0} + {s3}]{{1to16}}"),
                    concat!($multiply, " zmm4, zmm24, dword ptr [{b1}]{{1to16}}"),
                    concat!($multiply, " zmm5, zmm24, dword ptr [{b1} + {s}]{{1to16}}"),
                    concat!($multiply, " zmm6, zmm24, dword ptr [{b1} + 2*{s}]{{1to16}}"),
                    concat!($multiply, " zmm7, zmm24, dword ptr [{b1} + {s3}]{{1to16}}"),
                    concat!($multiply, " zmm8, zmm24, dword ptr [{b2}]{{1to16}}"),
                    concat!($multiply, " zmm9, zmm24, dword ptr [{b2} + {s}]{{1to16}}"),
                    concat!($multiply, " zmm10, zmm24, dword ptr [{b2} + 2*{s}]{{1to16}}"),
                    concat!($multiply, " zmm11, zmm24, dword ptr [{b2} + {s3}]{{1to16}}"),
                    concat!($multiply, " zmm12, zmm24, dword ptr [{b3}]{{1to16}}"),
                    concat!($multiply, " zmm13, zmm24, dword ptr [{b3} + {s}]{{1to16}}"),
                    concat!($multiply, " zmm14, zmm24, dword ptr [{b3} + 2*{s}]{{1to16}}"),
                    concat!($multiply, " zmm15, zmm24, dword ptr [{b3} + {s3}]{{1to16}}"),
                    concat!($multiply, " zmm16, zmm24, dword ptr [{b4}]{{1to16}}"),
                    concat!($multiply, " zmm17, zmm24, dword ptr [{b4} + {s}]{{1to16}}"),
                    concat!($multiply, " zmm18, zmm24, dword ptr [{b4} + 2*{s}]{{1to16}}"),
                    concat!($multiply, " zmm19, zmm24, dword ptr [{b4} + {s3}]{{1to16}}"),
                    concat!($multiply, " zmm20, zmm24, dword ptr [{b5}]{{1to16}}"),
                    concat!($multiply, " zmm21, zmm24, dword ptr [{b5} + {s}]{{1to16}}"),
                    concat!($multiply, " zmm22, zmm24, dword ptr [{b5} + 2*{s}]{{1to16}}"),
                    concat!($multiply, " zmm23, zmm24, dword ptr [{b5} + {s3}]{{1to16}}"),
                    "add {b0}, 4", "add {b1}, 4", "add {b2}, 4", "add {b3}, 4", "add {b4}, 4", "add {b5}, 4",
                    "add {q}, 64",
                    "dec {steps}",
                    "jnz 2b",
                    "test {adding}, {adding}",
                    "jz 3f",
                    concat!($add, " zmm0, zmm0, zmmword ptr [{out} + 0]"),
                    concat!($add, " zmm1, zmm1, zmmword ptr [{out} + 64]"),
                    concat!($add, " zmm2, zmm2, zmmword ptr [{out} + 128]"),
                    concat!($add, " zmm3, zmm3, zmmword ptr [{out} + 192]"),
                    concat!($add, " zmm4, zmm4, zmmword ptr [{out} + 256]"),
                    concat!($add, " zmm5, zmm5, zmmword ptr [{out} + 320]"),
                    concat!($add, " zmm6, zmm6, zmmword ptr [{out} + 384]"),
                    concat!($add, " zmm7, zmm7, zmmword ptr [{out} + 448]"),
                    concat!($add, " zmm8, zmm8, zmmword ptr [{out} + 512]"),
                    concat!($add, " zmm9, zmm9, zmmword ptr [{out} + 576]"),
                    concat!($add, " zmm10, zmm10, zmmword ptr [{out} + 640]"),
                    concat!($add, " zmm11, zmm11, zmmword ptr [{out} + 704]"),
                    concat!($add, " zmm12, zmm12, zmmword ptr [{out} + 768]"),
                    concat!($add, " zmm13, zmm13, zmmword ptr [{out} + 832]"),
                    concat!($add, " zmm14, zmm14, zmmword ptr [{out} + 896]"),
                    concat!($add, " zmm15, zmm15, zmmword ptr [{out} + 960]"),
                    concat!($add, " zmm16, zmm16, zmmword ptr [{out} + 1024]"),
                    concat!($add, " zmm17, zmm17, zmmword ptr [{out} + 1088]"),
                    concat!($add, " zmm18, zmm18, zmmword ptr [{out} + 1152]"),
                    concat!($add, " zmm19, zmm19, zmmword ptr [{out} + 1216]"),
                    concat!($add, " zmm20, zmm20, zmmword ptr [{out} + 1280]"),
                    concat!($add, " zmm21, zmm21, zmmword ptr [{out} + 1344]"),
                    concat!($add, " zmm22, zmm22, zmmword ptr [{out} + 1408]"),
                    concat!($add, " zmm23, zmm23, zmmword ptr [{out} + 1472]"),
                    "3:",
                    "vmovups [{out}], zmm0", "vmovups [{out} + 64], zmm1", "vmovups [{out} + 128], zmm2",
                    "vmovups [{out} + 192], zmm3", "vmovups [{out} + 256], zmm4", "vmovups [{out} + 320], zmm5",
                    "vmovups [{out} + 384], zmm6", "vmovups [{out} + 448], zmm7", "vmovups [{out} + 512], zmm8",
                    "vmovups [{out} + 576], zmm9", "vmovups [{out} + 640], zmm10", "vmovups [{out} + 704], zmm11",
                    "vmovups [{out} + 768], zmm12", "vmovups [{out} + 832], zmm13", "vmovups [{out} + 896], zmm14",
                    "vmovups [{out} + 960], zmm15", "vmovups [{out} + 1024], zmm16", "vmovups [{out} + 1088], zmm17",
                    "vmovups [{out} + 1152], zmm18", "vmovups [{out} + 1216], zmm19", "vmovups [{out} + 1280], zmm20",
                    "vmovups [{out} + 1344], zmm21", "vmovups [{out} + 1408], zmm22", "vmovups [{out} + 1472], zmm23",
                    b0 = inout(reg) rows => _,
                    b1 = inout(reg) rows.wrapping_add(4 * stride) => _,
                    b2 = inout(reg) rows.wrapping_add(8 * stride) => _,
                    b3 = inout(reg) rows.wrapping_add(12 * stride) => _,
                    b4 = inout(reg) rows.wrapping_add(16 * stride) => _,
                    b5 = inout(reg) rows.wrapping_add(20 * stride) => _,
                    q = inout(reg) panel => _,
                    s = in(reg) stride,
                    s3 = in(reg) 3 * stride,
                    steps = inout(reg) steps => _,
                    out = in(reg) out,
                    adding = in(reg) usize::from(adding),
                    out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _, out("zmm5") _,
                    out("zmm6") _, out("zmm7") _, out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
                    out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _, out("zmm16") _, out("zmm17") _,
                    out("zmm18") _, out("zmm19") _, out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _,
                    out("zmm24") _,
                    options(nostack),
                );
            }
        }
    };
}

narrow_kernel!(
    /// Single precision: a step is one value of a row.
    narrow_f32, "avx512f,avx512bw,avx512vl,avx512dq", "vfmadd231ps", "vaddps"
);
narrow_kernel!(
    /// Pairs of 16-bit integers, summed in 32 bits: a step is two values of a row.
    narrow_i16, "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni", "vpdpwssd", "vpaddd"
);

micro_kernel!(
    /// Fours of 8-bit integers, queries unsigned and rows signed, summed in 32 bits: a step is four values of a row.
    micro_i8, "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni", "vpbroadcastd", "vpdpbusd", "vpaddd"
);
narrow_kernel!(
    /// Fours of 8-bit integers, queries unsigned and rows signed, summed in 32 bits: a step is four values of a row.
    narrow_i8, "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni", "vpdpbusd", "vpaddd"
);

/// Dot products of 8-bit rows (sums Σ x) with a panel of queries shifted by 128: out[row][lane], exact in 32 bits. `d` is
/// a multiple of 4, `panel` is [d/4][width][4].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn dots_i8(rows: &[i8], sums: &[i32], d: usize, panel: &[u8], ahead: usize, out: &mut [i32]) {
    let (n, width) = (sums.len(), panel.len() / d);
    assert!(rows.len() == d * n && d.is_multiple_of(4) && panel.len() == d * width && out.len() == n * width);
    assert!(width == WIDTH || width == NARROW);
    let size = if width == WIDTH { ROWS } else { NARROW_ROWS };
    if n < size || !is_x86_feature_detected!("avx512vnni") {
        return tile::dots_i8(rows, sums, d, panel, out);
    }
    super::each_micro_tile(n, size, |row| {
        // The shift of the queries is taken back before: the products are added to it.
        for (out, &sum) in out[row * width..][..size * width].chunks_exact_mut(width).zip(&sums[row..]) {
            out.fill(-128 * sum);
        }
        // SAFETY: rows row..row + size lie inside both; VNNI was detected.
        unsafe {
            let from = rows.as_ptr().add(row * d).cast();
            let to = out.as_mut_ptr().add(row * width).cast();
            if width == WIDTH {
                micro_i8(from, d, d / 4, panel.as_ptr(), true, ahead, to);
            } else {
                narrow_i8(from, d, d / 4, panel.as_ptr(), true, ahead, to);
            }
        }
    });
}

/// Dot products of 16-bit rows with a panel of 16-bit queries: out[row][lane], exact in 32 bits. `d` is even, `panel`
/// is [d/2][width][2].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn dots_i16(rows: &[i16], d: usize, panel: &[i16], ahead: usize, out: &mut [i32]) {
    let (n, width) = (rows.len() / d, panel.len() / d);
    assert!(rows.len() == d * n && d.is_multiple_of(2) && panel.len() == d * width && out.len() == n * width);
    assert!(width == WIDTH || width == NARROW);
    if !is_x86_feature_detected!("avx512vnni") {
        return dots_i16_plain(rows, d, panel, out);
    }
    let size = if width == WIDTH { ROWS } else { NARROW_ROWS };
    if n < size {
        return super::with_padding(rows, d, size, width, out, |rows, out| {
            dots_i16(rows, d, panel, ahead, out)
        });
    }
    super::each_micro_tile(n, size, |row| {
        // SAFETY: rows row..row + size lie inside both; VNNI was detected.
        unsafe {
            let from = rows.as_ptr().add(row * d).cast();
            let to = out.as_mut_ptr().add(row * width).cast();
            if width == WIDTH {
                micro_i16(from, 2 * d, d / 2, panel.as_ptr().cast(), false, ahead, to);
            } else {
                narrow_i16(from, 2 * d, d / 2, panel.as_ptr().cast(), false, ahead, to);
            }
        }
    });
}

/// The same without VNNI, where the compiler's own code has to do.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn dots_i16_plain(rows: &[i16], d: usize, panel: &[i16], out: &mut [i32]) {
    match panel.len() / d {
        NARROW => tile::dots_i16::<NARROW>(rows, d, panel, out),
        _ => tile::dots_i16::<WIDTH>(rows, d, panel, out),
    }
}

super::instantiate!(#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")], V16);
