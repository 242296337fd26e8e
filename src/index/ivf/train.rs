//! Training: the tree that routes rows to centroids, from a sample of them, and its files.

use std::path::Path;

use super::state::Build;
use crate::error::Result;
use crate::index::format::{read_array, write_array};
use crate::index::kmeans::Tree;
use crate::index::random::Rng;
use crate::simd::Level;

/// Sampled rows per list, at most `SAMPLE_BYTES` of them.
const ROWS_PER_LIST: usize = 40;
const SAMPLE_BYTES: usize = 384 << 20;

/// The tree of an unfinished build, without shells.
pub(super) fn read_tree(folder: &Path, d: usize, level: Level) -> Result<Tree> {
    let read = |name| read_array(folder, name, d as u64);
    Tree::new(d, read("coarse.npy")?, read("centroids.npy")?, read_array(folder, "cells.npy", 1)?, level)
}

impl Build<'_> {
    pub fn train(&self) -> Result<Tree> {
        let lists = self.state.plan.as_ref().map_or(1, |plan| plan.lists);
        let most = (SAMPLE_BYTES.min(self.options.memory / 4) / (4 * self.d)).max(lists);
        let count = (ROWS_PER_LIST * lists).min(most).min(self.n as usize);
        let mut rows = Rng::new(&[self.options.seed, 10]).distinct(self.n, count);
        rows.sort_unstable();
        let sample = self.read(rows.into_iter())?;
        Tree::train(&sample, self.d, lists, self.options.seed, self.level)
    }

    pub fn keep_tree(&mut self, tree: &Tree) -> Result<()> {
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

    pub fn tree(&self) -> Result<Tree> {
        read_tree(&self.folder, self.d, self.level)
    }
}
