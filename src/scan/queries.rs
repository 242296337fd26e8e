//! The queries of a scan: norms, thresholds, and their packed form.

use super::Request;
use crate::error::{Error, ErrorKind, Result};
use crate::simd::{FAR, pack_panel, pack_panel_i8, pack_panel_i16};

/// Norms beyond this can't be squared and added in single precision.
pub(super) const LARGEST_SQ_NORM: f32 = f32::from_bits((127 + 97) << 23);

/// Up to here distances are taken from differences: no cancellation, and hardly slower.
const FEW_DIMENSIONS: usize = 32;

/// Arithmetic of the dot products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Single precision: |Δ log density| ≤ 1e-5 · max(1, |log density|).
    Float32,
    /// Queries at 15 bits, float rows too, int8 rows as they are: ≤ 5e-4 · max(1, |log density|), ≤ 1e-4 for h ≥ 0.2 of the norm.
    Int16,
    /// Queries and rows at 8 bits: ≤ 5e-3 · max(1, |log density|) for h ≥ 0.1 of the norm. Only where the CPU has VNNI,
    /// and only on request.
    Int8,
}

impl Precision {
    /// The name, as the command line takes it and results record it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::Int16 => "int16",
            Self::Int8 => "int8",
        }
    }

    /// The precision of a name.
    ///
    /// # Errors
    /// `Parameter` for an unknown name.
    pub fn from_name(name: &str) -> Result<Self> {
        [Self::Float32, Self::Int16, Self::Int8]
            .into_iter()
            .find(|precision| precision.name() == name)
            .ok_or_else(|| {
                Error::new(ErrorKind::Parameter, format!("unknown precision {name:?}"))
                    .remedy("choose auto, float32, int16 or int8")
            })
    }

    /// ε of the threshold for near rows: at most what the contract allows on |Δ log density| / max(1, |log density|).
    fn tolerance(self) -> f64 {
        match self {
            Self::Float32 => 5e-6,
            Self::Int16 => 2.5e-4,
            Self::Int8 => 5e-3,
        }
    }
}

/// Largest norm of a vector of 16-bit integers: products of two such vectors, and all partial sums, stay below 2³⁰
/// (Cauchy–Schwarz), roundings included.
pub(super) const INTEGER_NORM: f64 = 32_000.0;

/// Queries side by side in panels of the level's width.
pub(super) enum Packed {
    /// Few dimensions: [panel][d][width], for distances from differences.
    Differences(Vec<f32>),
    /// One query alone, as it is.
    OneF32,
    /// [panel][d][width].
    F32(Vec<f32>),
    /// One query alone, an even number of values: a zero behind the last where d is odd.
    OneI16 { query: Vec<i16>, scale: f32 },
    /// [panel][d/4][width][4], shifted by 128; d is a multiple of 4, padded with zeros.
    I8 { d: usize, panels: Vec<u8>, scales: Vec<f32> },
    /// [panel][d/2][width][2]; d is even, padded with zeros.
    I16 { d: usize, panels: Vec<i16>, scales: Vec<f32> },
}

/// All queries of a job, with the squared distances below which a pair is looked at again.
pub(super) struct Queries {
    /// Queries.
    pub count: usize,
    /// Queries of one panel.
    pub width: usize,
    /// ‖q‖², zeros up to whole panels.
    pub sq_norms: Vec<f32>,
    /// τ: below it the distance is taken again in double precision; −∞ up to whole panels.
    pub near: Vec<f32>,
    /// Below it (exact) a row is a duplicate.
    pub duplicate: Vec<f64>,
    /// The packed queries.
    pub packed: Packed,
}

/// ‖q‖² of every query.
///
/// # Errors
/// `NotFinite` with the query's number as the row.
pub(super) fn sq_norms(request: &Request<'_>) -> Result<Vec<f32>> {
    let mut norms = vec![0.0; request.queries.len() / request.d];
    request.level.sq_norms(request.queries, request.d, &mut norms);
    match norms.iter().position(|norm| !norm.is_finite() || *norm > LARGEST_SQ_NORM) {
        None => Ok(norms),
        Some(row) => {
            let message = "query holds NaN, infinity or values too large to square";
            Err(Error::new(ErrorKind::NotFinite, message).row(row as u64))
        }
    }
}

impl Queries {
    /// Packs the queries. `integer_rows`: rows are stored as integers of 8 bits, and taken as they are by `Int16`.
    pub fn new(request: &Request<'_>, integer_rows: bool) -> Result<Self> {
        let (d, level) = (request.d, request.level);
        let count = request.queries.len() / d;
        let mut sq_norms = sq_norms(request)?;
        let width = level.panel_width(count);
        // One query lies alone: its rows fill the lanes.
        let alone = count == 1 && d > FEW_DIMENSIONS && request.precision != Precision::Int8;
        let width = if alone { 1 } else { width };
        let packed = if d <= FEW_DIMENSIONS {
            Packed::Differences(pack_f32(request.queries, d, width))
        } else if request.precision == Precision::Float32 && count == 1 {
            Packed::OneF32
        } else if request.precision == Precision::Float32 {
            Packed::F32(pack_f32(request.queries, d, width))
        } else if request.precision == Precision::Int8 {
            pack_i8(request)
        } else {
            pack_i16(request, &sq_norms, integer_rows)
        };
        let row_error = match (&packed, integer_rows) {
            (_, true) => 0.0,
            // Half a step of the largest of d values, four times the size of a typical one.
            (Packed::I8 { .. }, false) => 4.0 / (127.0 * (d as f64).sqrt()),
            _ => 1.0 / INTEGER_NORM,
        };
        let deviations = if request.precision == Precision::Int8 { 2.0 } else { 4.0 };
        let mut near = Vec::with_capacity(count);
        let mut duplicate = Vec::with_capacity(count);
        for (query, &sq_norm) in sq_norms.iter().enumerate() {
            let sq_norm = f64::from(sq_norm);
            let limit = 1e-3_f64.max(2.0 * request.row_rounding).powi(2) * sq_norm;
            // A zero row is a copy of a zero query.
            let limit = limit.max(f64::from(f32::MIN_POSITIVE));
            // Roundings of integers are independent (standard deviation 1/√12 of a step, twice that in D²): so many
            // standard deviations of their sum. More would send whole clusters to double precision.
            let error = match &packed {
                Packed::Differences(_) => 1e-5 * limit,
                Packed::F32(_) | Packed::OneF32 => single_precision_error(d) * sq_norm,
                Packed::I8 { .. } | Packed::I16 { .. } | Packed::OneI16 { .. } => {
                    let scale = match &packed {
                        Packed::I8 { scales, .. } | Packed::I16 { scales, .. } => scales[query],
                        Packed::OneI16 { scale, .. } => *scale,
                        _ => 0.0,
                    };
                    let query = f64::from(scale) / sq_norm.sqrt().max(f64::MIN_POSITIVE);
                    2.0 * deviations * (row_error * row_error + query * query).sqrt() / 12_f64.sqrt()
                        * sq_norm
                        + single_precision_error(4) * sq_norm
                }
            };
            near.push(near_threshold(limit, error, request, matches!(packed, Packed::Differences(_))));
            duplicate.push(limit);
        }
        let padded = count.next_multiple_of(width);
        sq_norms.resize(padded, 0.0);
        near.resize(padded, f32::NEG_INFINITY);
        Ok(Self { count, width, sq_norms, near, duplicate, packed })
    }
}

/// Error of ‖x‖² + ‖q‖² − 2⟨x,q⟩ in single precision relative to the norms, for a near row: rounding of d products and
/// of the rest.
fn single_precision_error(d: usize) -> f64 {
    f64::from(f32::EPSILON) / 2.0 * (8.0 + 2.0 * (d as f64).sqrt())
}

fn pack_f32(queries: &[f32], d: usize, width: usize) -> Vec<f32> {
    let mut panels = vec![0.0; (queries.len() / d).div_ceil(width) * d * width];
    for (panel, queries) in panels.chunks_exact_mut(d * width).zip(queries.chunks(d * width)) {
        pack_panel(queries, d, width, panel);
    }
    panels
}

/// Queries as integers: as fine as 16 bits and sums of 32 bits allow.
fn pack_i16(request: &Request<'_>, sq_norms: &[f32], integer_rows: bool) -> Packed {
    let (d, level) = (request.d, request.level);
    let width = level.panel_width(sq_norms.len());
    let even = d.next_multiple_of(2);
    let largest_row = if integer_rows { 128.0 * (d as f64).sqrt() } else { INTEGER_NORM };
    let largest_norm = f64::from(i32::MAX) / largest_row * 0.99 - (d as f64).sqrt();
    let mut integers = vec![0; sq_norms.len() * even];
    let mut scales = Vec::with_capacity(sq_norms.len());
    for ((query, into), &sq_norm) in
        request.queries.chunks_exact(d).zip(integers.chunks_exact_mut(even)).zip(sq_norms)
    {
        let largest = query.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
        let factor = (32_766.0 / f64::from(largest)).min(largest_norm / f64::from(sq_norm).sqrt());
        // A zero (or denormal) query has no direction to round.
        let factor = if factor.is_finite() && (factor as f32).is_finite() { factor as f32 } else { 0.0 };
        level.quantise(query, factor, &mut into[..d]);
        scales.push(if factor > 0.0 { 1.0 / factor } else { 0.0 });
    }
    if let [scale] = scales[..] {
        return Packed::OneI16 { query: integers, scale };
    }
    scales.resize(sq_norms.len().next_multiple_of(width), 0.0);
    let mut panels = vec![0; sq_norms.len().div_ceil(width) * even * width];
    for (panel, queries) in panels.chunks_exact_mut(even * width).zip(integers.chunks(even * width)) {
        pack_panel_i16(queries, even, width, panel);
    }
    Packed::I16 { d: even, panels, scales }
}

/// Queries as 8-bit integers, a scale each.
fn pack_i8(request: &Request<'_>) -> Packed {
    let (d, level) = (request.d, request.level);
    let count = request.queries.len() / d;
    let width = level.panel_width(count);
    let padded = d.next_multiple_of(4);
    let mut integers = vec![0; count * padded];
    let mut scales = Vec::with_capacity(count);
    for (query, into) in request.queries.chunks_exact(d).zip(integers.chunks_exact_mut(padded)) {
        let factor = factor_i8(query);
        level.quantise_i8(query, factor, &mut into[..d]);
        scales.push(if factor > 0.0 { 1.0 / factor } else { 0.0 });
    }
    scales.resize(count.next_multiple_of(width), 0.0);
    let mut panels = vec![0; count.div_ceil(width) * padded * width];
    for (panel, queries) in panels.chunks_exact_mut(padded * width).zip(integers.chunks(padded * width)) {
        pack_panel_i8(queries, padded, width, panel);
    }
    Packed::I8 { d: padded, panels, scales }
}

/// The factor that brings the largest value of a vector to 127; 0 for a vector of zeros (or denormals).
pub(super) fn factor_i8(vector: &[f32]) -> f32 {
    let largest = vector.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    let factor = 127.0 / largest;
    if factor.is_finite() { factor } else { 0.0 }
}

/// τ(q): the squared distance below which cancellation in ‖x‖² + ‖q‖² − 2⟨x,q⟩ could matter.
///
/// With δ the error of the approximate D², the error of a row's log weight is δ/(2Dh) (exponential) or δ/(2h²)
/// (gaussian). It stays below ε·max(1, |log weight|) where D² ≥ δ/2ε resp. δ/ε, or where h is large enough.
fn near_threshold(duplicate: f64, error: f64, request: &Request<'_>, from_differences: bool) -> f32 {
    let mut near = (duplicate.max(request.exclude_within.powi(2)) + 2.0 * error) * (1.0 + 1e-5);
    let tolerance = request.precision.tolerance();
    for kernel in request.kernels.iter().filter(|kernel| kernel.kernel.is_fused() && !from_differences) {
        let h = kernel.bandwidth;
        let limit = if kernel.kernel.takes_root() {
            (error / (2.0 * tolerance)).min((error / (2.0 * h * tolerance)).powi(2))
        } else if error / (2.0 * h * h) <= tolerance {
            0.0
        } else {
            error / tolerance
        };
        near = near.max(limit);
    }
    (near as f32).min(FAR / 2.0)
}
