//! The index on disk: a folder of `.npy` files and `index.json`, written last. All of it can be built again from the store.
//!
//! | file | holds |
//! |---|---|
//! | `coarse.npy`, `centroids.npy`, `cells.npy`, `shells.npy` | the tree that routes vectors to lists |
//! | `rows.npy`, `scales.npy` (int8) | all rows, those of a list side by side in random order |
//! | `ids.npy` | the row's number in the store |
//! | `groups.npy`, `weights.npy` | as in the store, where it has them |
//! | `means.npy`, `moments.npy` | per list: mean row; first row, weight, mean and variance of ‖x − mean‖², Σ w², smallest and largest ‖x − mean‖² |
//! | `group_lists.npy`, `group_means.npy`, `group_moments.npy` | the same per list and group present |

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::store::{checksum, npy};

/// Name of the manifest.
pub const MANIFEST: &str = "index.json";

/// The version written and read.
pub const VERSION: u32 = 2;

/// Numbers per list in `moments.npy`: first row, rows, Σ w, mean and variance of ‖x − m‖², Σ w² relative to equal weights,
/// smallest and largest ‖x − m‖².
pub const MOMENTS: usize = 8;

/// Lists by rank of nearness, as shares of their number: each bin has its own kappa.
pub const RANKS: [f64; 5] = [0.005, 0.02, 0.08, 0.25, 1.0];

/// Longest manifest that is read.
const MAX_MANIFEST: u64 = 16 << 20;

/// One file with the facts that were true when it was written.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FileFacts {
    /// Name inside the folder.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
    /// xxh3-64 of the whole file.
    pub xxh3: String,
}

/// `index.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct IndexManifest {
    /// "lmd3-index".
    pub format: String,
    /// `VERSION`.
    pub version: u32,
    /// Fingerprint of the store that was indexed.
    pub store: String,
    /// Rows.
    pub n: u64,
    /// Dimensions.
    pub d: u64,
    /// Lists.
    pub lists: u64,
    /// Element type of the copy.
    pub dtype: String,
    /// Seed of all draws.
    pub seed: u64,
    /// Rounding of the copied rows relative to their norms; 0 where they are bit for bit those of the store.
    pub rounding: f64,
    /// Groups of the store; 0 where it has none.
    pub groups: u64,
    /// Whether moments per list and group are there.
    pub group_moments: bool,
    /// Whether rows have weights.
    pub weighted: bool,
    /// How the variance of D² in a list grows with the distance of the query, by the list's rank (see `RANKS`).
    pub kappa: Vec<f64>,
    /// Σ w ‖x‖² / Σ w, Σ w.
    pub sq_norm: f64,
    /// Σ w.
    pub weight: f64,
    /// Lists that hold .95 of the 10 nearest rows, by a trial on rows of the corpus.
    pub probes: u64,
    /// Share of the 10 nearest rows found in so many lists.
    pub recall: f64,
    /// Seconds that the build took (of the last run where it was continued).
    pub seconds: f64,
    /// Files.
    pub files: Vec<FileFacts>,
}

impl IndexManifest {
    /// Reads and checks a manifest.
    ///
    /// # Errors
    /// `FileMissing`, `Format`.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(MANIFEST);
        let io = |source: std::io::Error| {
            Error::io(&path, ErrorKind::Format, &source).remedy("build it: lmd3 index STORE")
        };
        if std::fs::metadata(&path).map_err(io)?.len() > MAX_MANIFEST {
            return Err(Error::new(ErrorKind::Format, "the manifest is too long to be one").file(&path));
        }
        let text = std::fs::read(&path).map_err(io)?;
        let value: serde_json::Value = serde_json::from_slice(&text)
            .map_err(|error| Error::new(ErrorKind::Format, format!("not JSON: {error}")).file(&path))?;
        if value["format"] != "lmd3-index" {
            return Err(Error::new(ErrorKind::Format, "not an index of lmd3").file(&path));
        }
        if value["version"] != VERSION {
            let message = format!("an index of version {}; this program reads {VERSION}", value["version"]);
            return Err(Error::new(ErrorKind::Format, message)
                .file(&path)
                .remedy("build it again: lmd3 index STORE --force"));
        }
        let manifest: Self = serde_json::from_value(value).map_err(|error| {
            Error::new(ErrorKind::Format, format!("damaged manifest: {error}")).file(&path)
        })?;
        let sound = manifest.n > 0
            && manifest.d > 0
            && (1..=manifest.n).contains(&manifest.lists)
            && manifest.kappa.iter().all(|kappa| kappa.is_finite() && *kappa >= 0.0)
            && manifest.kappa.len() == RANKS.len()
            && manifest.weight.is_finite()
            && manifest.weight > 0.0
            && manifest.sq_norm.is_finite()
            && manifest
                .files
                .iter()
                .all(|file| !file.name.contains(['/', '\\']) && !file.name.starts_with('.'));
        if !sound {
            return Err(
                Error::new(ErrorKind::Format, "damaged manifest: numbers that no index has").file(&path)
            );
        }
        Ok(manifest)
    }

    /// Checks that every file is there and as long as listed.
    ///
    /// # Errors
    /// `FileMissing`, `Format`.
    pub fn check_sizes(&self, folder: &Path) -> Result<()> {
        for file in &self.files {
            let path = folder.join(&file.name);
            let found = std::fs::metadata(&path)
                .map_err(|source| Error::io(&path, ErrorKind::Format, &source))?
                .len();
            if found != file.bytes {
                let message = format!("{found} bytes, the manifest says {}", file.bytes);
                return Err(Error::new(ErrorKind::Format, message)
                    .file(&path)
                    .remedy("build the index again"));
            }
        }
        Ok(())
    }

    /// Checks the checksums: of all files, or of those up to a size.
    ///
    /// # Errors
    /// `Verification` naming the first damaged file.
    pub fn verify(&self, folder: &Path, largest: u64) -> Result<()> {
        for file in self.files.iter().filter(|file| file.bytes <= largest) {
            let path = folder.join(&file.name);
            let (xxh3, _) = checksum(&path)?;
            if xxh3 != file.xxh3 {
                let message = format!("its checksum is {xxh3}, the manifest says {}", file.xxh3);
                return Err(Error::new(ErrorKind::Verification, message)
                    .file(&path)
                    .remedy("build the index again"));
            }
        }
        Ok(())
    }
}

/// The bin of each list by its rank, given as its place among all.
pub fn rank_bin(rank: usize, lists: usize) -> usize {
    let share = (rank + 1) as f64 / lists as f64;
    RANKS.iter().position(|&end| share <= end).unwrap_or(RANKS.len() - 1)
}

/// Numbers that `.npy` files of the index hold.
pub trait Number: Copy {
    /// NumPy's name of the type.
    const DESCR: &'static str;
    /// Bytes of one.
    const SIZE: usize;
    /// From little-endian bytes.
    fn from_le(bytes: &[u8]) -> Self;
    /// Appends little-endian bytes.
    fn to_le(self, out: &mut Vec<u8>);
}

macro_rules! number {
    ($type:ty, $descr:literal) => {
        impl Number for $type {
            const DESCR: &'static str = $descr;
            const SIZE: usize = size_of::<$type>();
            fn from_le(bytes: &[u8]) -> Self {
                let mut word = [0; size_of::<$type>()];
                word.copy_from_slice(bytes);
                Self::from_le_bytes(word)
            }
            fn to_le(self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
        }
    };
}
number!(f32, "<f4");
number!(f64, "<f8");
number!(u32, "<u4");

/// Reads a whole `.npy` file of a given type and of rows of `width` numbers (1: a vector).
///
/// # Errors
/// `FileMissing`, `Format`.
pub fn read_array<T: Number>(folder: &Path, name: &str, width: u64) -> Result<Vec<T>> {
    let path = folder.join(name);
    let bytes = std::fs::read(&path).map_err(|source| Error::io(&path, ErrorKind::Format, &source))?;
    let header = npy::parse(&bytes).map_err(|error| error.file(&path))?;
    let refuse = |message: &str| {
        Err(Error::new(ErrorKind::Format, message).file(&path).remedy("build the index again"))
    };
    let shape_fits = match header.shape.as_slice() {
        [_] => width == 1,
        [_, columns] => *columns == width,
        _ => false,
    };
    if header.descr.as_deref() != Some(T::DESCR) || header.fortran_order || !shape_fits {
        return refuse("not the array that an index has there");
    }
    let count = header.shape.iter().try_fold(T::SIZE as u64, |product, &extent| product.checked_mul(extent));
    let body = &bytes[header.offset..];
    if count != Some(body.len() as u64) {
        return refuse("truncated");
    }
    Ok(body.chunks_exact(T::SIZE).map(T::from_le).collect())
}

/// A `.npy` file that is appended to, and can be taken up again at a known length.
pub struct ArrayFile {
    path: PathBuf,
    file: File,
    buffer: Vec<u8>,
}

impl ArrayFile {
    /// Opens a file of the final shape for appending after `rows` rows of `stride` bytes; what lies behind is cut off.
    ///
    /// # Errors
    /// `Output`.
    pub fn open(path: PathBuf, descr: &str, shape: &[u64], rows: u64, stride: usize) -> Result<Self> {
        let header = npy::format(descr, shape);
        let open = || -> std::io::Result<File> {
            let mut file = File::options().create(true).truncate(false).read(true).write(true).open(&path)?;
            let length = header.len() as u64 + rows * stride as u64;
            if rows > 0 && file.metadata()?.len() < length {
                return Err(std::io::Error::other("shorter than the state of the build says"));
            }
            file.set_len(length)?;
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&header)?;
            file.seek(SeekFrom::Start(length))?;
            Ok(file)
        };
        let file = open().map_err(|source| Error::io(&path, ErrorKind::Output, &source))?;
        Ok(Self { path, file, buffer: Vec::new() })
    }

    /// Appends bytes.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|source| Error::io(&self.path, ErrorKind::Output, &source))
    }

    /// Appends numbers.
    pub fn numbers<T: Number>(&mut self, numbers: impl IntoIterator<Item = T>) -> Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.clear();
        numbers.into_iter().for_each(|number| number.to_le(&mut buffer));
        let result = self.write(&buffer);
        self.buffer = buffer;
        result
    }

    /// Makes sure that what was written is on the disk.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(|source| Error::io(&self.path, ErrorKind::Output, &source))
    }
}

/// Writes a small file under a temporary name, synced, and renames it.
///
/// # Errors
/// `Output`.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".tmp");
    let temporary = path.with_file_name(name);
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    write().map_err(|source| Error::io(path, ErrorKind::Output, &source))
}

/// Writes an array as a whole.
///
/// # Errors
/// `Output`.
pub fn write_array<T: Number>(path: &Path, shape: &[u64], numbers: &[T]) -> Result<()> {
    let mut bytes = npy::format(T::DESCR, shape);
    numbers.iter().for_each(|&number| number.to_le(&mut bytes));
    write_atomic(path, &bytes)
}
