//! The page for people, in Markdown.

use std::fmt::Write;

use super::{Report, goals};
use crate::measure::{Row, Section, Spread, Unit};
use upcall_measure::text::{amount, figure, times};

// Writing to a String does not fail.

pub fn text(report: &Report, graphs: &[(String, String)]) -> String {
    let mut text = String::from("# Benchmark\n\n");
    if report.quick {
        text += "**A short look (--quick): not to be quoted.**\n\n";
    }
    text += "Medians of the rounds, with the smallest and the largest in brackets. Absolute figures are those of this machine; ratios are formed round by round in this run.\n\n";
    machine(&mut text, report);
    text += "\n## Goals\n\n";
    text += &goals::table(report);
    for (name, error) in &report.failed {
        let _ = writeln!(text, "\n**{name} did not run:** {error}");
    }
    for (name, title) in graphs {
        let _ = write!(text, "\n![{title}]({name})\n");
    }
    for section in &report.sections {
        section_text(&mut text, section);
    }
    text
}

fn machine(text: &mut String, report: &Report) {
    let machine = &report.machine;
    let kind = if machine.virtual_machine { ", a virtual machine" } else { "" };
    let _ =
        writeln!(text, "- {}, {} of {} cores{kind}", machine.cpu, machine.cores.0, machine.cores.1);
    let _ = writeln!(text, "- Linux {}, clock {}", machine.kernel, machine.clock);
    let _ = writeln!(text, "- load before the run: {}", machine.load);
    let _ = writeln!(text, "- images on {}", machine.images_on);
    for (name, version) in &machine.versions {
        let _ = writeln!(text, "- {name}: {version}");
    }
}

fn section_text(text: &mut String, section: &Section) {
    let _ = write!(text, "\n## {}\n\n", section.name);
    for line in &section.about {
        let _ = writeln!(text, "{line}\n");
    }
    if section.rows.iter().any(|row| row.metric("rate").is_some()) {
        loads(text, section);
    } else {
        others(text, section);
    }
}

/// Of rows with a rate: two tables, the second with what each process used.
fn loads(text: &mut String, section: &Section) {
    let reference = section.reference.as_deref();
    text.push_str("| case | side | per second | p50 | p99 | p99.9 |");
    text.push_str(
        &reference
            .map_or(String::new(), |side| format!(" rate / {side} | cpu of servers / {side} |")),
    );
    text.push_str(" cpu of servers per request |\n|---|---|---|---|---|---|");
    text.push_str(if reference.is_some() { "---|---|---|\n" } else { "---|\n" });
    for row in &section.rows {
        let _ = write!(text, "| {} | {} |", row.case, row.side);
        for name in ["rate", "p50", "p99", "p99.9"] {
            let _ = write!(text, " {} |", row.metric(name).map_or("".into(), figure));
        }
        if let Some(reference) = reference {
            for name in ["rate", "cpu servers"] {
                let ratio =
                    if row.side == reference { None } else { ratio(section, row, reference, name) };
                let _ = write!(text, " {} |", ratio.map_or("".into(), times));
            }
        }
        let _ = writeln!(text, " {} |", row.metric("cpu servers").map_or("".into(), figure));
    }
    if !section.rows.iter().any(|row| row.metric("cpu servers").is_some()) {
        return;
    }
    text.push_str("\nFor each request: processor time; sleeps; times that the core went to somebody else (yielded or taken).\n\n");
    text.push_str("| case | side | how | who used what |\n|---|---|---|---|\n");
    for row in &section.rows {
        let _ = writeln!(text, "| {} | {} | {} | {} |", row.case, row.side, row.how, users(row));
    }
}

fn users(row: &Row) -> String {
    let names = row.metrics.iter().filter_map(|metric| metric.name.strip_prefix("cpu "));
    let users = names.filter(|name| !["all", "servers"].contains(name)).map(|name| {
        let of = |what: &str| row.median(&format!("{what} {name}")).unwrap_or(0.0);
        format!(
            "{name} {}; {}; {}",
            amount(of("cpu"), Unit::Nanoseconds),
            amount(of("sleeps"), Unit::PerRequest),
            amount(of("switches"), Unit::PerRequest)
        )
    });
    users.collect::<Vec<_>>().join("<br>")
}

/// Of rows with figures of all kinds: rows that follow each other with the same few figures
/// have a column for each.
fn others(text: &mut String, section: &Section) {
    const COLUMNS: usize = 5;
    let names = |row: &Row| -> Vec<String> {
        row.metrics.iter().map(|metric| metric.name.clone()).collect()
    };
    let alike = section.rows.chunk_by(|one, next| {
        let is_table = |row: &Row| row.metrics.len() <= COLUMNS;
        is_table(one) == is_table(next)
            && (!is_table(one) || names(one) == names(next) && one.case == next.case)
    });
    for rows in alike {
        let first = names(&rows[0]);
        if first.len() <= COLUMNS && rows.len() > 1 {
            let said = rows.iter().any(|row| !row.how.is_empty());
            let how = |word: &str| if said { format!(" {word} |") } else { String::new() };
            let _ = writeln!(text, "| {} | {} |{}", rows[0].case, first.join(" | "), how("how"));
            let _ = writeln!(
                text,
                "|---|{}{}",
                "---|".repeat(first.len()),
                if said { "---|" } else { "" }
            );
            for row in rows {
                let figures: Vec<String> = row.metrics.iter().map(figure).collect();
                let _ =
                    writeln!(text, "| {} | {} |{}", row.side, figures.join(" | "), how(&row.how));
            }
        } else {
            text.push_str("| case | side | figures | how |\n|---|---|---|---|\n");
            for row in rows {
                let figures = row.metrics.iter().map(|m| format!("{} {}", m.name, figure(m)));
                let figures = figures.collect::<Vec<_>>().join("<br>");
                let _ = writeln!(text, "| {} | {} | {figures} | {} |", row.case, row.side, row.how);
            }
        }
        text.push('\n');
    }
}

/// A figure's ratio to that of the same case at another side.
pub fn ratio(section: &Section, row: &Row, reference: &str, name: &str) -> Option<Spread> {
    let theirs = section.find(&row.case, reference)?.metric(name)?;
    Spread::of_ratios(row.metric(name)?, theirs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_with_the_same_few_figures_have_a_column_for_each() {
        let mut section = Section::new("profile", &[]);
        for (side, how) in [("one", ""), ("other", "asleep")] {
            section.row("case", side, how).push("time", Unit::Nanoseconds, 5.0);
            section.row("case", side, how).push("share", Unit::Count, 7.0);
        }
        section.row("case", "third", "").push("other", Unit::Count, 1.0);
        let mut text = String::new();
        section_text(&mut text, &section);
        assert!(text.contains("| case | time | share | how |\n|---|---|---|---|\n"), "{text}");
        assert!(text.contains("| other | 5.00 ns | 7 | asleep |\n\n"), "{text}");
        assert!(text.contains("| case | third | other 1 |  |"), "{text}");
    }

    #[test]
    fn a_section_shows_each_side_with_its_ratio_to_the_reference() {
        let mut section = Section::new("path", &["About it."]);
        section.reference = Some("peer".into());
        for (side, rates) in [("ours", [30.0, 44.0]), ("peer", [10.0, 11.0])] {
            let row = section.row("read", side, "a core each");
            rates.iter().for_each(|rate| row.push("rate", Unit::PerSecond, *rate));
            row.push("cpu servers", Unit::Nanoseconds, 50.0);
        }
        let mut text = String::new();
        section_text(&mut text, &section);
        assert!(text.contains("| read | ours | 37.0 /s (30.0 /s..44.0 /s) |"), "{text}");
        assert!(text.contains("| 3.50 (3.00..4.00) | 1.00 (1.00..1.00) |"), "{text}");
        let columns: Vec<usize> = text
            .lines()
            .filter(|line| line.starts_with('|'))
            .map(|line| line.matches('|').count())
            .collect();
        assert_eq!(columns, [10, 10, 10, 10, 5, 5, 5, 5]);
    }
}
