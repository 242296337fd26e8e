//! The rows of one tile in the form that its arithmetic takes.

use super::queries::{INTEGER_NORM, LARGEST_SQ_NORM, factor_i8};
use crate::error::{Error, ErrorKind, Result};
use crate::rows::{Dtype, Rows};
use crate::simd::Level;

/// Buffers for the rows of a tile; reused from tile to tile.
#[derive(Default)]
pub(super) struct TileRows {
    /// ‖x‖² as stored.
    pub norms: Vec<f32>,
    /// Rows in single precision, where they are not stored so.
    widened: Vec<f32>,
    /// Rows as integers, with an even stride.
    pub integers: Vec<i16>,
    /// Rows as bytes, with a stride that is a multiple of 4, and Σ x of each.
    pub bytes: Vec<i8>,
    /// Σ x of each row of bytes.
    pub sums: Vec<i32>,
    /// x ≈ scale · integers.
    pub scales: Vec<f32>,
}

impl TileRows {
    /// Rows in single precision: in place where they are stored so and aligned, else widened.
    pub fn singles<'r>(&'r mut self, rows: &Rows<'r>, level: Level) -> Result<(&'r [f32], &'r [f32])> {
        let in_place = match rows.dtype() {
            Dtype::F32 => bytemuck::try_cast_slice(rows.bytes()).ok(),
            _ => None,
        };
        let singles = match in_place {
            Some(singles) => singles,
            None => {
                self.widened.resize(rows.len() * rows.dim(), 0.0);
                level.widen(rows, &mut self.widened);
                &self.widened
            }
        };
        self.norms.resize(rows.len(), 0.0);
        level.sq_norms(singles, rows.dim(), &mut self.norms);
        check_finite(&self.norms)?;
        Ok((singles, &self.norms))
    }

    /// Rows as 16-bit integers of an even stride: 8-bit rows as they are, others scaled to a norm of `INTEGER_NORM`.
    pub fn quantise(&mut self, rows: &Rows<'_>, level: Level) -> Result<()> {
        let (n, d) = (rows.len(), rows.dim());
        let even = d.next_multiple_of(2);
        self.integers.clear();
        self.integers.resize(n * even, 0);
        if rows.dtype() == Dtype::I8 {
            self.norms.clear();
            self.scales.clear();
            for (i, into) in self.integers.chunks_exact_mut(even).enumerate() {
                let scale = rows.scales().map_or(1.0, |scales| scales[i]);
                let sum = level.widen_i8(&rows.bytes()[i * d..(i + 1) * d], &mut into[..d]);
                self.scales.push(scale);
                self.norms.push((f64::from(sum) * f64::from(scale).powi(2)) as f32);
            }
            return check_finite(&self.norms);
        }
        self.singles(rows, level)?;
        let singles = match rows.dtype() {
            Dtype::F32 => bytemuck::try_cast_slice(rows.bytes()).unwrap_or(&self.widened),
            _ => &self.widened[..],
        };
        self.scales.clear();
        for ((row, into), &norm) in
            singles.chunks_exact(d).zip(self.integers.chunks_exact_mut(even)).zip(&self.norms)
        {
            let factor = (INTEGER_NORM / f64::from(norm).sqrt()) as f32;
            let factor = if factor.is_finite() { factor } else { 0.0 };
            level.quantise(row, factor, &mut into[..d]);
            self.scales.push(if factor > 0.0 { 1.0 / factor } else { 0.0 });
        }
        Ok(())
    }
}

impl TileRows {
    /// Rows as 8-bit integers of a stride that is a multiple of 4, with their sums: as they are where stored so, else
    /// scaled to a largest value of 127.
    pub fn quantise_i8(&mut self, rows: &Rows<'_>, level: Level) -> Result<()> {
        let (n, d) = (rows.len(), rows.dim());
        let padded = d.next_multiple_of(4);
        self.bytes.clear();
        self.bytes.resize(n * padded, 0);
        self.sums.clear();
        self.scales.clear();
        if rows.dtype() == Dtype::I8 {
            self.norms.clear();
            for (i, into) in self.bytes.chunks_exact_mut(padded).enumerate() {
                let scale = rows.scales().map_or(1.0, |scales| scales[i]);
                let (sum, squares) = level.copy_i8(&rows.bytes()[i * d..(i + 1) * d], &mut into[..d]);
                self.sums.push(sum);
                self.scales.push(scale);
                self.norms.push((f64::from(squares) * f64::from(scale).powi(2)) as f32);
            }
            return check_finite(&self.norms);
        }
        self.singles(rows, level)?;
        let singles = match rows.dtype() {
            Dtype::F32 => bytemuck::try_cast_slice(rows.bytes()).unwrap_or(&self.widened),
            _ => &self.widened[..],
        };
        for (row, into) in singles.chunks_exact(d).zip(self.bytes.chunks_exact_mut(padded)) {
            let factor = factor_i8(row);
            self.sums.push(level.quantise_i8(row, factor, &mut into[..d]));
            self.scales.push(if factor > 0.0 { 1.0 / factor } else { 0.0 });
        }
        Ok(())
    }
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
