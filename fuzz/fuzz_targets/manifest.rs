//! A store's manifest: what is accepted agrees with itself.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lmd3::store::Manifest;

fuzz_target!(|data: &[u8]| {
    if let Ok(manifest) = Manifest::parse(data) {
        assert!(manifest.dtype().is_ok());
        assert_eq!(manifest.shards.iter().map(|shard| shard.rows).sum::<u64>(), manifest.rows);
        for file in manifest.shards.iter().flat_map(|shard| shard.files()) {
            assert!(!file.name.contains('/') && file.name != "..");
        }
    }
});
