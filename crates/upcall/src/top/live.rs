//! The view on a terminal, refreshed until `q` or the workers' end.

use std::time::{Duration, Instant};

use ratatui::DefaultTerminal;
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Style, Stylize};
use ratatui::text::Line;
use ratatui::widgets::{Cell, Paragraph, Row as TableRow, Table};
use upcall_stats::HopKind;

use super::text::{TITLES, WIDTHS, cells, counters, covers};
use super::{View, Watches};
use crate::failure::Failure;

/// Shows until the user quits or the workers end. The terminal is given back as it was.
pub fn run(watches: &mut Watches, interval: Duration) -> Result<(), Failure> {
    let mut terminal = ratatui::try_init()
        .map_err(|error| Failure::new(format_args!("cannot use the terminal: {error}")))?;
    let ended = show(&mut terminal, watches, interval);
    ratatui::restore();
    ended.map_err(|error| Failure::new(format_args!("cannot use the terminal: {error}")))
}

fn show(
    terminal: &mut DefaultTerminal,
    watches: &mut Watches,
    interval: Duration,
) -> std::io::Result<()> {
    loop {
        let views = watches.look();
        if views.is_empty() {
            return Ok(());
        }
        terminal.draw(|frame| draw(frame, &views))?;
        let next = Instant::now() + interval;
        while let Some(left) = next.checked_duration_since(Instant::now()) {
            if event::poll(left)? {
                match event::read()? {
                    Event::Key(key) if is_quit(key.code, key.modifiers) => return Ok(()),
                    Event::Resize(..) => {
                        terminal.draw(|frame| draw(frame, &views))?;
                    }
                    _ => {}
                }
            }
        }
    }
}

fn is_quit(key: KeyCode, modifiers: KeyModifiers) -> bool {
    matches!(key, KeyCode::Char('q') | KeyCode::Esc)
        || (key == KeyCode::Char('c') && modifiers.contains(KeyModifiers::CONTROL))
}

/// The workers one below the other.
fn draw(frame: &mut Frame<'_>, views: &[View]) {
    let tables: Vec<_> = views.iter().map(table_rows).collect();
    let heights = tables.iter().flat_map(|rows| [1, 1 + rows.len() as u16]);
    let mut heights: Vec<_> = heights.map(Constraint::Length).collect();
    heights.extend([Constraint::Min(0), Constraint::Length(1)]);
    let areas = Layout::vertical(heights).split(frame.area());
    for ((view, rows), areas) in views.iter().zip(tables).zip(areas.chunks(2)) {
        frame.render_widget(Line::from(format!("upcall top ({})", covers(view))).bold(), areas[0]);
        let widths = WIDTHS.map(|width| Constraint::Length(width as u16));
        let header = TableRow::new(TITLES.map(|title| right(title.to_owned()))).bold();
        frame.render_widget(Table::new(rows, widths).header(header), areas[1]);
    }
    frame.render_widget(Paragraph::new("q: quit").dim(), areas[areas.len() - 1]);
}

fn table_rows(view: &View) -> Vec<TableRow<'static>> {
    let mut rows = Vec::new();
    for row in &view.rows {
        if row.kind == HopKind::Request {
            rows.push(TableRow::new([Cell::from(format!("disk {}", row.disk))]).bold());
        }
        let alarm =
            row.violations > 0 || row.errors > 0.0 || row.state != upcall_stats::Standing::Up;
        let style = if alarm { Style::new().red() } else { Style::new() };
        let mut cells = cells(row, true).map(right);
        cells[0] = Cell::from(super::text::cells(row, true)[0].clone());
        rows.push(TableRow::new(cells).style(style));
        if let Some(counters) = counters(row) {
            rows.push(TableRow::new([Cell::from(format!("    {counters}"))]).dim());
        }
    }
    rows
}

fn right(text: String) -> Cell<'static> {
    Cell::from(Line::from(text).right_aligned())
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::rows;
    use super::*;

    #[test]
    fn several_workers_stand_one_below_the_other() {
        let views = [42, 43].map(|pid| View {
            rows: rows::of(&rows::tests::hops(), None),
            seconds: Some(1.0),
            pid,
        });
        let mut terminal = Terminal::new(TestBackend::new(140, 24)).unwrap();
        terminal.draw(|frame| draw(frame, &views)).unwrap();
        let text = terminal.backend().to_string();
        let at = |part: &str| text.find(part).unwrap_or_else(|| panic!("no {part:?}:\n{text}"));
        assert!(at("(worker 42;") < at("xor") && at("xor") < at("(worker 43;"), "{text}");
        let below = &text[at("(worker 43;")..];
        for part in ["disk root", "request", "xor", "lines 7", "store", "q: quit"] {
            assert!(below.contains(part), "no {part:?} below:\n{text}");
        }
    }
}
