//! A small generator of pseudo-random numbers whose streams are fixed by seeds: the same draws on any machine.

/// The finaliser of splitmix64: a bijection that spreads every bit of its argument over all bits.
pub(crate) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// splitmix64.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    /// The stream of a list of seeds; any of them changes all of it.
    pub fn new(seeds: &[u64]) -> Self {
        Self(seeds.iter().fold(0x6c6d_6433, |state, &seed| mix(state ^ mix(seed))))
    }

    /// 64 random bits.
    pub fn next(&mut self) -> u64 {
        let value = mix(self.0);
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        value
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 * f64::EPSILON / 2.0
    }

    /// Uniform in 0..n, n ≥ 1. (The bias of the multiplication is below n/2⁶⁴.)
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(n)) >> 64) as u64
    }

    /// `count` different numbers of 0..n in random order, by Floyd's algorithm and a shuffle.
    pub fn distinct(&mut self, n: u64, count: usize) -> Vec<u64> {
        let count = count.min(n as usize);
        let mut seen = std::collections::HashSet::with_capacity(count);
        let mut chosen = Vec::with_capacity(count);
        for top in n - count as u64..n {
            let candidate = self.below(top + 1);
            let value = if seen.insert(candidate) { candidate } else { top };
            seen.insert(value);
            chosen.push(value);
        }
        self.shuffle(&mut chosen);
        chosen
    }

    /// A random order.
    pub fn shuffle<T>(&mut self, values: &mut [T]) {
        for i in (1..values.len()).rev() {
            values.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_differ_by_every_seed_and_are_uniform() {
        let mut rng = Rng::new(&[1, 2]);
        let mean = (0..100_000).map(|_| rng.uniform()).sum::<f64>() / 1e5;
        assert!((mean - 0.5).abs() < 5.0 * (1.0 / 12.0_f64 / 1e5).sqrt());
        assert_ne!(Rng::new(&[1, 2]).next(), Rng::new(&[2, 1]).next());
        assert_ne!(Rng::new(&[1, 2]).next(), Rng::new(&[1, 3]).next());
    }

    #[test]
    fn distinct_numbers_are_distinct_and_evenly_chosen() {
        let mut counts = [0_u32; 20];
        for seed in 0..20_000 {
            let mut chosen = Rng::new(&[seed]).distinct(20, 5);
            chosen.iter().for_each(|&value| counts[value as usize] += 1);
            chosen.sort_unstable();
            chosen.dedup();
            assert_eq!(chosen.len(), 5);
        }
        // 5,000 each; the standard deviation is 61.
        assert!(counts.iter().all(|&count| count.abs_diff(5000) < 310), "{counts:?}");
        assert_eq!(Rng::new(&[0]).distinct(3, 9).len(), 3);
    }
}
