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

/// What is predicted of the kernel over a list, before any of its rows is read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Prediction {
    /// Logarithm of μ, the mean weight: the constant of the control variate.
    pub log_mu: f64,
    /// g′: the slope of the control variate is g′ μ.
    pub slope: f64,
    /// Logarithm of the root mean square of what the control variate leaves.
    pub log_residual: f64,
}

/// Lognormal moments of k where D² has the mean `u` and the variance `v`.
#[inline]
pub(super) fn predict(kernel: &ScaledKernel, u: f64, v: f64) -> Prediction {
    let (g, g1, g2) = derivatives(kernel, u.max(1e-12));
    let spread = v * g1 * g1;
    let curve = 0.5 * v * g2;
    let t = spread.min(6.0);
    let log_mu = (g + 0.5 * spread.min(3.0) + curve).min(0.0);
    let log_mu_t = (g + 0.5 * t + curve).min(0.0);
    // expm1(t) − t without cancellation.
    let rest = if t < 1e-2 { t * t * (0.5 + t / 6.0) } else { t.exp_m1() - t };
    Prediction { log_mu, slope: g1, log_residual: log_mu_t + 0.5 * (rest + 0.003).ln() }
}

#[cfg(test)]
mod tests {
    use super::*;

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
