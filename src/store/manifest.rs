//! `manifest.json` of a store: what the core reads of it, parsed and checked, without touching any other file.

use serde::Deserialize;

use crate::error::{Error, ErrorKind, Result};
use crate::rows::Dtype;

/// The value of the manifest's `format`.
pub const FORMAT: &str = "lmd3-store";

/// The version of the format that this crate reads and writes.
pub const VERSION: u64 = 1;

/// One file of a shard, with the facts that were true when it was written.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct FileEntry {
    /// Name inside the store's folder.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
    /// xxh3-64 of the whole file, 16 hexadecimal digits.
    pub xxh3: String,
}

/// One shard: its rows and its files.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ShardEntry {
    /// Rows of the shard.
    pub rows: u64,
    /// `embeddings-00000.npy`, or `.safetensors` for bfloat16.
    pub embeddings: FileEntry,
    /// `scales-00000.npy`: float32, one per row (int8 only).
    #[serde(default)]
    pub scales: Option<FileEntry>,
    /// `groups-00000.npy`: uint32, one per row.
    #[serde(default)]
    pub groups: Option<FileEntry>,
    /// `weights-00000.npy`: float32, one per row.
    #[serde(default)]
    pub weights: Option<FileEntry>,
    /// `documents-00000.parquet`; the core checks its bytes and never reads it.
    #[serde(default)]
    pub documents: Option<FileEntry>,
}

impl ShardEntry {
    /// All files of the shard.
    pub fn files(&self) -> impl Iterator<Item = &FileEntry> {
        let optional = [&self.scales, &self.groups, &self.weights, &self.documents];
        std::iter::once(&self.embeddings).chain(optional.into_iter().flatten())
    }
}

/// A named group of rows; its code is its position in the manifest.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct GroupEntry {
    /// The group's name.
    pub name: String,
    /// Its rows.
    pub rows: u64,
}

/// The part of the manifest that the core needs. Fields that it does not know are left to others.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Manifest {
    /// Dimensions.
    pub d: u64,
    /// Rows of all shards.
    pub rows: u64,
    /// Element type, as `Dtype::name` gives it.
    pub dtype: String,
    /// Whether every row has norm 1 (within the element type's rounding).
    pub normalised: bool,
    /// The groups; empty where none were recorded.
    #[serde(default)]
    pub groups: Vec<GroupEntry>,
    /// The shards in row order.
    pub shards: Vec<ShardEntry>,
}

#[derive(Deserialize)]
struct Preamble {
    format: Option<String>,
    version: Option<u64>,
}

fn bad(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Format, message)
}

impl Manifest {
    /// Parses the text of a manifest and checks all that can be checked without the other files.
    ///
    /// # Errors
    /// `Format` for junk, another version or facts that contradict each other; `Dtype` for an unknown element type;
    /// `Shape` for a store without rows or dimensions.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let preamble: Preamble = serde_json::from_slice(text)
            .map_err(|source| bad(format!("not a store's manifest: {source}")))?;
        if preamble.format.as_deref() != Some(FORMAT) {
            return Err(bad(format!("not a store's manifest: its format is not \"{FORMAT}\"")));
        }
        match preamble.version {
            Some(VERSION) => {}
            Some(version) => {
                let message = format!("store format version {version}; this lmd3 reads version {VERSION}");
                return Err(bad(message).remedy("use the version of lmd3 that wrote it, or encode again"));
            }
            None => return Err(bad("the manifest names no version")),
        }
        let manifest: Self =
            serde_json::from_slice(text).map_err(|source| bad(format!("damaged manifest: {source}")))?;
        manifest.check()?;
        Ok(manifest)
    }

    /// The element type.
    ///
    /// # Errors
    /// `Dtype` where stores do not hold it.
    pub fn dtype(&self) -> Result<Dtype> {
        Dtype::from_name(&self.dtype)
            .filter(|dtype| matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16 | Dtype::I8))
            .ok_or_else(|| {
                Error::new(ErrorKind::Dtype, format!("elements of type {:?} are not known", self.dtype))
            })
    }

    fn check(&self) -> Result<()> {
        let dtype = self.dtype()?;
        if self.d == 0 || self.rows == 0 || self.shards.is_empty() {
            return Err(Error::new(ErrorKind::Shape, "the store is empty"));
        }
        let mut rows = 0_u64;
        let mut names = std::collections::HashSet::new();
        for shard in &self.shards {
            if shard.rows == 0 {
                return Err(bad(format!("shard {:?} has no rows", shard.embeddings.name)));
            }
            rows = rows.checked_add(shard.rows).ok_or_else(|| bad("more rows than can be counted"))?;
            if shard.scales.is_some() != (dtype == Dtype::I8) {
                return Err(bad(format!("scales belong to int8 shards, and this one is {}", self.dtype)));
            }
            if shard.groups.is_some() && self.groups.is_empty() {
                return Err(bad("group codes without a table of groups"));
            }
            if shard.groups.is_none() && self.groups.len() > 1 {
                return Err(bad(format!("shard {:?} lacks its group codes", shard.embeddings.name)));
            }
            for file in shard.files() {
                // A manifest may come from anyone: it must not lead out of its folder.
                let plain = !file.name.is_empty()
                    && !file.name.starts_with('.')
                    && !file.name.contains(['/', '\\', '\0', ':']);
                if !plain {
                    return Err(bad(format!("{:?} is not a plain file name", file.name)));
                }
                if !names.insert(file.name.as_str()) {
                    return Err(bad(format!("the file {:?} is listed twice", file.name)));
                }
            }
        }
        if rows != self.rows {
            return Err(bad(format!("the shards have {rows} rows, not {}", self.rows)));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn example() -> Value {
        let file = |name: &str| json!({"name": name, "bytes": 128, "xxh3": "0123456789abcdef"});
        json!({
            "format": FORMAT, "version": VERSION, "d": 4, "rows": 5, "dtype": "float16", "normalised": true,
            "groups": [{"name": "a", "rows": 2}, {"name": "b", "rows": 3}], "unknown": [1, 2],
            "shards": [
                {"rows": 3, "embeddings": file("embeddings-00000.npy"), "groups": file("groups-00000.npy")},
                {"rows": 2, "embeddings": file("embeddings-00001.npy"), "groups": file("groups-00001.npy")},
            ],
        })
    }

    fn parse(value: &Value) -> Result<Manifest> {
        Manifest::parse(value.to_string().as_bytes())
    }

    #[test]
    fn reads_a_manifest() {
        let manifest = parse(&example()).unwrap();
        assert_eq!((manifest.d, manifest.rows, manifest.dtype().unwrap()), (4, 5, Dtype::F16));
        assert_eq!(manifest.shards[1].files().count(), 2);
    }

    #[test]
    fn refuses_what_contradicts_itself() {
        type Change = fn(&mut Value);
        let changes: [(Change, ErrorKind, &str); 12] = [
            (|m| m["format"] = json!("other"), ErrorKind::Format, "format"),
            (|m| m["version"] = json!(2), ErrorKind::Format, "version 2"),
            (|m| m["version"] = json!(null), ErrorKind::Format, "no version"),
            (|m| m["dtype"] = json!("float64"), ErrorKind::Dtype, "float64"),
            (|m| m["rows"] = json!(6), ErrorKind::Format, "5 rows, not 6"),
            (|m| m["d"] = json!(0), ErrorKind::Shape, "empty"),
            (|m| m["d"] = json!(-1), ErrorKind::Format, "damaged"),
            (|m| m["shards"] = json!([]), ErrorKind::Shape, "empty"),
            (
                |m| m["shards"][0]["embeddings"]["name"] = json!("../x.npy"),
                ErrorKind::Format,
                "plain file name",
            ),
            (|m| m["shards"][0]["groups"] = json!(null), ErrorKind::Format, "lacks its group codes"),
            (|m| m["dtype"] = json!("int8"), ErrorKind::Format, "scales"),
            (
                |m| m["shards"][1]["embeddings"]["name"] = json!("embeddings-00000.npy"),
                ErrorKind::Format,
                "listed twice",
            ),
        ];
        for (change, kind, word) in changes {
            let mut manifest = example();
            change(&mut manifest);
            let error = parse(&manifest).unwrap_err();
            assert_eq!(error.kind, kind, "{error}");
            assert!(error.message.contains(word), "{error} does not say {word:?}");
        }
        let mut manifest = example();
        manifest["shards"][0]["rows"] = json!(u64::MAX);
        assert_eq!(parse(&manifest).unwrap_err().kind, ErrorKind::Format);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(at in 0..500_usize, byte in any::<u8>(), cut in 0..500_usize) {
            let mut text = example().to_string().into_bytes();
            let end = text.len();
            text[at % end] = byte;
            let _ = Manifest::parse(&text);
            let _ = Manifest::parse(&text[..cut % end]);
        }
    }
}
