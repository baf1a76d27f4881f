//! What a benchmark gives: rows of figures, each with one sample a round.
//!
//! Always true: the samples of a row stand in the order of the rounds, so that two rows of
//! one case can be compared round by round.

use std::time::Duration;

use serde::Serialize;

use crate::histogram::Histogram;
use crate::process::Used;

/// How much work to put into a benchmark.
#[derive(Clone, Debug)]
pub struct Effort {
    /// Times that everything is measured again; the sides of a case in turn.
    pub rounds: usize,
    /// How long one measurement takes.
    pub slice: Duration,
    /// Leave out what takes long.
    pub quick: bool,
}

impl Effort {
    /// Enough for a look: under three minutes for everything.
    pub fn quick() -> Effort {
        Effort { rounds: 3, slice: Duration::from_millis(40), quick: true }
    }

    /// What figures to be quoted need: under twenty minutes for everything.
    pub fn full() -> Effort {
        Effort { rounds: 7, slice: Duration::from_millis(150), quick: false }
    }
}

/// The name of the client in [`Round::used`]: who sends requests is no part of what is
/// compared.
pub const CLIENT: &str = "client";

/// One benchmark's rows.
#[derive(Clone, Debug, Serialize)]
pub struct Section {
    /// The benchmark's name.
    pub name: String,
    /// What was done, for people: who ran where, what is equal and what is not.
    pub about: Vec<String>,
    /// The side that others are compared to, if there is one.
    pub reference: Option<String>,
    /// The figures.
    pub rows: Vec<Row>,
}

impl Section {
    /// An empty one.
    pub fn new(name: &str, about: &[&str]) -> Section {
        let about = about.iter().map(|line| (*line).to_owned()).collect();
        Section { name: name.to_owned(), about, reference: None, rows: Vec::new() }
    }

    /// The row of a case and side, made if it is not there.
    pub fn row(&mut self, case: &str, side: &str, how: &str) -> &mut Row {
        let is_it = |row: &Row| row.case == case && row.side == side;
        let at = self.rows.iter().position(is_it).unwrap_or_else(|| {
            self.rows.push(Row::new(case, side, how));
            self.rows.len() - 1
        });
        &mut self.rows[at]
    }

    /// A row that is there.
    pub fn find(&self, case: &str, side: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.case == case && row.side == side)
    }
}

/// One side of one case.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What was done, as in `read 4k, 32 in flight`.
    pub case: String,
    /// Who did it, as in `upcall, 1 filter`.
    pub side: String,
    /// How the sides waited, and what shared a core.
    pub how: String,
    /// The figures.
    pub metrics: Vec<Metric>,
}

impl Row {
    fn new(case: &str, side: &str, how: &str) -> Row {
        Row { case: case.to_owned(), side: side.to_owned(), how: how.to_owned(), metrics: vec![] }
    }

    /// Adds one round's sample of a figure.
    pub fn push(&mut self, name: &str, unit: Unit, sample: f64) {
        match self.metrics.iter_mut().find(|metric| metric.name == name) {
            Some(metric) => metric.samples.push(sample),
            None => {
                self.metrics.push(Metric { name: name.to_owned(), unit, samples: vec![sample] })
            }
        }
    }

    /// Adds a round's latencies.
    pub fn push_latencies(&mut self, latencies: &Histogram) {
        for (name, quantile) in [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)] {
            self.push(name, Unit::Nanoseconds, latencies.quantile_ns(quantile) as f64);
        }
        self.push("max", Unit::Nanoseconds, latencies.max_ns() as f64);
    }

    /// Adds a round of load: the rate, the latencies if there are some, and what each process
    /// used for one request.
    pub fn push_round(&mut self, round: &Round) {
        let requests = round.requests.max(1) as f64;
        self.push("rate", Unit::PerSecond, round.requests as f64 / round.elapsed.as_secs_f64());
        if round.latencies.total() > 0 {
            self.push_latencies(&round.latencies);
        }
        let (mut all_ns, mut servers_ns) = (0.0, 0.0);
        for (who, used) in &round.used {
            all_ns += used.cpu_ns as f64;
            servers_ns += if who == CLIENT { 0.0 } else { used.cpu_ns as f64 };
            self.push(&format!("cpu {who}"), Unit::Nanoseconds, used.cpu_ns as f64 / requests);
            self.push(&format!("sleeps {who}"), Unit::PerRequest, used.sleeps as f64 / requests);
            self.push(
                &format!("switches {who}"),
                Unit::PerRequest,
                used.switches as f64 / requests,
            );
        }
        if !round.used.is_empty() {
            self.push("cpu all", Unit::Nanoseconds, all_ns / requests);
            self.push("cpu servers", Unit::Nanoseconds, servers_ns / requests);
        }
        if round.errors > 0 {
            self.push("errors", Unit::Count, round.errors as f64);
        }
    }

    /// The figure of a name.
    pub fn metric(&self, name: &str) -> Option<&Metric> {
        self.metrics.iter().find(|metric| metric.name == name)
    }

    /// The median of a figure.
    pub fn median(&self, name: &str) -> Option<f64> {
        self.metric(name).map(|metric| metric.spread().median)
    }
}

/// What one measurement of one side gave.
#[derive(Clone, Debug, Default)]
pub struct Round {
    /// Requests that ended.
    pub requests: u64,
    /// Those of them that failed.
    pub errors: u64,
    /// From the first that began to the last that ended.
    pub elapsed: Duration,
    /// How long requests took; perhaps of a sample of them.
    pub latencies: Histogram,
    /// What each process used meanwhile, the client among them.
    pub used: Vec<(String, Used)>,
}

/// One figure.
#[derive(Clone, Debug, Serialize)]
pub struct Metric {
    /// Its name.
    pub name: String,
    /// Its unit.
    pub unit: Unit,
    /// One sample a round.
    pub samples: Vec<f64>,
}

/// Units.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// Of time.
    Nanoseconds,
    /// Requests, round trips, ....
    PerSecond,
    /// Of something for each request.
    PerRequest,
    /// KiB of memory.
    Kibibytes,
    /// A number of things.
    Count,
    /// A share of one core, 1 being all of it.
    Cores,
}

impl Metric {
    /// Median and spread of the samples.
    pub fn spread(&self) -> Spread {
        Spread::of(&self.samples)
    }
}

/// Where samples lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spread {
    /// The middle one; between the two in the middle if their number is even.
    pub median: f64,
    /// The smallest.
    pub low: f64,
    /// The largest.
    pub high: f64,
}

impl Spread {
    /// Of at least one sample; of none: zeroes.
    pub fn of(samples: &[f64]) -> Spread {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (Some(&low), Some(&high)) = (sorted.first(), sorted.last()) else {
            return Spread::default();
        };
        let middle = sorted.len() / 2;
        let median = if sorted.len().is_multiple_of(2) {
            (sorted[middle - 1] + sorted[middle]) / 2.0
        } else {
            sorted[middle]
        };
        Spread { median, low, high }
    }

    /// Of `ours` to `theirs`, round by round; rounds that only one of them has, and those
    /// in which `theirs` is 0, are left out. None if nothing is left.
    pub fn of_ratios(ours: &Metric, theirs: &Metric) -> Option<Spread> {
        let pairs = ours.samples.iter().zip(&theirs.samples);
        let ratios: Vec<f64> = pairs
            .filter(|(_, theirs)| **theirs != 0.0)
            .map(|(ours, theirs)| ours / theirs)
            .collect();
        (!ratios.is_empty()).then(|| Spread::of(&ratios))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_has_the_middle_and_both_ends() {
        assert_eq!(Spread::of(&[3.0, 1.0, 9.0]), Spread { median: 3.0, low: 1.0, high: 9.0 });
        assert_eq!(Spread::of(&[4.0, 2.0]).median, 3.0);
        assert_eq!(Spread::of(&[]), Spread::default());
    }

    #[test]
    fn ratios_are_formed_round_by_round() {
        let metric = |samples: &[f64]| Metric {
            name: "rate".into(),
            unit: Unit::PerSecond,
            samples: samples.into(),
        };
        // A machine that is twice as fast in the second round changes both sides.
        let ratio = Spread::of_ratios(&metric(&[3.0, 6.0, 3.3]), &metric(&[1.0, 2.0, 1.0]));
        assert_eq!(ratio.map(|ratio| (ratio.low, ratio.median)), Some((3.0, 3.0)));
        assert_eq!(Spread::of_ratios(&metric(&[1.0]), &metric(&[0.0])), None);
    }

    #[test]
    fn a_round_is_counted_for_each_request() {
        let mut section = Section::new("x", &[]);
        let used = Used { cpu_ns: 1000, sleeps: 5, switches: 10 };
        let round = Round {
            requests: 10,
            elapsed: Duration::from_secs(2),
            used: vec![("a".into(), used), (CLIENT.into(), used)],
            ..Round::default()
        };
        section.row("case", "side", "").push_round(&round);
        let row = section.find("case", "side").unwrap();
        assert_eq!(row.median("rate"), Some(5.0));
        assert_eq!(row.median("cpu a"), Some(100.0));
        assert_eq!(row.median("cpu all"), Some(200.0));
        assert_eq!(row.median("cpu servers"), Some(100.0), "the client is not one");
        assert_eq!(row.median("sleeps client"), Some(0.5));
        assert_eq!(row.median("p50"), None, "no latency was counted");
        assert_eq!(row.median("errors"), None);
    }
}
