//! Order statistics of timings.

use serde::Serialize;

/// The middle of a sample and its spread.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The median.
    pub median: f64,
    /// The 10th percentile.
    pub p10: f64,
    /// The 90th percentile.
    pub p90: f64,
    /// The median absolute deviation from the median.
    pub mad: f64,
}

impl Summary {
    /// Summarises a sample, which must not be empty.
    pub fn of(sample: &[f64]) -> Self {
        let median = percentile(sample, 50.0);
        let deviations: Vec<f64> = sample.iter().map(|value| (value - median).abs()).collect();
        Summary {
            median,
            p10: percentile(sample, 10.0),
            p90: percentile(sample, 90.0),
            mad: percentile(&deviations, 50.0),
        }
    }
}

/// The percentile of a sample, interpolated between neighbours; NaN for an empty one.
pub fn percentile(sample: &[f64], percent: f64) -> f64 {
    let mut sorted = sample.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let position = (percent / 100.0).clamp(0.0, 1.0) * last as f64;
    let below = position.floor();
    let (low, high) = (sorted[below as usize], sorted[position.ceil() as usize]);
    low + (high - low) * (position - below)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_interpolate() {
        let sample = [4.0, 1.0, 3.0, 2.0];
        assert_eq!(percentile(&sample, 0.0), 1.0);
        assert_eq!(percentile(&sample, 50.0), 2.5);
        assert_eq!(percentile(&sample, 100.0), 4.0);
        assert!((percentile(&sample, 90.0) - 3.7).abs() < 1e-12);
        assert_eq!(percentile(&[7.0], 10.0), 7.0);
        assert!(percentile(&[], 50.0).is_nan());
    }

    #[test]
    fn the_spread_ignores_outliers() {
        let summary = Summary::of(&[1.0, 2.0, 3.0, 4.0, 1000.0]);
        assert_eq!((summary.median, summary.mad), (3.0, 1.0));
    }
}
