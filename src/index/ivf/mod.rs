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

mod assign;
mod gather;
mod measure;
mod moments;
mod record;
mod spread;
mod state;
mod train;

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::Index;
use super::format::{FileFacts, IndexManifest, MANIFEST, RANKS, VERSION, write_atomic};
use super::gather::view_starts;
use super::kmeans::Tree;
use super::random::Rng;
use crate::error::{Error, ErrorKind, Result};
use crate::rows::{Dtype, ShardView};
use crate::simd::Level;
use crate::store::checksum;
use assign::{REASSIGNMENTS, ROUTE};
use gather::{GROUP_BYTES, MOST_GROUPS};
use measure::{kappa, probes};
use record::RECORD;
use state::{Build, Plan, State};

pub use assign::route;
pub use state::{BuildOptions, Progress, partial_folder};

/// Most buckets.
const MOST_BUCKETS: u64 = 256;

/// Rows tried as queries for kappa and recall.
const TRIALS: usize = 64;

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
