//! The exact scan against double-precision sums over the rows as stored, at every level this CPU has.

use lmd3::error::ErrorKind;
use lmd3::estimate::exact;
use lmd3::kernel::{Kernel, ScaledKernel};
use lmd3::logsum::LogSum;
use lmd3::scan::reduce::{Fold, Part};
use lmd3::scan::{Control, Io, NO_ROW, Precision, Request, Scan, plan::BLOCK_ROWS, scan, scan_parts};
use lmd3::simd::Level;
use lmd3::{Dtype, Rows, ShardView};
use proptest::prelude::*;

fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / 8_388_608.0 - 1.0
        })
        .collect()
}

fn normalise(rows: &mut [f32], d: usize) {
    for row in rows.chunks_exact_mut(d) {
        let norm = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        row.iter_mut().for_each(|x| *x = (f64::from(*x) / norm) as f32);
    }
}

/// Shards of a matrix, cut after the given numbers of rows.
fn shards<'a>(
    bytes: &'a [u8],
    d: usize,
    cuts: &[usize],
    groups: Option<&'a [u32]>,
    weights: Option<&'a [f32]>,
) -> Vec<ShardView<'a>> {
    let n = bytes.len() / (4 * d);
    let all = Rows::new(bytes, Dtype::F32, n, d, None).unwrap();
    let mut ends: Vec<usize> = cuts.iter().map(|&cut| cut.min(n)).collect();
    ends.push(n);
    let mut start = 0;
    ends.into_iter()
        .map(|end| {
            let range = start..end.max(start);
            start = range.end;
            ShardView {
                rows: all.slice(range.start, range.end),
                groups: groups.map(|groups| &groups[range.clone()]),
                weights: weights.map(|weights| &weights[range]),
            }
        })
        .collect()
}

fn bytes_of(rows: &[f32]) -> Vec<u8> {
    rows.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn request(queries: &[f32], d: usize, level: Level) -> Request<'_> {
    Request {
        queries,
        d,
        kernels: Vec::new(),
        neighbors: 0,
        by_group: false,
        exclude_rows: None,
        exclude_within: 0.0,
        row_rounding: 0.0,
        max_cosine: false,
        row_sum: false,
        precision: Precision::Float32,
        level,
        threads: 1,
        memory: 1 << 28,
        io: Io::Map,
    }
}

fn kernels(bandwidths: &[f64]) -> Vec<ScaledKernel> {
    Kernel::ALL
        .iter()
        .filter(|kernel| kernel.is_fused())
        .flat_map(|&kernel| bandwidths.iter().map(move |&h| ScaledKernel::new(kernel, h).unwrap()))
        .collect()
}

fn sq_distance(x: &[f32], q: &[f32]) -> f64 {
    x.iter().zip(q).map(|(&x, &q)| (f64::from(x) - f64::from(q)).powi(2)).sum()
}

/// log Σ w k and log Σ (w k)² over the rows that `keep` lets through.
fn direct(
    rows: &[f32],
    d: usize,
    query: &[f32],
    kernel: ScaledKernel,
    weights: Option<&[f32]>,
    keep: impl Fn(usize, f64) -> bool,
) -> LogSum {
    let mut sum = LogSum::EMPTY;
    for (i, row) in rows.chunks_exact(d).enumerate() {
        let sq = sq_distance(row, query);
        if keep(i, sq) {
            sum.push(kernel.log_weight(sq) + weights.map_or(0.0, |weights| f64::from(weights[i]).ln()));
        }
    }
    sum
}

fn assert_close(value: f64, truth: f64, tolerance: f64, label: &str) {
    let close = value == truth || (value - truth).abs() <= tolerance * truth.abs().max(1.0);
    assert!(close, "{label}: {value} is not {truth} (off by {:e})", value - truth);
}

fn run(shards: &[ShardView<'_>], request: &Request<'_>) -> Scan {
    scan(shards, request, None, &Control::default()).unwrap()
}

#[test]
fn sums_and_neighbours_equal_the_direct_ones_at_every_edge() {
    for level in Level::available() {
        for d in [1, 3, 8, 64, 384, 1000] {
            for (n, q) in [
                (0, 1),
                (1, 1),
                (2, 2),
                (5, 16),
                (95, 15),
                (96, 17),
                (97, 33),
                (383, 1),
                (BLOCK_ROWS + 1, 31),
            ] {
                if n > 1000 && d > 64 {
                    continue;
                }
                let (mut rows, mut queries) = (noise(n as u64 + 1, n * d), noise(77 + q as u64, q * d));
                if d > 1 {
                    normalise(&mut rows, d);
                    normalise(&mut queries, d);
                }
                if n > 0 {
                    queries[..d].copy_from_slice(&rows[..d]);
                }
                let bytes = bytes_of(&rows);
                let mut request = request(&queries, d, level);
                request.kernels = kernels(&[0.05, 0.3, 2.0]);
                request.neighbors = 5;
                let scan = run(&shards(&bytes, d, &[n / 3], None, None), &request);
                let estimate = exact::total(&scan.sums, q, request.kernels.len());
                for (j, query) in queries.chunks_exact(d).enumerate() {
                    for (b, &kernel) in request.kernels.iter().enumerate() {
                        let truth = direct(&rows, d, query, kernel, None, |_, _| true);
                        let label = format!("{} d {d} n {n} query {j} {kernel:?}", level.name());
                        let at = j * request.kernels.len() + b;
                        assert_close(estimate.log_sum[at], truth.log_sum(), 2e-6, &label);
                        if n == 0 {
                            assert_eq!(estimate.log_density[at], f64::NEG_INFINITY);
                        } else {
                            let density = truth.log_sum() - (n as f64).ln();
                            assert_close(estimate.log_density[at], density, 2e-6, &label);
                            let ess = (2.0 * truth.log_sum() - truth.log_sum_sq()).exp();
                            assert!(
                                (estimate.ess[at] / ess - 1.0).abs() < 2e-4,
                                "{label}: ess {} {ess}",
                                estimate.ess[at]
                            );
                        }
                    }
                    let mut order: Vec<(f64, u64)> = rows
                        .chunks_exact(d)
                        .enumerate()
                        .map(|(i, row)| (sq_distance(row, query), i as u64))
                        .collect();
                    order.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
                    let found: Vec<u64> = scan.neighbors[j].iter().map(|n| n.row).collect();
                    assert_eq!(found, order.iter().take(5).map(|&(_, row)| row).collect::<Vec<_>>());
                }
            }
        }
    }
}

#[test]
fn copies_of_a_query_come_out_right_over_several_shards() {
    let (d, n) = (64, 9000);
    for level in Level::available() {
        for copies in [1_usize, 50, 5000] {
            let mut rows = noise(1, n * d);
            let mut queries = noise(2, 2 * d);
            for (i, row) in rows.chunks_exact_mut(d).enumerate() {
                if i * copies / n != (i + 1) * copies / n {
                    row.copy_from_slice(&queries[..d]);
                }
            }
            normalise(&mut rows, d);
            normalise(&mut queries, d);
            let bytes = bytes_of(&rows);
            let mut request = request(&queries, d, level);
            request.kernels = kernels(&[0.05]);
            let scan = run(&shards(&bytes, d, &[1000, 6000], None, None), &request);
            assert_eq!(scan.sums.duplicates[0], copies as u64);
            let estimate = exact::total(&scan.sums, 2, 2);
            for at in 0..4 {
                let truth =
                    direct(&rows, d, &queries[at / 2 * d..][..d], request.kernels[at % 2], None, |_, _| true);
                let error = (estimate.log_sum[at] - truth.log_sum()).abs();
                assert!(error <= 1e-5, "{} {copies} copies: {error:e}", level.name());
            }
        }
    }
}

#[test]
fn the_nearest_are_found_in_any_order_of_the_rows() {
    let (d, n, k) = (24, 2 * BLOCK_ROWS + 700, 10);
    for q in [1, 5, 70] {
        let queries = noise(31, q * d);
        let first = &queries[..d];
        let mut rows: Vec<Vec<f32>> = noise(32, n * d).chunks_exact(d).map(<[f32]>::to_vec).collect();
        // Copies that are left out, and a crowd at one distance: more ties than places.
        rows[..40].fill(first.to_vec());
        let tie: Vec<f32> = first.iter().map(|x| x + 0.1).collect();
        rows[40..120].fill(tie);
        for order in ["falling", "rising", "periodic"] {
            rows.sort_by(|x, y| sq_distance(x, first).total_cmp(&sq_distance(y, first)));
            match order {
                "falling" => rows.reverse(),
                // Every row of the sample that a block is judged by is among the nearest.
                "periodic" => {
                    let near: Vec<Vec<f32>> = rows.drain(..n / 42).collect();
                    for (i, row) in near.into_iter().enumerate() {
                        rows.insert((i * BLOCK_ROWS / 96).min(rows.len()), row);
                    }
                }
                _ => {}
            }
            let flat = rows.concat();
            let bytes = bytes_of(&flat);
            for level in Level::available() {
                for threads in [1, 3] {
                    let mut request = request(&queries, d, level);
                    request.neighbors = k;
                    request.exclude_within = 1e-3;
                    request.threads = threads;
                    let scan = run(&shards(&bytes, d, &[], None, None), &request);
                    for (j, query) in queries.chunks_exact(d).enumerate() {
                        let mut truth: Vec<(f64, u64)> = flat
                            .chunks_exact(d)
                            .enumerate()
                            .map(|(i, row)| (sq_distance(row, query), i as u64))
                            .filter(|&(sq, _)| sq >= 1e-6)
                            .collect();
                        truth.sort_by(|x, y| x.0.total_cmp(&y.0).then(x.1.cmp(&y.1)));
                        let found: Vec<u64> = scan.neighbors[j].iter().map(|n| n.row).collect();
                        let wanted: Vec<u64> = truth[..k].iter().map(|&(_, row)| row).collect();
                        assert_eq!(
                            found, wanted,
                            "{order} {level:?} {q} queries, query {j}, {threads} threads"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn groups_weights_and_exclusions_equal_the_direct_sums() {
    let (d, n, q) = (24, 5000, 40);
    let mut rows = noise(5, n * d);
    normalise(&mut rows, d);
    let mut queries = noise(6, q * d);
    queries[..10 * d].copy_from_slice(&rows[100 * d..110 * d]);
    normalise(&mut queries[10 * d..], d);
    // Group 3 lies far away: its sum is tiny beside the others and must come out right all the same.
    let groups: Vec<u32> = (0..n).map(|i| if i % 1000 < 300 { 7 } else { (i % 4) as u32 }).collect();
    for (i, row) in rows.chunks_exact_mut(d).enumerate() {
        if groups[i] == 3 {
            row.iter_mut().for_each(|x| *x *= 40.0);
        }
    }
    let weights: Vec<f32> = noise(8, n)
        .iter()
        .enumerate()
        .map(|(i, x)| if i % 50 == 0 { 0.0 } else { (x + 1.01) * 1e-25 })
        .collect();
    let bytes = bytes_of(&rows);
    let own: Vec<u64> = (0..q as u64).map(|i| if i < 10 { 100 + i } else { NO_ROW }).collect();
    for level in Level::available() {
        for weights in [None, Some(weights.as_slice())] {
            let mut request = request(&queries, d, level);
            request.kernels = kernels(&[0.07, 0.5]);
            request.by_group = true;
            request.exclude_rows = Some(&own);
            request.exclude_within = 0.3;
            request.threads = 2;
            let scan = run(&shards(&bytes, d, &[1234], Some(&groups), weights), &request);
            let estimates = exact::by_group(&scan.sums, q, 4);
            assert_eq!(estimates.keys().copied().collect::<Vec<_>>(), [0, 1, 2, 3, 7]);
            for (&code, estimate) in &estimates {
                for at in 0..4 * q {
                    let query = at / 4;
                    let vector = &queries[query * d..][..d];
                    let keep = |i: usize, sq: f64| groups[i] == code && i as u64 != own[query] && sq >= 0.09;
                    let truth = direct(&rows, d, vector, request.kernels[at % 4], weights, keep);
                    let weight: f64 = rows
                        .chunks_exact(d)
                        .enumerate()
                        .filter(|&(i, row)| keep(i, sq_distance(row, vector)))
                        .map(|(i, _)| weights.map_or(1.0, |weights| f64::from(weights[i])))
                        .sum();
                    let label = format!("{} group {code} query {query} kernel {}", level.name(), at % 4);
                    assert_close(estimate.log_sum[at], truth.log_sum(), 3e-6, &label);
                    assert_close(estimate.log_density[at], truth.log_sum() - weight.ln(), 3e-6, &label);
                }
            }
        }
    }
}

#[test]
fn half_precision_rows_are_taken_as_stored() {
    let (d, n) = (48, 700);
    let mut queries = noise(3, 4 * d);
    normalise(&mut queries, d);
    let mut rows = noise(4, n * d);
    normalise(&mut rows, d);
    let half: Vec<half::f16> = rows.iter().map(|&x| half::f16::from_f32(x)).collect();
    // An odd offset: mapped files need not be aligned.
    let mut bytes = vec![0_u8];
    bytes.extend(half.iter().flat_map(|x| x.to_le_bytes()));
    let stored: Vec<f32> = half.iter().map(|x| x.to_f32()).collect();
    let view = ShardView {
        rows: Rows::new(&bytes[1..], Dtype::F16, n, d, None).unwrap(),
        groups: None,
        weights: None,
    };
    let mut single = vec![0_u8; 3];
    single.extend(bytes_of(&stored));
    let unaligned = ShardView {
        rows: Rows::new(&single[3..], Dtype::F32, n, d, None).unwrap(),
        groups: None,
        weights: None,
    };
    for level in Level::available() {
        let mut request = request(&queries, d, level);
        request.kernels = kernels(&[0.1]);
        for view in [view, unaligned] {
            let scan = run(&[view], &request);
            let estimate = exact::total(&scan.sums, 4, 2);
            for at in 0..8 {
                let truth =
                    direct(&stored, d, &queries[at / 2 * d..][..d], request.kernels[at % 2], None, |_, _| {
                        true
                    });
                assert_close(estimate.log_sum[at], truth.log_sum(), 2e-6, level.name());
            }
        }
    }
}

/// Rows as 8-bit integers with a scale each, and what they stand for.
fn quantise_i8(rows: &[f32], d: usize) -> (Vec<u8>, Vec<f32>, Vec<f32>) {
    let (mut bytes, mut scales, mut stored) = (Vec::new(), Vec::new(), Vec::new());
    for row in rows.chunks_exact(d) {
        let scale = row.iter().fold(0.0_f32, |largest, x| largest.max(x.abs())) / 127.0;
        scales.push(scale);
        for &x in row {
            let integer = if scale > 0.0 { (x / scale).round() as i8 } else { 0 };
            bytes.push(integer.cast_unsigned());
            stored.push(f32::from(integer) * scale);
        }
    }
    (bytes, scales, stored)
}

/// Rows around a few centres, so that some are near a query, some far, and some the same.
fn clustered(seed: u64, n: usize, d: usize) -> Vec<f32> {
    let centres = noise(seed, 8 * d);
    let jitter = noise(seed + 1, n * d);
    let mut rows = vec![0.0; n * d];
    for (i, row) in rows.chunks_exact_mut(d).enumerate() {
        let spread = [0.0_f32, 1e-3, 0.03, 0.2, 0.5, 1.0, 2.0][i % 7];
        for (k, x) in row.iter_mut().enumerate() {
            *x = centres[i % 8 * d + k] + spread * jitter[i * d + k];
        }
    }
    normalise(&mut rows, d);
    rows
}

#[test]
fn each_precision_keeps_its_bound_against_the_rows_as_stored() {
    let (n, q) = (1500, 12);
    for level in Level::available() {
        for d in [33, 100, 384] {
            for norm in [1e-3_f32, 1.0, 1e3] {
                let mut rows = clustered(d as u64, n, d);
                let mut queries = clustered(d as u64 + 5, q, d);
                queries[..8 * d].copy_from_slice(&clustered(d as u64, 8, d));
                rows.iter_mut().for_each(|x| *x *= norm);
                queries.iter_mut().for_each(|x| *x *= norm);
                let single = bytes_of(&rows);
                let (integers, scales, stored) = quantise_i8(&rows, d);
                let float_view = ShardView {
                    rows: Rows::new(&single, Dtype::F32, n, d, None).unwrap(),
                    groups: None,
                    weights: None,
                };
                let integer_rows = Rows::new(&integers, Dtype::I8, n, d, Some(&scales)).unwrap();
                let integer_view = ShardView { rows: integer_rows, groups: None, weights: None };
                for (view, truth) in [(float_view, &rows), (integer_view, &stored)] {
                    for precision in [Precision::Float32, Precision::Int16, Precision::Int8] {
                        if precision == Precision::Int8 && level.name() != "avx512" {
                            continue; // refused: tested below
                        }
                        let mut request = request(&queries, d, level);
                        request.precision = precision;
                        let widths = [0.03, 0.1, 0.2, 0.5, 1.0];
                        request.kernels = kernels(&widths.map(|h| h * f64::from(norm)));
                        request.neighbors = 10;
                        let scan = run(&[view], &request);
                        let count = request.kernels.len();
                        let estimate = exact::total(&scan.sums, q, count);
                        let mut recalled = 0;
                        for (j, query) in queries.chunks_exact(d).enumerate() {
                            for (b, &kernel) in request.kernels.iter().enumerate() {
                                if precision == Precision::Int8 && widths[b % widths.len()] < 0.1 {
                                    continue; // nothing is promised
                                }
                                let direct = direct(truth, d, query, kernel, None, |_, _| true).log_sum();
                                let direct = direct - (n as f64).ln();
                                let bound = match precision {
                                    Precision::Float32 => 1e-5,
                                    Precision::Int16 if widths[b % widths.len()] >= 0.2 => 1e-4,
                                    Precision::Int16 => 5e-4,
                                    Precision::Int8 => 5e-3,
                                };
                                let label = format!(
                                    "{} {precision:?} {:?} d {d} norm {norm} query {j} {kernel:?}",
                                    level.name(),
                                    view.rows.dtype()
                                );
                                assert_close(estimate.log_density[j * count + b], direct, bound, &label);
                            }
                            let mut order: Vec<(f64, u64)> = truth
                                .chunks_exact(d)
                                .enumerate()
                                .map(|(i, row)| (sq_distance(row, query), i as u64))
                                .collect();
                            order.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
                            let nearest: Vec<u64> = order.iter().take(10).map(|&(_, row)| row).collect();
                            recalled += scan.neighbors[j].iter().filter(|n| nearest.contains(&n.row)).count();
                        }
                        let floor = 0.999;
                        assert!(
                            recalled as f64 >= floor * (10 * q) as f64,
                            "recall {recalled} of {}",
                            10 * q
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn int8_is_refused_where_it_would_be_slower() {
    let queries = noise(1, 64);
    let mut request = request(&queries, 64, Level::PORTABLE);
    request.precision = Precision::Int8;
    let error = scan(&[], &request, None, &Control::default()).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Parameter);
}

#[test]
fn integer_sums_never_overflow() {
    // The worst rows and queries: one value alone, all values alike, opposite signs.
    for level in Level::available() {
        for d in [34, 516, 4096] {
            let mut rows = vec![0.0_f32; 4 * d];
            rows[0] = 1.0;
            rows[d..2 * d].fill(1.0);
            rows[2 * d..3 * d].fill(-1.0);
            rows[3 * d..].iter_mut().enumerate().for_each(|(k, x)| *x = if k % 2 == 0 { 1.0 } else { -1.0 });
            let bytes = vec![127_u8; 4 * d];
            let ones = vec![1.0 / 127.0; 4];
            let full = vec![1.0_f32; 4 * d];
            let single = bytes_of(&rows);
            let view = |rows| ShardView { rows, groups: None, weights: None };
            let float_view = view(Rows::new(&single, Dtype::F32, 4, d, None).unwrap());
            let integer_view = view(Rows::new(&bytes, Dtype::I8, 4, d, Some(&ones)).unwrap());
            for (view, truth) in [(float_view, &rows), (integer_view, &full)] {
                let mut request = request(&rows, d, level);
                request.precision = Precision::Int16;
                request.kernels = kernels(&[0.5 * (d as f64).sqrt()]);
                let estimate = exact::total(&run(&[view], &request).sums, 4, 2);
                for at in 0..8 {
                    let query = &rows[at / 2 * d..][..d];
                    let direct =
                        direct(truth, d, query, request.kernels[at % 2], None, |_, _| true).log_sum();
                    assert_close(estimate.log_sum[at], direct, 1e-4, level.name());
                }
            }
        }
    }
}

#[test]
fn cosines_and_the_sum_of_rows_are_right_for_any_norm() {
    let (d, n, q) = (10, 300, 20);
    let (rows, queries) = (noise(11, n * d), noise(12, q * d));
    let bytes = bytes_of(&rows);
    for level in Level::available() {
        let mut request = request(&queries, d, level);
        request.max_cosine = true;
        request.row_sum = true;
        let scan = run(&shards(&bytes, d, &[100], None, None), &request);
        for k in 0..d {
            let truth: f64 = rows.iter().skip(k).step_by(d).map(|&x| f64::from(x)).sum();
            assert!((scan.sums.row_sum[k] - truth).abs() < 1e-4);
        }
        for (j, query) in queries.chunks_exact(d).enumerate() {
            let norm = |x: &[f32]| x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            let truth = rows
                .chunks_exact(d)
                .map(|x| {
                    x.iter().zip(query).map(|(&x, &q)| f64::from(x) * f64::from(q)).sum::<f64>() / norm(x)
                })
                .fold(f64::NEG_INFINITY, f64::max);
            assert!((f64::from(scan.sums.max_projection[j]) - truth).abs() < 1e-5);
        }
    }
}

#[test]
fn bad_input_is_refused_with_its_row() {
    let level = Level::PORTABLE;
    let mut rows = noise(1, 200 * 4);
    rows[150 * 4 + 2] = f32::NAN;
    let bytes = bytes_of(&rows);
    let queries = noise(2, 8);
    let mut plain = request(&queries, 4, level);
    plain.kernels = kernels(&[1.0]);
    let error = scan(&shards(&bytes, 4, &[100], None, None), &plain, None, &Control::default()).unwrap_err();
    assert_eq!((error.kind, error.row), (ErrorKind::NotFinite, Some(150)));
    let bad = [1.0, f32::INFINITY];
    let error = scan(&[], &request(&bad, 1, level), None, &Control::default()).unwrap_err();
    assert_eq!((error.kind, error.row), (ErrorKind::NotFinite, Some(1)));
    let error = scan(
        &shards(&bytes, 4, &[], None, None),
        &request(&queries[..6], 3, level),
        None,
        &Control::default(),
    );
    assert_eq!(error.unwrap_err().kind, ErrorKind::Shape);
    let control = Control::default();
    control.stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let stopped = scan(&shards(&bytes, 4, &[], None, None), &plain, None, &control).unwrap_err();
    assert_eq!(stopped.kind, ErrorKind::Interrupted);
}

/// Everything a scan returns, to the bit.
fn fingerprint(scan: &Scan) -> Vec<u64> {
    let mut bits = Vec::new();
    for group in scan.sums.groups.values() {
        bits.extend(group.sums.iter().flat_map(|s| [s.max.to_bits(), s.sum.to_bits(), s.sum_sq.to_bits()]));
        bits.extend([group.rows, group.weight.to_bits()]);
        bits.extend(
            group.excluded.iter().flat_map(|(&q, &(rows, weight))| [u64::from(q), rows, weight.to_bits()]),
        );
    }
    bits.extend(scan.neighbors.iter().flatten().flat_map(|n| [n.row, n.sq_distance.to_bits()]));
    bits.extend(scan.sums.row_sum.iter().map(|x| x.to_bits()));
    bits.extend(&scan.sums.duplicates);
    bits
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn the_same_bytes_for_any_number_of_threads_and_any_batch(
        seed in any::<u64>(), n in 1_usize..20_000, q in 1_usize..80, cut in 0_usize..20_000, groups in 1_u32..5,
    ) {
        let d = 12;
        let (mut rows, mut queries) = (noise(seed, n * d), noise(seed ^ 9, q * d));
        normalise(&mut rows, d);
        normalise(&mut queries, d);
        let codes: Vec<u32> = (0..n as u32).map(|i| i.wrapping_mul(2_654_435_761) % groups).collect();
        let bytes = bytes_of(&rows);
        let views = shards(&bytes, d, &[cut], Some(&codes), None);
        for level in Level::available() {
            let mut request = request(&queries, d, level);
            request.kernels = kernels(&[0.1, 0.4]);
            request.neighbors = 3;
            request.by_group = true;
            request.row_sum = true;
            let first = fingerprint(&run(&views, &request));
            for (threads, memory) in [(2, 1 << 28), (3, 1), (7, 1 << 16)] {
                request.threads = threads;
                request.memory = memory;
                prop_assert_eq!(&fingerprint(&run(&views, &request)), &first);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]
    #[test]
    fn parts_of_any_ranges_fold_into_the_whole(
        seed in any::<u64>(), cuts in prop::collection::vec(0_usize..9000, 1..6), q in 1_usize..300,
        splits in prop::collection::vec(0_usize..8, 0..4), neighbors in 0_usize..5,
    ) {
        let (d, n) = (10, 9000);
        let (rows, queries) = (noise(seed, n * d), noise(seed ^ 9, q * d));
        let codes: Vec<u32> = (0..n as u32).map(|i| i / 2000 + i % 2).collect();
        let own: Vec<u64> = (0..q as u64).map(|i| if i % 3 == 0 { i * 7 } else { NO_ROW }).collect();
        let bytes = bytes_of(&rows);
        let mut cuts = cuts;
        cuts.sort_unstable();
        // Each shard is a segment at least; empty ones have none.
        let views = shards(&bytes, d, &cuts, Some(&codes), None);
        let segments = views.iter().filter(|view| !view.rows.is_empty()).count();
        let level = Level::available().pop().unwrap();
        let mut request = request(&queries, d, level);
        request.kernels = kernels(&[0.2, 1.0]);
        request.neighbors = neighbors;
        request.by_group = true;
        request.row_sum = true;
        request.max_cosine = true;
        request.exclude_rows = Some(&own);
        request.exclude_within = 0.3;
        let whole = run(&views, &request);

        let mut ends: Vec<usize> = splits.into_iter().map(|end| end.min(segments)).chain([segments]).collect();
        ends.sort_unstable();
        let mut parts: Vec<Part> = Vec::new();
        let mut start = 0;
        for (i, end) in ends.into_iter().enumerate() {
            // Other threads and memory for each range: batches and chunks of queries differ.
            (request.threads, request.memory) = [(1, 1 << 28), (2, 1), (3, 1 << 16)][i % 3];
            let mut sink = |part| {
                parts.push(part);
                Ok(())
            };
            scan_parts(&views, &request, Some(start..end), &Control::default(), &mut sink).unwrap();
            start = end;
        }
        let mut fold = Fold::new(q, request.kernels.len(), neighbors, 0);
        for part in &parts {
            fold.add(part).unwrap();
            prop_assert!(fold.add(part).is_err(), "a part was counted twice");
        }
        prop_assert_eq!(fold.next(), (segments, 0));
        let folded = fold.finish();
        prop_assert_eq!(folded.rows, n as u64);
        prop_assert_eq!(&folded.sums.max_projection, &whole.sums.max_projection);
        prop_assert_eq!(fingerprint(&folded), fingerprint(&whole));
    }
}

#[test]
fn an_error_of_the_sink_stops_the_scan() {
    let (rows, queries) = (noise(1, 50_000 * 4), noise(2, 400));
    let bytes = bytes_of(&rows);
    let views = shards(&bytes, 4, &[10_000, 20_000, 30_000], None, None);
    for threads in [1, 3] {
        let mut request = request(&queries, 4, Level::PORTABLE);
        (request.threads, request.kernels) = (threads, kernels(&[1.0]));
        let mut seen = 0;
        let mut sink = |part: Part| {
            seen += 1;
            if part.segment < 1 { Ok(()) } else { Err(lmd3::Error::new(ErrorKind::Output, "disk full")) }
        };
        let error = scan_parts(&views, &request, None, &Control::default(), &mut sink).unwrap_err();
        assert_eq!((error.kind, seen), (ErrorKind::Output, 2));
    }
}
