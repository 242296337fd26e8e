//! One shard: its mapped files.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::mapping::Mapped;
use super::{bin, npy, safetensors};
use crate::error::{Error, ErrorKind, Result};
use crate::rows::{Dtype, Rows, ShardView};

/// What a file is, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Npy,
    Safetensors,
    Bin(Dtype),
}

impl Kind {
    fn of(path: &Path) -> Self {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("safetensors") => Self::Safetensors,
            Some(extension) => bin::dtype(extension).map_or(Self::Npy, Self::Bin),
            None => Self::Npy,
        }
    }

    /// Bytes that hold every header.
    fn longest_header(self) -> usize {
        match self {
            Self::Npy => npy::MAX_HEADER + 12,
            Self::Safetensors => safetensors::MAX_HEADER + 8,
            Self::Bin(_) => bin::HEADER,
        }
    }

    fn parse(self, head: &[u8]) -> Result<npy::Header> {
        match self {
            Self::Npy => npy::parse(head),
            Self::Safetensors => safetensors::parse(head),
            Self::Bin(_) => bin::parse(head),
        }
    }
}

/// Opens a regular file.
fn regular_file(path: &Path) -> Result<File> {
    let io = |source| Error::io(path, ErrorKind::Format, &source);
    let file = File::open(path).map_err(io)?;
    if !file.metadata().map_err(io)?.is_file() {
        return Err(Error::new(ErrorKind::Format, "not a regular file").file(path));
    }
    Ok(file)
}

/// Maps a whole file.
///
/// # Errors
/// `FileMissing`, or `Format` where it is no regular file.
pub fn map(path: &Path) -> Result<Arc<Mapped>> {
    Ok(Arc::new(Mapped::new(path, &regular_file(path)?)?))
}

/// A mapped file whose header has been parsed.
#[derive(Debug)]
pub(crate) struct ArrayFile {
    map: Arc<Mapped>,
    header: npy::Header,
    kind: Kind,
}

impl ArrayFile {
    fn open(path: &Path) -> Result<Self> {
        let kind = Kind::of(path);
        let mut file = regular_file(path)?;
        let mut head = Vec::new();
        file.by_ref()
            .take(kind.longest_header() as u64)
            .read_to_end(&mut head)
            .map_err(|source| Error::io(path, ErrorKind::Format, &source))?;
        let header = kind.parse(&head).map_err(|error| error.file(path))?;
        Ok(Self { map: Arc::new(Mapped::new(path, &file)?), header, kind })
    }

    fn refuse(&self, kind: ErrorKind, message: impl Into<String>) -> Error {
        Error::new(kind, message).file(self.map.path())
    }

    /// The element type, where it is one of embeddings.
    fn dtype(&self) -> Result<Dtype> {
        let descr = self.header.descr.as_deref();
        let dtype = match self.kind {
            Kind::Npy => npy::dtype(descr),
            Kind::Safetensors => safetensors::dtype(descr),
            Kind::Bin(dtype) => Ok(dtype),
        };
        dtype.map_err(|error| error.file(self.map.path()))
    }

    /// The bytes of the elements, after proof that the file holds exactly as many as its shape says.
    fn elements(&self, size: usize) -> Result<&[u8]> {
        let count =
            self.header.shape.iter().try_fold(size as u64, |product, &extent| product.checked_mul(extent));
        // The file may have been cut short since its header was read.
        let Some(bytes) = self.map.get(self.header.offset..) else {
            return Err(self.refuse(ErrorKind::Format, "truncated inside its header"));
        };
        let found = bytes.len() as u64;
        match count {
            Some(expected) if expected == found => Ok(bytes),
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
pub(crate) enum Column<T> {
    /// In the mapped file; checked to be aligned when opened.
    Mapped(ArrayFile),
    /// Copied, where the file's elements are not aligned (or the machine's byte order is not the file's).
    Copied(Vec<T>),
}

/// Numbers of four bytes for which every bit pattern is valid.
pub(crate) trait Word: bytemuck::Pod {
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
    bytemuck::try_cast_slice(bytes).ok().filter(|_| cfg!(target_endian = "little"))
}

impl<T: Word> Column<T> {
    pub(crate) fn open(path: &Path, rows: usize) -> Result<Self> {
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

    pub(crate) fn values(&self) -> &[T] {
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

/// A matrix inside a file of any kind, by rows.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Element type.
    pub dtype: Dtype,
    /// Rows.
    pub n: u64,
    /// Dimensions.
    pub d: u64,
    /// Where the elements begin, in bytes from the file's start; they need not be aligned.
    pub offset: u64,
}

/// A run of rows of a store, mapped.
#[derive(Debug)]
pub struct Shard {
    map: Arc<Mapped>,
    offset: usize,
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
            offset: embeddings.header.offset,
            map: embeddings.map,
        })
    }

    /// A matrix inside a mapped file, whose place something else has found out.
    ///
    /// # Errors
    /// `Shape` where it is empty, `Format` where it does not lie inside the file.
    pub fn of_place(map: &Arc<Mapped>, place: Place, first_row: u64) -> Result<Self> {
        let Place { dtype, n, d, offset } = place;
        let refuse = |kind, message: String| Err(Error::new(kind, message).file(map.path()));
        if n == 0 || d == 0 {
            return refuse(ErrorKind::Shape, format!("the matrix is empty: {n} rows × {d} dimensions"));
        }
        let bytes = n.checked_mul(d).and_then(|count| count.checked_mul(dtype.size() as u64));
        match bytes.and_then(|bytes| bytes.checked_add(offset)) {
            Some(end) if end <= map.len() as u64 => {}
            _ => {
                return refuse(
                    ErrorKind::Format,
                    format!(
                        "truncated: {n} rows × {d} {} elements from byte {offset} on do not fit into {} bytes",
                        dtype.name(),
                        map.len()
                    ),
                );
            }
        }
        Ok(Self {
            map: Arc::clone(map),
            offset: offset as usize,
            dtype,
            n: n as usize,
            d: d as usize,
            first_row,
            scales: None,
            groups: None,
            weights: None,
        })
    }

    /// The same rows with a group code and a weight each, where given (as many as there are rows).
    ///
    /// # Errors
    /// `Shape` where there are more or fewer.
    pub fn with_columns(mut self, groups: Option<Vec<u32>>, weights: Option<Vec<f32>>) -> Result<Self> {
        let lengths = [groups.as_ref().map(Vec::len), weights.as_ref().map(Vec::len)];
        if lengths.into_iter().flatten().any(|length| length != self.n) {
            return Err(Error::new(
                ErrorKind::Shape,
                "a column beside the embeddings is not one value per row",
            ));
        }
        if let Some(groups) = groups {
            self.groups = Some(Column::Copied(groups));
        }
        if let Some(weights) = weights {
            self.weights = Some(Column::Copied(weights));
        }
        Ok(self)
    }

    /// The same rows, later in the store.
    #[must_use]
    pub fn at(self, first_row: u64) -> Self {
        Self { first_row, ..self }
    }

    /// What a scan reads.
    pub fn view(&self) -> ShardView<'_> {
        let size = self.n * self.d * self.dtype.size();
        let bytes = &self.map[self.offset..self.offset + size];
        let scales = self.scales.as_ref().map(Column::values);
        ShardView {
            rows: Rows::new(bytes, self.dtype, self.n, self.d, scales)
                .expect("sizes were checked when opened")
                .in_file(self.map.path(), self.offset as u64),
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
        self.map.path()
    }

    /// Checks that the file of the embeddings is still as long as the map. A scan calls it before each segment.
    ///
    /// # Errors
    /// `FileMissing`, or `Format` where the size has changed.
    pub fn check_size(&self) -> Result<()> {
        let path = self.path();
        let size =
            std::fs::metadata(path).map_err(|source| Error::io(path, ErrorKind::Format, &source))?.len();
        if size != self.map.len() as u64 {
            let message =
                format!("its size changed from {} to {size} bytes while it was read", self.map.len());
            return Err(Error::new(ErrorKind::Format, message).file(path));
        }
        Ok(())
    }
}
