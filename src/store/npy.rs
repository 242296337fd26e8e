//! The header of `.npy` files (NumPy's format description, versions 1 to 3): parsed from bytes, written to bytes.

use crate::error::{Error, ErrorKind, Result};
use crate::rows::Dtype;

/// The first bytes of every `.npy` file.
pub const MAGIC: &[u8; 6] = b"\x93NUMPY";

/// Longest header that is read. NumPy itself refuses headers above 10,000 characters by default.
pub const MAX_HEADER: usize = 64 << 10;

/// What the header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// NumPy's name of the element type, such as `<f4`; `None` for structured types.
    pub descr: Option<String>,
    /// Whether columns are contiguous instead of rows.
    pub fortran_order: bool,
    /// The array's shape.
    pub shape: Vec<u64>,
    /// Where the elements begin, in bytes from the file's start.
    pub offset: usize,
}

fn junk(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Format, message)
}

/// Parses a header from the first bytes of a file (`MAX_HEADER` + 12 bytes suffice).
///
/// # Errors
/// `Format` where the bytes are not a header or end within it.
pub fn parse(bytes: &[u8]) -> Result<Header> {
    if bytes.len() < 10 || &bytes[..6] != MAGIC {
        return Err(junk("not a .npy file: it does not begin with NumPy's magic bytes"));
    }
    let (start, length) = match bytes[6] {
        1 => (10, usize::from(u16::from_le_bytes([bytes[8], bytes[9]]))),
        2 | 3 if bytes.len() >= 12 => {
            let length = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
            (12, usize::try_from(length).unwrap_or(usize::MAX))
        }
        2 | 3 => return Err(junk("truncated inside the .npy header")),
        version => return Err(junk(format!(".npy format version {version} is not known"))),
    };
    if length > MAX_HEADER {
        return Err(junk(format!("a .npy header of {length} bytes is not plausible")));
    }
    let text = bytes.get(start..start + length).ok_or_else(|| junk("truncated inside the .npy header"))?;
    let text = std::str::from_utf8(text).map_err(|_| junk("the .npy header is not text"))?;
    let mut parser = Parser { rest: text.trim() };
    let (descr, fortran_order, shape) =
        parser.header().ok_or_else(|| junk("the .npy header is not NumPy's description of an array"))?;
    Ok(Header { descr, fortran_order, shape, offset: start + length })
}

/// Descriptions, order and shape of a header's dictionary.
type Fields = (Option<String>, bool, Vec<u64>);

/// A reader of the one Python dictionary that a header holds.
struct Parser<'a> {
    rest: &'a str,
}

impl<'a> Parser<'a> {
    fn token(&mut self, token: &str) -> Option<()> {
        self.rest = self.rest.trim_start().strip_prefix(token)?;
        Some(())
    }

    fn string(&mut self) -> Option<&'a str> {
        self.rest = self.rest.trim_start();
        let quote = self.rest.chars().next().filter(|quote| matches!(quote, '\'' | '"'))?;
        let (text, rest) = self.rest[1..].split_once(quote)?;
        self.rest = rest;
        (!text.contains('\\')).then_some(text)
    }

    fn number(&mut self) -> Option<u64> {
        self.rest = self.rest.trim_start();
        let end = self.rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.rest.len());
        let number = self.rest[..end].parse().ok()?;
        // Python 2 wrote long integers with a suffix.
        self.rest = self.rest[end..].strip_prefix('L').unwrap_or(&self.rest[end..]);
        Some(number)
    }

    fn shape(&mut self) -> Option<Vec<u64>> {
        self.token("(")?;
        let mut shape = Vec::new();
        while self.token(")").is_none() {
            shape.push(self.number()?);
            if self.token(",").is_none() {
                self.token(")")?;
                break;
            }
        }
        Some(shape)
    }

    /// Skips a bracketed list (the description of a structured type).
    fn list(&mut self) -> Option<()> {
        let mut depth = 0_usize;
        for (i, c) in self.rest.char_indices() {
            match c {
                '[' => depth += 1,
                ']' if depth == 1 => {
                    self.rest = &self.rest[i + 1..];
                    return Some(());
                }
                ']' => depth = depth.checked_sub(1)?,
                _ => {}
            }
        }
        None
    }

    fn header(&mut self) -> Option<Fields> {
        let (mut descr, mut order, mut shape) = (None, None, None);
        self.token("{")?;
        while self.token("}").is_none() {
            let key = self.string()?;
            self.token(":")?;
            match key {
                "descr" => {
                    self.rest = self.rest.trim_start();
                    descr = Some(if self.rest.starts_with('[') {
                        self.list()?;
                        None
                    } else {
                        Some(self.string()?.to_owned())
                    });
                }
                "fortran_order" => {
                    order = Some(if self.token("True").is_some() {
                        true
                    } else {
                        self.token("False")?;
                        false
                    });
                }
                "shape" => shape = Some(self.shape()?),
                _ => return None,
            }
            if self.token(",").is_none() {
                self.token("}")?;
                break;
            }
        }
        self.rest.trim().is_empty().then_some((descr?, order?, shape?))
    }
}

/// NumPy's name of an element type; none for bfloat16, which NumPy does not have.
pub fn descr(dtype: Dtype) -> Option<&'static str> {
    match dtype {
        Dtype::F32 => Some("<f4"),
        Dtype::F16 => Some("<f2"),
        Dtype::Bf16 => None,
        Dtype::I8 => Some("|i1"),
        Dtype::U8 => Some("|u1"),
    }
}

/// The element type of NumPy's name, where it is one that stores hold.
///
/// # Errors
/// `Dtype`, with the remedy for the types that people have by accident.
pub fn dtype(descr: Option<&str>) -> Result<Dtype> {
    let refuse = |message: String| Error::new(ErrorKind::Dtype, message);
    let Some(descr) = descr else {
        return Err(refuse("structured arrays are not embeddings".into()));
    };
    let known = [Dtype::F32, Dtype::F16, Dtype::I8, Dtype::U8];
    if let Some(dtype) = known.into_iter().find(|&dtype| self::descr(dtype) == Some(descr)) {
        return Ok(dtype);
    }
    let to_float32 = "save it as float32: numpy.save(path, array.astype('float32'))";
    Err(match descr.as_bytes() {
        [b'|', b'O', ..] => refuse("object arrays hold no numbers".into())
            .remedy("save a matrix of float32: numpy.save(path, numpy.stack(rows).astype('float32'))"),
        [b'>', ..] => refuse(format!("big-endian elements ({descr}) are not supported")).remedy(to_float32),
        [_, b'f', ..] => refuse(format!("elements of type {descr} are not supported")).remedy(to_float32),
        [_, b'i' | b'u' | b'b', ..] => {
            refuse(format!("integer elements ({descr}) are not embeddings")).remedy(to_float32)
        }
        _ => refuse(format!("elements of type {descr} are not embeddings")),
    })
}

/// The header of a C-ordered array, padded so that the elements begin at a multiple of 64. Its length does not
/// depend on the shape (as long as each extent is below 10²⁰), so that it can be written again in place.
pub fn format(descr: &str, shape: &[u64]) -> Vec<u8> {
    let extents = match shape {
        [n] => format!("({n},)"),
        _ => format!("({})", shape.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")),
    };
    let dictionary = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {extents}, }}");
    let room = 64 + 22 * shape.len();
    let total = (10 + room.max(dictionary.len() + 1)).next_multiple_of(64);
    let length = u16::try_from(total - 10).expect("headers are short");
    let mut header = Vec::with_capacity(total);
    header.extend_from_slice(MAGIC);
    header.extend_from_slice(&[1, 0]);
    header.extend_from_slice(&length.to_le_bytes());
    header.extend_from_slice(dictionary.as_bytes());
    header.resize(total - 1, b' ');
    header.push(b'\n');
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn with_dictionary(dictionary: &str) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&[1, 0]);
        bytes.extend_from_slice(&u16::try_from(dictionary.len()).unwrap().to_le_bytes());
        bytes.extend_from_slice(dictionary.as_bytes());
        bytes
    }

    #[test]
    fn reads_what_numpy_writes() {
        let header =
            parse(&with_dictionary("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }   \n"))
                .unwrap();
        assert_eq!(header.descr.as_deref(), Some("<f4"));
        assert!(!header.fortran_order);
        assert_eq!(header.shape, [3, 4]);
        let header =
            parse(&with_dictionary("{'shape': (3L,), 'fortran_order': True, 'descr': '|i1'}")).unwrap();
        assert_eq!((header.shape, header.fortran_order), (vec![3], true));
        let header = parse(&with_dictionary(
            "{'descr': [('a', '<f4'), ('b', '<i4', (2,))], 'fortran_order': False, 'shape': ()}",
        ));
        assert_eq!(header.unwrap().descr, None);
    }

    #[test]
    fn refuses_junk() {
        for dictionary in [
            "",
            "{",
            "{}",
            "{'descr': '<f4', 'fortran_order': False}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), } junk",
            "{'descr': '<f4', 'fortran_order': 0, 'shape': (3, 4)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (-3, 4)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999999, 4)}",
            "{'descr': [[, 'fortran_order': False, 'shape': (3, 4)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), 'other': 1}",
        ] {
            let error = parse(&with_dictionary(dictionary)).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Format, "{dictionary}");
        }
        let whole = with_dictionary("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }");
        for end in 0..whole.len() {
            assert!(parse(&whole[..end]).is_err(), "cut at {end}");
        }
        let mut version = whole.clone();
        version[6] = 9;
        assert!(parse(&version).unwrap_err().message.contains("version 9"));
    }

    #[test]
    fn names_the_types_people_have_by_accident() {
        for (name, word) in [
            ("|O", "object"),
            ("<i8", "integer"),
            ("|b1", "integer"),
            ("<f8", "<f8"),
            (">f4", "big-endian"),
            ("<U7", "<U7"),
        ] {
            let error = dtype(Some(name)).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Dtype);
            assert!(error.message.contains(word), "{error}");
        }
        assert_eq!(dtype(None).unwrap_err().kind, ErrorKind::Dtype);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(shape in proptest::collection::vec(any::<u64>(), 1..3), code in 0..3_usize) {
            let name = ["<f4", "<f2", "|i1"][code];
            let bytes = format(name, &shape);
            prop_assert_eq!(bytes.len() % 64, 0);
            prop_assert_eq!(bytes.len(), format(name, &vec![0; shape.len()]).len());
            let header = parse(&bytes).unwrap();
            prop_assert_eq!(header, Header { descr: Some(name.into()), fortran_order: false, shape, offset: bytes.len() });
        }

        #[test]
        fn no_bytes_make_it_panic(tail in proptest::collection::vec(any::<u8>(), 0..300), version in 0..4_u8) {
            let mut bytes = MAGIC.to_vec();
            bytes.push(version);
            bytes.extend_from_slice(&tail);
            let _ = parse(&bytes);
        }

        #[test]
        fn no_text_makes_it_panic(text in "[\\[\\](){}',: 0-9a-zA-Z<|é]{0,80}") {
            let _ = parse(&with_dictionary(&text));
        }
    }
}
