//! Instruction-set levels. Holding a `Level` is the proof that this CPU has it: it can only be had by detection.

use std::sync::OnceLock;

use super::prove::agrees;
use crate::error::{Error, ErrorKind, Result};

/// The instruction sets that the kernels are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Set {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// A level of instructions that this CPU was found to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Level(Set);

fn decision() -> &'static Result<(Level, Option<String>)> {
    static DECISION: OnceLock<Result<(Level, Option<String>)>> = OnceLock::new();
    DECISION.get_or_init(|| {
        let mut levels = Level::available();
        if let Ok(name) = std::env::var("LMD3_SIMD")
            && !name.is_empty()
            && name != "auto"
        {
            let wanted = Level::from_name(&name)?;
            levels.retain(|&level| level <= wanted);
        }
        Ok(highest_proven(&levels, agrees))
    })
}

/// The highest level that passes, with a notice of those that did not.
fn highest_proven(levels: &[Level], passes: impl Fn(Level) -> bool) -> (Level, Option<String>) {
    let mut failed = Vec::new();
    for &level in levels.iter().rev() {
        if level == Level::PORTABLE || passes(level) {
            let notice = (!failed.is_empty()).then(|| {
                let names = failed.join(", ");
                format!(
                    "the kernels of {names} disagree with the portable ones on this CPU: running {}",
                    level.name()
                )
            });
            return (level, notice);
        }
        failed.push(level.name());
    }
    (Level::PORTABLE, None)
}

impl Level {
    /// Plain Rust, on every CPU.
    pub const PORTABLE: Self = Self(Set::Portable);

    /// All levels this CPU has, lowest first.
    pub fn available() -> Vec<Self> {
        #[allow(unused_mut)]
        let mut levels = vec![Self::PORTABLE];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
            {
                levels.push(Self(Set::Avx2));
            }
            if levels.len() == 2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
            {
                levels.push(Self(Set::Avx512));
            }
        }
        levels
    }

    /// The level of a name.
    ///
    /// # Errors
    /// `Parameter` for an unknown name or a level that this CPU lacks.
    pub fn from_name(name: &str) -> Result<Self> {
        let available = Self::available();
        available.iter().copied().find(|level| level.name() == name).ok_or_else(|| {
            let names: Vec<_> = available.iter().map(|level| level.name()).collect();
            Error::new(ErrorKind::Parameter, format!("SIMD level {name:?} is unknown or not on this CPU"))
                .remedy(format!("this CPU has {}", names.join(", ")))
        })
    }

    /// The level to run at: that of the environment variable `LMD3_SIMD` where set, else the highest. Decided once, and
    /// proven against the portable path; a level that disagrees is passed over (`current_notice` says so).
    ///
    /// # Errors
    /// `Parameter` where `LMD3_SIMD` names a level that this CPU lacks.
    pub fn current() -> Result<Self> {
        decision().clone().map(|(level, _)| level)
    }

    /// What should be known of the choice: levels that failed their proof.
    pub fn current_notice() -> Option<String> {
        decision().as_ref().ok().and_then(|(_, notice)| notice.clone())
    }

    /// The name, as `LMD3_SIMD` takes it and results record it.
    pub fn name(self) -> &'static str {
        match self.0 {
            Set::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => "avx512",
        }
    }

    pub(crate) fn set(self) -> Set {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_that_fail_their_proof_are_passed_over_with_a_notice() {
        let levels = Level::available();
        let (level, notice) = highest_proven(&levels, |_| true);
        assert_eq!((Some(&level), notice), (levels.last(), None));
        let (level, notice) = highest_proven(&levels, |_| false);
        assert_eq!(level, Level::PORTABLE);
        assert_eq!(notice.is_some(), levels.len() > 1);
    }
}
