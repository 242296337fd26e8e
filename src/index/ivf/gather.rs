//! Gathering: bucket after bucket, the rows of each list side by side in random order, with its moments.

use std::fs::File;
use std::io::Read;

use rayon::prelude::*;

use super::moments::Facts;
use super::record::RECORD;
use super::state::Build;
use crate::error::{Error, ErrorKind, Result};
use crate::index::format::{ArrayFile, MOMENTS};
use crate::index::random::mix;
use crate::rows::Dtype;
use crate::store::npy;

/// Most groups with moments of their own, and the bytes that their means may take.
pub(super) const MOST_GROUPS: usize = 64;
pub(super) const GROUP_BYTES: usize = 512 << 20;

/// A list, its first row, and its members as (list, random key, record).
type Span<'a> = (usize, u64, &'a [(u32, u64, u32)]);

impl Build<'_> {
    pub fn gather_buckets(&mut self, counts: &[u64], ends: &[usize]) -> Result<()> {
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
}
