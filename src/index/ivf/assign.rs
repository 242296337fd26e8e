//! Assignment: the centroid of every row in `lists.bin`, the splitting of centroids with far too many rows, and the lists in shells
//! around each.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;

use super::state::{Build, STEP, read_rows};
use super::train::read_tree;
use crate::error::{Error, ErrorKind, Result};
use crate::index::format::write_array;
use crate::index::gather::view_starts;
use crate::index::kmeans::{Tree, shells};
use crate::index::on_threads;
use crate::index::random::mix;
use crate::rows::ShardView;
use crate::simd::Level;

/// A list above this multiple of the mean size is split, in at most so many further assignments.
const LARGEST: f64 = 3.0;
pub(super) const REASSIGNMENTS: usize = 2;

/// Bytes of an entry of `lists.bin`: centroid and distance.
pub(super) const ROUTE: usize = 8;

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
    on_threads(threads, || {
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

impl Build<'_> {
    /// Appends the centroid of every row and its distance to it to `lists.bin`.
    pub fn assign(&self, tree: &Tree) -> Result<()> {
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
    pub fn shells(&self) -> Result<(Tree, Vec<u32>)> {
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
        let outer: Vec<Vec<f32>> = parts.into_par_iter().map(shells).collect();
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
    pub fn split(&self, tree: &Tree) -> Result<Option<Tree>> {
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
}
