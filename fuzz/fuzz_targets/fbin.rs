//! Whole `.fbin .f16bin .u8bin .i8bin` files through a store: the first byte picks the kind.
#![no_main]

use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use lmd3::store::Store;

fuzz_target!(|data: &[u8]| {
    let Some((first, rest)) = data.split_first() else { return };
    let kind = ["fbin", "f16bin", "u8bin", "i8bin"][usize::from(first % 4)];
    let path: PathBuf = std::env::temp_dir().join(format!("lmd3-fuzz-{}.{kind}", std::process::id()));
    std::fs::write(&path, rest).unwrap();
    if let Ok(store) = Store::open(&path) {
        let (shard, row) = store.locate(store.n() - 1).unwrap();
        let mut values = vec![0.0; store.d()];
        shard.view().rows.read_f32(row, &mut values);
        assert_eq!(store.n() * store.d() as u64 * store.dtype().size() as u64 + 8, rest.len() as u64);
    }
});
