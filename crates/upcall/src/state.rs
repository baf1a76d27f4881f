//! `upcall sidecar` and `upcall gaps`: what the filters of a disk keep, and what they missed.
//! Offline, and read-only.

use std::fmt::Write as _;
use std::io::Write as _;
use std::os::fd::AsFd;
use std::path::Path;

use serde_json::json;
use upcall_gap::Report;
use upcall_state::{Folder, State, StateError, folder_of};

use crate::cli::{GapsArgs, SidecarArgs};
use crate::failure::Failure;
use crate::output::print;

/// Lists the sidecars of an image, or writes one to standard output.
pub fn sidecar(args: SidecarArgs) -> Result<(), Failure> {
    let found = open(&args.image, args.state.as_deref())?;
    let Some(name) = args.filter else {
        return list(found.as_ref(), args.json);
    };
    let known = match &found {
        Some(folder) => folder.sidecars().map_err(Failure::new)?,
        None => vec![],
    };
    let name = full_name(&name, &known)?;
    let read = found.map(|folder| folder.read_sidecar(&name)).transpose().map_err(Failure::new)?;
    let Some(Some(state)) = read.flatten() else {
        return Err(Failure::new(format_args!(
            "sidecar {name} is damaged: neither of its slots is whole; restore it from a copy"
        )));
    };
    let mut out = std::io::stdout().lock();
    out.write_all(&state.bytes).and_then(|()| out.flush()).map_err(Failure::of_output)
}

/// Prints what each filter of an image missed.
pub fn gaps(args: GapsArgs) -> Result<(), Failure> {
    let mut text = String::new();
    if let Some(folder) = open(&args.image, args.state.as_deref())? {
        for name in folder.gaps().map_err(Failure::new)? {
            let report =
                upcall_gap::read(folder.as_fd(), &format!("{name}.gaps")).map_err(|error| {
                    Failure::new(format_args!("{}: {error}", folder.path().display()))
                })?;
            if let Some(report) = report {
                text +=
                    &if args.json { gaps_json(&name, &report) } else { gaps_text(&name, &report) };
            }
        }
    }
    if text.is_empty() && !args.json {
        text = "no filter of this disk was ever ready to be bypassed\n".into();
    }
    print(&text)
}

/// The folder of an image; None if no filter has kept anything.
fn open(image: &Path, state: Option<&Path>) -> Result<Option<Folder>, Failure> {
    let failed = |error| Failure::new(format_args!("{}: {error}", image.display()));
    let path = match state {
        Some(path) => path.to_owned(),
        None => folder_of(image).map_err(failed)?,
    };
    match Folder::open_offline(&path) {
        Ok(folder) => Ok(Some(folder)),
        Err(StateError::Missing { .. }) if state.is_none() => Ok(None),
        Err(error) => Err(Failure::new(error)),
    }
}

/// `throttle` for `throttle-0`, if that is the only one of the filter.
fn full_name(name: &str, known: &[String]) -> Result<String, Failure> {
    if known.iter().any(|known| known == name) {
        return Ok(name.to_owned());
    }
    let of_filter: Vec<&String> = known
        .iter()
        .filter(|known| known.rsplit_once('-').is_some_and(|(filter, _)| filter == name))
        .collect();
    match of_filter.as_slice() {
        [one] => Ok((*one).clone()),
        _ if known.is_empty() => Err(Failure::new("no filter of this disk has kept a state")),
        _ => Err(Failure::new(format_args!(
            "there is no sidecar {name:?}; there are: {}",
            known.join(", ")
        ))),
    }
}

fn list(folder: Option<&Folder>, as_json: bool) -> Result<(), Failure> {
    let mut text = String::new();
    if let Some(folder) = folder {
        for name in folder.sidecars().map_err(Failure::new)? {
            let state = folder.read_sidecar(&name).map_err(Failure::new)?.flatten();
            text += &if as_json { state_json(&name, state) } else { state_text(&name, state) };
        }
    }
    if text.is_empty() && !as_json {
        text = "no filter of this disk has kept a state\n".into();
    }
    print(&text)
}

fn state_text(name: &str, state: Option<State>) -> String {
    match state {
        Some(state) => {
            let once = if state.is_doubled { "" } else { ", in one of two slots" };
            format!("{name}: {} bytes, synced {} times{once}\n", state.bytes.len(), state.sequence)
        }
        None => format!("{name}: DAMAGED\n"),
    }
}

fn state_json(name: &str, state: Option<State>) -> String {
    let value = match state {
        Some(State { sequence, bytes, is_doubled }) => json!({
            "name": name, "bytes": bytes.len(), "sequence": sequence, "doubled": is_doubled,
        }),
        None => json!({ "name": name, "damaged": true }),
    };
    format!("{value}\n")
}

fn gaps_text(name: &str, report: &Report) -> String {
    let mut text = String::new();
    if report.damage.headers {
        return format!("{name}: DAMAGED: it may have missed anything\n");
    }
    let total: u64 = report.gaps.iter().map(|gap| gap.length).sum();
    let count = report.gaps.len();
    // Writing to a String does not fail.
    let _ =
        writeln!(text, "{name}: missed {total} of {} bytes, in {count} ranges", report.capacity);
    if report.damage.pages > 0 {
        let _ = writeln!(text, "  {} damaged pages count as missed", report.damage.pages);
    }
    for gap in &report.gaps {
        let _ = writeln!(text, "  {} +{}", gap.offset, gap.length);
    }
    text
}

fn gaps_json(name: &str, report: &Report) -> String {
    let gaps: Vec<_> = report
        .gaps
        .iter()
        .map(|gap| json!({ "offset": gap.offset, "length": gap.length }))
        .collect();
    let value = json!({
        "name": name,
        "capacity": report.capacity,
        "gaps": gaps,
        "damaged": report.damage.headers,
        "damaged_pages": report.damage.pages,
    });
    format!("{value}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_with_one_sidecar_needs_no_number() {
        let known: Vec<String> = ["a-0", "a-b-0", "c-0", "c-1"].map(str::to_owned).into();
        for (given, found) in [("a", "a-0"), ("a-b", "a-b-0"), ("c-1", "c-1"), ("a-0", "a-0")] {
            assert_eq!(full_name(given, &known).unwrap(), found);
        }
        for wrong in ["c", "b", ""] {
            let said = full_name(wrong, &known).unwrap_err().to_string();
            assert!(said.contains("c-0, c-1"), "{said}");
        }
    }
}
