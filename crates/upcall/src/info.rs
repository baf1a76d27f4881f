//! `upcall filter info`: what a filter says about itself.

use std::fmt::Write;
use std::sync::Arc;

use serde_json::{Value, json};
use upcall_block::OpSet;
use upcall_filterhost::{Description, FilterFile, HostProcess, Param, Placement};

use crate::cli::InfoArgs;
use crate::failure::Failure;
use crate::output::print;

/// Loads the filter in a filter host, asks it, and prints the answer.
pub fn run(args: InfoArgs) -> Result<(), Failure> {
    let description = describe(&args.file)?;
    if args.json {
        let text = serde_json::to_string_pretty(&as_json(&description)).map_err(Failure::new)?;
        return print(&format!("{text}\n"));
    }
    print(&as_text(&description))
}

/// Asks the filter in `path`, in a filter host of its own.
pub fn describe(path: &std::path::Path) -> Result<Description, Failure> {
    let file = FilterFile::open(path).map_err(Failure::new)?;
    let mut host =
        HostProcess::start(&file, Placement::Isolated, Arc::new(|_| {})).map_err(Failure::new)?;
    let description = host.describe().map_err(Failure::new)?;
    host.quit().map_err(Failure::new)?;
    Ok(description)
}

fn ops(mask: u32) -> OpSet {
    OpSet::from_mask(mask).unwrap_or(OpSet::NONE)
}

fn as_text(filter: &Description) -> String {
    let mut text = String::new();
    // Writing to a String does not fail.
    let mut line = |name: &str, value: &dyn std::fmt::Display| {
        let _ = writeln!(text, "{name:<9}{value}");
    };
    line("name", &filter.name);
    line("version", &filter.version);
    line("vendor", &filter.vendor);
    line("summary", &filter.summary);
    line("class", &filter.class_name());
    line("built", &format_args!("for {} bits, ABI {}", filter.width.bits(), abi(filter)));
    line("ops", &ops(filter.ops));
    line("data", &data_access(filter));
    line("answers", &ops(filter.answers));
    line("issues", &if filter.issues() { "requests of its own" } else { "nothing" });
    line("keeps", &if filter.wants_sidecar() { "a state of its own (sidecar)" } else { "nothing" });
    if filter.params.is_empty() {
        text += "\nIt has no parameters.\n";
    } else {
        text += "\nparameters:\n";
        filter.params.iter().for_each(|param| text += &param_text(param));
    }
    text
}

fn abi(filter: &Description) -> String {
    format!("{}.{}", filter.abi >> 16, filter.abi & 0xffff)
}

fn data_access(filter: &Description) -> String {
    match (ops(filter.sees | filter.changes), ops(filter.changes)) {
        (sees, _) if sees.is_empty() => "none".into(),
        (sees, changes) if changes.is_empty() => format!("sees {sees} (mapped read-only)"),
        (sees, changes) => format!("sees {sees}; changes {changes}"),
    }
}

fn param_text(param: &Param) -> String {
    let default = match &param.default {
        Some(default) => format!("default {default:?}"),
        None if param.is_required() => "must be given".into(),
        None => "may be absent".into(),
    };
    let Param { name, kind, doc, .. } = param;
    let (kind, expects) = (kind.name(), param.expects());
    format!("  {name} ({kind}; {default})\n      {doc}\n      {expects}\n")
}

fn as_json(filter: &Description) -> Value {
    let names = |mask| ops(mask).iter().map(|op| op.name()).collect::<Vec<_>>();
    let param = |param: &Param| {
        json!({
            "name": param.name,
            "type": param.kind.name(),
            "doc": param.doc,
            "default": param.default,
            "required": param.is_required(),
            "expects": param.expects(),
            "choices": param.choices,
            "min": param.min,
            "max": param.max,
        })
    };
    json!({
        "name": filter.name,
        "version": filter.version,
        "vendor": filter.vendor,
        "summary": filter.summary,
        "class": filter.class_name(),
        "abi": abi(filter),
        "width": filter.width.bits(),
        "ops": names(filter.ops),
        "sees": names(filter.sees),
        "changes": names(filter.changes),
        "answers": names(filter.answers),
        "issues": filter.issues(),
        "sidecar": filter.wants_sidecar(),
        "params": filter.params.iter().map(param).collect::<Vec<_>>(),
    })
}
