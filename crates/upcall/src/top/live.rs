//! The view on a terminal, refreshed until `q` or the worker's end.

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
use super::{View, Watch, is_alive};
use crate::failure::Failure;

/// Shows until the user quits or the worker ends. The terminal is given back as it was.
pub fn run(watch: &mut Watch, interval: Duration) -> Result<(), Failure> {
    let mut terminal = ratatui::try_init()
        .map_err(|error| Failure::new(format_args!("cannot use the terminal: {error}")))?;
    let ended = show(&mut terminal, watch, interval);
    ratatui::restore();
    ended.map_err(|error| Failure::new(format_args!("cannot use the terminal: {error}")))
}

fn show(
    terminal: &mut DefaultTerminal,
    watch: &mut Watch,
    interval: Duration,
) -> std::io::Result<()> {
    let mut view = watch.look();
    loop {
        terminal.draw(|frame| draw(frame, &view))?;
        let next = Instant::now() + interval;
        while let Some(left) = next.checked_duration_since(Instant::now()) {
            if event::poll(left)? {
                match event::read()? {
                    Event::Key(key) if is_quit(key.code, key.modifiers) => return Ok(()),
                    Event::Resize(..) => {
                        terminal.draw(|frame| draw(frame, &view))?;
                    }
                    _ => {}
                }
            }
        }
        if !is_alive(watch.page.pid()) {
            return Ok(());
        }
        view = watch.look();
    }
}

fn is_quit(key: KeyCode, modifiers: KeyModifiers) -> bool {
    matches!(key, KeyCode::Char('q') | KeyCode::Esc)
        || (key == KeyCode::Char('c') && modifiers.contains(KeyModifiers::CONTROL))
}

fn draw(frame: &mut Frame<'_>, view: &View) {
    let [top, middle, bottom] =
        Layout::vertical([Constraint::Length(1), Constraint::Min(0), Constraint::Length(1)])
            .areas(frame.area());
    frame.render_widget(Line::from(format!("upcall top ({})", covers(view))).bold(), top);
    let widths = WIDTHS.map(|width| Constraint::Length(width as u16));
    let header = TableRow::new(TITLES.map(|title| right(title.to_owned()))).bold();
    frame.render_widget(Table::new(table_rows(view), widths).header(header), middle);
    frame.render_widget(Paragraph::new("q: quit").dim(), bottom);
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
