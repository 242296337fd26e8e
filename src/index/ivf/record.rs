//! Records of rows in the buckets' files, and rows in the element type of the copy.

use std::path::PathBuf;

use half::f16;

use super::state::Build;
use crate::error::{Error, ErrorKind, Result};
use crate::rows::{Dtype, ShardView};

/// Bytes of a record in a bucket beside the row itself: row, list, group, weight, scale.
pub(super) const RECORD: usize = 20;

impl Build<'_> {
    pub fn bucket_path(&self, bucket: usize) -> PathBuf {
        self.folder.join(format!("bucket-{bucket:03}.bin"))
    }

    /// Bytes of one record.
    pub fn record(&self) -> usize {
        RECORD + self.d * self.options.dtype.size()
    }
}

/// A row in single precision from its bytes in the copy.
#[inline]
pub(super) fn decode_row(bytes: &[u8], dtype: Dtype, scale: f32, row: &mut [f32]) {
    match dtype {
        Dtype::I8 => {
            row.iter_mut().zip(bytes).for_each(|(x, byte)| *x = f32::from(byte.cast_signed()) * scale);
        }
        Dtype::F32 => row
            .iter_mut()
            .zip(bytes.chunks_exact(4))
            .for_each(|(x, word)| *x = f32::from_le_bytes([word[0], word[1], word[2], word[3]])),
        _ => row
            .iter_mut()
            .zip(bytes.chunks_exact(2))
            .for_each(|(x, bytes)| *x = f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()),
    }
}

/// A row in the element type of the copy.
pub(super) struct Converted {
    dtype: Dtype,
    pub bytes: Vec<u8>,
    row: Vec<f32>,
    back: Vec<f32>,
    /// ‖x̂ − x‖/‖x‖ of the last row.
    pub rounding: f64,
}

impl Converted {
    pub fn new(dtype: Dtype, d: usize) -> Self {
        Self { dtype, bytes: Vec::new(), row: vec![0.0; d], back: vec![0.0; d], rounding: 0.0 }
    }

    /// Converts row `i`, unless it is stored so; returns its scale.
    pub fn take(&mut self, view: &ShardView<'_>, i: usize) -> Result<f32> {
        let rows = view.rows;
        self.bytes.clear();
        if rows.dtype() == self.dtype {
            self.bytes.extend_from_slice(rows.slice(i, i + 1).bytes());
            return Ok(rows.scales().map_or(1.0, |scales| scales[i]));
        }
        rows.read_f32(i, &mut self.row);
        let mut scale = 1.0;
        self.rounding = 0.0;
        if self.dtype == Dtype::F32 {
            self.bytes.extend(self.row.iter().flat_map(|x| x.to_le_bytes()));
            return Ok(scale);
        }
        if self.dtype == Dtype::I8 {
            let largest = self.row.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
            scale = largest / 127.0;
            let inverse = if scale >= f32::MIN_POSITIVE { 1.0 / scale } else { 0.0 };
            self.bytes.extend(self.row.iter().map(|x| ((x * inverse).round() as i8).cast_unsigned()));
        } else {
            if self.row.iter().any(|x| x.abs() > 65504.0) {
                return Err(Error::new(ErrorKind::NotFinite, "a value above 65504, the largest of float16")
                    .remedy("build the index with --dtype int8"));
            }
            self.bytes.extend(self.row.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()));
        }
        decode_row(&self.bytes, self.dtype, scale, &mut self.back);
        let (mut error, mut norm) = (0.0, 0.0);
        for (x, back) in self.row.iter().zip(&self.back) {
            error += f64::from(x - back).powi(2);
            norm += f64::from(*x).powi(2);
        }
        self.rounding = if norm > 0.0 { (error / norm).sqrt() } else { 0.0 };
        Ok(scale)
    }
}
