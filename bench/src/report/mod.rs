//! What comes out of a run: JSON for programs, a page for people, graphs of both.

mod goals;
mod graph;
mod page;

use std::fs;
use std::path::Path;

use serde::Serialize;

use crate::machine::Machine;
use crate::measure::Section;

/// A whole run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What it ran on.
    pub machine: Machine,
    /// Whether it was a short look: figures of one are not to be quoted.
    pub quick: bool,
    /// What was measured.
    pub sections: Vec<Section>,
    /// What was not, and why.
    pub failed: Vec<(String, String)>,
}

impl Report {
    /// A benchmark's section, if it ran.
    pub fn section(&self, name: &str) -> Option<&Section> {
        self.sections.iter().find(|section| section.name == name)
    }
}

/// Writes `all.json`, one `NAME.json` for each benchmark that ran, `report.md` and the
/// graphs. Files of benchmarks that did not run stay as they are.
pub fn write(report: &Report, folder: &Path) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("cannot write to {}: {error}", folder.display());
    fs::create_dir_all(folder).map_err(failed)?;
    fs::write(folder.join("all.json"), json(report)).map_err(failed)?;
    for section in &report.sections {
        fs::write(folder.join(format!("{}.json", section.name)), json(section)).map_err(failed)?;
    }
    let mut graphs = Vec::new();
    for (name, title, svg) in graph::all(report) {
        fs::write(folder.join(&name), svg).map_err(failed)?;
        graphs.push((name, title));
    }
    fs::write(folder.join("report.md"), page::text(report, &graphs)).map_err(failed)
}

fn json(value: &impl Serialize) -> String {
    // Our own types have nothing that JSON has not.
    serde_json::to_string_pretty(value).unwrap_or_default() + "\n"
}
