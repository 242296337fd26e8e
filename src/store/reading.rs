//! Rows read from their file piece by piece, where a map is not wanted: on file systems whose maps are slow, or to keep the
//! process's own memory apart from the page cache.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};

/// An open file that is read at places of one's choice.
#[derive(Debug, Default)]
pub struct Reader {
    open: Option<(PathBuf, File)>,
}

impl Reader {
    /// Reads `len` bytes from `offset` on, and lets the system fetch the bytes `ahead` meanwhile.
    ///
    /// # Errors
    /// `FileMissing`, or `Format` with the file where it can't be read or was cut short.
    pub fn read(
        &mut self,
        path: &Path,
        offset: u64,
        len: usize,
        ahead: std::ops::Range<u64>,
        into: &mut Vec<u8>,
    ) -> Result<()> {
        let io = |source| Error::io(path, ErrorKind::Format, &source);
        if self.open.as_ref().is_none_or(|(open, _)| open != path) {
            self.open = Some((path.to_path_buf(), File::open(path).map_err(io)?));
        }
        let Some((_, file)) = &mut self.open else {
            return Err(Error::new(ErrorKind::Internal, "no file is open"));
        };
        fetch(file, ahead);
        into.resize(len, 0);
        file.seek(SeekFrom::Start(offset)).map_err(io)?;
        file.read_exact(into).map_err(|source| match source.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                Error::new(ErrorKind::Format, "it was cut short while it was read")
                    .file(path)
                    .remedy("restore the file, then run again")
            }
            _ => io(source),
        })
    }
}

/// Asks the system to have bytes of a file in memory soon.
fn fetch(file: &File, range: std::ops::Range<u64>) {
    #[cfg(target_os = "linux")]
    if let (Ok(start), Ok(len)) =
        (i64::try_from(range.start), i64::try_from(range.end.saturating_sub(range.start)))
        && len > 0
    {
        use std::os::fd::AsRawFd;
        // SAFETY: the descriptor is open; advice changes no memory of this process, and its failure is of no matter.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), start, len, libc::POSIX_FADV_WILLNEED) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (file, range);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_is_there_and_names_a_file_cut_short() {
        let folder = tempfile::tempdir().unwrap();
        let (one, two) = (folder.path().join("one"), folder.path().join("two"));
        std::fs::write(&one, (0..100).collect::<Vec<u8>>()).unwrap();
        std::fs::write(&two, [7; 10]).unwrap();
        let (mut reader, mut bytes) = (Reader::default(), Vec::new());
        for (offset, len) in [(0, 100), (40, 3), (99, 1), (0, 0)] {
            reader.read(&one, offset, len, 0..1 << 40, &mut bytes).unwrap();
            assert_eq!(bytes, (offset as u8..offset as u8 + len as u8).collect::<Vec<u8>>());
        }
        reader.read(&two, 1, 9, 0..0, &mut bytes).unwrap();
        assert_eq!(bytes, [7; 9]);
        let error = reader.read(&two, 5, 6, 0..0, &mut bytes).unwrap_err();
        assert_eq!((error.kind, error.file.as_deref()), (ErrorKind::Format, Some(&*two)));
        let missing = reader.read(&folder.path().join("none"), 0, 1, 0..0, &mut bytes).unwrap_err();
        assert_eq!(missing.kind, ErrorKind::FileMissing);
    }
}
