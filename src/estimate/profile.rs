//! A kernel as a smooth function of u = D², with what a normal D² makes of it.

use crate::error::{Error, ErrorKind, Result};
use crate::kernel::{Kernel, ScaledKernel};

/// Refuses kernels that are no smooth function of D².
pub(super) fn check(kernels: &[ScaledKernel]) -> Result<()> {
    match kernels.iter().find(|kernel| !kernel.kernel.is_fused()) {
        None => Ok(()),
        Some(kernel) => {
            let message = format!("sums of the {} kernel are not estimated", kernel.kernel.name());
            Err(Error::new(ErrorKind::Parameter, message)
                .remedy("take the exponential or gaussian kernel, or the exact method"))
        }
    }
}

/// g(u) = log k and its first two derivatives.
#[inline]
pub(super) fn derivatives(kernel: &ScaledKernel, u: f64) -> (f64, f64, f64) {
    let h = kernel.bandwidth;
    if kernel.kernel == Kernel::Gaussian {
        let c = 0.5 / (h * h);
        (-c * u, -c, 0.0)
    } else {
        let root = u.sqrt();
        (-root / h, -0.5 / (h * root), 0.25 / (h * u * root))
    }
}

/// What is predicted of the kernel over lists, before any of their rows is read.
#[derive(Clone, Debug, Default)]
pub(super) struct Predictions {
    /// Logarithm of μ, the mean weight: the constant of the control variate.
    pub log_mu: Vec<f64>,
    /// Logarithm of the root mean square of what the control variate leaves.
    pub log_residual: Vec<f64>,
    /// Whether that is a guess at the nearest few rows.
    pub tails: Vec<bool>,
    /// Variance of log k.
    spread: Vec<f64>,
}

/// log μ, and g′: the slope of the control variate is g′ μ. The lognormal mean of k where D² has the mean `u` and the variance `v`.
#[inline]
pub(super) fn mean(kernel: &ScaledKernel, u: f64, v: f64) -> (f64, f64) {
    let (g, g1, g2) = derivatives(kernel, u.max(1e-12));
    (least_of(g + 0.5 * least_of(v * g1 * g1, 3.0) + 0.5 * v * g2, 0.0), g1)
}

impl Predictions {
    /// Moments of k over the rows of lists where D² has the means `u`, the variances `v` and the lower bounds `least`; `log_n` are the
    /// logarithms of their numbers.
    ///
    /// A lognormal's square is decided by D² about 2·v·|g′| below the mean. Where n rows do not reach so far, its moments are
    /// those of rows that do not exist; what is left then is one row of the n at the edge they do reach, u − √(2 ln n · v), or at the bound.
    pub fn predict(
        &mut self,
        kernel: &ScaledKernel,
        u: &[f64],
        v: &[f64],
        least: impl Fn(usize) -> f64,
        log_n: &[f64],
    ) {
        let count = u.len();
        for values in [&mut self.log_mu, &mut self.log_residual, &mut self.spread] {
            values.resize(count, 0.0);
        }
        self.tails.resize(count, false);
        let (log_mu, logs, spread) =
            (&mut self.log_mu[..count], &mut self.log_residual[..count], &mut self.spread[..count]);
        let (u, v, log_n) = (&u[..count], &v[..count], &log_n[..count]);
        // No branches: these become vectors.
        for list in 0..count {
            let (g, g1, g2) = derivatives(kernel, u[list].max(1e-12));
            let t = v[list] * g1 * g1;
            let curve = 0.5 * v[list] * g2;
            log_mu[list] = least_of(g + 0.5 * least_of(t, 3.0) + curve, 0.0);
            logs[list] = least_of(g + 0.5 * t + curve, 0.0);
            spread[list] = t;
        }
        for list in 0..count {
            let t = spread[list];
            let tail = t > (TAIL * log_n[list]).clamp(1.0, REACH);
            self.tails[list] = tail;
            if tail {
                let edge = (u[list] - (2.0 * log_n[list] * v[list]).sqrt()).max(least(list)).max(1e-12);
                logs[list] = derivatives(kernel, edge).0 - 0.5 * log_n[list];
            } else {
                logs[list] += rest(t);
            }
        }
    }
}

/// The smaller of two numbers that are none of them NaN, as one instruction.
#[inline(always)]
fn least_of(a: f64, b: f64) -> f64 {
    if a < b { a } else { b }
}

/// A list is in that state where the variance of log k exceeds this share of ln n. (At ½ the edge is where a lognormal's square
/// is decided; rows of text crowd nearer to a query than normal D² would, so the edge rules a little earlier.)
const TAIL: f64 = 0.35;

/// Largest variance of log k that a list can show: that of 10⁸ rows.
const REACH: f64 = 9.25;

/// ½ log(eᵗ − 1 − t + .003) for t from 0 to `REACH`, from a table: it is asked for every list and query.
#[inline]
fn rest(t: f64) -> f64 {
    const STEPS: usize = 4096;
    static TABLE: std::sync::OnceLock<Vec<f64>> = std::sync::OnceLock::new();
    let table = TABLE.get_or_init(|| {
        let at = |step: usize| step as f64 * REACH / STEPS as f64;
        // expm1(t) − t without cancellation.
        let square = |t: f64| if t < 1e-2 { t * t * (0.5 + t / 6.0) } else { t.exp_m1() - t };
        (0..=STEPS + 1).map(|step| 0.5 * (square(at(step)) + 0.003).ln()).collect()
    });
    let place = t * (STEPS as f64 / REACH);
    let step = place as usize;
    let share = place - step as f64;
    table[step] + share * (table[step + 1] - table[step])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_the_function() {
        for i in 0..=925 {
            let t = f64::from(i) / 100.0;
            let truth = 0.5 * ((t.exp_m1() - t).max(0.0) + 0.003).ln();
            assert!((rest(t) - truth).abs() < 1e-3, "{t}");
        }
    }

    #[test]
    fn what_a_list_may_hide_is_at_the_edge_its_rows_reach() {
        let kernel = ScaledKernel::new(Kernel::Gaussian, 0.1).unwrap();
        // D² = 60 ± 10 over 200 rows: lognormal moments would be those of k > 1.
        let mut found = Predictions::default();
        let log_n = 200.0_f64.ln();
        found.predict(&kernel, &[60.0, 60.0], &[100.0, 100.0], |list| [0.0, 50.0][list], &[log_n, log_n]);
        let edge = 60.0 - 10.0 * (2.0 * log_n).sqrt();
        assert!((found.log_residual[0] - (-edge / 0.02 - 0.5 * log_n)).abs() < 1e-9);
        assert!((found.log_residual[1] - (-50.0 / 0.02 - 0.5 * log_n)).abs() < 1e-9);
        assert!(found.tails == [true, true]);
    }

    #[test]
    fn derivatives_are_those_of_the_log_weight() {
        for kernel in [Kernel::Exponential, Kernel::Gaussian] {
            let scaled = ScaledKernel::new(kernel, 0.3).unwrap();
            for u in [0.01, 0.4, 1.7] {
                let (g, g1, g2) = derivatives(&scaled, u);
                let step = 1e-5 * u;
                let at = |u| scaled.log_weight(u);
                assert!((g - at(u)).abs() < 1e-12);
                assert!((g1 - (at(u + step) - at(u - step)) / (2.0 * step)).abs() < 1e-6 * g1.abs());
                let second = (at(u + step) - 2.0 * at(u) + at(u - step)) / (step * step);
                assert!((g2 - second).abs() < 1e-3 * second.abs() + 1e-3, "{g2} {second}");
            }
        }
    }
}
