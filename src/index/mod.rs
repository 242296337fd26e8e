//! The index: rows in lists of near ones, with the exact moments of every list.
//!
//! It serves two ends. Nearest rows are looked for in the lists nearest to a query; and the mean of D² over a list is
//! known exactly for any query, ‖q − m‖² + tr, which lets an estimator sample only what is left of a kernel sum.

pub mod format;
pub mod gather;
pub mod ivf;
pub mod kmeans;
pub(crate) mod random;
pub mod search;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::rows::{Dtype, ShardView};
use crate::simd::{Level, pack_panel};
use crate::store::{Column, Shard, ShardFiles};
use format::{IndexManifest, MOMENTS, read_array};
use kmeans::Tree;

/// Files up to this size are checked against their checksums whenever an index is opened.
const CHECKED: u64 = 64 << 20;

/// Runs work on a pool of so many threads (0: all); a panic in it becomes an error.
///
/// # Errors
/// Those of the work, `Parameter` where threads can't be started, `Internal` for a panic.
pub fn on_threads<T: Send>(threads: usize, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .map_err(|error| Error::new(ErrorKind::Parameter, format!("can't start threads: {error}")))?;
    catch_unwind(AssertUnwindSafe(|| pool.install(work)))
        .unwrap_or_else(|_| Err(Error::new(ErrorKind::Internal, "a worker panicked")))
}

/// Whoever finds near rows: the index, or another library behind Python.
pub trait Neighbors {
    /// Rows and squared distances of up to k near rows of each query, nearest first.
    ///
    /// # Errors
    /// Those of the provider.
    fn query(&self, queries: &[f32], k: usize) -> Result<Vec<Vec<crate::topk::Neighbor>>>;
}

/// What is known of one list.
#[derive(Clone, Copy, Debug)]
pub struct List {
    /// Position of its first row in the copy.
    pub start: u64,
    /// Rows.
    pub n: u64,
    /// Σ w.
    pub weight: f64,
    /// Mean of ‖x − m‖².
    pub tr: f64,
    /// Variance of ‖x − m‖².
    pub s4: f64,
    /// Mean of w² over the square of the mean of w: 1 where all weights are equal.
    pub spread: f64,
    /// Smallest ‖x − m‖.
    pub inner: f64,
    /// Largest ‖x − m‖.
    pub outer: f64,
}

impl List {
    /// A bound below of D² for all rows, given ‖q − m‖² (the triangle inequality).
    #[inline]
    pub fn nearest_sq(&self, to_mean: f64) -> f64 {
        let distance = to_mean.sqrt();
        let bound = (distance - self.outer).max(self.inner - distance).max(0.0);
        bound * bound
    }

    /// A bound above of the same.
    pub fn farthest_sq(&self, to_mean: f64) -> f64 {
        (to_mean.sqrt() + self.outer).powi(2)
    }
}

/// Moments of the rows of one group in the lists where it is present.
#[derive(Clone, Debug, Default)]
pub struct GroupMoments {
    /// The entries of list c are `first[c]..first[c + 1]`.
    pub first: Vec<u32>,
    /// Group code.
    pub codes: Vec<u32>,
    /// Mean row, d values each.
    pub means: Vec<f32>,
    /// Rows, Σ w, mean of ‖x − m‖².
    pub moments: Vec<[f64; 3]>,
}

/// An open index.
#[derive(Debug)]
pub struct Index {
    folder: PathBuf,
    manifest: IndexManifest,
    tree: Tree,
    means: Vec<f32>,
    /// Squared norms of the centroids and of the mean rows.
    sq_norms: [Vec<f32>; 2],
    lists: Vec<List>,
    /// Centroid of each list.
    centroids: Vec<u32>,
    shard: Shard,
    ids: Column<u32>,
    groups: Option<GroupMoments>,
    level: Level,
}

/// Squared distances of the queries of a panel to all centroids and to the means of all lists.
pub struct Ranked {
    /// To the centroids that rows were assigned by, which order the lists: [query][centroid].
    to_centroid: Vec<f32>,
    /// To the mean rows: [query][list].
    to_mean: Vec<f32>,
    /// The list that each query's own copy would be in.
    own: Vec<u32>,
}

impl Ranked {
    fn of<'r>(&self, all: &'r [f32], lane: usize) -> &'r [f32] {
        let each = all.len() / self.own.len();
        &all[lane * each..(lane + 1) * each]
    }

    /// Of one query to all centroids.
    pub fn to_centroids(&self, lane: usize) -> &[f32] {
        self.of(&self.to_centroid, lane)
    }

    /// Of one query to all mean rows.
    pub fn to_means(&self, lane: usize) -> &[f32] {
        self.of(&self.to_mean, lane)
    }

    /// The list that the query's own copy would be in.
    pub fn own(&self, lane: usize) -> u32 {
        self.own[lane]
    }
}

impl Index {
    /// Opens an index; files that are read whole are checked against their checksums.
    ///
    /// # Errors
    /// `FileMissing`, `Format`, `Verification`.
    pub fn open(folder: &Path) -> Result<Self> {
        let manifest = IndexManifest::read(folder)?;
        manifest.check_sizes(folder)?;
        manifest.verify(folder, CHECKED)?;
        Self::from_parts(folder, manifest)
    }

    /// Maps and reads the files that a manifest describes.
    pub(crate) fn from_parts(folder: &Path, manifest: IndexManifest) -> Result<Self> {
        let level = Level::current()?;
        let broken = |message: &str| {
            Error::new(ErrorKind::Format, message)
                .file(folder)
                .remedy("build the index again: lmd3 index STORE --force")
        };
        let d64 = manifest.d;
        let d = usize::try_from(d64).map_err(|_| broken("more dimensions than fit"))?;
        let dtype = Dtype::from_name(&manifest.dtype).ok_or_else(|| broken("an unknown element type"))?;
        let tree = Tree::new(
            d,
            read_array(folder, "coarse.npy", d64)?,
            read_array(folder, "centroids.npy", d64)?,
            read_array(folder, "cells.npy", 1)?,
            level,
        )?
        .with_shells(read_array(folder, "shells.npy", 1)?)?;
        let means: Vec<f32> = read_array(folder, "means.npy", d64)?;
        let moments: Vec<f64> = read_array(folder, "moments.npy", MOMENTS as u64)?;
        let count = manifest.lists as usize;
        if tree.len() != count || means.len() != count * d || moments.len() != count * MOMENTS {
            return Err(broken("its files disagree on the number of lists"));
        }
        if !tree.lists().iter().chain(tree.coarse()).chain(&means).all(|x| x.is_finite()) {
            return Err(broken("NaN or infinity in the centroids"));
        }
        let place = |name: &str, present: bool| present.then(|| folder.join(name));
        let files = ShardFiles {
            embeddings: folder.join("rows.npy"),
            scales: place("scales.npy", dtype == Dtype::I8),
            groups: place("groups.npy", manifest.groups > 0),
            weights: place("weights.npy", manifest.weighted),
        };
        let shard = Shard::open(&files, 0)?;
        if (shard.len() as u64, shard.dim(), shard.dtype()) != (manifest.n, d, dtype) {
            return Err(broken("its rows are not those that the manifest describes"));
        }
        let ids = Column::open(&folder.join("ids.npy"), shard.len())?;
        let mut lists = Vec::with_capacity(count);
        let mut next = 0;
        for entry in moments.chunks_exact(MOMENTS) {
            let &[start, n, weight, tr, s4, spread, inner, outer] = entry else {
                unreachable!("chunks of eight")
            };
            let sound = entry.iter().all(|value| value.is_finite() && *value >= 0.0);
            if !sound || start as u64 != next || n.fract() != 0.0 {
                return Err(broken("moments that no list has"));
            }
            next += n as u64;
            // Means are rounded to single precision: their rows lie within these radii up to that.
            let inner = (inner.sqrt() * (1.0 - 1e-6)).max(0.0);
            let outer = outer.sqrt() * (1.0 + 1e-6);
            lists.push(List { start: start as u64, n: n as u64, weight, tr, s4, spread, inner, outer });
        }
        if next != manifest.n {
            return Err(broken("its lists do not hold all rows"));
        }
        let groups = if manifest.group_moments { Some(Self::read_groups(folder, d64, count)?) } else { None };
        let mut centroids = vec![0; count];
        for (centroid, ends) in tree.first().windows(2).enumerate() {
            centroids[ends[0] as usize..ends[1] as usize].fill(centroid as u32);
        }
        let sq_norms = [tree.lists(), &means].map(|rows| {
            let mut norms = vec![0.0; rows.len() / d];
            level.sq_norms(rows, d, &mut norms);
            norms
        });
        let folder = folder.to_path_buf();
        Ok(Self { folder, manifest, tree, means, sq_norms, lists, centroids, shard, ids, groups, level })
    }

    fn read_groups(folder: &Path, d: u64, lists: usize) -> Result<GroupMoments> {
        let pairs: Vec<u32> = read_array(folder, "group_lists.npy", 2)?;
        let means: Vec<f32> = read_array(folder, "group_means.npy", d)?;
        let moments: Vec<f64> = read_array(folder, "group_moments.npy", 3)?;
        let count = pairs.len() / 2;
        let of_list: Vec<u32> = pairs.chunks_exact(2).map(|pair| pair[0]).collect();
        let finite = means.iter().all(|x| x.is_finite()) && moments.iter().all(|x| x.is_finite());
        if means.len() as u64 != count as u64 * d
            || moments.len() != 3 * count
            || !of_list.is_sorted()
            || of_list.last().is_some_and(|&list| list as usize >= lists)
            || !finite
        {
            return Err(Error::new(ErrorKind::Format, "moments of groups that do not fit the lists")
                .file(folder)
                .remedy("build the index again"));
        }
        let first =
            (0..=lists).map(|list| of_list.partition_point(|&of| (of as usize) < list) as u32).collect();
        Ok(GroupMoments {
            first,
            codes: pairs.chunks_exact(2).map(|pair| pair[1]).collect(),
            means,
            moments: moments.chunks_exact(3).map(|entry| [entry[0], entry[1], entry[2]]).collect(),
        })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What `index.json` says.
    pub fn manifest(&self) -> &IndexManifest {
        &self.manifest
    }

    /// Dimensions.
    pub fn d(&self) -> usize {
        self.shard.dim()
    }

    /// Rows.
    pub fn n(&self) -> u64 {
        self.manifest.n
    }

    /// The lists, in the order of their rows.
    pub fn lists(&self) -> &[List] {
        &self.lists
    }

    /// The rows, list after list.
    pub fn view(&self) -> ShardView<'_> {
        self.shard.view()
    }

    /// Number in the store of each row of the copy.
    pub fn ids(&self) -> &[u32] {
        self.ids.values()
    }

    /// Mean rows of the lists, row-major.
    pub fn means(&self) -> &[f32] {
        &self.means
    }

    /// Moments per list and group, where the index has them.
    pub fn groups(&self) -> Option<&GroupMoments> {
        self.groups.as_ref()
    }

    /// Centroid of each list.
    pub fn centroids(&self) -> &[u32] {
        &self.centroids
    }

    /// The routing tree.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Instructions in use.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Queries of one panel.
    pub fn panel_width(&self) -> usize {
        self.level.panel_width(usize::MAX)
    }

    /// Distances of up to `panel_width` queries to all lists. A value does not depend on the other queries.
    pub fn rank(&self, queries: &[f32], sq_norms: &[f64]) -> Ranked {
        let (d, width) = (self.d(), self.panel_width());
        let mut panel = vec![0.0; d * width];
        pack_panel(queries, d, width, &mut panel);
        /// Rows taken together from [row][lane] to [lane][row]: their dot products stay in the first-level cache.
        const FEW: usize = 16;
        /// Rows in front that are fetched.
        const AHEAD: usize = 12;
        let distances = |rows: &[f32], norms: &[f32]| {
            let mut dots = vec![0.0; norms.len() * width];
            self.level.dots(rows, d, d, &panel, AHEAD * 4 * d, &mut dots);
            let mut out = vec![0.0; norms.len() * sq_norms.len()];
            for first in (0..norms.len()).step_by(FEW) {
                let some = first..(first + FEW).min(norms.len());
                for (lane, &query) in sq_norms.iter().enumerate() {
                    let into = &mut out[lane * norms.len()..][some.clone()];
                    for (row, into) in some.clone().zip(into) {
                        let dot = f64::from(dots[row * width + lane]);
                        *into = (f64::from(norms[row]) + query - 2.0 * dot).max(0.0) as f32;
                    }
                }
            }
            out
        };
        let mut own = vec![0; queries.len() / d];
        self.tree.route(queries, &mut own);
        let [centroids, means] = &self.sq_norms;
        Ranked {
            to_centroid: distances(self.tree.lists(), centroids),
            to_mean: distances(&self.means, means),
            own,
        }
    }

    /// The nearest `count` lists of a query that hold rows, its own list first.
    pub fn nearest_lists(&self, ranked: &Ranked, lane: usize, count: usize, out: &mut Vec<u32>) {
        let (distances, own) = (ranked.to_centroids(lane), ranked.own(lane));
        let key = |list: u32| {
            let distance = distances[self.centroids[list as usize] as usize];
            // Own list first, lists without rows last.
            let class = if self.lists[list as usize].n == 0 { 2_u8 } else { u8::from(list != own) };
            (class, distance.to_bits(), list)
        };
        out.clear();
        out.extend(0..self.lists.len() as u32);
        let count = count.min(out.len());
        if count < out.len() {
            out.select_nth_unstable_by_key(count, |&list| key(list));
            out.truncate(count);
        }
        out.sort_unstable_by_key(|&list| key(list));
        while out.last().is_some_and(|&list| self.lists[list as usize].n == 0) {
            out.pop();
        }
    }
}
