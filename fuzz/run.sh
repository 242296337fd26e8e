#!/bin/sh
# fuzz/run.sh SECONDS [TARGET…]: libFuzzer with the stable toolchain (coverage comes from a pass of LLVM).
# A unit that takes more than LMD3_FUZZ_TIMEOUT seconds (5) is a finding. What Python parses is fuzzed by fuzz/files.py.
set -eu
cd "$(dirname "$0")"
seconds=$1
shift
[ $# -gt 0 ] || set -- manifest npy fbin safetensors
RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing -Cdebug-assertions -Ccodegen-units=1"
export RUSTFLAGS
host=$(rustc -vV | sed -n 's/^host: //p')
cargo build --release --quiet --target "$host" --target-dir target
for target in "$@"; do
    mkdir -p "corpus/$target" "artifacts/$target"
    python3 seeds.py "$target" "corpus/$target"
    "target/$host/release/$target" "corpus/$target" -max_total_time="$seconds" -timeout="${LMD3_FUZZ_TIMEOUT:-5}" -rss_limit_mb=1024 \
        -malloc_limit_mb=256 -max_len=4096 -artifact_prefix="artifacts/$target/" -print_final_stats=1
done
