//! Checks that need no request: the table and the parameters.

use upcall_block::{Op, OpSet};
use upcall_filterhost::{Description, ParamError, ParamType, params};

/// Whether what the filter declares makes sense, beyond what loading it has checked.
pub fn table(filter: &Description) -> Result<String, Vec<String>> {
    let mut wrong = Vec::new();
    let changes = OpSet::from_mask(filter.changes).unwrap_or(OpSet::NONE);
    if changes.contains(Op::Read) && !filter.has_io_done {
        wrong.push(
            "it says that it changes the data of reads, but has no io_done() to do so".into(),
        );
    }
    if changes.contains(Op::Write) && !changes.contains(Op::Read) {
        wrong.push("it changes what is written, but not what is read: who changes it back?".into());
    }
    for (name, text) in [("version", &filter.version), ("summary", &filter.summary)] {
        if text.is_empty() {
            wrong.push(format!("its {name} is empty"));
        }
    }
    for param in filter.params.iter().filter(|param| param.doc.is_empty()) {
        wrong.push(format!("parameter {}: its doc is empty", param.name));
    }
    let ops = OpSet::from_mask(filter.ops).unwrap_or(OpSet::NONE);
    let found = format!("{} {}, {}, {ops}", filter.name, filter.version, filter.class_name());
    if wrong.is_empty() { Ok(found) } else { Err(wrong) }
}

/// Whether wrong parameters are refused before the filter sees them, and the given ones fit.
pub fn parameters(filter: &Description, given: &[(String, String)]) -> Result<String, Vec<String>> {
    let mut wrong = Vec::new();
    if let Err(error) = params::check(filter, given) {
        wrong.push(error.to_string());
    }
    let without = |name: &str| -> Vec<(String, String)> {
        given.iter().filter(|(other, _)| other != name).cloned().collect()
    };
    let mut tried = 1;
    let unknown = with(given.to_vec(), "no_such_parameter", "1");
    if !matches!(params::check(filter, &unknown), Err(ParamError::Unknown { .. })) {
        wrong.push("an unknown parameter is not refused".into());
    }
    for param in &filter.params {
        if param.is_required() {
            tried += 1;
            if params::check(filter, &without(&param.name)).is_ok() {
                wrong.push(format!("{} may be left out, though it has no default", param.name));
            }
        }
        for value in nonsense(param.kind) {
            tried += 1;
            if params::check(filter, &with(without(&param.name), &param.name, value)).is_ok() {
                wrong.push(format!("{} may be {value:?}", param.name));
            }
        }
    }
    let found = format!("{} declared; {tried} wrong ones refused", filter.params.len());
    if wrong.is_empty() { Ok(found) } else { Err(wrong) }
}

fn with(mut all: Vec<(String, String)>, name: &str, value: &str) -> Vec<(String, String)> {
    all.push((name.into(), value.into()));
    all
}

/// Values that no declaration of this type allows.
fn nonsense(kind: ParamType) -> &'static [&'static str] {
    match kind {
        ParamType::Int => &["", "many", "1.5", "99999999999999999999"],
        ParamType::Bool => &["", "maybe"],
        ParamType::Size => &["", "-1", "1X"],
        ParamType::Millis => &["", "-1", "1y"],
        ParamType::Choice => &["", "no such choice"],
        ParamType::Fraction => &["", "-0.1", "1.1", "nan"],
        ParamType::Address => &["nowhere"],
        ParamType::String | ParamType::FileRead | ParamType::FileAppend => &[],
    }
}
