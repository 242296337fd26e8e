//! Writing shards: streamed `.npy` (bfloat16: `.safetensors`) files under a temporary name, synced, checksummed and renamed when finished.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use xxhash_rust::xxh3::Xxh3Default;

use super::first_not_finite;
use super::manifest::FileEntry;
use super::{npy, safetensors};
use crate::error::{Error, ErrorKind, Result};
use crate::rows::{Dtype, Rows};

/// Bytes read or written at a time.
const BUFFER: usize = 1 << 20;

/// The xxh3-64 of a whole file and its size.
///
/// # Errors
/// `FileMissing`, or `Format` where it can't be read.
pub fn checksum(path: &Path) -> Result<(String, u64)> {
    let io = |source: std::io::Error| Error::io(path, ErrorKind::Format, &source);
    let mut file = File::open(path).map_err(io)?;
    let mut hash = Xxh3Default::new();
    let mut buffer = vec![0; BUFFER];
    let mut size = 0;
    loop {
        let read = file.read(&mut buffer).map_err(io)?;
        if read == 0 {
            return Ok((format!("{:016x}", hash.digest()), size));
        }
        hash.update(&buffer[..read]);
        size += read as u64;
    }
}

/// What a file holds, for its header.
#[derive(Clone, Copy, Debug)]
enum Layout {
    /// `.npy`: one number per row.
    Column(&'static str),
    /// `.npy`: rows of so many numbers.
    Matrix(&'static str, u64),
    /// `.safetensors`: bfloat16 rows of so many numbers.
    Bfloat16(u64),
}

/// A file being written: its rows are appended, its header gets their number at the end.
#[derive(Debug)]
struct ArrayWriter {
    path: PathBuf,
    partial: PathBuf,
    file: File,
    layout: Layout,
    finished: bool,
}

impl ArrayWriter {
    fn create(path: PathBuf, layout: Layout) -> Result<Self> {
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(".partial");
        let partial = path.with_file_name(name);
        let file =
            File::create(&partial).map_err(|source| Error::io(&partial, ErrorKind::Output, &source))?;
        let mut writer = Self { path, partial, file, layout, finished: false };
        let header = writer.header(0);
        writer.write(&header)?;
        Ok(writer)
    }

    fn header(&self, rows: u64) -> Vec<u8> {
        match self.layout {
            Layout::Column(descr) => npy::format(descr, &[rows]),
            Layout::Matrix(descr, width) => npy::format(descr, &[rows, width]),
            Layout::Bfloat16(width) => safetensors::format(rows, width),
        }
    }

    fn failed(&self, source: &std::io::Error) -> Error {
        Error::io(&self.path, ErrorKind::Output, source)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|source| self.failed(&source))
    }

    fn finish(mut self, rows: u64) -> Result<FileEntry> {
        let header = self.header(rows);
        let mut write = || {
            self.file.seek(SeekFrom::Start(0))?;
            self.file.write_all(&header)?;
            self.file.sync_all()
        };
        write().map_err(|source| self.failed(&source))?;
        // Read back rather than hashed on the way: the header, which comes first, is known last.
        let (xxh3, bytes) = checksum(&self.partial)?;
        std::fs::rename(&self.partial, &self.path).map_err(|source| self.failed(&source))?;
        self.finished = true;
        let name = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(FileEntry { name, bytes, xxh3 })
    }
}

impl Drop for ArrayWriter {
    fn drop(&mut self) {
        if !self.finished {
            // Nothing is left to tell about a failure to clean up.
            let _ = std::fs::remove_file(&self.partial);
        }
    }
}

/// What a finished shard consists of.
#[derive(Clone, Debug)]
pub struct WrittenShard {
    /// Rows.
    pub rows: u64,
    /// `embeddings-00000.npy`, or `.safetensors` for bfloat16.
    pub embeddings: FileEntry,
    /// `scales-00000.npy`, for int8.
    pub scales: Option<FileEntry>,
}

/// Writes the embeddings of one shard, converted to the store's element type.
#[derive(Debug)]
pub struct ShardWriter {
    embeddings: ArrayWriter,
    scales: Option<ArrayWriter>,
    dtype: Dtype,
    d: usize,
    rows: u64,
    rounding: f64,
    buffer: Vec<u8>,
}

impl ShardWriter {
    /// Starts shard `number` in a folder.
    ///
    /// # Errors
    /// `Dtype` for a type that is not written, `Shape` for d = 0, `Output` where the folder can't be written.
    pub fn create(folder: &Path, number: usize, d: usize, dtype: Dtype) -> Result<Self> {
        let layout = match (dtype, npy::descr(dtype)) {
            (Dtype::F32 | Dtype::F16 | Dtype::I8, Some(descr)) => Layout::Matrix(descr, d as u64),
            (Dtype::Bf16, _) => Layout::Bfloat16(d as u64),
            _ => {
                let message = format!("stores are not written as {}", dtype.name());
                return Err(
                    Error::new(ErrorKind::Dtype, message).remedy("use float16, float32, bfloat16 or int8")
                );
            }
        };
        if d == 0 {
            return Err(Error::new(ErrorKind::Shape, "vectors of no dimensions"));
        }
        let place = |kind: &str, suffix: &str| folder.join(format!("{kind}-{number:05}.{suffix}"));
        let suffix = if dtype == Dtype::Bf16 { "safetensors" } else { "npy" };
        let scales = match dtype {
            Dtype::I8 => Some(ArrayWriter::create(place("scales", "npy"), Layout::Column("<f4"))?),
            _ => None,
        };
        let embeddings = ArrayWriter::create(place("embeddings", suffix), layout)?;
        Ok(Self { embeddings, scales, dtype, d, rows: 0, rounding: 0.0, buffer: Vec::new() })
    }

    /// Rows so far.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Largest ‖x̂ − x‖/‖x‖ of the int8 rows so far: x as given, x̂ as stored. 0 for the other types, whose rounding is
    /// known beforehand.
    pub fn rounding(&self) -> f64 {
        self.rounding
    }

    /// Appends rows (row-major, a multiple of d values): none of them where one is refused.
    ///
    /// int8 rows are stored as the integers nearest to x / scale with scale = max|x| / 127, so that a value is
    /// off by at most half a scale.
    ///
    /// # Errors
    /// `Shape`; `NotFinite` with the row within the shard, also for values beyond the store's type; `Output`.
    pub fn append(&mut self, values: &[f32]) -> Result<()> {
        if !values.len().is_multiple_of(self.d) {
            return Err(Error::new(
                ErrorKind::Shape,
                format!("{} values are not rows of {}", values.len(), self.d),
            ));
        }
        let count = values.len() / self.d;
        self.buffer.clear();
        let mut scales = Vec::new();
        let mut rounding = self.rounding;
        match self.dtype {
            Dtype::F32 => self.buffer.extend(values.iter().flat_map(|value| value.to_le_bytes())),
            Dtype::F16 => {
                let mut halves = vec![f16::ZERO; values.len()];
                halves.convert_from_f32_slice(values);
                self.buffer.extend(halves.iter().flat_map(|value| value.to_le_bytes()));
            }
            Dtype::Bf16 => {
                let mut halves = vec![bf16::ZERO; values.len()];
                halves.convert_from_f32_slice(values);
                self.buffer.extend(halves.iter().flat_map(|value| value.to_le_bytes()));
            }
            Dtype::I8 | Dtype::U8 => {
                for row in values.chunks_exact(self.d) {
                    let largest = row.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
                    // NaN does not survive `max`, so the row's own sum is asked too.
                    let finite =
                        row.iter().sum::<f32>().is_finite() || row.iter().all(|value| value.is_finite());
                    let scale = if finite { largest / 127.0 } else { f32::NAN };
                    // The largest subnormals vanish when divided: such rows are zero for every purpose.
                    let inverse = if scale >= f32::MIN_POSITIVE { 1.0 / scale } else { 0.0 };
                    scales.push(scale);
                    let (mut error, mut norm) = (0.0, 0.0);
                    self.buffer.extend(row.iter().map(|value| {
                        let stored = (value * inverse).round();
                        error += f64::from(value - stored * scale).powi(2);
                        norm += f64::from(*value).powi(2);
                        (stored as i8).cast_unsigned()
                    }));
                    if inverse > 0.0 {
                        rounding = rounding.max((error / norm).sqrt());
                    }
                }
            }
        }
        let stored =
            Rows::new(&self.buffer, self.dtype, count, self.d, self.scales.is_some().then_some(&scales))?;
        if let Some(row) = first_not_finite(&stored) {
            let given = &values[row * self.d..(row + 1) * self.d];
            let error = if given.iter().all(|value| value.is_finite()) {
                let largest = if self.dtype == Dtype::Bf16 { "3.39e38" } else { "65504" };
                let message = format!("a value above {largest}, the largest of {}", self.dtype.name());
                Error::new(ErrorKind::NotFinite, message)
                    .remedy("store it as float32, or normalise the vectors")
            } else {
                Error::new(ErrorKind::NotFinite, "NaN or infinity")
            };
            return Err(error.row(self.rows + row as u64));
        }
        self.embeddings.write(&self.buffer)?;
        if let Some(file) = &mut self.scales {
            let bytes: Vec<u8> = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
            file.write(&bytes)?;
        }
        self.rows += count as u64;
        self.rounding = rounding;
        Ok(())
    }

    /// Completes, syncs and renames the files.
    ///
    /// # Errors
    /// `Output`.
    pub fn finish(self) -> Result<WrittenShard> {
        let rows = self.rows;
        Ok(WrittenShard {
            rows,
            embeddings: self.embeddings.finish(rows)?,
            scales: self.scales.map(|scales| scales.finish(rows)).transpose()?,
        })
    }
}
