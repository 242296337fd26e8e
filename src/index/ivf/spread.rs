//! Spreading: rows into files of buckets, each of which holds the lists next to each other and fits into memory.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use super::record::Converted;
use super::state::{Build, STEP};
use crate::error::{Error, ErrorKind, Result};

impl Build<'_> {
    /// Cuts the lists into buckets of about equal size: first list of each, and the number of lists at the end.
    pub fn cut(&self, counts: &[u64]) -> Vec<usize> {
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

    pub fn spread(&mut self, of_row: &[u32], counts: &[u64], ends: &[usize]) -> Result<()> {
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
}
