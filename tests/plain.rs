//! Kernels of the plain path against naive sums, alone and beside fused kernels.

use lmd3::error::ErrorKind;
use lmd3::kernel::{Kernel, ScaledKernel};
use lmd3::logsum::LogSum;
use lmd3::scan::{Control, Io, NO_ROW, Precision, Request, Scan, plan::BLOCK_ROWS, scan};
use lmd3::simd::Level;
use lmd3::{Dtype, Rows, ShardView};

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

fn normalised(mut rows: Vec<f32>, d: usize) -> Vec<f32> {
    for row in rows.chunks_exact_mut(d) {
        let norm = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        row.iter_mut().for_each(|x| *x = (f64::from(*x) / norm) as f32);
    }
    rows
}

/// Rows over two shards and a block's end, with groups and weights; queries of which some are rows.
struct Case {
    d: usize,
    bytes: Vec<u8>,
    rows: Vec<f32>,
    groups: Vec<u32>,
    weights: Vec<f32>,
    queries: Vec<f32>,
    own: Vec<u64>,
}

impl Case {
    fn new(d: usize) -> Self {
        let n = BLOCK_ROWS + 300;
        let rows = normalised(noise(1, n * d), d);
        let mut queries = normalised(noise(2, 7 * d), d);
        queries.extend_from_slice(&rows[5 * d..6 * d]);
        let mut own = vec![NO_ROW; 8];
        own[7] = 5;
        Self {
            d,
            bytes: rows.iter().flat_map(|x| x.to_le_bytes()).collect(),
            groups: (0..n as u32).map(|row| row / 50 % 3).collect(),
            weights: noise(3, n).into_iter().map(|w| if w < -0.8 { 0.0 } else { w.abs() }).collect(),
            rows,
            queries,
            own,
        }
    }

    fn scan(&self, kernels: &[ScaledKernel], level: Level, threads: usize) -> Scan {
        let n = self.groups.len();
        let all = Rows::new(&self.bytes, Dtype::F32, n, self.d, None).unwrap();
        let cut = BLOCK_ROWS + 100;
        let shard = |start: usize, end: usize| ShardView {
            rows: all.slice(start, end),
            groups: Some(&self.groups[start..end]),
            weights: Some(&self.weights[start..end]),
        };
        let request = Request { level, threads, exclude_rows: Some(&self.own), ..self.request(kernels) };
        scan(&[shard(0, cut), shard(cut, n)], &request, None, &Control::default()).unwrap()
    }

    fn request(&self, kernels: &[ScaledKernel]) -> Request<'_> {
        Request {
            queries: &self.queries,
            d: self.d,
            kernels: kernels.to_vec(),
            neighbors: 3,
            by_group: true,
            exclude_rows: None,
            exclude_within: 0.0,
            row_rounding: 6e-8,
            max_cosine: true,
            row_sum: true,
            precision: Precision::Float32,
            level: Level::current().unwrap(),
            threads: 1,
            memory: 1 << 28,
            io: Io::Map,
        }
    }

    /// log Σ w k over one group, pair by pair.
    fn truth(&self, kernel: &ScaledKernel, query: usize, group: u32) -> LogSum {
        let d = self.d;
        let q = &self.queries[query * d..(query + 1) * d];
        let mut sum = LogSum::EMPTY;
        for (row, x) in self.rows.chunks_exact(d).enumerate() {
            if self.groups[row] != group || self.own[query] == row as u64 {
                continue;
            }
            let pairs = || x.iter().zip(q).map(|(&x, &q)| (f64::from(x), f64::from(q)));
            let measure = match kernel.kernel {
                Kernel::Laplacian => pairs().map(|(x, q)| (x - q).abs()).sum::<f64>(),
                Kernel::VonMisesFisher => pairs().map(|(x, q)| x * q).sum::<f64>(),
                _ => pairs().map(|(x, q)| (x - q).powi(2)).sum::<f64>(),
            };
            sum.push(kernel.log_weight(measure) + f64::from(self.weights[row]).ln());
        }
        sum
    }
}

fn kernels(which: &[(Kernel, f64)]) -> Vec<ScaledKernel> {
    which.iter().map(|&(kernel, h)| ScaledKernel::new(kernel, h).unwrap()).collect()
}

const MIXED: [(Kernel, f64); 7] = [
    (Kernel::Tophat, 1.2),
    (Kernel::Exponential, 0.3),
    (Kernel::VonMisesFisher, 0.25),
    (Kernel::Laplacian, 0.8),
    (Kernel::Gaussian, 0.4),
    (Kernel::Epanechnikov, 1.1),
    (Kernel::Linear, 1.3),
];

fn bits(scan: &Scan, columns: usize, column: usize) -> Vec<[u64; 3]> {
    let groups = scan.sums.groups.values();
    groups
        .flat_map(|group| group.sums.iter().skip(column).step_by(columns))
        .map(|sum| [sum.max.to_bits(), sum.sum.to_bits(), sum.sum_sq.to_bits()])
        .collect()
}

#[test]
fn sums_of_groups_are_the_naive_ones_with_weights_and_left_out_rows() {
    for d in [3, 19, 64] {
        let case = Case::new(d);
        let kernels = kernels(&MIXED);
        let scan = case.scan(&kernels, Level::current().unwrap(), 2);
        for (&code, group) in &scan.sums.groups {
            for (at, sum) in group.sums.iter().enumerate() {
                let (query, kernel) = (at / kernels.len(), &kernels[at % kernels.len()]);
                let truth = case.truth(kernel, query, code);
                let allowed = if kernel.kernel.is_fused() { 1e-5 } else { 1e-11 };
                for (found, expected) in
                    [(sum.log_sum(), truth.log_sum()), (sum.log_sum_sq(), truth.log_sum_sq())]
                {
                    let same =
                        found == expected || (found - expected).abs() <= allowed * expected.abs().max(1.0);
                    assert!(same, "{kernel:?} d {d} query {query} group {code}: {found}, not {expected}");
                }
            }
        }
        assert_eq!(scan.sums.groups.values().map(|group| group.excluded.len()).sum::<usize>(), 1);
    }
}

#[test]
fn columns_keep_their_bytes_beside_others_and_with_any_threads_and_level() {
    let case = Case::new(40);
    let columns = MIXED.len();
    let together = case.scan(&kernels(&MIXED), Level::current().unwrap(), 1);
    for threads in [2, 3, 7] {
        let scan = case.scan(&kernels(&MIXED), Level::current().unwrap(), threads);
        (0..columns).for_each(|c| assert_eq!(bits(&scan, columns, c), bits(&together, columns, c)));
    }
    for (column, &one) in MIXED.iter().enumerate() {
        let alone = case.scan(&kernels(&[one]), Level::current().unwrap(), 1);
        if !one.0.is_fused() {
            for level in Level::available() {
                assert_eq!(
                    bits(&case.scan(&kernels(&[one]), level, 2), 1, 0),
                    bits(&together, columns, column)
                );
            }
        }
        assert_eq!(alone.neighbors, together.neighbors);
        assert_eq!(alone.sums.duplicates, together.sums.duplicates);
    }
}

#[test]
fn vectors_off_the_sphere_are_refused_by_name() {
    let mut case = Case::new(8);
    let vmf = kernels(&[(Kernel::VonMisesFisher, 0.3)]);
    let run = |case: &Case| {
        let rows = Rows::new(&case.bytes, Dtype::F32, case.groups.len(), 8, None).unwrap();
        let view = ShardView { rows, groups: None, weights: None };
        scan(&[view], &case.request(&vmf), None, &Control::default())
    };
    assert!(run(&case).is_ok());
    let row = BLOCK_ROWS + 21;
    case.bytes[row * 32 + 3] ^= 1;
    let error = run(&case).unwrap_err();
    assert_eq!((error.kind, error.row), (ErrorKind::Parameter, Some(row as u64)));
    case.queries[6 * 8] += 2.5;
    let error = run(&case).unwrap_err();
    assert!(error.kind == ErrorKind::Parameter && error.message.contains("query 6"), "{error}");
}
