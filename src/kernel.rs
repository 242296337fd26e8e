//! Kernels: from a distance to the logarithm of a weight.
//!
//! Every kernel here is a decreasing function of the Euclidean distance D between a row and a query, scaled by a
//! bandwidth h. `log_weight` is the truth in double precision; the SIMD code evaluates the same function as
//! `−coefficient · g(D²)`, with g the square root or the identity.

use crate::error::{Error, ErrorKind, Result};

/// A kernel k(D), not normalised: k(0) = 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// exp(−D/h).
    Exponential,
    /// exp(−D²/(2h²)).
    Gaussian,
}

impl Kernel {
    /// All kernels, in the order of their names in messages.
    pub const ALL: [Self; 2] = [Self::Exponential, Self::Gaussian];

    /// The name used on the command line and in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exponential => "exponential",
            Self::Gaussian => "gaussian",
        }
    }

    /// The kernel of a name.
    ///
    /// # Errors
    /// `Parameter` for an unknown name.
    pub fn from_name(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|kernel| kernel.name() == name).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|kernel| kernel.name()).collect();
            Error::new(ErrorKind::Parameter, format!("unknown kernel {name:?}"))
                .remedy(format!("choose one of {}", known.join(", ")))
        })
    }

    /// Whether the weight depends on D (square root taken) rather than on D².
    pub fn takes_root(self) -> bool {
        matches!(self, Self::Exponential)
    }
}

/// A kernel with its bandwidth.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScaledKernel {
    /// The kernel.
    pub kernel: Kernel,
    /// The bandwidth h, in units of distance.
    pub bandwidth: f64,
}

impl ScaledKernel {
    /// Checks the bandwidth.
    ///
    /// # Errors
    /// `Parameter` where h is not a finite positive number, or so small or large that its coefficient leaves single precision.
    pub fn new(kernel: Kernel, bandwidth: f64) -> Result<Self> {
        let scaled = Self { kernel, bandwidth };
        let coefficient = scaled.coefficient();
        // Wider than this, a row masked at `FAR` would weigh something; narrower, the coefficient leaves single precision.
        let usable = if kernel.takes_root() { 1e-12..=1e30 } else { 1e-26..=1e30 };
        if bandwidth.is_nan() || bandwidth <= 0.0 || !usable.contains(&coefficient) {
            return Err(Error::new(
                ErrorKind::Parameter,
                format!("bandwidth {bandwidth} is not a usable positive number"),
            )
            .remedy("give h > 0 in units of the distance between embeddings"));
        }
        Ok(scaled)
    }

    /// The c of log k = −c·g(D²).
    pub fn coefficient(&self) -> f64 {
        match self.kernel {
            Kernel::Exponential => 1.0 / self.bandwidth,
            Kernel::Gaussian => 0.5 / (self.bandwidth * self.bandwidth),
        }
    }

    /// log k at a squared distance.
    pub fn log_weight(&self, sq_distance: f64) -> f64 {
        let g = if self.kernel.takes_root() { sq_distance.sqrt() } else { sq_distance };
        -self.coefficient() * g
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_weights_are_the_formulas() {
        let exponential = ScaledKernel::new(Kernel::Exponential, 0.5).unwrap();
        assert!((exponential.log_weight(9.0) + 6.0).abs() < 1e-15);
        let gaussian = ScaledKernel::new(Kernel::Gaussian, 0.5).unwrap();
        assert!((gaussian.log_weight(9.0) + 18.0).abs() < 1e-15);
    }

    #[test]
    fn bad_bandwidths_and_names_are_refused() {
        for bandwidth in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-40] {
            assert!(ScaledKernel::new(Kernel::Gaussian, bandwidth).is_err(), "{bandwidth}");
        }
        assert!(Kernel::from_name("cosine").is_err());
        for kernel in Kernel::ALL {
            assert_eq!(Kernel::from_name(kernel.name()).unwrap(), kernel);
        }
    }
}
