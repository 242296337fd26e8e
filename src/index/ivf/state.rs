//! What a build is asked for, what it is at, and the state by which it goes on after it was killed.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::index::format::write_atomic;
use crate::index::gather::read_row;
use crate::rows::{Dtype, ShardView};
use crate::simd::Level;

/// Rows between two checkpoints of the assignment and of the spreading.
pub(super) const STEP: u64 = 1 << 18;

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
    pub(super) fn at(&self, stage: u64, rows: u64) -> Result<()> {
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
pub(super) struct Plan {
    pub version: u32,
    pub store: String,
    pub n: u64,
    pub d: usize,
    pub lists: usize,
    pub dtype: String,
    pub seed: u64,
    pub groups: usize,
    pub weighted: bool,
    pub level: String,
    pub buckets: u64,
}

/// How far it got.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct State {
    pub plan: Option<Plan>,
    /// Trees trained or split so far.
    pub trees: usize,
    /// Whether the assignment by the last tree is final.
    pub assigned: bool,
    /// Rows spread.
    pub spread: u64,
    /// Buckets, lists and rows gathered; pairs of list and group.
    pub buckets: usize,
    pub lists: usize,
    pub rows: u64,
    pub pairs: u64,
    pub sq_norm: f64,
    pub weight: f64,
    pub rounding: f64,
}

/// A build under way.
pub(super) struct Build<'a> {
    pub views: &'a [ShardView<'a>],
    pub starts: Vec<u64>,
    pub n: u64,
    pub d: usize,
    pub options: &'a BuildOptions,
    pub folder: PathBuf,
    pub state: State,
    pub level: Level,
    pub progress: &'a Progress,
}

/// The folder of an unfinished build.
pub fn partial_folder(folder: &Path) -> PathBuf {
    let mut name = folder.file_name().unwrap_or_default().to_os_string();
    name.push(".partial");
    folder.with_file_name(name)
}

impl Build<'_> {
    pub fn save(&self) -> Result<()> {
        let text = serde_json::to_vec(&self.state).expect("numbers and strings");
        write_atomic(&self.folder.join("state.json"), &text)
    }

    /// Rows of the store in single precision, checked to be finite.
    pub fn read(&self, rows: impl ExactSizeIterator<Item = u64>) -> Result<Vec<f32>> {
        read_rows(self.views, &self.starts, self.d, rows)
    }
}

/// Rows in single precision, checked to be finite.
pub(super) fn read_rows(
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
