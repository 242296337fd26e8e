//! The rows of one tile in the form that its arithmetic takes.

use super::queries::{INTEGER_NORM, LARGEST_SQ_NORM, factor_i8};
use crate::error::{Error, ErrorKind, Result};
use crate::rows::{Dtype, Rows};
use crate::simd::{Integers, Level};

/// Bytes apart at which rows compete for the same few places of a first-level cache (32 KB, 8 ways).
const CONFLICT: usize = 2048;

/// Buffers for the rows of a tile; reused from tile to tile of one job. Values between the end of a row and the stride are
/// zeros: they are never written.
#[derive(Default)]
pub(crate) struct TileRows {
    /// ‖x‖² as stored.
    pub norms: Vec<f32>,
    /// Rows in single precision, where they are not stored so.
    widened: Vec<f32>,
    /// The same apart by another stride than d, where that makes a difference.
    apart: Vec<f32>,
    /// Rows as integers, with an even stride.
    pub integers: Vec<i16>,
    /// Rows as bytes, with a stride that is a multiple of 4, and Σ x of each.
    pub bytes: Vec<i8>,
    /// Σ x of each row of bytes.
    pub sums: Vec<i32>,
    /// x ≈ scale · integers.
    pub scales: Vec<f32>,
    /// ‖x‖² of the integers.
    squares: Vec<i32>,
}

impl TileRows {
    /// Takes the rows in single precision, with their norms.
    pub fn take_singles(&mut self, rows: &Rows<'_>, level: Level) -> Result<()> {
        self.norms.resize(rows.len(), 0.0);
        self.apart.clear();
        match in_place(rows) {
            Some(singles) => level.sq_norms(singles, rows.dim(), &mut self.norms),
            None => {
                self.widened.resize(rows.len() * rows.dim(), 0.0);
                level.widen(rows, &mut self.widened, &mut self.norms);
            }
        }
        check_finite(&self.norms)
    }

    /// The same, apart by a stride that lets a micro-tile of rows share the first-level cache; returns the stride.
    pub fn take_apart(&mut self, rows: &Rows<'_>, level: Level) -> Result<usize> {
        self.take_singles(rows, level)?;
        let d = rows.dim();
        if !(4 * d).is_multiple_of(CONFLICT) {
            return Ok(d);
        }
        let stride = d + 16;
        self.apart.resize(rows.len() * stride, 0.0);
        let singles = in_place(rows).unwrap_or(&self.widened);
        for (row, to) in singles.chunks_exact(d).zip(self.apart.chunks_exact_mut(stride)) {
            to[..d].copy_from_slice(row);
        }
        Ok(stride)
    }

    /// The rows taken last in single precision: in place where they are stored so and aligned, else widened.
    pub fn singles<'r>(&'r self, rows: &Rows<'r>) -> &'r [f32] {
        if !self.apart.is_empty() {
            return &self.apart;
        }
        in_place(rows).unwrap_or(&self.widened)
    }

    /// Dot products of the rows with one query. `ahead` bytes in front are fetched.
    pub fn dots_one(
        &mut self,
        rows: &Rows<'_>,
        query: &[f32],
        ahead: usize,
        level: Level,
        dots: &mut [f32],
    ) -> Result<()> {
        self.norms.resize(rows.len(), 0.0);
        if !level.dots_one(rows, query, ahead, dots, &mut self.norms) {
            self.widened.resize(rows.len() * rows.dim(), 0.0);
            level.widen(rows, &mut self.widened, &mut self.norms);
            let widened = bytemuck::cast_slice(&self.widened);
            let singles = Rows::new(widened, Dtype::F32, rows.len(), rows.dim(), None)?;
            level.dots_one(&singles, query, 0, dots, &mut self.norms);
        }
        check_finite(&self.norms)
    }

    /// Integer dot products of the rows with one query of an even number of values (a zero behind the last, where d is odd).
    pub fn dots_one_i16(
        &mut self,
        rows: &Rows<'_>,
        query: &[i16],
        ahead: usize,
        level: Level,
        dots: &mut [i32],
    ) -> Result<()> {
        if rows.dtype() != Dtype::I8 {
            self.quantise(rows, level)?;
            level.dots_one_i16(&self.integers, query, dots);
            return Ok(());
        }
        self.squares.resize(rows.len(), 0);
        level.dots_one_i8(rows.bytes(), &query[..rows.dim()], ahead, dots, &mut self.squares);
        self.take_scales(rows)
    }

    /// Scales and norms of 8-bit rows, from the sums of their squares.
    fn take_scales(&mut self, rows: &Rows<'_>) -> Result<()> {
        self.scales.clear();
        match rows.scales() {
            Some(scales) => self.scales.extend_from_slice(scales),
            None => self.scales.resize(rows.len(), 1.0),
        }
        self.norms.clear();
        let norms = self.squares.iter().zip(&self.scales);
        self.norms.extend(norms.map(|(&sum, &scale)| (f64::from(sum) * f64::from(scale).powi(2)) as f32));
        check_finite(&self.norms)
    }

    /// Rows as 16-bit integers of an even stride: 8-bit rows as they are, others scaled to a norm of `INTEGER_NORM`.
    pub fn quantise(&mut self, rows: &Rows<'_>, level: Level) -> Result<()> {
        let (n, d) = (rows.len(), rows.dim());
        let stride = d.next_multiple_of(2);
        self.integers.resize(n * stride, 0);
        if rows.dtype() == Dtype::I8 {
            self.squares.resize(n, 0);
            level.widen_i8(rows.bytes(), d, stride, &mut self.integers, &mut self.squares);
            return self.take_scales(rows);
        }
        self.norms.resize(n, 0.0);
        self.scales.resize(n, 0.0);
        let mut into =
            Integers { stride, values: &mut self.integers, norms: &mut self.norms, scales: &mut self.scales };
        if !level.quantise_rows(rows, INTEGER_NORM, &mut into) {
            self.widened.resize(n * d, 0.0);
            level.widen(rows, &mut self.widened, into.norms);
            let singles = Rows::new(bytemuck::cast_slice(&self.widened), Dtype::F32, n, d, None)?;
            level.quantise_rows(&singles, INTEGER_NORM, &mut into);
        }
        check_finite(&self.norms)
    }

    /// Rows as 8-bit integers of a stride that is a multiple of 4, with their sums: as they are where stored so, else
    /// scaled to a largest value of 127.
    pub fn quantise_i8(&mut self, rows: &Rows<'_>, level: Level) -> Result<()> {
        let (n, d) = (rows.len(), rows.dim());
        let stride = d.next_multiple_of(4);
        self.bytes.resize(n * stride, 0);
        self.sums.clear();
        if rows.dtype() == Dtype::I8 {
            self.squares.clear();
            for (row, into) in rows.bytes().chunks_exact(d).zip(self.bytes.chunks_exact_mut(stride)) {
                let (sum, squares) = level.copy_i8(row, &mut into[..d]);
                self.sums.push(sum);
                self.squares.push(squares);
            }
            return self.take_scales(rows);
        }
        self.take_singles(rows, level)?;
        self.scales.clear();
        let singles = in_place(rows).unwrap_or(&self.widened);
        for (row, into) in singles.chunks_exact(d).zip(self.bytes.chunks_exact_mut(stride)) {
            let factor = factor_i8(row);
            self.sums.push(level.quantise_i8(row, factor, &mut into[..d]));
            self.scales.push(if factor > 0.0 { 1.0 / factor } else { 0.0 });
        }
        Ok(())
    }
}

/// Rows that are stored in single precision, where they are aligned.
fn in_place<'r>(rows: &Rows<'r>) -> Option<&'r [f32]> {
    (rows.dtype() == Dtype::F32).then(|| bytemuck::try_cast_slice(rows.bytes()).ok()).flatten()
}

/// The norm is the proof that a row is finite: every value is squared into it.
fn check_finite(norms: &[f32]) -> Result<()> {
    match norms.iter().position(|norm| !norm.is_finite() || *norm > LARGEST_SQ_NORM) {
        None => Ok(()),
        Some(row) => {
            let message = "row holds NaN, infinity or values too large to square";
            Err(Error::new(ErrorKind::NotFinite, message).row(row as u64))
        }
    }
}
