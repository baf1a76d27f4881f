//! Figures as people read them.

use crate::measure::{Metric, Spread, Unit};

/// A spread of ratios.
pub fn times(spread: Spread) -> String {
    format!("{:.2} ({:.2}..{:.2})", spread.median, spread.low, spread.high)
}

/// A figure with its spread.
pub fn figure(metric: &Metric) -> String {
    let spread = metric.spread();
    let middle = amount(spread.median, metric.unit);
    if metric.samples.len() < 2 {
        return middle;
    }
    format!("{middle} ({}..{})", amount(spread.low, metric.unit), amount(spread.high, metric.unit))
}

/// A number as people read it.
pub fn amount(value: f64, unit: Unit) -> String {
    let scaled = |value: f64, steps: &[(f64, &str)]| {
        let step = steps.iter().find(|(size, _)| value >= *size).or(steps.last());
        let (size, word) = step.copied().unwrap_or((1.0, ""));
        let value = value / size;
        let digits = if value >= 100.0 {
            0
        } else if value >= 10.0 {
            1
        } else {
            2
        };
        format!("{value:.digits$}{word}")
    };
    match unit {
        Unit::Nanoseconds => {
            scaled(value, &[(1e9, " s"), (1e6, " ms"), (1e3, " µs"), (1.0, " ns")])
        }
        Unit::PerSecond => scaled(value, &[(1e6, " M/s"), (1e3, " k/s"), (1.0, " /s")]),
        Unit::PerRequest | Unit::Cores => format!("{value:.3}"),
        Unit::Kibibytes => scaled(value, &[(1024.0, " MiB"), (1.0, " KiB")]),
        Unit::Count => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_as_people_write_them() {
        assert_eq!(amount(111.4, Unit::Nanoseconds), "111 ns");
        assert_eq!(amount(4_100.0, Unit::Nanoseconds), "4.10 µs");
        assert_eq!(amount(0.0, Unit::Nanoseconds), "0.00 ns");
        assert_eq!(amount(7.9e6, Unit::PerSecond), "7.90 M/s");
        assert_eq!(amount(6144.0, Unit::Kibibytes), "6.00 MiB");
    }
}
