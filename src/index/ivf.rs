//! Building an index: every stage leaves files that the same build, killed and started again, continues from.
//!
//! ```text
//! train    k-means on a sample                                            → coarse, centroids, cells
//! assign   every row to its centroid, segment by segment; those with far too many are split, and all is assigned again; then
//!          a centroid whose rows lie at very different distances gets a list for each shell → shells
//! spread   rows into buckets of neighbouring lists, sequentially          → a few hundred files
//! gather   each bucket in memory: rows of a list side by side, shuffled; exact moments of the rows as they are then stored
//! measure  how the variance of D² grows with distance; how many lists hold the nearest rows
//! ```
//! Memory holds the sample, the buffers of the buckets, and one bucket.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use half::f16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::Index;
use super::Neighbors;
use super::format::{
    ArrayFile, FileFacts, IndexManifest, MANIFEST, VERSION, read_array, write_array, write_atomic,
};
use super::gather::{Asked, Run, gather, read_row, view_starts};
use super::kmeans::Tree;
use super::random::{Rng, mix};
use super::search::Searcher;
use crate::error::{Error, ErrorKind, Result};
use crate::rows::{Dtype, ShardView};
use crate::simd::Level;
use crate::store::{checksum, npy};

/// Lists by rank of nearness, as shares of their number: each bin has its own kappa.
pub const RANKS: [f64; 5] = [0.005, 0.02, 0.08, 0.25, 1.0];

/// Numbers per list in `moments.npy`: first row, rows, Σ w, mean and variance of ‖x − m‖², Σ w² relative to equal weights,
/// smallest and largest ‖x − m‖².
pub const MOMENTS: usize = 8;

/// Sampled rows per list, at most `SAMPLE_BYTES` of them.
const ROWS_PER_LIST: usize = 40;
const SAMPLE_BYTES: usize = 384 << 20;

/// A list above this multiple of the mean size is split, in at most so many further assignments.
const LARGEST: f64 = 3.0;
const REASSIGNMENTS: usize = 2;

/// Rows between two checkpoints of the assignment and of the spreading.
const STEP: u64 = 1 << 18;

/// Most buckets, and most groups with moments of their own.
const MOST_BUCKETS: u64 = 256;
const MOST_GROUPS: usize = 64;
const GROUP_BYTES: usize = 512 << 20;

/// Rows tried as queries for kappa and recall.
const TRIALS: usize = 64;

/// What to build.
#[derive(Clone, Debug)]
pub struct BuildOptions {
    /// Fingerprint of the store.
    pub fingerprint: String,
    /// Lists; 0: √(2n).
    pub lists: usize,
    /// Element type of the copy: float32, float16 or int8.
    pub dtype: Dtype,
    /// Seed.
    pub seed: u64,
    /// Groups in the store; 0 for none.
    pub groups: usize,
    /// Threads; 0 takes all.
    pub threads: usize,
    /// Bytes of memory to hold to, beside what the files' pages take.
    pub memory: usize,
    /// Stop where rows are to be assigned to lists: `lists.bin` is then written by others (see `route`).
    pub pause: bool,
}

/// What a build is at, shared with whoever watches.
#[derive(Debug, Default)]
pub struct Progress {
    /// Set to stop.
    pub stop: AtomicBool,
    /// Stage: 0 train, 1 assign, 2 spread, 3 gather, 4 measure.
    pub stage: AtomicU64,
    /// Rows done in it.
    pub rows: AtomicU64,
    /// Rows that an earlier run had done already, over all stages.
    pub continued: AtomicU64,
}

impl Progress {
    fn at(&self, stage: u64, rows: u64) -> Result<()> {
        self.stage.store(stage, Ordering::Relaxed);
        self.rows.store(rows, Ordering::Relaxed);
        if self.stop.load(Ordering::Relaxed) {
            Err(Error::new(ErrorKind::Interrupted, "stopped"))
        } else {
            Ok(())
        }
    }
}

/// What decides whether an unfinished build can be continued.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Plan {
    version: u32,
    store: String,
    n: u64,
    d: usize,
    lists: usize,
    dtype: String,
    seed: u64,
    groups: usize,
    weighted: bool,
    level: String,
    buckets: u64,
}

/// How far it got.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct State {
    plan: Option<Plan>,
    /// Trees trained or split so far.
    trees: usize,
    /// Whether the assignment by the last tree is final.
    assigned: bool,
    /// Rows spread.
    spread: u64,
    /// Buckets, lists and rows gathered; pairs of list and group.
    buckets: usize,
    lists: usize,
    rows: u64,
    pairs: u64,
    sq_norm: f64,
    weight: f64,
    rounding: f64,
}

struct Build<'a> {
    views: &'a [ShardView<'a>],
    starts: Vec<u64>,
    n: u64,
    d: usize,
    options: &'a BuildOptions,
    folder: PathBuf,
    state: State,
    level: Level,
    progress: &'a Progress,
}

/// The folder of an unfinished build.
pub fn partial_folder(folder: &Path) -> PathBuf {
    let mut name = folder.file_name().unwrap_or_default().to_os_string();
    name.push(".partial");
    folder.with_file_name(name)
}

/// Builds an index of the rows into a folder, by way of `<folder>.partial`, which an earlier run may have left. False where it
/// paused because rows are to be assigned.
///
/// # Errors
/// `Parameter`, `NotFinite`, `Output`, `Interrupted`.
pub fn build(
    views: &[ShardView<'_>],
    folder: &Path,
    options: &BuildOptions,
    progress: &Progress,
) -> Result<bool> {
    let n: u64 = views.iter().map(|view| view.rows.len() as u64).sum();
    let d = views.first().map_or(0, |view| view.rows.dim());
    if n == 0 || d == 0 {
        return Err(Error::new(ErrorKind::Shape, "there are no rows to index"));
    }
    if n > u64::from(u32::MAX) {
        return Err(Error::new(ErrorKind::Parameter, format!("an index holds up to 2^32 rows, not {n}"))
            .remedy("index parts of the store"));
    }
    if !matches!(options.dtype, Dtype::I8 | Dtype::F16 | Dtype::F32) {
        return Err(Error::new(ErrorKind::Dtype, format!("an index keeps no {} copy", options.dtype.name()))
            .remedy("choose float32, float16 or int8"));
    }
    let partial = partial_folder(folder);
    std::fs::create_dir_all(&partial).map_err(|source| Error::io(&partial, ErrorKind::Output, &source))?;
    let lists = if options.lists == 0 { (2.0 * n as f64).sqrt().ceil() as usize } else { options.lists };
    let lists = lists.min(n as usize).max(1);
    let stride = (d * options.dtype.size() + RECORD) as u64;
    let room = (options.memory as u64 / 5).max(1 << 20);
    let plan = Plan {
        version: VERSION,
        store: options.fingerprint.clone(),
        n,
        d,
        lists,
        dtype: options.dtype.name().into(),
        seed: options.seed,
        groups: options.groups,
        weighted: views.iter().any(|view| view.weights.is_some()),
        level: Level::current()?.name().into(),
        buckets: (n * stride).div_ceil(room).clamp(1, MOST_BUCKETS),
    };
    let state = std::fs::read(partial.join("state.json"))
        .ok()
        .and_then(|text| serde_json::from_slice::<State>(&text).ok())
        .filter(|state| state.plan.as_ref() == Some(&plan));
    if state.is_none() {
        // Leftovers of another build.
        let entries =
            std::fs::read_dir(&partial).map_err(|source| Error::io(&partial, ErrorKind::Output, &source))?;
        for entry in entries.flatten() {
            let _ = std::fs::remove_file(entry.path());
        }
    }
    let state = state.unwrap_or(State { plan: Some(plan), ..State::default() });
    progress.continued.store(state.spread + state.rows, Ordering::Relaxed);
    let mut build = Build {
        views,
        starts: view_starts(views),
        n,
        d,
        options,
        folder: partial.clone(),
        state,
        level: Level::current()?,
        progress,
    };
    if !super::on_threads(options.threads, || build.run())? {
        return Ok(false);
    }
    if folder.exists() {
        std::fs::remove_dir_all(folder).map_err(|source| Error::io(folder, ErrorKind::Output, &source))?;
    }
    std::fs::rename(&partial, folder).map_err(|source| Error::io(folder, ErrorKind::Output, &source))?;
    Ok(true)
}

/// The route of each row in a range, by the tree of an unfinished build: what another machine does of the assignment. What a
/// row gets depends on nothing but the row, the tree and the SIMD level. It is an entry of `lists.bin`: the centroid in the lower
/// half, the bits of ‖x − c‖² in the upper.
///
/// # Errors
/// `Parameter`, `Format`, `NotFinite`.
pub fn route(views: &[ShardView<'_>], partial: &Path, rows: Range<u64>, threads: usize) -> Result<Vec<u64>> {
    let starts = view_starts(views);
    let n: u64 = views.iter().map(|view| view.rows.len() as u64).sum();
    if rows.start > rows.end || rows.end > n {
        return Err(Error::new(ErrorKind::Parameter, format!("no rows {rows:?} among {n}")));
    }
    let d = views.first().map_or(0, |view| view.rows.dim());
    let tree = read_tree(partial, d, Level::current()?)?;
    let rows: Vec<u64> = rows.collect();
    super::on_threads(threads, || {
        let parts: Vec<Result<Vec<u64>>> =
            rows.par_chunks(2048).map(|rows| route_rows(views, &starts, d, &tree, rows)).collect();
        let mut lists = Vec::with_capacity(rows.len());
        for part in parts {
            lists.extend(part?);
        }
        Ok(lists)
    })
}

/// The routes of a few rows.
fn route_rows(
    views: &[ShardView<'_>],
    starts: &[u64],
    d: usize,
    tree: &Tree,
    rows: &[u64],
) -> Result<Vec<u64>> {
    let singles = read_rows(views, starts, d, rows.iter().copied())?;
    let (mut lists, mut radii) = (vec![0; rows.len()], vec![0.0; rows.len()]);
    tree.route_centroids(&singles, &mut lists, &mut radii);
    Ok(lists
        .iter()
        .zip(&radii)
        .map(|(&list, radius)| u64::from(radius.to_bits()) << 32 | u64::from(list))
        .collect())
}

/// Rows in single precision, checked to be finite.
fn read_rows(
    views: &[ShardView<'_>],
    starts: &[u64],
    d: usize,
    rows: impl ExactSizeIterator<Item = u64>,
) -> Result<Vec<f32>> {
    let mut out = vec![0.0; rows.len() * d];
    for (row, into) in rows.zip(out.chunks_exact_mut(d)) {
        read_row(views, starts, row, into);
        if !into.iter().all(|x| x.is_finite()) {
            return Err(Error::new(ErrorKind::NotFinite, "NaN or infinity").row(row));
        }
    }
    Ok(out)
}

fn read_tree(folder: &Path, d: usize, level: Level) -> Result<Tree> {
    let read = |name| read_array(folder, name, d as u64);
    Tree::new(d, read("coarse.npy")?, read("centroids.npy")?, read_array(folder, "cells.npy", 1)?, level)
}

/// Bytes of an entry of `lists.bin`: centroid and distance.
const ROUTE: usize = 8;

/// Bytes of a record in a bucket beside the row itself: row, list, group, weight, scale.
const RECORD: usize = 20;

impl Build<'_> {
    fn run(&mut self) -> Result<bool> {
        let started = Instant::now();
        if self.state.trees == 0 {
            self.progress.at(0, 0)?;
            let tree = self.train()?;
            self.keep_tree(&tree)?;
        }
        while !self.state.assigned {
            let listed = std::fs::metadata(self.folder.join("lists.bin")).map_or(0, |facts| facts.len());
            if self.options.pause && listed != ROUTE as u64 * self.n {
                return Ok(false);
            }
            let tree = self.tree()?;
            self.assign(&tree)?;
            let split = if self.state.trees <= REASSIGNMENTS { self.split(&tree)? } else { None };
            match split {
                Some(tree) => self.keep_tree(&tree)?,
                None => {
                    self.state.assigned = true;
                    self.save()?;
                }
            }
        }
        let (tree, of_row) = self.shells()?;
        let mut counts = vec![0_u64; tree.len()];
        for &list in &of_row {
            counts[list as usize] += 1;
        }
        let buckets = self.cut(&counts);
        if self.state.spread < self.n {
            self.spread(&of_row, &counts, &buckets)?;
        }
        drop(of_row);
        self.gather_buckets(&counts, &buckets)?;
        self.finish(&tree, started)?;
        Ok(true)
    }

    fn save(&self) -> Result<()> {
        let text = serde_json::to_vec(&self.state).expect("numbers and strings");
        write_atomic(&self.folder.join("state.json"), &text)
    }

    fn keep_tree(&mut self, tree: &Tree) -> Result<()> {
        let d = self.d as u64;
        let place = |name: &str| self.folder.join(name);
        // Killed before all is written, the build trains again: rows must not meet half a tree, nor lists of another.
        let trees = std::mem::take(&mut self.state.trees);
        self.save()?;
        let _ = std::fs::remove_file(place("lists.bin"));
        write_array(&place("coarse.npy"), &[tree.coarse().len() as u64 / d, d], tree.coarse())?;
        write_array(&place("centroids.npy"), &[tree.centroids() as u64, d], tree.lists())?;
        write_array(&place("cells.npy"), &[tree.cells().len() as u64], tree.cells())?;
        self.state.trees = trees + 1;
        self.save()
    }

    fn tree(&self) -> Result<Tree> {
        read_tree(&self.folder, self.d, self.level)
    }

    /// Rows of the store in single precision, checked to be finite.
    fn read(&self, rows: impl ExactSizeIterator<Item = u64>) -> Result<Vec<f32>> {
        read_rows(self.views, &self.starts, self.d, rows)
    }

    fn train(&self) -> Result<Tree> {
        let lists = self.state.plan.as_ref().map_or(1, |plan| plan.lists);
        let most = (SAMPLE_BYTES.min(self.options.memory / 4) / (4 * self.d)).max(lists);
        let count = (ROWS_PER_LIST * lists).min(most).min(self.n as usize);
        let mut rows = Rng::new(&[self.options.seed, 10]).distinct(self.n, count);
        rows.sort_unstable();
        let sample = self.read(rows.into_iter())?;
        Tree::train(&sample, self.d, lists, self.options.seed, self.level)
    }

    /// Appends the centroid of every row and its distance to it to `lists.bin`.
    fn assign(&self, tree: &Tree) -> Result<()> {
        let path = self.folder.join("lists.bin");
        let io = |source: std::io::Error| Error::io(&path, ErrorKind::Output, &source);
        let mut file =
            File::options().create(true).truncate(false).read(true).write(true).open(&path).map_err(io)?;
        let listed = file.metadata().map_err(io)?.len() / ROUTE as u64;
        let mut done = if listed == self.n { listed } else { listed.min(self.n) / STEP * STEP };
        file.set_len(ROUTE as u64 * done).map_err(io)?;
        file.seek(SeekFrom::End(0)).map_err(io)?;
        while done < self.n {
            self.progress.at(1, done)?;
            let end = (done + STEP).min(self.n);
            // Eight pieces, so that the rows in single precision take little.
            let piece = ((end - done) / 8).max(4096);
            for start in (done..end).step_by(piece as usize) {
                let stop = (start + piece).min(end);
                let rows: Vec<u64> = (start..stop).collect();
                let parts: Vec<Result<Vec<u64>>> = rows
                    .par_chunks(2048)
                    .map(|rows| route_rows(self.views, &self.starts, self.d, tree, rows))
                    .collect();
                for part in parts {
                    let bytes: Vec<u8> = part?.iter().flat_map(|route| route.to_le_bytes()).collect();
                    file.write_all(&bytes).map_err(io)?;
                }
            }
            file.sync_data().map_err(io)?;
            done = end;
        }
        Ok(())
    }

    /// Calls `take(row, centroid, ‖x − c‖²)` for every row.
    fn routes(&self, mut take: impl FnMut(u64, u32, f32)) -> Result<()> {
        let path = self.folder.join("lists.bin");
        let mut file = File::open(&path).map_err(|source| Error::io(&path, ErrorKind::Output, &source))?;
        let mut bytes = vec![0; ROUTE << 16];
        let damaged = || {
            Error::new(ErrorKind::Format, "the lists of the unfinished build are damaged")
                .file(&path)
                .remedy("remove the .partial folder")
        };
        let mut row = 0;
        while row < self.n {
            let count = ((self.n - row) as usize).min(bytes.len() / ROUTE);
            file.read_exact(&mut bytes[..count * ROUTE]).map_err(|_| damaged())?;
            for entry in bytes[..count * ROUTE].chunks_exact(ROUTE) {
                let route = u64::from_le_bytes(entry.try_into().expect("chunks of eight"));
                take(row, route as u32, f32::from_bits((route >> 32) as u32));
                row += 1;
            }
        }
        Ok(())
    }

    /// The final tree, and the list of every row in it.
    fn shells(&self) -> Result<(Tree, Vec<u32>)> {
        let tree = self.tree()?;
        let mut ends = vec![0_usize; tree.centroids() + 1];
        self.routes(|_, centroid, _| ends[centroid as usize + 1] += 1)?;
        for centroid in 0..tree.centroids() {
            ends[centroid + 1] += ends[centroid];
        }
        let mut next = ends.clone();
        let mut radii = vec![0.0_f32; self.n as usize];
        self.routes(|_, centroid, radius| {
            radii[next[centroid as usize]] = radius;
            next[centroid as usize] += 1;
        })?;
        let mut parts = Vec::with_capacity(tree.centroids());
        let mut rest = &mut radii[..];
        for ends in ends.windows(2) {
            let (part, after) = rest.split_at_mut(ends[1] - ends[0]);
            parts.push(part);
            rest = after;
        }
        let outer: Vec<Vec<f32>> = parts.into_par_iter().map(super::kmeans::shells).collect();
        let flat: Vec<f32> =
            outer.into_iter().flat_map(|cuts| cuts.into_iter().chain([f32::INFINITY])).collect();
        drop(radii);
        write_array(&self.folder.join("shells.npy"), &[flat.len() as u64], &flat)?;
        let tree = tree.with_shells(flat)?;
        let mut of_row = vec![0; self.n as usize];
        self.routes(|row, centroid, radius| of_row[row as usize] = tree.shell(centroid, radius))?;
        Ok((tree, of_row))
    }

    /// A tree in which far too large lists are split; None where there are none.
    fn split(&self, tree: &Tree) -> Result<Option<Tree>> {
        let mut counts = vec![0_u64; tree.len()];
        self.routes(|_, list, _| counts[list as usize] += 1)?;
        let wanted = self.state.plan.as_ref().map_or(1, |plan| plan.lists);
        let typical = self.n as f64 / wanted as f64;
        let limit = (LARGEST * typical).max(16.0);
        let wide: Vec<u32> =
            (0..counts.len() as u32).filter(|&list| counts[list as usize] as f64 > limit).collect();
        if wide.is_empty() {
            return Ok(None);
        }
        let mut members: std::collections::BTreeMap<u32, Vec<u64>> =
            wide.iter().map(|&list| (list, Vec::new())).collect();
        let most = (self.options.memory / 8 / (4 * self.d) / wide.len()).clamp(64, 4096) as u64;
        self.routes(|row, list, _| {
            if let Some(members) = members.get_mut(&list) {
                let keep = counts[list as usize].div_ceil(most);
                if mix(row).is_multiple_of(keep) {
                    members.push(row);
                }
            }
        })?;
        let mut parts = Vec::new();
        for (list, rows) in members {
            let count = (counts[list as usize] as f64 / typical).round() as usize;
            parts.push((list, self.read(rows.into_iter())?, count));
        }
        let tree_after = tree.split(&parts, self.options.seed + self.state.trees as u64)?;
        Ok((tree_after.len() > tree.len()).then_some(tree_after))
    }

    /// Cuts the lists into buckets of about equal size: first list of each, and the number of lists at the end.
    fn cut(&self, counts: &[u64]) -> Vec<usize> {
        let buckets = self.state.plan.as_ref().map_or(1, |plan| plan.buckets);
        let target = self.n.div_ceil(buckets);
        let mut ends = vec![0];
        let mut size = 0;
        for (list, &count) in counts.iter().enumerate() {
            if size > 0 && size + count > target {
                ends.push(list);
                size = 0;
            }
            size += count;
        }
        ends.push(counts.len());
        ends
    }

    fn bucket_path(&self, bucket: usize) -> PathBuf {
        self.folder.join(format!("bucket-{bucket:03}.bin"))
    }

    /// Bytes of one record.
    fn record(&self) -> usize {
        RECORD + self.d * self.options.dtype.size()
    }

    fn spread(&mut self, of_row: &[u32], counts: &[u64], ends: &[usize]) -> Result<()> {
        let mut bucket_of = vec![0_u16; counts.len()];
        for (bucket, ends) in ends.windows(2).enumerate() {
            bucket_of[ends[0]..ends[1]].fill(bucket as u16);
        }
        let buckets = ends.len() - 1;
        let mut before = vec![0_u64; buckets];
        for &list in &of_row[..self.state.spread as usize] {
            before[bucket_of[list as usize] as usize] += 1;
        }
        let record = self.record();
        let failed = |path: &Path, source: std::io::Error| Error::io(path, ErrorKind::Output, &source);
        let mut files = Vec::new();
        for (bucket, &rows) in before.iter().enumerate() {
            let path = self.bucket_path(bucket);
            let open = || -> std::io::Result<File> {
                let mut file = File::options().create(true).truncate(false).write(true).open(&path)?;
                if file.metadata()?.len() < rows * record as u64 {
                    return Err(std::io::Error::other("shorter than the state of the build says"));
                }
                file.set_len(rows * record as u64)?;
                file.seek(SeekFrom::End(0))?;
                Ok(file)
            };
            files.push(open().map_err(|source| failed(&path, source))?);
        }
        let room = (self.options.memory / 8 / buckets).clamp(record, 1 << 20);
        let mut buffers: Vec<Vec<u8>> = vec![Vec::new(); buckets];
        let mut converted = Converted::new(self.options.dtype, self.d);
        while self.state.spread < self.n {
            self.progress.at(2, self.state.spread)?;
            // Eight steps to a checkpoint: each waits for the disk.
            let end = (self.state.spread + 8 * STEP).min(self.n);
            for row in self.state.spread..end {
                if row % STEP == 0 {
                    self.progress.at(2, row)?;
                }
                let list = of_row[row as usize];
                let bucket = bucket_of[list as usize] as usize;
                let view = self.starts.partition_point(|&start| start <= row) - 1;
                let inside = (row - self.starts[view]) as usize;
                let view = &self.views[view];
                let scale = converted.take(view, inside).map_err(|error| error.row(row))?;
                self.state.rounding = self.state.rounding.max(converted.rounding);
                let buffer = &mut buffers[bucket];
                buffer.extend_from_slice(&(row as u32).to_le_bytes());
                buffer.extend_from_slice(&list.to_le_bytes());
                buffer.extend_from_slice(&view.groups.map_or(0, |groups| groups[inside]).to_le_bytes());
                buffer.extend_from_slice(&view.weights.map_or(1.0, |weights| weights[inside]).to_le_bytes());
                buffer.extend_from_slice(&scale.to_le_bytes());
                buffer.extend_from_slice(&converted.bytes);
                if buffer.len() >= room {
                    files[bucket]
                        .write_all(buffer)
                        .map_err(|source| failed(&self.bucket_path(bucket), source))?;
                    buffer.clear();
                }
            }
            for (bucket, (file, buffer)) in files.iter_mut().zip(&mut buffers).enumerate() {
                let mut write = || -> std::io::Result<()> {
                    file.write_all(buffer)?;
                    buffer.clear();
                    file.sync_data()
                };
                write().map_err(|source| failed(&self.bucket_path(bucket), source))?;
            }
            self.state.spread = end;
            self.save()?;
        }
        Ok(())
    }

    fn gather_buckets(&mut self, counts: &[u64], ends: &[usize]) -> Result<()> {
        let (n, d, lists) = (self.n, self.d as u64, counts.len() as u64);
        let stride = self.d * self.options.dtype.size();
        let descr = npy::descr(self.options.dtype).expect("a type that NumPy has");
        let (done, pairs) = (self.state.rows, self.state.pairs);
        let place = |name: &str| self.folder.join(name);
        let plan = self.state.plan.clone().expect("a build has a plan");
        let mut rows = ArrayFile::open(place("rows.npy"), descr, &[n, d], done, stride)?;
        let column = |name: &str, descr: &str, wanted: bool| -> Result<Option<ArrayFile>> {
            if wanted { Ok(Some(ArrayFile::open(place(name), descr, &[n], done, 4)?)) } else { Ok(None) }
        };
        let mut ids = column("ids.npy", "<u4", true)?;
        let mut scales = column("scales.npy", "<f4", self.options.dtype == Dtype::I8)?;
        let mut groups = column("groups.npy", "<u4", plan.groups > 0)?;
        let mut weights = column("weights.npy", "<f4", plan.weighted)?;
        let finished = self.state.lists as u64;
        let mut means = ArrayFile::open(place("means.npy"), "<f4", &[lists, d], finished, 4 * self.d)?;
        let mut moments =
            ArrayFile::open(place("moments.npy"), "<f8", &[lists, MOMENTS as u64], finished, 8 * MOMENTS)?;
        let with_groups = plan.groups > 1 && plan.groups <= MOST_GROUPS;
        let group_files = |pairs: u64| -> Result<[ArrayFile; 3]> {
            Ok([
                ArrayFile::open(place("group_lists.npy"), "<u4", &[pairs, 2], pairs, 8)?,
                ArrayFile::open(place("group_means.npy"), "<f4", &[pairs, d], pairs, 4 * d as usize)?,
                ArrayFile::open(place("group_moments.npy"), "<f8", &[pairs, 3], pairs, 24)?,
            ])
        };
        let mut of_groups = if with_groups { Some(group_files(pairs)?) } else { None };
        while self.state.buckets + 1 < ends.len() {
            self.progress.at(3, self.state.rows)?;
            let bucket = self.state.buckets;
            let (first, end) = (ends[bucket], ends[bucket + 1]);
            let path = self.bucket_path(bucket);
            let mut bytes = Vec::new();
            File::open(&path)
                .and_then(|mut file| file.read_to_end(&mut bytes))
                .map_err(|source| Error::io(&path, ErrorKind::Output, &source))?;
            let expected: u64 = counts[first..end].iter().sum();
            let record = self.record();
            if bytes.len() as u64 != expected * record as u64 {
                return Err(Error::new(ErrorKind::Format, "a bucket of the unfinished build is damaged")
                    .file(&path)
                    .remedy("remove the .partial folder and build again"));
            }
            let word = |record: &[u8], at: usize| {
                u32::from_le_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]])
            };
            let mut order: Vec<(u32, u64, u32)> = bytes
                .chunks_exact(record)
                .enumerate()
                .map(|(at, record)| {
                    let row = u64::from(word(record, 0));
                    (word(record, 4), mix(row ^ mix(self.options.seed ^ 0x7368_7566)), at as u32)
                })
                .collect();
            order.par_sort_unstable();
            let mut start = self.state.rows;
            let mut spans: Vec<Span> = Vec::with_capacity(end - first);
            let mut rest = &order[..];
            for (list, &count) in counts.iter().enumerate().take(end).skip(first) {
                let (mine, after) = rest.split_at(count as usize);
                spans.push((list, start, mine));
                start += count;
                rest = after;
            }
            let facts: Vec<Facts> =
                spans.par_iter().map(|(_, _, members)| self.moments(&bytes, members, with_groups)).collect();
            for &(_, _, at) in &order {
                rows.write(&bytes[at as usize * record + RECORD..(at as usize + 1) * record])?;
            }
            let each = |at: usize| order.iter().map(move |entry| (entry.2 as usize, at));
            for (file, at) in [(&mut ids, 0), (&mut groups, 8), (&mut weights, 12), (&mut scales, 16)] {
                if let Some(file) = file {
                    file.numbers(each(at).map(|(which, at)| word(&bytes[which * record..], at)))?;
                }
            }
            for ((list, start, _), facts) in spans.iter().zip(&facts) {
                means.numbers(facts.mean.iter().copied())?;
                let [weight, tr, s4, spread, inner, outer] = facts.moments;
                moments.numbers([
                    *start as f64,
                    counts[*list] as f64,
                    weight,
                    tr,
                    s4,
                    spread,
                    inner,
                    outer,
                ])?;
                self.state.sq_norm += facts.sq_norm;
                self.state.weight += weight;
                if let Some([of_list, of_mean, of_moments]) = &mut of_groups {
                    for (code, mean, entry) in &facts.groups {
                        of_list.numbers([*list as u32, *code])?;
                        of_mean.numbers(mean.iter().copied())?;
                        of_moments.numbers(*entry)?;
                        self.state.pairs += 1;
                    }
                }
            }
            for file in [&mut rows, &mut means, &mut moments] {
                file.sync()?;
            }
            for file in [&mut ids, &mut scales, &mut groups, &mut weights].into_iter().flatten() {
                file.sync()?;
            }
            for file in of_groups.iter_mut().flatten() {
                file.sync()?;
            }
            self.state.rows += expected;
            self.state.buckets += 1;
            self.state.lists = end;
            self.save()?;
            let _ = std::fs::remove_file(&path);
        }
        if of_groups.take().is_some() {
            // With their final shapes in the headers.
            group_files(self.state.pairs)?;
        }
        Ok(())
    }

    /// Mean row and moments of a list's rows, as its records hold them.
    fn moments(&self, bytes: &[u8], members: &[(u32, u64, u32)], with_groups: bool) -> Facts {
        let (d, record) = (self.d, self.record());
        let number = |record: &[u8], at: usize| {
            f32::from_le_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]])
        };
        let mut row = vec![0.0_f32; d];
        let decode = |at: u32, row: &mut Vec<f32>| -> (f64, u32) {
            let entry = &bytes[at as usize * record..][..record];
            decode_row(&entry[RECORD..], self.options.dtype, number(entry, 16), row);
            (f64::from(number(entry, 12)), u32::from_le_bytes([entry[8], entry[9], entry[10], entry[11]]))
        };
        #[derive(Default)]
        struct Sum {
            n: f64,
            weight: f64,
            row: Vec<f64>,
            sq: f64,
        }
        let mut all = Sum { row: vec![0.0; d], ..Sum::default() };
        let mut groups: std::collections::BTreeMap<u32, Sum> = std::collections::BTreeMap::new();
        let (mut weight_sq, mut sq_norm) = (0.0, 0.0);
        for &(_, _, at) in members {
            let (weight, code) = decode(at, &mut row);
            all.n += 1.0;
            all.weight += weight;
            weight_sq += weight * weight;
            let mut norm = 0.0;
            for (sum, &x) in all.row.iter_mut().zip(&row) {
                *sum += weight * f64::from(x);
                norm += f64::from(x) * f64::from(x);
            }
            sq_norm += weight * norm;
            if with_groups {
                let sum = groups.entry(code).or_insert_with(|| Sum { row: vec![0.0; d], ..Sum::default() });
                sum.n += 1.0;
                sum.weight += weight;
                sum.row.iter_mut().zip(&row).for_each(|(sum, &x)| *sum += weight * f64::from(x));
            }
        }
        let mean_of = |sum: &Sum| -> Vec<f32> {
            sum.row
                .iter()
                .map(|total| if sum.weight > 0.0 { (total / sum.weight) as f32 } else { 0.0 })
                .collect()
        };
        let mean = mean_of(&all);
        let group_means: std::collections::BTreeMap<u32, Vec<f32>> =
            groups.iter().map(|(&code, sum)| (code, mean_of(sum))).collect();
        let sq = |row: &[f32], mean: &[f32]| -> f64 {
            row.iter().zip(mean).map(|(x, m)| (f64::from(*x) - f64::from(*m)).powi(2)).sum()
        };
        let (mut first, mut second) = (0.0, 0.0);
        let mut around = Vec::with_capacity(members.len());
        for &(_, _, at) in members {
            let (weight, code) = decode(at, &mut row);
            let distance = sq(&row, &mean);
            first += weight * distance;
            around.push((weight, distance));
            if with_groups && let (Some(sum), Some(mean)) = (groups.get_mut(&code), group_means.get(&code)) {
                sum.sq += weight * sq(&row, mean);
            }
        }
        let per = |total: f64| if all.weight > 0.0 { total / all.weight } else { 0.0 };
        let tr = per(first);
        let (mut inner, mut outer) = (f64::INFINITY, 0.0_f64);
        for (weight, distance) in around {
            second += weight * (distance - tr).powi(2);
            (inner, outer) = (inner.min(distance), outer.max(distance));
        }
        let spread = if all.weight > 0.0 { weight_sq * all.n / (all.weight * all.weight) } else { 1.0 };
        let groups = groups
            .into_iter()
            .zip(group_means.into_values())
            .map(|((code, sum), mean)| {
                (code, mean, [sum.n, sum.weight, if sum.weight > 0.0 { sum.sq / sum.weight } else { 0.0 }])
            })
            .collect();
        let inner = if inner.is_finite() { inner } else { 0.0 };
        Facts { mean, moments: [all.weight, tr, per(second), spread, inner, outer], sq_norm, groups }
    }

    fn finish(&mut self, tree: &Tree, started: Instant) -> Result<()> {
        self.progress.at(4, 0)?;
        let plan = self.state.plan.clone().expect("a build has a plan");
        if self.state.weight.is_nan() || self.state.weight <= 0.0 {
            return Err(Error::new(ErrorKind::Parameter, "all rows have the weight 0"));
        }
        let with_groups = plan.groups > 1
            && plan.groups <= MOST_GROUPS
            && self.state.pairs as usize * self.d * 4 <= GROUP_BYTES;
        let mut manifest = IndexManifest {
            format: "lmd3-index".into(),
            version: VERSION,
            store: plan.store.clone(),
            n: self.n,
            d: self.d as u64,
            lists: tree.len() as u64,
            dtype: plan.dtype.clone(),
            seed: plan.seed,
            rounding: self.state.rounding,
            groups: plan.groups as u64,
            group_moments: with_groups,
            weighted: plan.weighted,
            kappa: vec![1.0; RANKS.len()],
            sq_norm: self.state.sq_norm / self.state.weight,
            weight: self.state.weight,
            probes: 1,
            recall: 0.0,
            seconds: 0.0,
            files: Vec::new(),
        };
        let index = Index::from_parts(&self.folder, manifest.clone())?;
        let mut rng = Rng::new(&[plan.seed, 11]);
        let mut trials = rng.distinct(self.n, TRIALS);
        trials.sort_unstable();
        let queries = self.read(trials.into_iter())?;
        manifest.kappa = kappa(&index, &queries)?;
        (manifest.probes, manifest.recall) = probes(&index, &queries)?;
        drop(index);
        let mut names = vec![
            "coarse.npy",
            "centroids.npy",
            "cells.npy",
            "shells.npy",
            "rows.npy",
            "ids.npy",
            "means.npy",
            "moments.npy",
        ];
        names.extend((self.options.dtype == Dtype::I8).then_some("scales.npy"));
        names.extend((plan.groups > 0).then_some("groups.npy"));
        names.extend(plan.weighted.then_some("weights.npy"));
        if with_groups {
            names.extend(["group_lists.npy", "group_means.npy", "group_moments.npy"]);
        }
        for name in &names {
            let (xxh3, bytes) = checksum(&self.folder.join(name))?;
            manifest.files.push(FileFacts { name: (*name).into(), bytes, xxh3 });
        }
        manifest.seconds = started.elapsed().as_secs_f64();
        let text = serde_json::to_vec_pretty(&manifest).expect("numbers and strings");
        write_atomic(&self.folder.join(MANIFEST), &text)?;
        let entries = std::fs::read_dir(&self.folder)
            .map_err(|source| Error::io(&self.folder, ErrorKind::Output, &source))?;
        for entry in entries.flatten() {
            let name = entry.file_name();
            if name != MANIFEST && !names.iter().any(|kept| name == *kept) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
        Ok(())
    }
}

/// A list, its first row, and its members as (list, random key, record).
type Span<'a> = (usize, u64, &'a [(u32, u64, u32)]);

struct Facts {
    mean: Vec<f32>,
    /// Weight, mean and variance of ‖x − m‖², spread of the weights, smallest and largest ‖x − m‖².
    moments: [f64; 6],
    sq_norm: f64,
    groups: Vec<(u32, Vec<f32>, [f64; 3])>,
}

fn decode_row(bytes: &[u8], dtype: Dtype, scale: f32, row: &mut [f32]) {
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
struct Converted {
    dtype: Dtype,
    bytes: Vec<u8>,
    row: Vec<f32>,
    back: Vec<f32>,
    /// ‖x̂ − x‖/‖x‖ of the last row.
    rounding: f64,
}

impl Converted {
    fn new(dtype: Dtype, d: usize) -> Self {
        Self { dtype, bytes: Vec::new(), row: vec![0.0; d], back: vec![0.0; d], rounding: 0.0 }
    }

    /// Converts row `i`, unless it is stored so; returns its scale.
    fn take(&mut self, view: &ShardView<'_>, i: usize) -> Result<f32> {
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

/// The bin of each list by its rank, given as its place among all.
pub fn rank_bin(rank: usize, lists: usize) -> usize {
    let share = (rank + 1) as f64 / lists as f64;
    RANKS.iter().position(|&end| share <= end).unwrap_or(RANKS.len() - 1)
}

/// How much the variance of D² over a list exceeds s4, in units of 4‖q − m‖² tr/d, by the rank of the list.
fn kappa(index: &Index, queries: &[f32]) -> Result<Vec<f64>> {
    /// Lists looked at for each query and bin.
    const LISTS: usize = 6;
    let view = index.view();
    let asked = Asked::new(queries, index.d(), view.rows.dtype() == Dtype::I8, index.level())?;
    let (d, width, lists) = (index.d(), index.panel_width(), index.lists());
    let mut chosen: Vec<(usize, f64, usize)> = Vec::new();
    let mut runs = Vec::new();
    for (panel, queries) in queries.chunks(width * d).enumerate() {
        let norms = &asked.sq_norms[panel * width..][..queries.len() / d];
        let ranked = index.rank(queries, norms);
        let mut order = Vec::new();
        for lane in 0..norms.len() {
            index.nearest_lists(&ranked, lane, lists.len(), &mut order);
            let mut taken = [0; RANKS.len()];
            let mut rng = Rng::new(&[index.manifest().seed, 12, (panel * width + lane) as u64]);
            let mut places: Vec<usize> = (0..order.len()).collect();
            rng.shuffle(&mut places);
            for place in places {
                let (list, bin) = (order[place] as usize, rank_bin(place, lists.len()));
                if taken[bin] == LISTS || lists[list].n < 8 || lists[list].tr <= 0.0 {
                    continue;
                }
                taken[bin] += 1;
                chosen.push((bin, f64::from(ranked.to_mean[list * width + lane]), list));
                let query = (panel * width + lane) as u32;
                runs.push(Run { query, start: lists[list].start, len: lists[list].n.min(4096) as u32 });
            }
        }
    }
    let found = gather(&[view], &asked, &runs);
    let mut sums = [(0.0, 0.0); RANKS.len()];
    for (at, &(bin, to_mean, list)) in chosen.iter().enumerate() {
        let values = found.run(at, runs[at].len);
        let n = values.len() as f64;
        let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        let variance = values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / (n - 1.0);
        let unit = 4.0 * to_mean * lists[list].tr / d as f64;
        // Sums of both, so that lists near the query, whose unit is small, count for little: their mean of ratios is noise.
        sums[bin].0 += variance - lists[list].s4;
        sums[bin].1 += unit;
    }
    // A bin without lists (there are few) takes its neighbour's.
    let mut table: Vec<f64> = sums
        .iter()
        // The covariance of a list has no direction with more than all of tr.
        .map(|&(sum, units)| if units > 0.0 { (sum / units).clamp(0.0, d as f64) } else { f64::NAN })
        .collect();
    for bin in (0..table.len() - 1).rev() {
        if table[bin].is_nan() {
            table[bin] = table[bin + 1];
        }
    }
    for bin in 0..table.len() {
        if table[bin].is_nan() {
            table[bin] = if bin == 0 { 1.0 } else { table[bin - 1] };
        }
    }
    Ok(table)
}

/// Lists that hold .95 of the 10 nearest rows, each trial row itself left out, and the share that they hold.
fn probes(index: &Index, queries: &[f32]) -> Result<(u64, f64)> {
    const K: usize = 10;
    let lists = index.lists().len();
    let search = |probes: usize| Searcher { index, source: None, probes }.query(queries, K + 1);
    // So many lists stand for all: the truth itself would be a scan.
    let most = (lists / 4).clamp(32.min(lists), 512.min(lists));
    let truth = search(most)?;
    let recall = |found: &[Vec<crate::topk::Neighbor>]| -> f64 {
        let (mut hits, mut all) = (0_usize, 0_usize);
        for (found, truth) in found.iter().zip(&truth) {
            let truth = &truth[1.min(truth.len())..];
            all += truth.len();
            hits +=
                truth.iter().filter(|neighbor| found.iter().any(|other| other.row == neighbor.row)).count();
        }
        if all == 0 { 1.0 } else { hits as f64 / all as f64 }
    };
    let mut tried = 1;
    while tried < most {
        let share = recall(&search(tried)?);
        if share >= 0.96 {
            return Ok((tried as u64, share));
        }
        tried = (tried + 1).max(tried * 5 / 4);
    }
    Ok((most as u64, 1.0))
}
