//! Graphs, as plain SVG: no program is needed to look at them, and a difference between two
//! runs is a difference of text.

use std::fmt::Write;

use super::Report;
use crate::measure::{Section, Unit};
use crate::path::servers::Disk;
use crate::{path, upcall};
use upcall_measure::text::amount;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 190.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 60.0;
const COLOURS: [&str; 6] = ["#2060a0", "#c04020", "#208050", "#806020", "#703090", "#505050"];

/// A line of a graph: a name, and (x, median, low, high).
struct Line {
    name: String,
    points: Vec<(f64, f64, f64, f64)>,
}

struct Graph {
    title: String,
    x: String,
    unit: Unit,
    /// Both axes by powers instead of steps.
    by_powers: bool,
    lines: Vec<Line>,
}

/// All graphs that this run has figures for: file name, title, content.
pub fn all(report: &Report) -> Vec<(String, String, String)> {
    let mut all = Vec::new();
    if let Some(section) = report.section("upcall") {
        all.push(("upcall-chain.svg".to_owned(), by_chain_length(section)));
    }
    if let Some(section) = report.section("path") {
        for (disk, file) in [(Disk::Null, "null"), (Disk::Raw, "raw")] {
            for (name, what) in [
                ("rate", "Reads a second"),
                ("cpu servers", "Processor time for each read, servers and filter hosts"),
            ] {
                let kind = if name == "rate" { "iops" } else { "cpu" };
                let graph = by_depth(section, disk, name, what);
                all.push((format!("path-{file}-{kind}.svg"), graph));
            }
        }
    }
    let drawn = all.into_iter().filter(|(_, graph)| !graph.lines.is_empty());
    drawn.map(|(name, graph)| (name, graph.title.clone(), draw(&graph))).collect()
}

fn by_chain_length(section: &Section) -> Graph {
    let line = |(name, quantile): (&str, &str)| {
        let point = |count: usize| {
            let row = section.find(upcall::ALONE, &upcall::chain_of(count))?;
            let spread = row.metric(quantile)?.spread();
            Some((count as f64, spread.median, spread.low, spread.high))
        };
        Line { name: name.into(), points: (0..=8).filter_map(point).collect() }
    };
    Graph {
        title: "Latency by filters in the chain, one request in flight".into(),
        x: "filters, each a process of its own".into(),
        unit: Unit::Nanoseconds,
        by_powers: false,
        lines: [("p50", "p50"), ("p99", "p99")].map(line).into(),
    }
}

fn by_depth(section: &Section, disk: Disk, metric: &str, what: &str) -> Graph {
    let line = |side: String| {
        let point = |depth: usize| {
            let row = section.find(&path::case(disk, path::READ, depth), &side)?;
            let spread = row.metric(metric)?.spread();
            Some((depth as f64, spread.median, spread.low, spread.high))
        };
        Line { points: path::DEPTHS.into_iter().filter_map(point).collect(), name: side }
    };
    let sides = [0, 1, 4].map(path::ours).into_iter().chain([path::PEER.to_owned()]);
    Graph {
        title: format!("{what}, {}, 4 KiB, client polling", disk.word()),
        x: "requests in flight".into(),
        unit: if metric == "rate" { Unit::PerSecond } else { Unit::Nanoseconds },
        by_powers: true,
        lines: sides.map(line).filter(|line| !line.points.is_empty()).collect(),
    }
}

fn draw(graph: &Graph) -> String {
    let points = || graph.lines.iter().flat_map(|line| &line.points);
    let x_max = points().map(|point| point.0).fold(1.0, f64::max);
    let y_max = points().map(|point| point.3).fold(0.0, f64::max).max(1.0);
    let y_min = points().map(|point| point.2).fold(y_max, f64::min).max(y_max / 1e6);
    let (width, height) = (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM);
    let share = |value: f64, low: f64, high: f64| {
        if graph.by_powers {
            (value.max(low).ln() - low.ln()) / (high.ln() - low.ln()).max(f64::EPSILON)
        } else {
            value / high
        }
    };
    let x_at = |x: f64| LEFT + width * share(x, 1.0, x_max);
    let y_at = |y: f64| TOP + height * (1.0 - share(y, y_min, y_max));

    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    // Writing to a String does not fail.
    let _ =
        writeln!(svg, "<text x=\"{LEFT}\" y=\"22\" font-size=\"15\">{}</text>", xml(&graph.title));
    let bottom = TOP + height;
    for step in 0..=4 {
        let part = f64::from(step) / 4.0;
        let value = if graph.by_powers { y_min * (y_max / y_min).powf(part) } else { y_max * part };
        let y = y_at(value);
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT + width,
            LEFT - 6.0,
            y + 4.0,
            amount(value, graph.unit)
        );
    }
    let mut marks: Vec<f64> = points().map(|point| point.0).collect();
    marks.sort_by(f64::total_cmp);
    marks.dedup();
    for x in marks {
        let at = x_at(x);
        let _ = writeln!(
            svg,
            "<text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{x}</text>",
            bottom + 18.0
        );
    }
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
        LEFT + width / 2.0,
        bottom + 42.0,
        xml(&graph.x)
    );
    for (number, line) in graph.lines.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        let path: Vec<String> = line
            .points
            .iter()
            .map(|point| format!("{:.1},{:.1}", x_at(point.0), y_at(point.1)))
            .collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            path.join(" ")
        );
        for &(x, median, low, high) in &line.points {
            let at = x_at(x);
            let _ = writeln!(
                svg,
                "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{:.1}\" y2=\"{:.1}\" stroke=\"{colour}\"/><circle cx=\"{at:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"/>",
                y_at(low),
                y_at(high),
                y_at(median)
            );
        }
        let y = TOP + 16.0 * number as f64 + 10.0;
        let x = LEFT + width + 14.0;
        let _ = writeln!(
            svg,
            "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"10\" height=\"10\" fill=\"{colour}\"/><text x=\"{:.1}\" y=\"{y:.1}\">{}</text>",
            y - 9.0,
            x + 16.0,
            xml(&line.name)
        );
    }
    svg + "</svg>\n"
}

fn xml(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_lie_inside_the_frame_on_steps_and_powers() {
        for by_powers in [false, true] {
            let points = vec![(1.0, 10.0, 9.0, 12.0), (128.0, 9e6, 8e6, 1e7)];
            let graph = Graph {
                title: "a < b".into(),
                x: "depth".into(),
                unit: Unit::PerSecond,
                by_powers,
                lines: vec![Line { name: "one".into(), points }],
            };
            let svg = draw(&graph);
            assert!(svg.contains("a &lt; b") && svg.ends_with("</svg>\n"));
            for circle in svg.lines().filter(|line| line.contains("<circle")) {
                let number = |name: &str| -> f64 {
                    let rest = circle.split(&format!(" {name}=\"")).nth(1).unwrap();
                    rest.split('"').next().unwrap().parse().unwrap()
                };
                assert!((LEFT..=WIDTH - RIGHT).contains(&number("cx")), "{circle}");
                assert!((TOP..=HEIGHT - BOTTOM).contains(&number("cy")), "{circle}");
            }
        }
    }
}
