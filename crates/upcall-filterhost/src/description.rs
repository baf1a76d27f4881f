//! What a filter says about itself, checked.
//!
//! The filter host sends it as JSON. Both come from a process that is not trusted: here the
//! text becomes a [`Description`], or an error that says what is wrong with it. Whoever
//! holds a `Description` need not check it again.

use serde::Deserialize;
use upcall_abi::WIRE_VERSION;
use upcall_abi::filter::{ABI_MAJOR, ABI_MINOR, filter_flag, op};

use crate::file::Width;
use crate::params::{Param, ParamType};
use crate::text::clean;

/// Names of the classes, from the guest to the store; `UPCALL_CLASS_INSPECTION` is 1.
pub const CLASSES: [&str; 8] = [
    "inspection",
    "compression",
    "encryption",
    "replication",
    "cache",
    "provider",
    "qos",
    "capture",
];

/// A filter's table, as its author declared it. Masks have bit `1 << op` for an operation.
///
/// Always true: the name is 1 to 31 bytes of `a-z`, `0-9`, `-`; `class` is 1 to 8; `ops` is
/// not empty and has known operations only; `sees`, `changes` and `answers` are parts of it,
/// `sees` and `changes` of read and write; who answers writes handles flush; parameters have
/// different names, and defaults that fit their own declaration.
#[derive(Clone, Debug, PartialEq)]
pub struct Description {
    /// Unique among the filters of one chain's vendor, as `xor`.
    pub name: String,
    /// The author's.
    pub version: String,
    /// The author.
    pub vendor: String,
    /// One line.
    pub summary: String,
    /// Version of the contract that it was built against, `(major << 16) | minor`.
    pub abi: u32,
    /// Of its code.
    pub width: Width,
    /// Its place in the chain; see [`CLASSES`].
    pub class: u32,
    /// [`filter_flag`].
    pub flags: u32,
    /// `start_io` is called for these.
    pub ops: u32,
    /// With the data mapped.
    pub sees: u32,
    /// With the data mapped, to be changed.
    pub changes: u32,
    /// It may answer these itself.
    pub answers: u32,
    /// Whether it has `io_done`; if not, it never answers pass-and-watch.
    pub has_io_done: bool,
    /// Whether it has `cancel`.
    pub has_cancel: bool,
    /// Whether it has `event`.
    pub has_event: bool,
    /// Whether it can hand its state to another instance.
    pub has_save_state: bool,
    /// Whether it can take over the state of another instance.
    pub has_load_state: bool,
    /// What the operator may set.
    pub params: Vec<Param>,
}

impl Description {
    /// The class by name.
    pub fn class_name(&self) -> &'static str {
        CLASSES.get(self.class as usize - 1).copied().unwrap_or("unknown")
    }

    /// Whether it keeps a state of its own: a sidecar for each instance.
    pub fn wants_sidecar(&self) -> bool {
        self.flags & filter_flag::SIDECAR != 0
    }

    /// Whether it asks what its disks consist of.
    pub fn asks_extents(&self) -> bool {
        self.flags & filter_flag::EXTENTS != 0
    }

    /// Whether it issues requests of its own.
    pub fn issues(&self) -> bool {
        self.flags & filter_flag::ISSUES != 0
    }

    /// Whether it decides what is on the disk, so that no operation may slip past it.
    pub fn decides(&self) -> bool {
        self.changes | self.answers != 0
    }

    /// Whether it is shown any data; if not, it gets no arena.
    pub fn wants_data(&self) -> bool {
        self.sees != 0 || self.writes_data()
    }

    /// Whether its pages are mapped for writing: it changes data, or answers reads.
    pub fn writes_data(&self) -> bool {
        self.changes != 0 || self.answers & bit(op::READ) != 0
    }

    /// Checks the text of a DESCRIPTION from a filter host for filters of `width`.
    pub fn parse(text: &[u8], width: Width) -> Result<Description, String> {
        let raw: Raw = serde_json::from_slice(text)
            .map_err(|error| format!("not a description: {}", clean_error(&error)))?;
        raw.check(width)
    }
}

#[derive(Deserialize)]
struct Raw {
    wire: u32,
    abi: u32,
    width: u32,
    name: String,
    version: String,
    vendor: String,
    summary: String,
    class: u32,
    flags: u32,
    ops: u32,
    sees: u32,
    changes: u32,
    answers: u32,
    functions: Vec<String>,
    params: Vec<RawParam>,
}

#[derive(Deserialize)]
struct RawParam {
    name: String,
    r#type: u32,
    doc: String,
    default: Option<String>,
    choices: Option<String>,
    min: i64,
    max: i64,
}

const TEXT_MAX: usize = 400;
const READ_WRITE: u32 = bit(op::READ) | bit(op::WRITE);
const ALL_OPS: u32 = READ_WRITE | bit(op::FLUSH) | bit(op::DISCARD) | bit(op::WRITE_ZEROES);

const fn bit(op: u8) -> u32 {
    1 << op
}

impl Raw {
    fn check(self, width: Width) -> Result<Description, String> {
        if self.wire != WIRE_VERSION {
            return Err(format!("the filter host speaks wire version {}", self.wire));
        }
        let (major, minor) = (self.abi >> 16, self.abi & 0xffff);
        if major != ABI_MAJOR || minor > ABI_MINOR {
            return Err(format!(
                "built for version {major}.{minor} of the filter contract, this is \
                 {ABI_MAJOR}.{ABI_MINOR}"
            ));
        }
        if self.width != width.bits() {
            return Err(format!("{} bits in a file of {} bits", self.width, width.bits()));
        }
        if !is_name(&self.name, b'-') {
            return Err(format!(
                "the name {:?} is not 1 to 31 of a-z, 0-9 and -",
                clean(self.name.as_bytes(), TEXT_MAX)
            ));
        }
        if !(1..=CLASSES.len() as u32).contains(&self.class) {
            return Err(format!("there is no class {}", self.class));
        }
        if self.flags & !(filter_flag::ISSUES | filter_flag::SIDECAR | filter_flag::EXTENTS) != 0 {
            return Err(format!("unknown flags {:#x}", self.flags));
        }
        self.check_ops()?;
        let params = check_params(self.params)?;
        let has = |name: &str| self.functions.iter().any(|function| function == name);
        let line = |text: &str| clean(text.as_bytes(), TEXT_MAX);
        Ok(Description {
            version: line(&self.version),
            vendor: line(&self.vendor),
            summary: line(&self.summary),
            abi: self.abi,
            width,
            class: self.class,
            flags: self.flags,
            ops: self.ops,
            sees: self.sees,
            changes: self.changes,
            answers: self.answers,
            has_io_done: has("io_done"),
            has_cancel: has("cancel"),
            has_event: has("event"),
            has_save_state: has("save_state"),
            has_load_state: has("load_state"),
            name: self.name,
            params,
        })
    }

    fn check_ops(&self) -> Result<(), String> {
        if self.ops == 0 {
            return Err("`ops` is empty: it would never be called".into());
        }
        for (name, mask, allowed, of) in [
            ("ops", self.ops, ALL_OPS, "the operations"),
            ("sees", self.sees, self.ops & READ_WRITE, "read and write in `ops`"),
            ("changes", self.changes, self.ops & READ_WRITE, "read and write in `ops`"),
            ("answers", self.answers, self.ops, "`ops`"),
        ] {
            if mask & !allowed != 0 {
                return Err(format!("`{name}` is {mask:#x}, which is not a part of {of}"));
            }
        }
        if self.answers & bit(op::WRITE) != 0 && self.ops & bit(op::FLUSH) == 0 {
            return Err("it answers writes, so it must have flush in `ops`".into());
        }
        Ok(())
    }
}

fn check_params(raw: Vec<RawParam>) -> Result<Vec<Param>, String> {
    let mut params: Vec<Param> = Vec::with_capacity(raw.len());
    for raw in raw {
        let name = clean(raw.name.as_bytes(), TEXT_MAX);
        let wrong = |what: String| format!("parameter {name:?}: {what}");
        if !is_name(&raw.name, b'_') {
            return Err(wrong("the name is not 1 to 31 of a-z, 0-9 and _".into()));
        }
        if params.iter().any(|param| param.name == raw.name) {
            return Err(wrong("declared twice".into()));
        }
        let Some(kind) = ParamType::from_number(raw.r#type) else {
            return Err(wrong(format!("there is no type {}", raw.r#type)));
        };
        let choices = match (&raw.choices, kind) {
            (Some(text), ParamType::Choice) => text.split('|').map(str::to_owned).collect(),
            (None, ParamType::Choice) => return Err(wrong("has no `choices`".into())),
            _ => Vec::new(),
        };
        if choices.iter().any(|choice| !is_plain(choice)) {
            return Err(wrong("has an empty or unprintable choice".into()));
        }
        if raw.min > raw.max {
            return Err(wrong(format!("min {} is more than max {}", raw.min, raw.max)));
        }
        let param = Param {
            name: raw.name.clone(),
            kind,
            doc: clean(raw.doc.as_bytes(), TEXT_MAX),
            default: raw.default,
            choices,
            min: raw.min,
            max: raw.max,
        };
        if let Some(default) = &param.default {
            if *default != clean(default.as_bytes(), usize::MAX) {
                return Err(wrong("its default is not plain text on one line".into()));
            }
            if let Err(what) = param.check(default) {
                return Err(wrong(format!("its default {default:?} is wrong: {what}")));
            }
        }
        params.push(param);
    }
    Ok(params)
}

fn is_name(name: &str, extra: u8) -> bool {
    (1..=31).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == extra)
}

fn is_plain(text: &str) -> bool {
    !text.is_empty() && clean(text.as_bytes(), usize::MAX) == text
}

fn clean_error(error: &serde_json::Error) -> String {
    clean(error.to_string().as_bytes(), TEXT_MAX)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::{Value, json};

    pub(crate) fn sample() -> Value {
        json!({
            "wire": 1, "abi": 65536, "width": 64, "name": "xor", "version": "1", "vendor": "us",
            "summary": "flips bits", "class": 3, "flags": 0, "ops": 6, "sees": 6, "changes": 6,
            "answers": 0, "functions": ["io_done", "cancel"], "params": [
                {"name": "key", "type": 1, "doc": "d", "default": "5", "choices": null,
                 "min": 0, "max": 9}],
            "later": {"unknown": []}
        })
    }

    fn parse(value: &Value) -> Result<Description, String> {
        Description::parse(value.to_string().as_bytes(), Width::Bits64)
    }

    #[test]
    fn a_description_is_read_and_unknown_fields_are_passed_over() {
        let description = parse(&sample()).unwrap();
        assert_eq!((description.name.as_str(), description.class_name()), ("xor", "encryption"));
        assert!(description.has_io_done && description.has_cancel && !description.has_event);
        assert!(description.decides() && description.writes_data() && !description.issues());
        assert_eq!(description.params[0].name, "key");
        assert_eq!(description.params[0].kind, ParamType::Int);
    }

    #[test]
    fn pages_are_for_those_who_asked_and_writable_for_those_who_change() {
        let (read, write) = (2, 4);
        for (sees, changes, answers, wants, writes) in [
            (0, 0, 0, false, false),
            (read, 0, 0, true, false),
            (0, write, 0, true, true),
            (0, 0, read, true, true),
            (0, 0, write, false, false),
        ] {
            let mut masks = sample();
            masks["ops"] = json!(14);
            (masks["sees"], masks["changes"]) = (json!(sees), json!(changes));
            masks["answers"] = json!(answers);
            let description = parse(&masks).unwrap();
            let found = (description.wants_data(), description.writes_data());
            assert_eq!(found, (wants, writes), "{sees} {changes} {answers}");
        }
    }

    #[test]
    fn each_wrong_field_is_refused_with_its_name() {
        for (field, value, says) in [
            ("wire", json!(2), "wire version 2"),
            ("abi", json!(65540), "version 1.4"),
            ("abi", json!(2 << 16), "version 2.0"),
            ("width", json!(32), "32 bits in a file of 64"),
            ("name", json!(""), "name"),
            ("name", json!("Xor"), "name"),
            ("name", json!("x\u{1b}"), "name"),
            ("name", json!("x".repeat(32)), "name"),
            ("class", json!(0), "class 0"),
            ("class", json!(9), "class 9"),
            ("class", json!(-1), "not a description"),
            ("flags", json!(8), "flags 0x8"),
            ("ops", json!(0), "`ops` is empty"),
            ("ops", json!(64), "`ops`"),
            ("ops", json!(7), "`ops`"),
            ("sees", json!(8), "`sees`"),
            ("changes", json!(10), "`changes`"),
            ("answers", json!(8), "`answers`"),
            ("answers", json!(4), "must have flush"),
            ("params", json!([1]), "not a description"),
            ("summary", json!(null), "not a description"),
        ] {
            let mut wrong = sample();
            wrong[field] = value.clone();
            let said = parse(&wrong).unwrap_err();
            assert!(said.contains(says), "{field} = {value}: {said}");
            assert!(said.chars().all(|char| !char.is_control()), "{said:?}");
        }
    }

    #[test]
    fn each_wrong_parameter_is_refused_with_its_name() {
        for (field, value, says) in [
            ("name", json!("Key"), "a-z"),
            ("name", json!("a-b"), "a-z"),
            ("type", json!(11), "type 11"),
            ("type", json!(6), "no `choices`"),
            ("default", json!("10"), "its default"),
            ("default", json!("5\n"), "plain text"),
            ("min", json!(10), "more than max"),
        ] {
            let mut wrong = sample();
            wrong["params"][0][field] = value.clone();
            let said = parse(&wrong).unwrap_err();
            assert!(said.contains(says) && said.contains("parameter"), "{field}: {said}");
        }
        let mut twice = sample();
        twice["params"] = json!([twice["params"][0], twice["params"][0]]);
        assert!(parse(&twice).unwrap_err().contains("declared twice"));
    }

    #[test]
    fn text_for_people_is_cleaned() {
        let mut hostile = sample();
        hostile["summary"] = json!("\u{1b}[31mred\nline");
        hostile["params"][0]["doc"] = json!("\u{202e}");
        let description = parse(&hostile).unwrap();
        assert_eq!(description.summary, "\u{fffd}[31mred\u{fffd}line");
        assert_eq!(description.params[0].doc, "\u{fffd}");
    }

    #[test]
    fn what_is_no_json_is_refused() {
        for text in [&b""[..], b"{", b"\xff", b"[]", b"null", &[b'['; 10_000]] {
            assert!(Description::parse(text, Width::Bits64).is_err());
        }
    }
}
