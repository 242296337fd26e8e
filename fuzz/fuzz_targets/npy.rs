//! The header of `.npy` files: what is accepted lies inside the bytes, and is written and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lmd3::store::npy;

fuzz_target!(|data: &[u8]| {
    if let Ok(header) = npy::parse(data) {
        assert!(header.offset <= data.len());
        if let Ok(dtype) = npy::dtype(header.descr.as_deref()) {
            // Shapes of hundreds of extents are read, and never written.
            if (1..=8).contains(&header.shape.len()) {
                let again = npy::parse(&npy::format(npy::descr(dtype).unwrap(), &header.shape)).unwrap();
                assert_eq!((again.shape, again.descr), (header.shape, header.descr));
            }
        }
    }
});
