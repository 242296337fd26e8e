//! The one error type of the crate: what went wrong, in which file and row, and what the user can do about it.

use std::fmt;
use std::path::{Path, PathBuf};

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

/// The cause of an error. Each kind is one exception class of `lmd3.errors` (`ErrorKind::Shape` is `ShapeError`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// A file or folder that should be there is not.
    FileMissing,
    /// Bytes that are not what the file's name or header promises: junk, truncated, another version.
    Format,
    /// A matrix of the wrong shape, or an empty one.
    Shape,
    /// An element type that is not supported where it was given.
    Dtype,
    /// NaN or infinity in data that must be finite.
    NotFinite,
    /// A parameter outside its range.
    Parameter,
    /// An output that exists or can't be written.
    Output,
    /// A stored checksum or fact does not hold any more.
    Verification,
    /// The user stopped the run.
    Interrupted,
    /// A defect of this program, caught before it could reach the caller as a panic.
    Internal,
}

/// An error with its cause, its place and its remedy.
#[derive(Clone, Debug)]
pub struct Error {
    /// The cause.
    pub kind: ErrorKind,
    /// What went wrong, one sentence.
    pub message: String,
    /// The file concerned.
    pub file: Option<PathBuf>,
    /// The row concerned, counted from 0 in that file.
    pub row: Option<u64>,
    /// What the user can do.
    pub remedy: Option<String>,
}

impl Error {
    /// An error of a kind with its message; place and remedy are added by the other methods.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), file: None, row: None, remedy: None }
    }

    /// Names the file.
    #[must_use]
    pub fn file(mut self, file: impl AsRef<Path>) -> Self {
        self.file = Some(file.as_ref().to_path_buf());
        self
    }

    /// Names the row, counted from 0 in the file.
    #[must_use]
    pub fn row(mut self, row: u64) -> Self {
        self.row = Some(row);
        self
    }

    /// Says what the user can do.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    /// An operating-system error on a file: `FileMissing` where it does not exist, else `Format` or `Output` as given.
    pub fn io(file: impl AsRef<Path>, kind: ErrorKind, source: &std::io::Error) -> Self {
        let kind = if source.kind() == std::io::ErrorKind::NotFound { ErrorKind::FileMissing } else { kind };
        Self::new(kind, source.to_string()).file(file)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{}: ", file.display())?;
        }
        if let Some(row) = self.row {
            write!(f, "row {row}: ")?;
        }
        f.write_str(&self.message)?;
        if let Some(remedy) = &self.remedy {
            write!(f, " ({remedy})")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}
