//! eˣ of many values in double precision: what plans and estimates take of every list and every row drawn.
//!
//! Plain steps without a branch, which the compiler turns into vectors of whatever width the instruction set has.

/// Beyond these the exponent does not fit: below the result is 0, above it is infinite.
const LEAST: f64 = -708.0;
const MOST: f64 = 709.0;

/// ln 2 in two parts, the first with so few digits that its multiples by integers up to 2¹¹ are exact.
const LN_2: (f64, f64) = (6.931_471_803_691_238e-1, 1.908_214_929_270_587_7e-10);

/// 1/k! from k = 13 down to 0: the first term left out is below 4e-18 on [−½ ln 2, ½ ln 2].
const SERIES: [f64; 14] = [
    1.0 / 6_227_020_800.0,
    1.0 / 479_001_600.0,
    1.0 / 39_916_800.0,
    1.0 / 3_628_800.0,
    1.0 / 362_880.0,
    1.0 / 40_320.0,
    1.0 / 5_040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    0.5,
    1.0,
    1.0,
];

/// Replaces every value x, which is no NaN, by eˣ: relative error below 4e-16.
#[inline(always)]
pub(super) fn exponentials(values: &mut [f64]) {
    /// Adding it rounds to the nearest integer and leaves that in the low bits.
    const ROUND: f64 = 6_755_399_441_055_744.0;
    for value in values {
        let x = if *value < MOST { *value } else { MOST };
        let clamped = if x > LEAST { x } else { LEAST };
        let rounded = clamped * std::f64::consts::LOG2_E + ROUND;
        let k = rounded - ROUND;
        let r = (clamped - k * LN_2.0) - k * LN_2.1;
        let mut p = SERIES[0];
        for coefficient in &SERIES[1..] {
            p = p * r + coefficient;
        }
        // 2ᵏ: the low bits of the rounded value are k, and the bias of the exponent is added to them.
        let power = f64::from_bits((rounded.to_bits() << 52).wrapping_add(1023 << 52));
        let result = if x > LEAST { p * power } else { 0.0 };
        *value = if *value > MOST { f64::INFINITY } else { result };
    }
}

#[cfg(test)]
mod tests {
    use crate::simd::Level;

    #[test]
    fn every_level_takes_exponentials_in_double_precision() {
        let given: Vec<f64> = (0..40_000)
            .map(|i| -720.0 + f64::from(i) * 0.0357)
            .chain([0.0, -0.0, 1e-300, -1e-17, f64::NEG_INFINITY, 708.9, 0.5 * std::f64::consts::LN_2])
            .filter(|&x| x < 709.0)
            .collect();
        for level in Level::available() {
            let mut found = given.clone();
            level.exponentials(&mut found);
            for (&x, &y) in given.iter().zip(&found) {
                let truth = if x > -708.0 { x.exp() } else { 0.0 };
                assert!((y - truth).abs() <= 4.5e-16 * truth, "{level:?} {x} {y} {truth}");
            }
        }
    }

    #[test]
    fn a_value_does_not_depend_on_its_place() {
        for level in Level::available() {
            let mut all: Vec<f64> = (0..77).map(|i| -0.37 * f64::from(i)).collect();
            let given = all.clone();
            level.exponentials(&mut all);
            for (i, &x) in given.iter().enumerate() {
                let mut alone = [x];
                level.exponentials(&mut alone);
                assert!(alone[0].to_bits() == all[i].to_bits(), "{level:?} {x}");
            }
        }
    }
}
