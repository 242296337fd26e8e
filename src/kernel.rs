//! Kernels: from a distance to the logarithm of a weight.
//!
//! A kernel is a decreasing function of how far a row x lies from a query q, scaled by a bandwidth h. `log_weight` is the
//! truth in double precision. The exponential and gaussian kernels are *fused*: the SIMD code evaluates the same function
//! as `−coefficient · g(D²)`, with g the square root or the identity. The others take the plain path of the scan.

use crate::error::{Error, ErrorKind, Result};

/// A kernel, not normalised: at most 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// exp(−D/h).
    Exponential,
    /// exp(−D²/(2h²)).
    Gaussian,
    /// exp(κ(⟨x,q⟩ − 1)) with κ = 1/h², for unit vectors: there equal to the gaussian.
    VonMisesFisher,
    /// exp(−‖x − q‖₁/h).
    Laplacian,
    /// 1 where D < h, else 0.
    Tophat,
    /// 1 − (D/h)² where D < h, else 0.
    Epanechnikov,
    /// 1 − D/h where D < h, else 0.
    Linear,
}

/// What a kernel is a function of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// The squared Euclidean distance D².
    SqDistance,
    /// ‖x − q‖₁.
    Manhattan,
    /// ⟨x, q⟩.
    Inner,
}

impl Kernel {
    /// All kernels, in the order of their names in messages.
    pub const ALL: [Self; 7] = [
        Self::Exponential,
        Self::Gaussian,
        Self::VonMisesFisher,
        Self::Laplacian,
        Self::Tophat,
        Self::Epanechnikov,
        Self::Linear,
    ];

    /// The name used on the command line and in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exponential => "exponential",
            Self::Gaussian => "gaussian",
            Self::VonMisesFisher => "vmf",
            Self::Laplacian => "laplacian",
            Self::Tophat => "tophat",
            Self::Epanechnikov => "epanechnikov",
            Self::Linear => "linear",
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

    /// Whether the scan evaluates the kernel within its tiles of distances; the others take the plain path.
    pub fn is_fused(self) -> bool {
        matches!(self, Self::Exponential | Self::Gaussian)
    }

    /// Whether a fused kernel's weight depends on D (square root taken) rather than on D².
    pub fn takes_root(self) -> bool {
        matches!(self, Self::Exponential)
    }

    /// What the kernel is a function of.
    pub fn measure(self) -> Measure {
        match self {
            Self::VonMisesFisher => Measure::Inner,
            Self::Laplacian => Measure::Manhattan,
            _ => Measure::SqDistance,
        }
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
        let squared = matches!(kernel, Kernel::Gaussian | Kernel::VonMisesFisher);
        let usable = if squared { 1e-26..=1e30 } else { 1e-12..=1e30 };
        if bandwidth.is_nan() || bandwidth <= 0.0 || !usable.contains(&coefficient) {
            return Err(Error::new(
                ErrorKind::Parameter,
                format!("bandwidth {bandwidth} is not a usable positive number"),
            )
            .remedy("give h > 0 in units of the distance between embeddings"));
        }
        Ok(scaled)
    }

    /// The c of log k = −c·g(D²) for fused kernels; for the others the like of it.
    pub fn coefficient(&self) -> f64 {
        match self.kernel {
            Kernel::Gaussian => 0.5 / (self.bandwidth * self.bandwidth),
            Kernel::VonMisesFisher => 1.0 / (self.bandwidth * self.bandwidth),
            _ => 1.0 / self.bandwidth,
        }
    }

    /// log k at a value of the kernel's measure: −∞ on and beyond the edge of a compact kernel, as scikit-learn has it.
    pub fn log_weight(&self, measure: f64) -> f64 {
        let h = self.bandwidth;
        let within = |weight: fn(f64) -> f64| {
            let distance = measure.sqrt();
            if distance < h { weight(distance / h) } else { f64::NEG_INFINITY }
        };
        match self.kernel {
            Kernel::Exponential => -self.coefficient() * measure.sqrt(),
            Kernel::Gaussian | Kernel::Laplacian => -self.coefficient() * measure,
            Kernel::VonMisesFisher => self.coefficient() * (measure - 1.0),
            Kernel::Tophat => within(|_| 0.0),
            Kernel::Epanechnikov => within(|share| (-share * share).ln_1p()),
            Kernel::Linear => within(|share| (-share).ln_1p()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_weights_are_the_formulas() {
        let at = |kernel, measure| ScaledKernel::new(kernel, 0.5).unwrap().log_weight(measure);
        let close =
            |value: f64, expected: f64| assert!((value - expected).abs() < 1e-15, "{value} {expected}");
        close(at(Kernel::Exponential, 9.0), -6.0);
        close(at(Kernel::Gaussian, 9.0), -18.0);
        close(at(Kernel::VonMisesFisher, 0.25), -3.0);
        close(at(Kernel::Laplacian, 9.0), -18.0);
        close(at(Kernel::Tophat, 0.04), 0.0);
        close(at(Kernel::Epanechnikov, 0.04), 0.84_f64.ln());
        close(at(Kernel::Linear, 0.04), 0.6_f64.ln());
    }

    #[test]
    fn compact_kernels_end_before_their_edge() {
        for kernel in [Kernel::Tophat, Kernel::Epanechnikov, Kernel::Linear] {
            let scaled = ScaledKernel::new(kernel, 0.5).unwrap();
            assert_eq!(scaled.log_weight(0.25), f64::NEG_INFINITY);
            assert_eq!(scaled.log_weight(0.250_001), f64::NEG_INFINITY);
            assert!(scaled.log_weight(0.249_999).is_finite());
        }
    }

    #[test]
    fn on_the_sphere_von_mises_fisher_is_the_gaussian() {
        let (vmf, gaussian) = (Kernel::VonMisesFisher, Kernel::Gaussian);
        for inner in [-1.0, 0.0, 0.7, 1.0] {
            let one = ScaledKernel::new(vmf, 0.3).unwrap().log_weight(inner);
            let other = ScaledKernel::new(gaussian, 0.3).unwrap().log_weight(2.0 - 2.0 * inner);
            assert!((one - other).abs() < 1e-13);
        }
    }

    #[test]
    fn bad_bandwidths_and_names_are_refused() {
        for kernel in Kernel::ALL {
            for bandwidth in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-40] {
                assert!(ScaledKernel::new(kernel, bandwidth).is_err(), "{kernel:?} {bandwidth}");
            }
            assert_eq!(Kernel::from_name(kernel.name()).unwrap(), kernel);
        }
        assert!(Kernel::from_name("cosine").is_err());
    }
}
