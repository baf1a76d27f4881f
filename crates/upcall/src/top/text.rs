//! The view as a table of text.

use super::View;
use super::rows::Row;
use upcall_stats::HopKind;

/// What stands above the columns.
pub const TITLES: [&str; 11] = [
    "hop",
    "requests",
    "read",
    "write",
    "errors",
    "in flight",
    "p50",
    "p99",
    "p99.9",
    "share",
    "violations",
];
/// Columns wide; the first is for names.
pub const WIDTHS: [usize; 11] = [22, 10, 11, 11, 8, 9, 9, 9, 9, 6, 10];

/// All disks, one below the other.
pub fn table(view: &View) -> String {
    let mut text = String::new();
    let mut last = None;
    for row in &view.rows {
        if last != Some(&row.disk) {
            text += &format!("disk {} ({})\n", row.disk, covers(view));
            text += &line(&TITLES.map(str::to_owned));
            last = Some(&row.disk);
        }
        text += &line(&cells(row, view.seconds.is_some()));
        if let Some(health) = health(row) {
            text += &format!("    {health}\n");
        }
        if let Some(counters) = counters(row) {
            text += &format!("    {counters}\n");
        }
    }
    text
}

/// What the numbers cover.
pub fn covers(view: &View) -> String {
    match view.seconds {
        None => format!("worker {}; since its start", view.pid),
        Some(seconds) => format!("worker {}; last {seconds:.1} s", view.pid),
    }
}

/// A row's cells, in the order of [`TITLES`].
pub fn cells(row: &Row, is_rate: bool) -> [String; 11] {
    let per_second = if is_rate { "/s" } else { "" };
    let indent = if row.kind == HopKind::Request { "" } else { "  " };
    [
        format!("{indent}{}", row.hop),
        format!("{:.0}{per_second}", row.requests),
        megabytes(row.read_bytes, per_second),
        megabytes(row.write_bytes, per_second),
        format!("{:.0}{per_second}", row.errors),
        row.in_flight.to_string(),
        duration(row.p50_ns),
        duration(row.p99_ns),
        duration(row.p999_ns),
        row.share.map_or("-".into(), |share| format!("{:.0}%", share * 100.0)),
        row.violations.to_string(),
    ]
}

/// How a filter is, if it is not up or has not always been.
pub fn health(row: &Row) -> Option<String> {
    (row.failures > 0).then(|| {
        format!(
            "{}; failed {} times, longest stall {}; {} requests delivered again, {} went past it",
            row.state.name(),
            row.failures,
            duration(Some(row.longest_stall_ns)),
            row.retries,
            row.skipped
        )
    })
}

/// The filter's own counters on one line.
pub fn counters(row: &Row) -> Option<String> {
    let all: Vec<String> =
        row.counters.iter().map(|(name, value)| format!("{name} {value}")).collect();
    (!all.is_empty()).then(|| all.join(", "))
}

fn line(cells: &[String; 11]) -> String {
    let mut line = format!("{:<width$}", cells[0], width = WIDTHS[0]);
    for (cell, width) in cells.iter().zip(WIDTHS).skip(1) {
        line += &format!(" {cell:>width$}");
    }
    line.push('\n');
    line
}

fn megabytes(bytes: f64, per_second: &str) -> String {
    format!("{:.1} MB{per_second}", bytes / 1e6)
}

/// Three digits and a unit.
fn duration(ns: Option<u64>) -> String {
    let Some(ns) = ns else { return "-".into() };
    let (value, unit) = match ns {
        0..1_000 => return format!("{ns} ns"),
        1_000..1_000_000 => (ns as f64 / 1e3, "us"),
        1_000_000..1_000_000_000 => (ns as f64 / 1e6, "ms"),
        _ => (ns as f64 / 1e9, "s"),
    };
    let decimals = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
    format!("{value:.decimals$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::super::rows;
    use super::*;

    #[test]
    fn durations_have_three_digits_and_a_unit() {
        for (ns, text) in [
            (0, "0 ns"),
            (999, "999 ns"),
            (1_500, "1.50 us"),
            (12_345, "12.3 us"),
            (123_456, "123 us"),
            (5_000_000_000, "5.00 s"),
        ] {
            assert_eq!(duration(Some(ns)), text);
        }
        assert_eq!(duration(None), "-");
    }

    #[test]
    fn a_table_has_a_line_for_each_hop_and_the_filters_counters() {
        let view = View { rows: rows::of(&rows::tests::hops(), None), seconds: None, pid: 42 };
        let text = table(&view);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "disk root (worker 42; since its start)");
        let first: Vec<&str> = lines[2].split_whitespace().collect();
        assert_eq!(first[..6], ["request", "150", "0.4", "MB", "0.2", "MB"]);
        assert!(lines[3].starts_with("  xor ") && lines[3].contains(" 20% "), "{text}");
        assert_eq!(lines[4].trim(), "lines 7");
        assert!(lines[5].starts_with("  store "), "{text}");
    }

    #[test]
    fn a_filter_that_has_failed_says_so_below_its_line() {
        let mut hops = rows::tests::hops();
        hops[1].health = upcall_stats::FilterHealth {
            standing: upcall_stats::Standing::Quarantined,
            failures: 6,
            longest_stall_ns: 12_000_000,
        };
        hops[1].block.retries = 4;
        let text = table(&View { rows: rows::of(&hops, None), seconds: None, pid: 42 });
        let said = "    quarantined; failed 6 times, longest stall 12.0 ms; 4 requests delivered";
        assert!(text.lines().any(|line| line.starts_with(said)), "{text}");
    }
}
