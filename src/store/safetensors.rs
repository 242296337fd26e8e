//! The header of safetensors files that hold one matrix: bfloat16 shards are stored so, since NumPy has no such type.
//!
//! Eight bytes with the header's length, a JSON object {name: {dtype, shape, data_offsets}}, then the elements.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::npy::Header;
use crate::error::{Error, ErrorKind, Result};
use crate::rows::Dtype;

/// Longest header that is read; files of one matrix need a hundred bytes, and some carry metadata.
pub const MAX_HEADER: usize = 1 << 20;

/// The name of the matrix in files that are written.
const NAME: &str = "embeddings";

/// Room of a written header: its length does not depend on the shape, so that it can be written again in place.
const ROOM: usize = 256;

#[derive(Deserialize)]
struct Tensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

fn junk(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Format, message)
}

/// The length of the header from the first eight bytes.
///
/// # Errors
/// `Format` where it is not plausible.
pub fn header_length(bytes: [u8; 8]) -> Result<usize> {
    usize::try_from(u64::from_le_bytes(bytes))
        .ok()
        .filter(|length| (2..=MAX_HEADER).contains(length))
        .ok_or_else(|| junk("not a safetensors file: it does not begin with the length of a header"))
}

/// Parses the beginning of a file: eight bytes and the header.
///
/// # Errors
/// `Format` where the bytes are not a header, end within it, or describe something else than one tensor.
pub fn parse(bytes: &[u8]) -> Result<Header> {
    let truncated = || junk("truncated inside the safetensors header");
    let length = header_length(*bytes.first_chunk::<8>().ok_or_else(truncated)?)?;
    let text = bytes.get(8..8 + length).ok_or_else(truncated)?;
    let mut entries: Map<String, Value> = serde_json::from_slice(text)
        .map_err(|source| junk(format!("a damaged safetensors header: {source}")))?;
    entries.remove("__metadata__");
    let mut tensors = entries.into_iter();
    let (Some((name, tensor)), None) = (tensors.next(), tensors.next()) else {
        return Err(junk("a safetensors file with more or less than one tensor")
            .remedy("save the matrix of embeddings in a file of its own"));
    };
    let tensor: Tensor = serde_json::from_value(tensor)
        .map_err(|source| junk(format!("a damaged safetensors header: tensor {name:?}: {source}")))?;
    let size = match tensor.dtype.as_str() {
        "F32" => Some(4),
        "F16" | "BF16" => Some(2),
        _ => None,
    };
    let bytes = size.and_then(|size| tensor.shape.iter().try_fold(size, |all: u64, &n| all.checked_mul(n)));
    if size.is_some() && (tensor.data_offsets[0] != 0 || bytes != Some(tensor.data_offsets[1])) {
        return Err(junk(format!("tensor {name:?}: its place in the file does not fit its shape")));
    }
    Ok(Header { descr: Some(tensor.dtype), fortran_order: false, shape: tensor.shape, offset: 8 + length })
}

/// The element type of a name in a header, where it is one that stores hold.
///
/// # Errors
/// `Dtype`.
pub fn dtype(descr: Option<&str>) -> Result<Dtype> {
    match descr {
        Some("F32") => Ok(Dtype::F32),
        Some("F16") => Ok(Dtype::F16),
        Some("BF16") => Ok(Dtype::Bf16),
        other => {
            let message = format!("elements of type {} are not embeddings", other.unwrap_or("unknown"));
            Err(Error::new(ErrorKind::Dtype, message).remedy("save them as float32, float16 or bfloat16"))
        }
    }
}

/// The beginning of a file of one bfloat16 matrix; the elements begin at a multiple of 64.
pub fn format(rows: u64, d: u64) -> Vec<u8> {
    // Saturating: such a matrix can't be written, and no header may panic.
    let bytes = rows.saturating_mul(d).saturating_mul(2);
    let text =
        format!("{{\"{NAME}\":{{\"dtype\":\"BF16\",\"shape\":[{rows},{d}],\"data_offsets\":[0,{bytes}]}}}}");
    let mut header = ((ROOM - 8) as u64).to_le_bytes().to_vec();
    header.extend_from_slice(text.as_bytes());
    header.resize(ROOM, b' ');
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn with_text(text: &str) -> Vec<u8> {
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(text.as_bytes());
        bytes
    }

    #[test]
    fn reads_what_others_write() {
        let text =
            r#"{"__metadata__":{"format":"pt"},"x":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]}}  "#;
        let header = parse(&with_text(text)).unwrap();
        assert_eq!((header.shape, header.offset), (vec![2, 3], 8 + text.len()));
        assert_eq!(dtype(header.descr.as_deref()).unwrap(), Dtype::F16);
        let text = r#"{"x":{"dtype":"I64","shape":[2,3],"data_offsets":[0,48]}}"#;
        let header = parse(&with_text(text)).unwrap();
        assert_eq!(dtype(header.descr.as_deref()).unwrap_err().kind, ErrorKind::Dtype);
    }

    #[test]
    fn refuses_junk() {
        for text in [
            "[]",
            "{}",
            "{} x",
            r#"{"__metadata__":{}}"#,
            r#"{"x":{"dtype":"F16","shape":[2,3]}}"#,
            r#"{"x":{"dtype":"F16","shape":[2,-3],"data_offsets":[0,12]}}"#,
            r#"{"x":{"dtype":"F16","shape":[2,3],"data_offsets":[0,13]}}"#,
            r#"{"x":{"dtype":"F16","shape":[2,3],"data_offsets":[4,16]}}"#,
            r#"{"x":{"dtype":"F16","shape":[9223372036854775808,3],"data_offsets":[0,12]}}"#,
            r#"{"x":{"dtype":"F16","shape":[1],"data_offsets":[0,2]},"y":{"dtype":"F16","shape":[1],"data_offsets":[2,4]}}"#,
        ] {
            assert_eq!(parse(&with_text(text)).unwrap_err().kind, ErrorKind::Format, "{text}");
        }
        let whole = format(2, 3);
        for end in 0..whole.len() {
            assert!(parse(&whole[..end]).is_err(), "cut at {end}");
        }
        assert!(header_length([0xff; 8]).is_err());
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(rows in 0..1_u64 << 40, d in 0..1_u64 << 20) {
            let bytes = format(rows, d);
            prop_assert_eq!(bytes.len(), ROOM);
            let header = parse(&bytes).unwrap();
            prop_assert_eq!(dtype(header.descr.as_deref()).unwrap(), Dtype::Bf16);
            prop_assert_eq!((header.shape, header.offset), (vec![rows, d], ROOM));
        }

        #[test]
        fn no_bytes_make_it_panic(at in 0..ROOM, byte in any::<u8>(), cut in 0..ROOM, rows in any::<u64>(), d in any::<u64>()) {
            let mut bytes = format(rows, d);
            bytes[at] = byte;
            let _ = parse(&bytes);
            let _ = parse(&bytes[..cut]);
        }
    }
}
