//! The header of safetensors files: what is accepted lies inside the bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lmd3::store::safetensors;

fuzz_target!(|data: &[u8]| {
    if let Ok(header) = safetensors::parse(data) {
        assert!(header.offset <= data.len());
        let _ = safetensors::dtype(header.descr.as_deref());
    }
});
