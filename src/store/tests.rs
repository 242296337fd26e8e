use std::fs;

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;

fn never() -> bool {
    false
}

fn write_npy(path: &Path, descr: &str, shape: &[u64], elements: &[u8]) {
    let mut bytes = npy::format(descr, shape);
    bytes.extend_from_slice(elements);
    fs::write(path, bytes).unwrap();
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

#[test]
fn a_bare_file_is_a_store() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.npy");
    write_npy(&path, "<f4", &[2, 3], &f32_bytes(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
    let store = Store::open(&path).unwrap();
    assert_eq!((store.n(), store.d(), store.dtype()), (2, 3, Dtype::F32));
    let (shard, row) = store.locate(1).unwrap();
    let mut values = [0.0; 3];
    shard.view().rows.read_f32(row, &mut values);
    assert_eq!(values, [4.0, 5.0, 6.0]);
    assert!(store.locate(2).is_none());
    store.check_finite(2, &never).unwrap();
    let norms = store.norms(2, &never).unwrap();
    assert_eq!(norms, [Norms { low: (14.0_f64.sqrt(), 0), high: (77.0_f64.sqrt(), 1) }]);
}

#[test]
fn bad_files_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.npy");
    let open = || Store::open(&path).unwrap_err();
    assert_eq!(open().kind, ErrorKind::FileMissing);
    let cases: [(&str, &[u64], usize, ErrorKind, &str); 9] = [
        ("<f4", &[2, 3], 23, ErrorKind::Format, "truncated"),
        ("<f4", &[2, 3], 25, ErrorKind::Format, "1 bytes more"),
        ("<f4", &[u64::MAX, u64::MAX], 24, ErrorKind::Format, "more bytes than"),
        ("<f4", &[6], 24, ErrorKind::Shape, "not rows"),
        ("<f4", &[0, 3], 0, ErrorKind::Shape, "empty"),
        ("<f4", &[3, 0], 0, ErrorKind::Shape, "empty"),
        ("|i1", &[2, 3], 6, ErrorKind::Dtype, "integer"),
        ("<i8", &[2, 3], 48, ErrorKind::Dtype, "integer"),
        ("|O", &[2, 3], 48, ErrorKind::Dtype, "object"),
    ];
    for (descr, shape, bytes, kind, word) in cases {
        write_npy(&path, descr, shape, &vec![0; bytes]);
        let error = open();
        assert_eq!(error.kind, kind, "{error}");
        assert!(error.message.contains(word), "{error}");
        assert_eq!(error.file.as_deref(), Some(path.as_path()));
    }
    fs::write(&path, "junk").unwrap();
    assert_eq!(open().kind, ErrorKind::Format);
    fs::write(&path, "").unwrap();
    assert_eq!(open().kind, ErrorKind::Format);
    let text = String::from_utf8_lossy(&npy::format("<f4", &[2, 3])).replace("False", "True ");
    let mut bytes = npy::format("<f4", &[2, 3]);
    bytes.splice(10.., text.split_at(text.len() - bytes.len() + 10).1.bytes());
    bytes.extend_from_slice(&[0; 24]);
    fs::write(&path, bytes).unwrap();
    assert!(open().message.contains("by columns"), "{}", open());
}

#[test]
fn bad_safetensors_files_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let whole = [safetensors::format(2, 3), vec![0; 12]].concat();
    let place = whole.iter().position(|&byte| byte == b'[').unwrap();
    let mut other_shape = whole.clone();
    other_shape[place + 1] = b'9';
    let mut other_type = whole.clone();
    let place = whole.windows(2).position(|bytes| bytes == b"BF").unwrap();
    other_type[place..place + 4].copy_from_slice(b"I16 ");
    let cases = [
        (whole[..whole.len() - 1].to_vec(), ErrorKind::Format, "truncated"),
        ([whole.clone(), vec![0]].concat(), ErrorKind::Format, "1 bytes more"),
        (whole[..100].to_vec(), ErrorKind::Format, "truncated"),
        (other_shape, ErrorKind::Format, "does not fit"),
        (other_type, ErrorKind::Dtype, "I16"),
        ([safetensors::format(0, 3), vec![]].concat(), ErrorKind::Shape, "empty"),
        (b"junk".to_vec(), ErrorKind::Format, "safetensors"),
    ];
    for (bytes, kind, word) in cases {
        fs::write(&path, bytes).unwrap();
        let error = Store::open(&path).unwrap_err();
        assert_eq!((error.kind, error.file.as_deref()), (kind, Some(path.as_path())), "{error}");
        assert!(error.message.contains(word), "{error}");
    }
    fs::write(&path, whole).unwrap();
    let store = Store::open(&path).unwrap();
    assert_eq!((store.n(), store.d(), store.dtype()), (2, 3, Dtype::Bf16));
}

#[test]
fn the_rounding_of_integers_is_measured() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = ShardWriter::create(folder.path(), 0, 3, Dtype::I8).unwrap();
    // The second row lies on the grid, the third is zero, the fourth too small for a scale.
    writer.append(&[1.27, 0.005, 0.0, 127.0, -3.0, 2.0, 0.0, 0.0, 0.0, 1e-40, 0.0, 0.0]).unwrap();
    let expected = 0.005 / (1.27_f64.powi(2) + 0.005_f64.powi(2)).sqrt();
    assert!((writer.rounding() - expected).abs() < 1e-6, "{}", writer.rounding());
    assert!(writer.append(&[1.0, 0.51, f32::NAN]).is_err());
    assert!((writer.rounding() - expected).abs() < 1e-6);
}

#[test]
fn unaligned_elements_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.npy");
    let dictionary = "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2)}";
    let mut bytes = npy::MAGIC.to_vec();
    bytes.extend_from_slice(&[1, 0, u8::try_from(dictionary.len()).unwrap(), 0]);
    bytes.extend_from_slice(dictionary.as_bytes());
    assert_ne!(bytes.len() % 4, 0);
    bytes.extend_from_slice(&f32_bytes(&[0.5, -3.0]));
    fs::write(&path, bytes).unwrap();
    let store = Store::open(&path).unwrap();
    let mut values = [0.0; 2];
    store.shards()[0].view().rows.read_f32(0, &mut values);
    assert_eq!(values, [0.5, -3.0]);
}

#[test]
fn the_first_bad_row_is_named_for_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.npy");
    let (n, d) = (3 * CHUNK + 17, 3);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for row in [0, CHUNK - 1, CHUNK, n - 1] {
            let mut values = vec![1.0_f32; n * d];
            values[row * d + 1] = bad;
            values[(n - 1) * d] = bad;
            write_npy(&path, "<f4", &[n as u64, d as u64], &f32_bytes(&values));
            let halves: Vec<u8> =
                values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect();
            let half_path = folder.path().join("half.npy");
            write_npy(&half_path, "<f2", &[n as u64, d as u64], &halves);
            for threads in 1..4 {
                for place in [&path, &half_path] {
                    let error = Store::open(place).unwrap().check_finite(threads, &never).unwrap_err();
                    assert_eq!((error.kind, error.row), (ErrorKind::NotFinite, Some(row as u64)));
                }
            }
        }
    }
    let error = Store::open(&path).unwrap().check_finite(1, &|| true).map_err(|error| error.kind);
    // A short check may end before the first poll.
    assert!(matches!(error, Err(ErrorKind::Interrupted | ErrorKind::NotFinite)));
}

#[test]
fn a_file_cut_after_opening_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.npy");
    write_npy(&path, "<f4", &[2, 3], &[0; 24]);
    let store = Store::open(&path).unwrap();
    store.shards()[0].check_size().unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(100).unwrap();
    assert_eq!(store.shards()[0].check_size().unwrap_err().kind, ErrorKind::Format);
}

proptest! {
    #[test]
    fn finite_values_pass_and_others_do_not(bits in proptest::collection::vec(any::<u32>(), 1..40)) {
        let values: Vec<f32> = bits.iter().copied().map(f32::from_bits).collect();
        let bytes = f32_bytes(&values);
        let rows = Rows::new(&bytes, Dtype::F32, values.len(), 1, None).unwrap();
        prop_assert_eq!(first_not_finite(&rows), values.iter().position(|value| !value.is_finite()));
        let halves: Vec<f16> = bits.iter().map(|&bits| f16::from_bits(bits as u16)).collect();
        let bytes: Vec<u8> = halves.iter().flat_map(|value| value.to_le_bytes()).collect();
        let rows = Rows::new(&bytes, Dtype::F16, halves.len(), 1, None).unwrap();
        prop_assert_eq!(first_not_finite(&rows), halves.iter().position(|value| !value.is_finite()));
    }
}

fn written(values: &[f32], d: usize, dtype: Dtype) -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = ShardWriter::create(folder.path(), 0, d, dtype).unwrap();
    // In two pieces, so that appending is seen to append.
    let cut = values.len() / d / 2 * d;
    writer.append(&values[..cut]).unwrap();
    writer.append(&values[cut..]).unwrap();
    let shard = writer.finish().unwrap();
    let entry = |file: &manifest::FileEntry| serde_json::json!({"name": file.name, "bytes": file.bytes, "xxh3": file.xxh3});
    let mut listed = serde_json::json!({"rows": shard.rows, "embeddings": entry(&shard.embeddings)});
    if let Some(scales) = &shard.scales {
        listed["scales"] = entry(scales);
    }
    let manifest = serde_json::json!({
        "format": manifest::FORMAT, "version": manifest::VERSION, "d": d, "rows": shard.rows, "dtype": dtype.name(),
        "normalised": false, "shards": [listed],
    });
    fs::write(folder.path().join(MANIFEST), manifest.to_string()).unwrap();
    let store = Store::open(folder.path()).unwrap();
    (folder, store)
}

#[test]
fn a_row_that_is_refused_leaves_the_shard_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::I8] {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut writer = ShardWriter::create(folder.path(), 0, 2, dtype).unwrap();
            writer.append(&[1.0, 2.0]).unwrap();
            let error = writer.append(&[1.0, 2.0, 3.0, bad]).unwrap_err();
            assert_eq!((error.kind, error.row), (ErrorKind::NotFinite, Some(2)), "{}", dtype.name());
            let shard = writer.finish().unwrap();
            assert_eq!(shard.rows, 1);
            let store = Store::open(&folder.path().join(shard.embeddings.name));
            assert!(dtype == Dtype::I8 || store.unwrap().n() == 1);
        }
    }
    let mut writer = ShardWriter::create(folder.path(), 0, 1, Dtype::F16).unwrap();
    assert!(writer.append(&[1e5]).unwrap_err().message.contains("65504"));
    let mut wide = ShardWriter::create(folder.path(), 1, 1, Dtype::Bf16).unwrap();
    assert!(wide.append(&[f32::MAX]).unwrap_err().message.contains("bfloat16"));
    assert_eq!(writer.append(&[]).map(|()| writer.rows()).unwrap(), 0);
}

#[test]
fn an_unfinished_shard_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = ShardWriter::create(folder.path(), 3, 2, Dtype::I8).unwrap();
    writer.append(&[1.0, 2.0]).unwrap();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    drop(writer);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    let error = ShardWriter::create(&folder.path().join("absent"), 0, 2, Dtype::F32).unwrap_err();
    assert_eq!(error.kind, ErrorKind::FileMissing);
    assert_eq!(ShardWriter::create(folder.path(), 0, 2, Dtype::U8).unwrap_err().kind, ErrorKind::Dtype);
}

#[test]
fn a_listed_file_that_is_gone_or_cut_is_named() {
    let (folder, store) = written(&[1.0, 2.0, 3.0, 4.0], 2, Dtype::I8);
    drop(store);
    let path = folder.path().join("scales-00000.npy");
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(100).unwrap();
    let error = Store::open(folder.path()).unwrap_err();
    assert_eq!((error.kind, error.file.as_deref()), (ErrorKind::Format, Some(path.as_path())));
    fs::remove_file(&path).unwrap();
    let error = Store::open(folder.path()).unwrap_err();
    assert_eq!((error.kind, error.file.as_deref()), (ErrorKind::FileMissing, Some(path.as_path())));
    fs::remove_file(folder.path().join(MANIFEST)).unwrap();
    assert!(Store::open(folder.path()).unwrap_err().message.contains("no manifest.json"));
}

proptest! {
    #[test]
    fn what_is_written_is_read_again(
        values in (1..5_usize).prop_flat_map(|d| {
            (proptest::collection::vec(proptest::collection::vec(-2.0_f32..2.0, d), 1..20), Just(d))
        }),
    ) {
        let (rows, d) = values;
        let values: Vec<f32> = rows.concat();
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::I8] {
            let (folder, store) = written(&values, d, dtype);
            prop_assert_eq!((store.n(), store.d(), store.dtype()), (rows.len() as u64, d, dtype));
            let mut read = vec![0.0; d];
            for (i, row) in rows.iter().enumerate() {
                store.shards()[0].view().rows.read_f32(i, &mut read);
                let largest = row.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
                for (&found, &value) in read.iter().zip(row) {
                    match dtype {
                        Dtype::F32 => prop_assert_eq!(found, value),
                        Dtype::F16 => prop_assert_eq!(found, f16::from_f32(value).to_f32()),
                        Dtype::Bf16 => prop_assert_eq!(found, bf16::from_f32(value).to_f32()),
                        _ => prop_assert!((found - value).abs() <= 0.5001 * largest / 127.0),
                    }
                }
            }
            let entry = &store.manifest().unwrap().shards[0].embeddings;
            let found = checksum(&folder.path().join(&entry.name)).unwrap();
            prop_assert_eq!(found, (entry.xxh3.clone(), entry.bytes));
        }
    }
}

#[test]
fn pieces_of_files_are_one_store() {
    let folder = tempfile::tempdir().unwrap();
    let (npy, raw) = (folder.path().join("x.npy"), folder.path().join("y.bin"));
    write_npy(&npy, "<f4", &[2, 2], &f32_bytes(&[1.0, 2.0, 3.0, 4.0]));
    // One byte before the elements: they are not aligned.
    fs::write(&raw, [vec![9], f32_bytes(&[5.0, 6.0, 7.0, 8.0, 9.0, 10.0])].concat()).unwrap();
    let place = |n, offset| Some(Place { dtype: Dtype::F32, n, d: 2, offset });
    let pieces = [(raw.clone(), place(1, 17)), (npy.clone(), None), (raw.clone(), place(2, 1))];
    let store = Store::of_pieces(folder.path(), &pieces, Some(&[0, 1, 1, 2, 0]), None).unwrap();
    let mut found = Vec::new();
    for row in 0..store.n() {
        let (shard, inside) = store.locate(row).unwrap();
        let mut values = [0.0; 2];
        shard.view().rows.read_f32(inside, &mut values);
        found.push((values[0], shard.view().groups.unwrap()[inside]));
        shard.check_size().unwrap();
    }
    assert_eq!(found, [(9.0, 0), (1.0, 1), (3.0, 1), (5.0, 2), (7.0, 0)]);
    let open = |pieces: &[(PathBuf, Option<Place>)], groups: Option<&[u32]>| {
        Store::of_pieces(folder.path(), pieces, groups, None).unwrap_err().kind
    };
    assert_eq!(open(&[], None), ErrorKind::Shape);
    assert_eq!(open(&pieces, Some(&[0; 4])), ErrorKind::Shape);
    assert_eq!(open(&pieces, Some(&[0; 6])), ErrorKind::Shape);
    assert_eq!(open(&[(raw.clone(), place(3, 2))], None), ErrorKind::Format);
    assert_eq!(open(&[(raw.clone(), place(u64::MAX, 1))], None), ErrorKind::Format);
    assert_eq!(open(&[(raw.clone(), place(1, u64::MAX))], None), ErrorKind::Format);
    assert_eq!(open(&[(raw.clone(), place(0, 1))], None), ErrorKind::Shape);
    let wide = Some(Place { dtype: Dtype::F32, n: 1, d: 3, offset: 1 });
    assert_eq!(open(&[(npy, None), (raw, wide)], None), ErrorKind::Shape);
}

#[test]
fn files_of_rows_and_dimensions_are_stores() {
    let folder = tempfile::tempdir().unwrap();
    for (name, dtype, elements) in [
        ("x.fbin", Dtype::F32, f32_bytes(&[1.0, 2.0])),
        ("x.u8bin", Dtype::U8, vec![200, 7]),
        ("x.i8bin", Dtype::I8, vec![0x80, 7]),
    ] {
        let path = folder.path().join(name);
        let whole = [vec![1, 0, 0, 0, 2, 0, 0, 0], elements].concat();
        fs::write(&path, &whole).unwrap();
        let store = Store::open(&path).unwrap();
        assert_eq!((store.n(), store.d(), store.dtype()), (1, 2, dtype));
        let mut values = [0.0; 2];
        store.shards()[0].view().rows.read_f32(0, &mut values);
        let expected =
            if name == "x.fbin" { [1.0, 2.0] } else { [if name == "x.u8bin" { 200.0 } else { -128.0 }, 7.0] };
        assert_eq!(values, expected);
        fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        assert!(Store::open(&path).unwrap_err().message.contains("truncated"));
    }
}
