//! Sums of exponentials in log space, with the sum of squares beside.
//!
//! A `LogSum` stands for Σ exp(aᵢ) = exp(max)·sum and Σ exp(2aᵢ) = exp(2·max)·sum_sq. Folding two of them is exact
//! up to rounding but not associative to the last bit: the order of folds is part of the contract of a scan.

/// A sum of exponentials and of their squares, relative to the exponential of `max`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogSum {
    /// The shift, −∞ for an empty sum.
    pub max: f64,
    /// Σ exp(aᵢ − max).
    pub sum: f64,
    /// Σ exp(2(aᵢ − max)).
    pub sum_sq: f64,
}

impl LogSum {
    /// The empty sum.
    pub const EMPTY: Self = Self { max: f64::NEG_INFINITY, sum: 0.0, sum_sq: 0.0 };

    /// A sum given relative to a shift; empty where nothing was added.
    pub fn scaled(max: f64, sum: f64, sum_sq: f64) -> Self {
        if sum > 0.0 { Self { max, sum, sum_sq } } else { Self::EMPTY }
    }

    /// Adds exp(a).
    pub fn push(&mut self, a: f64) {
        if a > f64::NEG_INFINITY {
            self.fold(&Self { max: a, sum: 1.0, sum_sq: 1.0 });
        }
    }

    /// Adds another sum.
    pub fn fold(&mut self, other: &Self) {
        if other.max == f64::NEG_INFINITY {
            return;
        }
        if other.max <= self.max {
            let factor = (other.max - self.max).exp();
            self.sum += other.sum * factor;
            self.sum_sq += other.sum_sq * factor * factor;
        } else {
            let factor = (self.max - other.max).exp();
            self.sum = self.sum * factor + other.sum;
            self.sum_sq = self.sum_sq * factor * factor + other.sum_sq;
            self.max = other.max;
        }
    }

    /// log Σ exp(aᵢ), −∞ where empty.
    pub fn log_sum(&self) -> f64 {
        self.max + self.sum.ln()
    }

    /// log Σ exp(2aᵢ), −∞ where empty.
    pub fn log_sum_sq(&self) -> f64 {
        2.0 * self.max + self.sum_sq.ln()
    }
}

impl Default for LogSum {
    fn default() -> Self {
        Self::EMPTY
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn empty_is_log_zero_and_neutral() {
        assert_eq!(LogSum::EMPTY.log_sum(), f64::NEG_INFINITY);
        assert_eq!(LogSum::EMPTY.log_sum_sq(), f64::NEG_INFINITY);
        let mut sum = LogSum::EMPTY;
        sum.fold(&LogSum::EMPTY);
        sum.push(f64::NEG_INFINITY);
        assert_eq!(sum, LogSum::EMPTY);
    }

    proptest! {
        #[test]
        fn folds_agree_with_the_direct_sum(
            left in prop::collection::vec(-900.0..100.0_f64, 0..40),
            right in prop::collection::vec(-900.0..100.0_f64, 1..40),
        ) {
            let mut parts = [LogSum::EMPTY; 2];
            for (part, values) in parts.iter_mut().zip([&left, &right]) {
                values.iter().for_each(|&a| part.push(a));
            }
            let mut total = parts[0];
            total.fold(&parts[1]);
            let all: Vec<f64> = left.iter().chain(&right).copied().collect();
            let max = all.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let direct = max + all.iter().map(|a| (a - max).exp()).sum::<f64>().ln();
            let direct_sq = 2.0 * max + all.iter().map(|a| (2.0 * (a - max)).exp()).sum::<f64>().ln();
            prop_assert!((total.log_sum() - direct).abs() < 1e-12 * direct.abs().max(1.0));
            prop_assert!((total.log_sum_sq() - direct_sq).abs() < 1e-12 * direct_sq.abs().max(1.0));
        }
    }
}
