//! The header of `.fbin .f16bin .u8bin .i8bin` files (BIGANN's format): two uint32, rows and dimensions, then the
//! elements by rows.

use super::npy::Header;
use crate::error::{Error, ErrorKind, Result};
use crate::rows::Dtype;

/// Length of the header.
pub const HEADER: usize = 8;

/// The element type that a file's name says; none for other names.
pub fn dtype(extension: &str) -> Option<Dtype> {
    match extension {
        "fbin" => Some(Dtype::F32),
        "f16bin" => Some(Dtype::F16),
        "u8bin" => Some(Dtype::U8),
        "i8bin" => Some(Dtype::I8),
        _ => None,
    }
}

/// Parses the first bytes of a file.
///
/// # Errors
/// `Format` where there are fewer than eight.
pub fn parse(bytes: &[u8]) -> Result<Header> {
    let Some(&[a, b, c, d, e, f, g, h]) = bytes.first_chunk::<HEADER>() else {
        return Err(Error::new(ErrorKind::Format, "truncated inside its header of rows and dimensions"));
    };
    let shape =
        vec![u64::from(u32::from_le_bytes([a, b, c, d])), u64::from(u32::from_le_bytes([e, f, g, h]))];
    Ok(Header { descr: None, fortran_order: false, shape, offset: HEADER })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_rows_and_dimensions() {
        assert_eq!(parse(&[3, 0, 0, 0, 2, 1, 0, 0, 9]).unwrap().shape, [3, 258]);
        assert_eq!(parse(&[3, 0, 0, 0, 2, 1, 0]).unwrap_err().kind, ErrorKind::Format);
        assert_eq!(dtype("u8bin"), Some(Dtype::U8));
        assert_eq!(dtype("bin"), None);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..20)) {
            prop_assert_eq!(parse(&bytes).is_ok(), bytes.len() >= HEADER);
        }
    }
}
