//! Mapped files. The only place of the crate where files are mapped, and where a file that is cut short under its map is
//! told from a defect.

use std::fs::File;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::{Error, ErrorKind, Result};

/// A file mapped for reading.
#[derive(Debug)]
pub struct Mapped {
    path: PathBuf,
    map: Mmap,
    /// The slot that names the file to the handler of SIGBUS.
    #[cfg(unix)]
    slot: Option<usize>,
    /// What the handler writes: kept here, since it must not allocate.
    #[cfg(unix)]
    _words: Box<truncation::Words>,
}

impl Mapped {
    /// Maps an open file.
    ///
    /// # Errors
    /// `Format` where the system refuses.
    pub fn new(path: &Path, file: &File) -> Result<Self> {
        // SAFETY: the map is read-only and private to this struct, and all access goes through byte slices, for
        // which any content is valid. Another process that truncates the file under the map makes reads fail with
        // SIGBUS; that ends the process, it can't corrupt memory. Sizes are checked again by `Shard::check_size`.
        let map = unsafe { Mmap::map(file) }.map_err(|source| Error::io(path, ErrorKind::Format, &source))?;
        #[cfg(unix)]
        let words = Box::new(truncation::Words::new(path));
        Ok(Self {
            path: path.to_path_buf(),
            #[cfg(unix)]
            slot: truncation::enter(map.as_ptr() as usize, map.len(), &words),
            #[cfg(unix)]
            _words: words,
            map,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

#[cfg(unix)]
impl Drop for Mapped {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            truncation::leave(slot);
        }
    }
}

#[cfg(unix)]
pub use truncation::end_by_name;

#[cfg(unix)]
mod truncation {
    use std::path::Path;
    use std::ptr::null_mut;
    use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

    /// What is said of a file: a line, and the same as JSON.
    #[derive(Debug)]
    pub struct Words {
        line: String,
        json: String,
    }

    impl Words {
        pub fn new(path: &Path) -> Self {
            let file = path.display().to_string();
            let (message, remedy) =
                ("it was cut short while it was read", "restore the file, then run again");
            let error = serde_json::json!({"error": {
                "kind": "WorkError", "message": message, "file": file, "row": null, "remedy": remedy,
            }});
            Self { line: format!("lmd3: {file}: {message} ({remedy})\n"), json: format!("{error}\n") }
        }
    }

    /// A mapped range. Its words belong to the `Mapped` that entered it, which outlives all reads of the range.
    struct Slot {
        start: AtomicUsize,
        length: AtomicUsize,
        words: AtomicPtr<Words>,
    }

    /// More files than that are mapped without a name; a store of 10⁹ rows has a thousand shards.
    const SLOTS: usize = 4096;

    static TABLE: [Slot; SLOTS] = [const {
        Slot { start: AtomicUsize::new(0), length: AtomicUsize::new(0), words: AtomicPtr::new(null_mut()) }
    }; SLOTS];
    static JSON: AtomicBool = AtomicBool::new(false);

    pub fn enter(start: usize, length: usize, words: &Words) -> Option<usize> {
        let words = std::ptr::from_ref(words).cast_mut();
        let free = |slot: &Slot| {
            slot.words.compare_exchange(null_mut(), words, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        let slot = TABLE.iter().position(free)?;
        TABLE[slot].length.store(length, Ordering::Release);
        TABLE[slot].start.store(start, Ordering::Release);
        Some(slot)
    }

    pub fn leave(slot: usize) {
        TABLE[slot].length.store(0, Ordering::Release);
        TABLE[slot].start.store(0, Ordering::Release);
        TABLE[slot].words.store(null_mut(), Ordering::Release);
    }

    /// Makes a read beyond the end of a file that was cut short under its map end the process with status 1 and the file's
    /// name, on stderr or, as JSON, on stdout. For the command line: a library must not take a process's signals.
    pub fn end_by_name(json: bool) {
        JSON.store(json, Ordering::Relaxed);
        // SAFETY: the structure is valid when zeroed (no flags, an empty mask), and the handler is a function of the
        // signature that SA_SIGINFO asks for, which lives as long as the program.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGBUS, &raw const action, null_mut());
        }
    }

    /// Only what may be called in a signal's handler: atomics, `write`, `_exit`, `signal`.
    extern "C" fn handler(signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
        // SAFETY: the system passes a valid structure to a handler with SA_SIGINFO.
        let address = unsafe { (*info).si_addr() } as usize;
        for slot in &TABLE {
            let start = slot.start.load(Ordering::Acquire);
            if start == 0 || !(start..start + slot.length.load(Ordering::Acquire)).contains(&address) {
                continue;
            }
            let words = slot.words.load(Ordering::Acquire);
            // SAFETY: the address lies in the slot's range, so the range is being read, and its `Mapped` is alive; its
            // words are dropped after the slot was left.
            if let Some(words) = unsafe { words.as_ref() } {
                let (stream, text) =
                    if JSON.load(Ordering::Relaxed) { (1, &words.json) } else { (2, &words.line) };
                // SAFETY: a valid range of bytes; and `_exit` may be called at any time.
                unsafe {
                    libc::write(stream, text.as_ptr().cast(), text.len());
                    libc::_exit(1);
                }
            }
        }
        // No map of ours: the signal does what it does without this handler, as soon as the read is tried again.
        // SAFETY: allowed in a handler.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
        }
    }
}
