//! Stores: embeddings on disk as a folder of shards with a manifest, or bare files (`.npy`, `.safetensors`, `.fbin` and its
//! kin, or pieces of others), opened by mapping.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};
use crate::rows::{Dtype, Rows};

pub mod bin;
pub mod manifest;
mod mapping;
pub mod npy;
pub mod reading;
pub mod safetensors;
mod shard;
mod writer;

pub use manifest::Manifest;
#[cfg(unix)]
pub use mapping::end_by_name;
pub(crate) use shard::Column;
pub use shard::{Place, Shard, ShardFiles};
pub use writer::{ShardWriter, WrittenShard, checksum};

/// Name of the manifest inside a store's folder.
pub const MANIFEST: &str = "manifest.json";

/// Manifests above this size are not read: 10⁹ rows in small shards stay far below it.
const MAX_MANIFEST: u64 = 256 << 20;

/// Rows that a worker takes at a time when all rows are read once.
const CHUNK: usize = 4096;

/// An open store: mapped shards of one width and element type.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    manifest: Option<Manifest>,
    shards: Vec<Shard>,
    d: usize,
    n: u64,
    dtype: Dtype,
}

impl Store {
    /// Opens a folder with a manifest, or a bare file: `.npy` of float32 or float16, `.safetensors` of these or
    /// bfloat16, `.fbin .f16bin .u8bin .i8bin` (integers at scale 1). Headers, shapes and sizes are checked here; values are not (`check_finite`, `verify`).
    ///
    /// # Errors
    /// `FileMissing`, `Format`, `Dtype`, `Shape`, each with the file.
    pub fn open(path: &Path) -> Result<Self> {
        let metadata =
            std::fs::metadata(path).map_err(|source| Error::io(path, ErrorKind::Format, &source))?;
        if metadata.is_dir() { Self::open_folder(path) } else { Self::open_file(path) }
    }

    fn open_file(path: &Path) -> Result<Self> {
        Self::of_pieces(path, &[(path.to_path_buf(), None)], None, None)
    }

    /// Opens bare vectors that lie in several files, or in parts of files, as one store.
    ///
    /// # Arguments
    /// * `path` - what is opened, for messages
    /// * `pieces` - files in row order: a whole file, by its name and header, or a place in one
    /// * `groups`, `weights` - one per row of all pieces, or none
    ///
    /// # Errors
    /// `Shape` without pieces, for pieces of different widths, for columns of another length; `Dtype` for pieces of different
    /// types; and those of `open`.
    pub fn of_pieces(
        path: &Path,
        pieces: &[(PathBuf, Option<Place>)],
        groups: Option<&[u32]>,
        weights: Option<&[f32]>,
    ) -> Result<Self> {
        let mut shards: Vec<Shard> = Vec::with_capacity(pieces.len());
        let mut last: Option<(&Path, std::sync::Arc<mapping::Mapped>)> = None;
        let mut n = 0_u64;
        for (file, place) in pieces {
            let shard = if let Some(place) = place {
                // Arrow files have thousands of pieces: each file is mapped once.
                let map = match &last {
                    Some((name, map)) if *name == file.as_path() => map.clone(),
                    _ => shard::map(file)?,
                };
                last = Some((file, map.clone()));
                Shard::of_place(&map, *place, n)?
            } else {
                bare(file)?.at(n)
            };
            if let Some(first) = shards.first() {
                let say = |shard: &Shard| format!("{} dimensions of {}", shard.dim(), shard.dtype().name());
                if (shard.dim(), shard.dtype()) != (first.dim(), first.dtype()) {
                    let message =
                        format!("holds {}, {} holds {}", say(&shard), first.path().display(), say(first));
                    return Err(Error::new(ErrorKind::Shape, message).file(file));
                }
            }
            let range = n as usize..n as usize + shard.len();
            let part = |length: usize| range.end <= length;
            if groups.is_some_and(|groups| !part(groups.len()))
                || weights.is_some_and(|weights| !part(weights.len()))
            {
                return Err(Error::new(ErrorKind::Shape, "fewer groups or weights than rows").file(path));
            }
            n += shard.len() as u64;
            shards.push(shard.with_columns(
                groups.map(|groups| groups[range.clone()].to_vec()),
                weights.map(|weights| weights[range.clone()].to_vec()),
            )?);
        }
        let Some(first) = shards.first() else {
            return Err(Error::new(ErrorKind::Shape, "there are no vectors").file(path));
        };
        if [groups.map(<[u32]>::len), weights.map(<[f32]>::len)].into_iter().flatten().any(|l| l as u64 != n)
        {
            return Err(Error::new(ErrorKind::Shape, "more groups or weights than rows").file(path));
        }
        let (d, dtype) = (first.dim(), first.dtype());
        Ok(Self { path: path.to_path_buf(), manifest: None, shards, d, n, dtype })
    }

    fn open_folder(path: &Path) -> Result<Self> {
        let file = path.join(MANIFEST);
        let missing = || {
            Error::new(ErrorKind::FileMissing, format!("not a store: it holds no {MANIFEST}"))
                .file(path)
                .remedy("a store that was not finished has none: encode again")
        };
        let io = |source: std::io::Error| match source.kind() {
            std::io::ErrorKind::NotFound => missing(),
            _ => Error::io(&file, ErrorKind::Format, &source),
        };
        if std::fs::metadata(&file).map_err(io)?.len() > MAX_MANIFEST {
            return Err(Error::new(ErrorKind::Format, "the manifest is too long to be one").file(&file));
        }
        let text = std::fs::read(&file).map_err(io)?;
        let manifest = Manifest::parse(&text).map_err(|error| error.file(&file))?;
        let dtype = manifest.dtype()?;
        let mut shards = Vec::with_capacity(manifest.shards.len());
        let mut first_row = 0;
        for entry in &manifest.shards {
            for listed in entry.files() {
                let place = path.join(&listed.name);
                let found = std::fs::metadata(&place)
                    .map_err(|source| Error::io(&place, ErrorKind::Format, &source))?
                    .len();
                if found != listed.bytes {
                    let word = if found < listed.bytes { "truncated" } else { "longer than written" };
                    let message = format!("{word}: {found} bytes, the manifest says {}", listed.bytes);
                    return Err(Error::new(ErrorKind::Format, message)
                        .file(&place)
                        .remedy("restore the file or encode again"));
                }
            }
            let place =
                |entry: &Option<manifest::FileEntry>| entry.as_ref().map(|entry| path.join(&entry.name));
            let files = ShardFiles {
                embeddings: path.join(&entry.embeddings.name),
                scales: place(&entry.scales),
                groups: place(&entry.groups),
                weights: place(&entry.weights),
            };
            let shard = Shard::open(&files, first_row)?;
            let expected = (entry.rows, manifest.d, dtype);
            let found = (shard.len() as u64, shard.dim() as u64, shard.dtype());
            if found != expected {
                let say = |(n, d, dtype): (u64, u64, Dtype)| format!("{n} rows × {d} {}", dtype.name());
                let message = format!("holds {}, the manifest says {}", say(found), say(expected));
                return Err(Error::new(ErrorKind::Shape, message).file(shard.path()));
            }
            let codes = manifest.groups.len();
            if let Some(row) =
                shard.view().groups.and_then(|groups| groups.iter().position(|&code| code as usize >= codes))
            {
                let message = format!("a group code of {codes} or more; the manifest has {codes} groups");
                return Err(Error::new(ErrorKind::Format, message)
                    .file(files.groups.unwrap_or_default())
                    .row(row as u64));
            }
            if let Some(row) = shard
                .view()
                .weights
                .and_then(|weights| weights.iter().position(|w| !(w.is_finite() && *w >= 0.0)))
            {
                let message = "a weight that is not a finite number ≥ 0";
                return Err(Error::new(ErrorKind::NotFinite, message)
                    .file(files.weights.unwrap_or_default())
                    .row(row as u64));
            }
            if let Some(row) =
                shard.view().rows.scales().and_then(|scales| scales.iter().position(|s| !s.is_finite()))
            {
                let message = "a scale that is not finite";
                return Err(Error::new(ErrorKind::NotFinite, message)
                    .file(files.scales.unwrap_or_default())
                    .row(row as u64));
            }
            first_row += entry.rows;
            shards.push(shard);
        }
        let d = shards[0].dim();
        Ok(Self { path: path.to_path_buf(), n: manifest.rows, manifest: Some(manifest), shards, d, dtype })
    }

    /// What was opened: the folder or file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Dimensions.
    pub fn d(&self) -> usize {
        self.d
    }

    /// Rows of all shards, ≥ 1.
    pub fn n(&self) -> u64 {
        self.n
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The shards in row order.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The manifest; none for a bare file.
    pub fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_ref()
    }

    /// The shard that holds a row of the store, and the row's number inside it.
    pub fn locate(&self, row: u64) -> Option<(&Shard, usize)> {
        let position = self.shards.partition_point(|shard| shard.first_row() <= row).checked_sub(1)?;
        let shard = &self.shards[position];
        let inside = usize::try_from(row - shard.first_row()).ok()?;
        (inside < shard.len()).then_some((shard, inside))
    }

    /// Checks every value; the calling thread polls `interrupted` about twenty times a second.
    ///
    /// # Errors
    /// `NotFinite` with the file and the first such row in it; `Interrupted`.
    pub fn check_finite(&self, threads: usize, interrupted: &dyn Fn() -> bool) -> Result<()> {
        for shard in &self.shards {
            let rows = shard.view().rows;
            let first = first_chunk(rows.len(), threads, interrupted, &|range| {
                first_not_finite(&rows.slice(range.start, range.end)).map(|row| row + range.start)
            })?;
            if let Some(row) = first {
                return Err(Error::new(ErrorKind::NotFinite, "NaN or infinity")
                    .file(shard.path())
                    .row(row as u64));
            }
        }
        Ok(())
    }

    /// Smallest and largest Euclidean norm of the rows of each shard, with a row (of the shard) that has it.
    ///
    /// # Errors
    /// `Interrupted`.
    pub fn norms(&self, threads: usize, interrupted: &dyn Fn() -> bool) -> Result<Vec<Norms>> {
        let mut found = Vec::with_capacity(self.shards.len());
        for shard in &self.shards {
            let rows = shard.view().rows;
            let bounds = std::sync::Mutex::new(Norms::default());
            first_chunk(rows.len(), threads, interrupted, &|range| {
                let mut here = Norms::default();
                let mut row = vec![0.0; rows.dim()];
                for i in range {
                    rows.read_f32(i, &mut row);
                    let norm = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
                    here.add((norm, i), (norm, i));
                }
                bounds.lock().expect("no worker panics while it holds the lock").add(here.low, here.high);
                None
            })?;
            found.push(bounds.into_inner().expect("all workers have ended"));
        }
        Ok(found)
    }
}

/// Extremes of norms, each with its row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norms {
    /// The smallest.
    pub low: (f64, usize),
    /// The largest.
    pub high: (f64, usize),
}

impl Default for Norms {
    fn default() -> Self {
        Self { low: (f64::INFINITY, usize::MAX), high: (-1.0, usize::MAX) }
    }
}

impl Norms {
    /// Ties go to the lower row, whatever the order of threads.
    fn add(&mut self, low: (f64, usize), high: (f64, usize)) {
        if low.0 < self.low.0 || (low.0 == self.low.0 && low.1 < self.low.1) {
            self.low = low;
        }
        if high.0 > self.high.0 || (high.0 == self.high.0 && high.1 < self.high.1) {
            self.high = high;
        }
    }
}

/// A whole file of bare vectors.
fn bare(path: &Path) -> Result<Shard> {
    let shard = Shard::open(&ShardFiles { embeddings: path.to_path_buf(), ..ShardFiles::default() }, 0)?;
    let named = path.extension().and_then(|extension| extension.to_str()).and_then(bin::dtype);
    if matches!(shard.dtype(), Dtype::I8 | Dtype::U8) && named.is_none() {
        let message = format!("integer elements ({}) are not embeddings", shard.dtype().name());
        return Err(Error::new(ErrorKind::Dtype, message)
            .file(path)
            .remedy("save it as float32: numpy.save(path, array.astype('float32'))"));
    }
    Ok(shard)
}

/// Runs `find` over chunks of `0..n` on several threads and gives the smallest row that any call found.
///
/// Plain threads, not the scan's pool: this is a read at the disk's speed that needs no work stealing.
fn first_chunk(
    n: usize,
    threads: usize,
    interrupted: &dyn Fn() -> bool,
    find: &(dyn Fn(std::ops::Range<usize>) -> Option<usize> + Sync),
) -> Result<Option<usize>> {
    let next = AtomicUsize::new(0);
    let best = AtomicUsize::new(usize::MAX);
    let stop = AtomicBool::new(false);
    let work = || {
        while !stop.load(Ordering::Relaxed) {
            let start = next.fetch_add(CHUNK, Ordering::Relaxed);
            // Chunks are handed out in order, so all below the best row are already taken.
            if start >= n || start > best.load(Ordering::Relaxed) {
                break;
            }
            if let Some(row) = find(start..(start + CHUNK).min(n)) {
                best.fetch_min(row, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> =
            (0..threads.clamp(1, n.div_ceil(CHUNK).max(1))).map(|_| scope.spawn(work)).collect();
        let mut pause = Duration::from_micros(50);
        while !workers.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            if interrupted() {
                stop.store(true, Ordering::Relaxed);
                break;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    });
    if stop.into_inner() {
        return Err(Error::new(ErrorKind::Interrupted, "stopped"));
    }
    let best = best.into_inner();
    Ok((best != usize::MAX).then_some(best))
}

/// The first row with NaN or infinity.
pub fn first_not_finite(rows: &Rows<'_>) -> Option<usize> {
    // An exponent of all ones; whole blocks are tested without branches, so that the loop runs at memory speed.
    let half = |bytes: &[u8], mask: u16| {
        bytes.chunks_exact(2).fold(false, |bad, x| bad | (u16::from_le_bytes([x[0], x[1]]) & mask == mask))
    };
    let bad = |bytes: &[u8]| match rows.dtype() {
        Dtype::F32 => bytes.chunks_exact(4).fold(false, |bad, x| {
            bad | (u32::from_le_bytes([x[0], x[1], x[2], x[3]]) & 0x7f80_0000 == 0x7f80_0000)
        }),
        Dtype::F16 => half(bytes, 0x7c00),
        Dtype::Bf16 => half(bytes, 0x7f80),
        Dtype::I8 | Dtype::U8 => false,
    };
    let stride = rows.dim() * rows.dtype().size();
    if let Some(row) = rows.scales().and_then(|scales| scales.iter().position(|scale| !scale.is_finite())) {
        return Some(row);
    }
    if !bad(rows.bytes()) {
        return None;
    }
    rows.bytes().chunks_exact(stride).position(bad)
}

#[cfg(test)]
mod tests;
