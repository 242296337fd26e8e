//! What this machine can do at most: multiply-adds held in registers, and reading memory. Scans are judged against these.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use super::Level;
use super::level::Set;

/// Steps of a loop between two looks at the clock.
const STEPS: usize = 20_000;

/// The highest rate of single-precision arithmetic.
#[derive(Clone, Copy, Debug)]
pub struct Arithmetic {
    /// Multiplications and additions per second.
    pub operations: f64,
    /// The clock (Hz, one thread's) at which two vector multiply-adds a cycle give this rate; None for the portable level, whose
    /// vectors are the compiler's choice.
    pub implied_clock: Option<f64>,
}

/// Measures multiply-adds that touch nothing but registers, in 16 (AVX-512, portable) or 12 (AVX2) independent chains: the
/// best of several bursts, for a shared host takes some of the time.
pub fn arithmetic(level: Level, threads: usize, time: Duration) -> Arithmetic {
    let operations = best(threads, time, |_| {
        let operations = match level.set() {
            Set::Portable => portable(),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: holding a level proves that the CPU has its instructions.
            Set::Avx2 => unsafe { x86::avx2() },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Set::Avx512 => unsafe { x86::avx512() },
        };
        operations as f64
    });
    let lanes = match level.set() {
        Set::Portable => None,
        #[cfg(target_arch = "x86_64")]
        Set::Avx2 => Some(8.0),
        #[cfg(target_arch = "x86_64")]
        Set::Avx512 => Some(16.0),
    };
    let implied_clock = lanes.map(|lanes| operations / threads as f64 / (2.0 * 2.0 * lanes));
    Arithmetic { operations, implied_clock }
}

/// Measures products of 16-bit integers summed in 32 bits (two operations each) in registers, as `arithmetic` does.
pub fn arithmetic_i16(level: Level, threads: usize, time: Duration) -> f64 {
    best(threads, time, |_| {
        let operations = match level.set() {
            Set::Portable => portable_i16(),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: holding a level proves that the CPU has its instructions, and VNNI was detected.
            Set::Avx512 if level.has_fast_int8() => unsafe { x86::avx512_i16() },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a level with AVX-512 has AVX2 as well.
            Set::Avx512 | Set::Avx2 => unsafe { x86::avx2_i16() },
        };
        operations as f64
    })
}

/// The same of 8-bit integers, where an instruction multiplies four at a time; None elsewhere.
pub fn arithmetic_i8(level: Level, threads: usize, time: Duration) -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    if level.has_fast_int8() {
        // SAFETY: VNNI was detected.
        return Some(best(threads, time, |_| unsafe { x86::avx512_i8() } as f64));
    }
    let _ = (level, threads, time);
    None
}

/// Measures the micro-kernel of `dots` on operands that stay in the first-level cache, one thread: operations per second.
/// Below .95 of `arithmetic` somebody else is at work on this host.
pub fn cached_dots(level: Level, time: Duration) -> f64 {
    let d = super::CHAIN;
    let width = level.panel_width(usize::MAX);
    // Whole micro-tiles at every level.
    let rows = 24;
    let (x, panel) = (vec![0.5_f32; rows * d], vec![0.25_f32; d * width]);
    best(1, time, |_| {
        let mut out = vec![0.0; rows * width];
        for _ in 0..200 {
            level.dots(black_box(&x), d, d, black_box(&panel), 0, &mut out);
        }
        black_box(&out);
        (200 * 2 * rows * d * width) as f64
    })
}

/// Measures the clock (Hz) of one thread by additions that wait for each other, one a cycle; None where that is not known.
pub fn clock(time: Duration) -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    {
        Some(best(1, time, |_| x86::dependent_additions() as f64))
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = time;
        None
    }
}

/// Measures the bytes per second that threads read together from `bytes` of memory, which should be far more than the caches.
pub fn read_bandwidth(threads: usize, bytes: usize, time: Duration) -> f64 {
    let words: Vec<u64> = (0..bytes / 8).map(|i| i as u64).collect();
    let share = words.len() / threads;
    best(threads, time, |thread| {
        let slice = &words[thread * share..(thread + 1) * share];
        black_box(add_up(black_box(slice)));
        8.0 * slice.len() as f64
    })
}

/// Runs bursts of work on all threads for about `time` and returns the highest rate of amounts per second.
fn best(threads: usize, time: Duration, work: impl Fn(usize) -> f64 + Sync) -> f64 {
    const BURSTS: u32 = 8;
    let barrier = Barrier::new(threads);
    let run = |thread: usize| {
        work(thread);
        let rates = (0..BURSTS).map(|_| {
            barrier.wait();
            let start = Instant::now();
            let mut amount = 0.0;
            while start.elapsed() < time / BURSTS || amount == 0.0 {
                amount += work(thread);
            }
            amount / start.elapsed().as_secs_f64()
        });
        rates.collect::<Vec<f64>>()
    };
    let rates: Vec<Vec<f64>> = std::thread::scope(|scope| {
        let run = &run;
        let others: Vec<_> = (1..threads).map(|thread| scope.spawn(move || run(thread))).collect();
        let mut rates = vec![run(0)];
        rates.extend(others.into_iter().filter_map(|other| other.join().ok()));
        rates
    });
    let burst = |index: usize| rates.iter().map(|rates| rates[index]).sum::<f64>();
    (0..BURSTS as usize).map(burst).fold(0.0, f64::max)
}

/// Wrapping sum of words in 32 chains, which the compiler holds in vectors.
fn add_up(words: &[u64]) -> u64 {
    let mut sums = [0_u64; 32];
    for chunk in words.chunks_exact(32) {
        for (sum, &word) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(word);
        }
    }
    sums.iter().fold(0, |sum, &part| sum.wrapping_add(part))
}

/// Multiply-adds as any CPU has them; returns the operations done.
fn portable() -> usize {
    const LANES: usize = 4;
    let (x, y) = black_box((1.000_1_f32, 1e-3_f32));
    let mut sums: [[f32; LANES]; 16] = std::array::from_fn(|i| [i as f32; LANES]);
    for _ in 0..STEPS {
        for lane in sums.iter_mut().flatten() {
            *lane = *lane * x + y;
        }
        if sums[0][0] > 1e30 {
            sums = [[1.0; LANES]; 16];
        }
    }
    black_box(sums);
    STEPS * 16 * LANES * 2
}

/// Products of integers as any CPU has them; returns the operations done.
fn portable_i16() -> usize {
    const LANES: usize = 8;
    let x: [i16; LANES] = black_box([3; LANES]);
    let mut sums = [[0_i32; LANES]; 8];
    for _ in 0..STEPS {
        for sums in &mut sums {
            for (sum, &x) in sums.iter_mut().zip(&x) {
                *sum = sum.wrapping_add(i32::from(x) * i32::from(x));
            }
        }
        black_box(&mut sums);
    }
    STEPS * 8 * LANES * 2
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::STEPS;

    /// Returns the operations done.
    #[target_feature(enable = "avx2,fma")]
    pub fn avx2() -> usize {
        let (x, y) = black_box((_mm256_set1_ps(1e-3), _mm256_set1_ps(1e-3)));
        let mut sums: [__m256; 12] = std::array::from_fn(|i| _mm256_set1_ps(i as f32));
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(x, y, *sum);
            }
        }
        black_box(sums);
        STEPS * 12 * 8 * 2
    }

    /// Returns the operations done.
    #[target_feature(enable = "avx512f")]
    pub fn avx512() -> usize {
        let (x, y) = black_box((_mm512_set1_ps(1e-3), _mm512_set1_ps(1e-3)));
        let mut sums: [__m512; 16] = std::array::from_fn(|i| _mm512_set1_ps(i as f32));
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(x, y, *sum);
            }
        }
        black_box(sums);
        STEPS * 16 * 16 * 2
    }

    /// Returns the operations done: one product and one addition for each pair of 16-bit integers.
    #[target_feature(enable = "avx2")]
    pub fn avx2_i16() -> usize {
        let (x, y) = black_box((_mm256_set1_epi16(3), _mm256_set1_epi16(5)));
        let mut sums: [__m256i; 12] = std::array::from_fn(|i| _mm256_set1_epi32(i as i32));
        for _ in 0..STEPS {
            for sum in &mut sums {
                // SAFETY: registers only. In assembly, since the compiler would multiply once for all.
                unsafe {
                    asm!(
                        "vpmaddwd {t}, {x}, {y}", "vpaddd {sum}, {sum}, {t}",
                        t = out(ymm_reg) _, x = in(ymm_reg) x, y = in(ymm_reg) y, sum = inout(ymm_reg) *sum,
                        options(pure, nomem, nostack)
                    );
                }
            }
        }
        black_box(sums);
        STEPS * 12 * 16 * 2
    }

    /// Returns the operations done.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn avx512_i16() -> usize {
        let (x, y) = black_box((_mm512_set1_epi16(3), _mm512_set1_epi16(5)));
        let mut sums: [__m512i; 16] = std::array::from_fn(|i| _mm512_set1_epi32(i as i32));
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm512_dpwssd_epi32(*sum, x, y);
            }
        }
        black_box(sums);
        STEPS * 16 * 32 * 2
    }

    /// Returns the operations done.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn avx512_i8() -> usize {
        let (x, y) = black_box((_mm512_set1_epi8(3), _mm512_set1_epi8(5)));
        let mut sums: [__m512i; 16] = std::array::from_fn(|i| _mm512_set1_epi32(i as i32));
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, x, y);
            }
        }
        black_box(sums);
        STEPS * 16 * 64 * 2
    }

    /// Additions of which each waits for the one before; returns their number.
    pub fn dependent_additions() -> usize {
        let mut value = black_box(1_u64);
        for _ in 0..STEPS {
            // SAFETY: adds a register to itself and touches nothing else.
            unsafe {
                asm!(
                    "add {0}, {0}", "add {0}, {0}", "add {0}, {0}", "add {0}, {0}", "add {0}, {0}", "add {0}, {0}",
                    "add {0}, {0}", "add {0}, {0}", "add {0}, {0}", "add {0}, {0}", "add {0}, {0}", "add {0}, {0}",
                    "add {0}, {0}", "add {0}, {0}", "add {0}, {0}", "add {0}, {0}",
                    inout(reg) value, options(pure, nomem, nostack)
                );
            }
        }
        black_box(value);
        STEPS * 16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_of_a_real_machine() {
        let time = Duration::from_millis(40);
        for level in Level::available() {
            let found = arithmetic(level, 1, time);
            assert!(found.operations > 2e8 && found.operations < 1e13, "{found:?}");
            let integers = arithmetic_i16(level, 1, time);
            assert!(integers > 2e8 && integers < 1e13, "{integers:e}");
            assert_eq!(arithmetic_i8(level, 1, time).is_some(), level.has_fast_int8());
            assert!(cached_dots(level, time) > 1e7);
            if let Some(clock) = found.implied_clock {
                assert!((2e8..8e9).contains(&clock), "{found:?}");
            }
        }
        let bandwidth = read_bandwidth(2, 1 << 24, time);
        assert!(bandwidth > 1e8 && bandwidth < 1e13);
        if let Some(clock) = clock(time) {
            assert!((3e8..8e9).contains(&clock), "{clock:e}");
        }
    }
}
