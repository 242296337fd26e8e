//! `Rows`: a borrowed n × d matrix of embeddings as it lies in a file, whatever its element type and alignment.

use std::path::Path;

use half::{bf16, f16};

use crate::error::{Error, ErrorKind, Result};

/// Element types of stored embeddings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// Signed bytes, times a scale per row (1 where none is stored).
    I8,
    /// Unsigned bytes.
    U8,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::I8 | Self::U8 => 1,
        }
    }

    /// The name used in manifests and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
            Self::I8 => "int8",
            Self::U8 => "uint8",
        }
    }

    /// The type of a name, as `name` gives it.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::F32, Self::F16, Self::Bf16, Self::I8, Self::U8].into_iter().find(|dtype| dtype.name() == name)
    }
}

/// A borrowed row-major n × d matrix. Bytes may be unaligned (they come from a mapped file).
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    bytes: &'a [u8],
    dtype: Dtype,
    n: usize,
    d: usize,
    scales: Option<&'a [f32]>,
    file: Option<(&'a Path, u64)>,
}

impl<'a> Rows<'a> {
    /// Checks that the bytes hold exactly n rows of d elements, and that there is one scale per row where there are any.
    ///
    /// # Errors
    /// `Shape` where they do not, or where d is 0.
    pub fn new(bytes: &'a [u8], dtype: Dtype, n: usize, d: usize, scales: Option<&'a [f32]>) -> Result<Self> {
        let expected = n.checked_mul(d).and_then(|elements| elements.checked_mul(dtype.size()));
        if d == 0 || expected != Some(bytes.len()) {
            let message = format!("{} bytes are not {n} rows of {d} {} elements", bytes.len(), dtype.name());
            return Err(Error::new(ErrorKind::Shape, message));
        }
        if scales.is_some_and(|scales| scales.len() != n) {
            return Err(Error::new(ErrorKind::Shape, format!("scales are not one per row of {n}")));
        }
        Ok(Self { bytes, dtype, n, d, scales, file: None })
    }

    /// The same rows, with the file and the offset in it from which their bytes can be read instead.
    #[must_use]
    pub fn in_file(self, path: &'a Path, offset: u64) -> Self {
        Self { file: Some((path, offset)), ..self }
    }

    /// The file and the offset in it where the bytes lie, where that is known.
    pub fn file(&self) -> Option<(&'a Path, u64)> {
        self.file
    }

    /// The same rows, their bytes read from elsewhere.
    ///
    /// # Errors
    /// `Shape` where the number of bytes is another.
    pub fn with_bytes<'b>(&self, bytes: &'b [u8]) -> Result<Rows<'b>>
    where
        'a: 'b,
    {
        Rows::new(bytes, self.dtype, self.n, self.d, self.scales)
    }

    /// Rows.
    pub fn len(&self) -> usize {
        self.n
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.n == 0
    }

    /// Dimensions.
    pub fn dim(&self) -> usize {
        self.d
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// All bytes, row-major.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The scale of each row, where stored.
    pub fn scales(&self) -> Option<&'a [f32]> {
        self.scales
    }

    /// The rows `start..end`.
    ///
    /// # Panics
    /// Where the range lies outside.
    pub fn slice(&self, start: usize, end: usize) -> Self {
        assert!(start <= end && end <= self.n, "row range outside the matrix");
        let stride = self.d * self.dtype.size();
        Self {
            bytes: &self.bytes[start * stride..end * stride],
            n: end - start,
            scales: self.scales.map(|scales| &scales[start..end]),
            file: self.file.map(|(path, offset)| (path, offset + (start * stride) as u64)),
            ..*self
        }
    }

    /// The rows `numbers`, copied into the buffers.
    ///
    /// # Panics
    /// Where a row lies outside.
    pub fn gather<'b>(&self, numbers: &[u32], bytes: &'b mut Vec<u8>, scales: &'b mut Vec<f32>) -> Rows<'b> {
        let stride = self.d * self.dtype.size();
        bytes.clear();
        scales.clear();
        for &number in numbers {
            let row = number as usize;
            bytes.extend_from_slice(&self.bytes[row * stride..(row + 1) * stride]);
            if let Some(from) = self.scales {
                scales.push(from[row]);
            }
        }
        let scales = self.scales.is_some().then_some(&scales[..]);
        Rows { bytes, dtype: self.dtype, n: numbers.len(), d: self.d, scales, file: None }
    }

    /// Writes row `i` as stored (scale applied) into `out` (d values).
    ///
    /// # Panics
    /// Where the row or the length of `out` is wrong.
    pub fn read_f32(&self, i: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.d);
        let row = self.slice(i, i + 1);
        match self.dtype {
            Dtype::F32 => {
                for (value, bytes) in out.iter_mut().zip(row.bytes.chunks_exact(4)) {
                    *value = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                }
            }
            Dtype::F16 => {
                for (value, bytes) in out.iter_mut().zip(row.bytes.chunks_exact(2)) {
                    *value = f16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
                }
            }
            Dtype::Bf16 => {
                for (value, bytes) in out.iter_mut().zip(row.bytes.chunks_exact(2)) {
                    *value = bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
                }
            }
            Dtype::I8 => {
                let scale = row.scales.map_or(1.0, |scales| scales[0]);
                for (value, byte) in out.iter_mut().zip(row.bytes) {
                    *value = f32::from(byte.cast_signed()) * scale;
                }
            }
            Dtype::U8 => {
                let scale = row.scales.map_or(1.0, |scales| scales[0]);
                for (value, byte) in out.iter_mut().zip(row.bytes) {
                    *value = f32::from(*byte) * scale;
                }
            }
        }
    }
}

/// What a scan reads of one shard: its rows and, where present, a group code and a weight per row.
#[derive(Clone, Copy, Debug)]
pub struct ShardView<'a> {
    /// The embeddings.
    pub rows: Rows<'a>,
    /// Group code of each row; absent where there is one group only.
    pub groups: Option<&'a [u32]>,
    /// Weight of each row, ≥ 0 and finite; absent where all are 1.
    pub weights: Option<&'a [f32]>,
}
