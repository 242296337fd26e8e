//! Every level this CPU has, every length around a lane, a tile and nothing, against double precision.

use super::tile::EXP2;
use super::*;

/// Lengths at which loops begin, end and change: nothing, one, lane ± 1, micro-tile ± 1, tile ± 1.
const ROWS: [usize; 14] = [0, 1, 2, 5, 6, 7, 11, 12, 13, 23, 25, 95, 96, 97];
const DIMS: [usize; 14] = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 384];

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

/// Levels with both widths of their panels.
fn for_each_shape(check: impl Fn(Level, usize)) {
    for_each_level(|level| {
        for queries in [1, 1000] {
            check(level, level.panel_width(queries));
        }
    });
}

/// The same, and the column of one query.
fn for_each_width(check: impl Fn(Level, usize)) {
    for_each_shape(&check);
    for_each_level(|level| check(level, 1));
}

fn for_each_level(check: impl Fn(Level)) {
    for level in Level::available() {
        println!("level {}", level.name());
        check(level);
    }
}

#[test]
fn names_round_trip_and_unknown_ones_are_refused() {
    for_each_level(|level| assert_eq!(Level::from_name(level.name()).unwrap(), level));
    assert!(Level::from_name("mmx").is_err());
}

#[test]
fn dots_norms_and_distances_agree_with_double_precision() {
    for_each_shape(|level, width| {
        for d in DIMS {
            let queries = noise(d as u64, width * d);
            let mut panel = vec![0.0; width * d];
            pack_panel(&queries, d, width, &mut panel);
            let mut query_norms = vec![0.0; width];
            level.sq_norms(&queries, d, &mut query_norms);
            for n in ROWS {
                let rows = noise(1000 + n as u64, n * d);
                let mut tile = vec![f32::NAN; n * width];
                level.dots(&rows, d, d, &panel, 4096, &mut tile);
                let mut apart = vec![f32::NAN; n * (d + 3)];
                apart
                    .chunks_exact_mut(d + 3)
                    .zip(rows.chunks_exact(d))
                    .for_each(|(to, row)| to[..d].copy_from_slice(row));
                let mut same = vec![f32::NAN; n * width];
                level.dots(&apart, d + 3, d, &panel, 4096, &mut same);
                assert_eq!(same, tile);
                let tolerance = 4e-7 * (d as f64);
                for (i, row) in rows.chunks_exact(d).enumerate() {
                    for (j, query) in queries.chunks_exact(d).enumerate() {
                        let exact: f64 =
                            row.iter().zip(query).map(|(&x, &q)| f64::from(x) * f64::from(q)).sum();
                        assert!(
                            (f64::from(tile[i * width + j]) - exact).abs() < tolerance,
                            "{d} {n} {i} {j}"
                        );
                    }
                }
                let (mut one, mut squares) = (vec![f32::NAN; n], vec![f32::NAN; n]);
                let stored = Rows::new(bytemuck::cast_slice(&rows), Dtype::F32, n, d, None).unwrap();
                assert!(level.dots_one(&stored, &queries[..d], 4096, &mut one, &mut squares));
                for (i, row) in rows.chunks_exact(d).enumerate() {
                    assert!((f64::from(one[i]) - f64::from(tile[i * width])).abs() < 2.0 * tolerance);
                    let exact: f64 = row.iter().map(|&x| f64::from(x).powi(2)).sum();
                    assert!((f64::from(squares[i]) / exact - 1.0).abs() < 1e-6);
                }
                let mut norms = vec![0.0; n];
                level.sq_norms(&rows, d, &mut norms);
                let mut min = vec![0.0; width];
                level.sq_distances(&mut tile, &norms, &query_norms, &mut min);
                let mut truth_min = vec![f64::from(FAR); width];
                for (i, row) in rows.chunks_exact(d).enumerate() {
                    for (j, query) in queries.chunks_exact(d).enumerate() {
                        let exact = level.sq_distance(row, query);
                        let direct: f64 =
                            row.iter().zip(query).map(|(&x, &q)| (f64::from(x) - f64::from(q)).powi(2)).sum();
                        assert!((exact - direct).abs() <= 1e-12 * direct);
                        assert!((f64::from(tile[i * width + j]) - direct).abs() < 4.0 * tolerance);
                        truth_min[j] = truth_min[j].min(f64::from(tile[i * width + j]));
                    }
                }
                assert_eq!(min.iter().map(|&x| f64::from(x)).collect::<Vec<_>>(), truth_min);
                let mut again = vec![0.0; width];
                level.column_min(&tile, &mut again);
                assert_eq!(again, min);
                level.sq_differences(&rows, d, &panel, &mut tile, &mut min);
                for (i, row) in rows.chunks_exact(d).enumerate() {
                    for (j, query) in queries.chunks_exact(d).enumerate() {
                        let exact = level.sq_distance(row, query);
                        let relative = (f64::from(tile[i * width + j]) - exact).abs() / exact;
                        assert!(relative < 1.2e-7 * (3.0 + d as f64), "{d} {n} {i} {j}: {relative:e}");
                    }
                }
                level.column_min(&tile, &mut again);
                assert_eq!(again, min);
            }
        }
    });
}

#[test]
fn integer_dots_are_exact_and_become_distances() {
    for_each_shape(|level, width| {
        for d in DIMS.map(|d| d.next_multiple_of(2)) {
            // The whole range, as far as sums fit 32 bits.
            let largest = (f64::from(i32::MAX) / d as f64).sqrt().min(32767.0) as f32;
            let integers = |seed: u64, n: usize| -> Vec<i16> {
                let mut out = vec![0; n];
                level.quantise(&noise(seed, n), largest, &mut out);
                out
            };
            let queries = integers(3, width * d);
            let mut panel = vec![0; width * d];
            pack_panel_i16(&queries, d, width, &mut panel);
            for n in ROWS {
                let rows = integers(4, n * d);
                let mut dots = vec![0_i32; n * width];
                level.dots_i16(&rows, d, &panel, 64, &mut dots);
                let exact = |x: &[i16], q: &[i16]| -> i64 {
                    x.iter().zip(q).map(|(&x, &q)| i64::from(x) * i64::from(q)).sum()
                };
                for (i, row) in rows.chunks_exact(d).enumerate() {
                    for (j, query) in queries.chunks_exact(d).enumerate() {
                        assert_eq!(i64::from(dots[i * width + j]), exact(row, query), "{d} {n} {i} {j}");
                    }
                }
                let mut one = vec![-1_i32; n];
                level.dots_one_i16(&rows, &queries[..d], &mut one);
                assert!(one.iter().enumerate().all(|(i, &dot)| dot == dots[i * width]));
                let row_scales: Vec<f32> = noise(5, n).iter().map(|x| 1e-4 * (x + 2.0)).collect();
                let query_scales: Vec<f32> = noise(6, width).iter().map(|x| 1e-4 * (x + 2.0)).collect();
                let norm = |v: &[i16], scale: f32| (exact(v, v) as f64 * f64::from(scale).powi(2)) as f32;
                let norms: Vec<f32> =
                    rows.chunks_exact(d).zip(&row_scales).map(|(row, &scale)| norm(row, scale)).collect();
                let query_norms: Vec<f32> =
                    queries.chunks_exact(d).zip(&query_scales).map(|(q, &scale)| norm(q, scale)).collect();
                let mut tile: Vec<f32> =
                    dots.iter().map(|&dot| f32::from_bits(dot.cast_unsigned())).collect();
                let mut min = vec![0.0; width];
                let scales = RowScales { norms: &norms, scales: &row_scales };
                level.sq_distances_i32(&mut tile, scales, &query_norms, &query_scales, &mut min);
                for (i, row) in rows.chunks_exact(d).enumerate() {
                    for (j, query) in queries.chunks_exact(d).enumerate() {
                        let (a, b) = (f64::from(row_scales[i]), f64::from(query_scales[j]));
                        let truth: f64 = row
                            .iter()
                            .zip(query)
                            .map(|(&x, &q)| (f64::from(x) * a - f64::from(q) * b).powi(2))
                            .sum();
                        let size = f64::from(norms[i] + query_norms[j]);
                        assert!((f64::from(tile[i * width + j]) - truth).abs() < 5e-7 * size);
                    }
                }
                let mut again = vec![0.0; width];
                level.column_min(&tile, &mut again);
                assert_eq!(again, min);
            }
        }
    });
}

#[test]
fn one_column_is_the_first_of_many() {
    for_each_level(|level| {
        let width = level.panel_width(1000);
        for n in ROWS {
            let dots = noise(21, n * width);
            let norms: Vec<f32> = noise(22, n).iter().map(|x| x + 1.5).collect();
            let halves: Vec<f32> = norms.iter().map(|norm| 0.5 / norm.sqrt()).collect();
            let query_norms = vec![0.9; width];
            let (mut wide, mut min) = (dots.clone(), vec![0.0; width]);
            let (mut column, mut one) =
                (dots.iter().step_by(width).copied().collect::<Vec<_>>(), vec![0.0; 1]);
            level.sq_distances(&mut wide, &norms, &query_norms, &mut min);
            level.sq_distances(&mut column, &norms, &query_norms[..1], &mut one);
            assert!(wide.iter().step_by(width).zip(&column).all(|(a, b)| a == b));
            assert_eq!(min[0], one[0]);
            level.column_min(&column, &mut one);
            assert_eq!(min[0], one[0]);
            let (mut max, mut one) = (vec![f32::NEG_INFINITY; width], vec![f32::NEG_INFINITY; 1]);
            level.max_projection(&wide, &norms, &halves, &query_norms, &mut max);
            level.max_projection(&column, &norms, &halves, &query_norms[..1], &mut one);
            assert_eq!(max[0], one[0]);
            let scales = RowScales { norms: &norms, scales: &halves };
            let integers: Vec<f32> =
                dots.iter().map(|x| f32::from_bits(((x * 1e6) as i32).cast_unsigned())).collect();
            let (mut wide, mut column) =
                (integers.clone(), integers.iter().step_by(width).copied().collect::<Vec<_>>());
            let mut one = vec![0.0; 1];
            level.sq_distances_i32(&mut wide, scales, &query_norms, &vec![1e-6; width], &mut min);
            level.sq_distances_i32(&mut column, scales, &query_norms[..1], &[1e-6], &mut one);
            assert!(wide.iter().step_by(width).zip(&column).all(|(a, b)| a == b));
            assert_eq!(min[0], one[0]);
        }
    });
}

#[test]
fn dots_of_bytes_are_exact() {
    for_each_shape(|level, width| {
        for d in DIMS.map(|d| d.next_multiple_of(4)) {
            let bytes = |seed: u64, n: usize| -> Vec<i8> {
                let mut out = vec![0; n];
                let sum = level.quantise_i8(&noise(seed, n), 127.0, &mut out);
                assert_eq!(sum, out.iter().map(|&x| i32::from(x)).sum::<i32>());
                out
            };
            let queries = bytes(3, width * d);
            let mut panel = vec![0; width * d];
            pack_panel_i8(&queries, d, width, &mut panel);
            for n in ROWS {
                let rows = bytes(4, n * d);
                let unsigned: Vec<u8> = rows.iter().map(|x| x.cast_unsigned()).collect();
                let sums: Vec<i32> =
                    unsigned.chunks_exact(d).map(|row| level.copy_i8(row, &mut vec![0; d]).0).collect();
                let mut dots = vec![0_i32; n * width];
                level.dots_i8(&rows, &sums, d, &panel, 64, &mut dots);
                for (i, row) in rows.chunks_exact(d).enumerate() {
                    for (j, query) in queries.chunks_exact(d).enumerate() {
                        let exact: i32 =
                            row.iter().zip(query).map(|(&x, &q)| i32::from(x) * i32::from(q)).sum();
                        assert_eq!(dots[i * width + j], exact, "{d} {n} {i} {j}");
                    }
                }
            }
        }
    });
}

#[test]
fn quantising_rounds_to_the_nearest() {
    for_each_level(|level| {
        let values = noise(9, 1001);
        let mut out = vec![0_i16; 1001];
        level.quantise(&values, 32767.0, &mut out);
        for (&value, &integer) in values.iter().zip(&out) {
            assert_eq!(integer, (value * 32767.0).round_ties_even() as i16);
        }
    });
}

#[test]
fn rows_become_integers_of_one_norm_with_their_scales() {
    for_each_level(|level| {
        for d in DIMS {
            for n in [0, 1, 2, 13] {
                let mut values = noise(11, n * d);
                // A row without direction.
                values.iter_mut().take(d).for_each(|value| *value = 0.0);
                let halves: Vec<u8> =
                    values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect();
                for (bytes, dtype) in [(bytemuck::cast_slice(&values), Dtype::F32), (&halves[..], Dtype::F16)]
                {
                    let rows = Rows::new(bytes, dtype, n, d, None).unwrap();
                    let stride = d + 3;
                    let (mut integers, mut norms, mut scales) =
                        (vec![7_i16; n * stride], vec![0.0; n], vec![0.0; n]);
                    let mut into =
                        Integers { stride, values: &mut integers, norms: &mut norms, scales: &mut scales };
                    assert!(level.quantise_rows(&rows, 32_000.0, &mut into));
                    let mut row = vec![0.0; d];
                    for i in 0..n {
                        rows.read_f32(i, &mut row);
                        let exact: f64 = row.iter().map(|&x| f64::from(x).powi(2)).sum();
                        assert!((f64::from(norms[i]) - exact).abs() <= 1e-6 * exact);
                        for (k, &x) in row.iter().enumerate() {
                            let back = f64::from(integers[i * stride + k]) * f64::from(scales[i]);
                            assert!(
                                (back - f64::from(x)).abs() <= 0.51 * f64::from(scales[i]),
                                "{d} {i} {k}"
                            );
                        }
                        assert!(integers[i * stride + d..(i + 1) * stride].iter().all(|&x| x == 7));
                    }
                }
            }
        }
    });
}

#[test]
fn bytes_widen_and_multiply_exactly() {
    for_each_level(|level| {
        for d in DIMS {
            let n = 300_usize.div_ceil(d);
            let bytes: Vec<u8> = (0..n * d).map(|i| i as u8).collect();
            let query: Vec<i16> = noise(12, d).iter().map(|x| (x * 32_767.0) as i16).collect();
            let (mut wide, mut squares) = (vec![9_i16; n * (d + 1)], vec![-1; n]);
            level.widen_i8(&bytes, d, d + 1, &mut wide, &mut squares);
            let (mut dots, mut again) = (vec![-1; n], vec![-1; n]);
            level.dots_one_i8(&bytes, &query, 0, &mut dots, &mut again);
            assert_eq!(squares, again);
            for (i, row) in bytes.chunks_exact(d).enumerate() {
                let row: Vec<i32> = row.iter().map(|x| i32::from(x.cast_signed())).collect();
                assert_eq!(squares[i], row.iter().map(|x| x * x).sum::<i32>());
                assert_eq!(dots[i], row.iter().zip(&query).map(|(x, &q)| x * i32::from(q)).sum::<i32>());
                assert!(row.iter().zip(&wide[i * (d + 1)..]).all(|(x, &y)| *x == i32::from(y)));
                assert_eq!(wide[i * (d + 1) + d], 9);
            }
        }
    });
}

#[test]
fn hits_are_exactly_the_values_below_the_cut() {
    for_each_width(|level, width| {
        for n in ROWS {
            let tile: Vec<f32> = noise(7, n * width).iter().map(|x| x + 1.0).collect();
            let cut: Vec<f32> =
                (0..width).map(|lane| if lane % 3 == 0 { f32::NEG_INFINITY } else { 0.3 }).collect();
            let mut min = vec![0.0; width];
            level.column_min(&tile, &mut min);
            let mut hits = Vec::new();
            level.below(&tile, &min, &cut, &mut hits);
            hits.sort_unstable();
            let expected: Vec<(u32, u32)> = (0..n * width)
                .filter(|&i| tile[i] < cut[i % width])
                .map(|i| ((i / width) as u32, (i % width) as u32))
                .collect();
            assert_eq!(hits, expected);
        }
    });
}

#[test]
fn kernel_sums_agree_with_double_precision_at_any_shift() {
    for_each_width(|level, width| {
        let exponents: Vec<Exponent> =
            [(true, 3.0_f32), (false, 0.7), (true, 40.0), (false, 90.0), (true, 0.01)]
                .map(|(root, coefficient)| Exponent { root, coefficient })
                .to_vec();
        for n in ROWS {
            for weighted in [false, true] {
                let weights: Vec<f32> = noise(3, n).iter().map(|x| x + 1.0).collect();
                let weights = weighted.then_some(weights.as_slice());
                let mut min_state = vec![FAR; width];
                let mut sums = vec![0.0_f64; 2 * width * exponents.len()];
                let mut all: Vec<Vec<(f32, f32)>> = vec![Vec::new(); width];
                // Three tiles at falling distances: the shift has to move.
                for (round, scale) in [4.0_f32, 1.0, 0.25].into_iter().enumerate() {
                    let mut tile: Vec<f32> =
                        noise(round as u64, n * width).iter().map(|x| (x + 1.1) * scale).collect();
                    for (i, &value) in tile.iter().enumerate() {
                        all[i % width].push((value, weights.map_or(1.0, |weights| weights[i / width])));
                    }
                    let mut min = vec![0.0; width];
                    level.column_min(&tile, &mut min);
                    let mut into = PanelSums { min: &mut min_state, sums: &mut sums };
                    level.accumulate(&mut tile, &min, weights, &exponents, &mut into);
                }
                if n == 0 {
                    assert!(min_state.iter().all(|&min| min == FAR) && sums.iter().all(|&sum| sum == 0.0));
                    continue;
                }
                for (index, exponent) in exponents.iter().enumerate() {
                    for lane in 0..width {
                        let g = |x: f32| if exponent.root { f64::from(x).sqrt() } else { f64::from(x) };
                        let shift = exponent.shift(min_state[lane]);
                        let e = |x: f32| (-f64::from(exponent.coefficient) * g(x) - shift).exp2();
                        let truth: f64 = all[lane].iter().map(|&(x, w)| e(x) * f64::from(w)).sum();
                        let truth_sq: f64 =
                            all[lane].iter().map(|&(x, w)| (e(x) * f64::from(w)).powi(2)).sum();
                        let sum = sums[2 * width * index + lane];
                        let sum_sq = sums[2 * width * index + width + lane];
                        let label = format!("{} rows {n} exponent {index}: {sum} {truth}", level.name());
                        assert!((sum / truth - 1.0).abs() < 3e-6, "{label}");
                        assert!((sum_sq / truth_sq - 1.0).abs() < 6e-6, "{label}");
                    }
                }
            }
        }
    });
}

#[test]
fn masked_values_and_distant_ones_weigh_nothing() {
    for_each_width(|level, width| {
        let exponents =
            [Exponent { root: true, coefficient: 1.0 }, Exponent { root: false, coefficient: 1e3 }];
        let mut min_state = vec![FAR; width];
        let mut sums = vec![0.0; 4 * width];
        for value in [FAR, 1e8, 1.0, FAR, 3e9] {
            let mut tile = vec![value; width];
            let min = vec![value; width];
            let mut into = PanelSums { min: &mut min_state, sums: &mut sums };
            level.accumulate(&mut tile, &min, None, &exponents, &mut into);
        }
        assert!(min_state.iter().all(|&min| min == 1.0));
        assert!(sums.iter().all(|&sum| (sum - 1.0).abs() < 1e-6), "{sums:?}");
    });
}

#[test]
fn half_precision_widens_exactly() {
    for_each_level(|level| {
        let bytes: Vec<u8> =
            (0..=u16::MAX).filter(|bits| bits & 0x7c00 != 0x7c00).flat_map(u16::to_le_bytes).collect();
        for n in [0, 1, 7, 8, 9, 15, 16, 17, bytes.len() / 2] {
            let rows = Rows::new(&bytes[..2 * n], Dtype::F16, n, 1, None).unwrap();
            let mut wide = vec![f32::NAN; n];
            let mut norms = vec![f32::NAN; n];
            level.widen(&rows, &mut wide, &mut norms);
            assert!(norms.iter().zip(&wide).all(|(norm, value)| *norm == value * value));
            for (value, bytes) in wide.iter().zip(bytes.chunks_exact(2)) {
                assert_eq!(*value, half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32());
            }
        }
    });
}

#[test]
fn weighted_rows_add_up() {
    for_each_level(|level| {
        for d in DIMS {
            for n in ROWS {
                let rows = noise(5, n * d);
                let weights: Vec<f32> = noise(6, n).iter().map(|x| x + 1.0).collect();
                let mut sum = vec![0.5_f64; d];
                level.add_rows(&rows, d, Some(&weights), &mut vec![0.0; d], &mut sum);
                for (k, &sum) in sum.iter().enumerate() {
                    let truth: f64 = (0..n).map(|i| f64::from(rows[i * d + k]) * f64::from(weights[i])).sum();
                    assert!((sum - 0.5 - truth).abs() < 1e-4);
                }
            }
        }
    });
}

#[test]
fn the_polynomial_is_as_accurate_as_it_says() {
    let worst = (-5000..=5000)
        .map(|i| {
            let f = i as f32 * 1e-4;
            let p = EXP2.iter().rev().fold(0.0_f64, |p, &c| p * f64::from(f) + f64::from(c));
            (p / f64::from(f).exp2() - 1.0).abs()
        })
        .fold(0.0, f64::max);
    assert!(worst < 1.6e-7, "{worst:e}");
}
