//! One shard: its mapped files. The only place of the crate where files are mapped.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::{npy, safetensors};
use crate::error::{Error, ErrorKind, Result};
use crate::rows::{Dtype, Rows, ShardView};

/// A mapped `.npy` or `.safetensors` file whose header has been parsed.
#[derive(Debug)]
struct ArrayFile {
    path: PathBuf,
    map: Mmap,
    header: npy::Header,
    is_safetensors: bool,
}

impl ArrayFile {
    fn open(path: &Path) -> Result<Self> {
        let io = |source| Error::io(path, ErrorKind::Format, &source);
        let mut file = File::open(path).map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        if !metadata.is_file() {
            return Err(Error::new(ErrorKind::Format, "not a regular file").file(path));
        }
        let is_safetensors = path.extension().is_some_and(|extension| extension == "safetensors");
        let longest = if is_safetensors { safetensors::MAX_HEADER + 8 } else { npy::MAX_HEADER + 12 };
        let mut head = Vec::new();
        file.by_ref().take(longest as u64).read_to_end(&mut head).map_err(io)?;
        let parsed = if is_safetensors { safetensors::parse(&head) } else { npy::parse(&head) };
        let header = parsed.map_err(|error| error.file(path))?;
        // SAFETY: the map is read-only and private to this struct, and all access goes through byte slices, for
        // which any content is valid. Another process that truncates the file under the map makes reads fail with
        // SIGBUS; that ends the process, it can't corrupt memory. Sizes are checked again by `Shard::check_size`.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        Ok(Self { path: path.to_path_buf(), map, header, is_safetensors })
    }

    fn refuse(&self, kind: ErrorKind, message: impl Into<String>) -> Error {
        Error::new(kind, message).file(&self.path)
    }

    /// The element type, where it is one of embeddings.
    fn dtype(&self) -> Result<Dtype> {
        let descr = self.header.descr.as_deref();
        let dtype = if self.is_safetensors { safetensors::dtype(descr) } else { npy::dtype(descr) };
        dtype.map_err(|error| error.file(&self.path))
    }

    /// The bytes of the elements, after proof that the file holds exactly as many as its shape says.
    fn elements(&self, size: usize) -> Result<&[u8]> {
        let count =
            self.header.shape.iter().try_fold(size as u64, |product, &extent| product.checked_mul(extent));
        let found = (self.map.len() - self.header.offset) as u64;
        match count {
            Some(expected) if expected == found => Ok(&self.map[self.header.offset..]),
            Some(expected) if expected > found => Err(self
                .refuse(
                    ErrorKind::Format,
                    format!("truncated: its header promises {expected} bytes of elements, {found} are there"),
                )
                .remedy("copy or write the file again")),
            Some(expected) => Err(self.refuse(
                ErrorKind::Format,
                format!("{} bytes more than its header promises", found - expected),
            )),
            None => {
                Err(self.refuse(ErrorKind::Format, "its header promises more bytes than can be addressed"))
            }
        }
    }
}

/// A column beside the embeddings: one 4-byte number per row.
#[derive(Debug)]
enum Column<T> {
    /// In the mapped file; checked to be aligned when opened.
    Mapped(ArrayFile),
    /// Copied, where the file's elements are not aligned (or the machine's byte order is not the file's).
    Copied(Vec<T>),
}

/// Numbers of four bytes for which every bit pattern is valid.
trait Word: Copy {
    const DESCR: &'static str;
    fn from_le(bytes: [u8; 4]) -> Self;
}

impl Word for u32 {
    const DESCR: &'static str = "<u4";
    fn from_le(bytes: [u8; 4]) -> Self {
        Self::from_le_bytes(bytes)
    }
}

impl Word for f32 {
    const DESCR: &'static str = "<f4";
    fn from_le(bytes: [u8; 4]) -> Self {
        Self::from_le_bytes(bytes)
    }
}

/// The bytes as words where they are aligned and the machine is little-endian.
fn words<T: Word>(bytes: &[u8]) -> Option<&[T]> {
    // SAFETY: `Word` is implemented for u32 and f32 only, for which all bit patterns are valid.
    let (before, words, after) = unsafe { bytes.align_to::<T>() };
    (cfg!(target_endian = "little") && before.is_empty() && after.is_empty()).then_some(words)
}

impl<T: Word> Column<T> {
    fn open(path: &Path, rows: usize) -> Result<Self> {
        let file = ArrayFile::open(path)?;
        if file.header.descr.as_deref() != Some(T::DESCR) {
            return Err(file.refuse(ErrorKind::Dtype, format!("its elements are not of type {}", T::DESCR)));
        }
        if file.header.shape != [rows as u64] {
            let message = format!("its shape is {:?}; the embeddings have {rows} rows", file.header.shape);
            return Err(file.refuse(ErrorKind::Shape, message));
        }
        let bytes = file.elements(4)?;
        if words::<T>(bytes).is_some() {
            return Ok(Self::Mapped(file));
        }
        let copy =
            bytes.chunks_exact(4).map(|word| T::from_le([word[0], word[1], word[2], word[3]])).collect();
        Ok(Self::Copied(copy))
    }

    fn values(&self) -> &[T] {
        match self {
            Self::Mapped(file) => {
                words(&file.map[file.header.offset..]).expect("alignment was checked when opened")
            }
            Self::Copied(values) => values,
        }
    }
}

/// Paths of a shard's files.
#[derive(Clone, Debug, Default)]
pub struct ShardFiles {
    /// The embeddings, n × d.
    pub embeddings: PathBuf,
    /// One float32 scale per row.
    pub scales: Option<PathBuf>,
    /// One uint32 group code per row.
    pub groups: Option<PathBuf>,
    /// One float32 weight per row.
    pub weights: Option<PathBuf>,
}

/// A run of rows of a store, mapped.
#[derive(Debug)]
pub struct Shard {
    embeddings: ArrayFile,
    dtype: Dtype,
    n: usize,
    d: usize,
    first_row: u64,
    scales: Option<Column<f32>>,
    groups: Option<Column<u32>>,
    weights: Option<Column<f32>>,
}

impl Shard {
    /// Maps a shard and checks headers, shapes and sizes (not values).
    ///
    /// # Errors
    /// `FileMissing`, `Format` (junk, truncated), `Dtype` (not a type of embeddings), `Shape` (not n × d, or empty),
    /// each with the file.
    pub fn open(files: &ShardFiles, first_row: u64) -> Result<Self> {
        let embeddings = ArrayFile::open(&files.embeddings)?;
        let dtype = embeddings.dtype()?;
        let &[n, d] = embeddings.header.shape.as_slice() else {
            let message = format!("its shape is {:?}, not rows × dimensions", embeddings.header.shape);
            return Err(embeddings.refuse(ErrorKind::Shape, message));
        };
        if n == 0 || d == 0 {
            return Err(embeddings
                .refuse(ErrorKind::Shape, format!("the matrix is empty: {n} rows × {d} dimensions")));
        }
        if embeddings.header.fortran_order {
            return Err(embeddings
                .refuse(ErrorKind::Format, "the matrix is stored by columns (Fortran order)")
                .remedy("save it by rows: numpy.save(path, numpy.ascontiguousarray(array))"));
        }
        embeddings.elements(dtype.size())?;
        // The elements are mapped, so both extents are below the address space.
        let (n, d) = (n as usize, d as usize);
        let column = |path: &Option<PathBuf>| path.as_deref().map(|path| Column::open(path, n)).transpose();
        Ok(Self {
            dtype,
            n,
            d,
            first_row,
            scales: column(&files.scales)?,
            groups: files.groups.as_deref().map(|path| Column::open(path, n)).transpose()?,
            weights: column(&files.weights)?,
            embeddings,
        })
    }

    /// What a scan reads.
    pub fn view(&self) -> ShardView<'_> {
        let bytes = &self.embeddings.map[self.embeddings.header.offset..];
        let scales = self.scales.as_ref().map(Column::values);
        ShardView {
            rows: Rows::new(bytes, self.dtype, self.n, self.d, scales)
                .expect("sizes were checked when opened"),
            groups: self.groups.as_ref().map(Column::values),
            weights: self.weights.as_ref().map(Column::values),
        }
    }

    /// Number of the first row within the store.
    pub fn first_row(&self) -> u64 {
        self.first_row
    }

    /// Rows.
    pub fn len(&self) -> usize {
        self.n
    }

    /// Whether there are no rows: never, since empty shards are refused.
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

    /// The file of the embeddings.
    pub fn path(&self) -> &Path {
        &self.embeddings.path
    }

    /// Checks that the file of the embeddings is still as long as the map. A scan calls it before each segment.
    ///
    /// # Errors
    /// `FileMissing`, or `Format` where the size has changed.
    pub fn check_size(&self) -> Result<()> {
        let path = self.path();
        let size =
            std::fs::metadata(path).map_err(|source| Error::io(path, ErrorKind::Format, &source))?.len();
        if size != self.embeddings.map.len() as u64 {
            let message = format!(
                "its size changed from {} to {size} bytes while it was read",
                self.embeddings.map.len()
            );
            return Err(self.embeddings.refuse(ErrorKind::Format, message));
        }
        Ok(())
    }
}
