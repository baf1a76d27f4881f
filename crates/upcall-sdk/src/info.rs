//! What a filter says about itself, checked while it is compiled.

use std::ffi::CStr;
use std::mem::size_of;
use std::ptr;

use crate::{Op, OpSet, sys};

/// A filter's place in the chain, from the guest to the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Class {
    /// Looks at what the guest does.
    Inspection = 1,
    /// Makes data smaller.
    Compression = 2,
    /// Makes data unreadable.
    Encryption = 3,
    /// Keeps another copy.
    Replication = 4,
    /// Answers from something faster.
    Cache = 5,
    /// Is where the data ends up.
    Provider = 6,
    /// Limits and shares.
    Qos = 7,
    /// Sees what the store sees.
    Capture = 8,
}

/// What a filter is. The masks mean what the header says of them.
#[derive(Clone, Copy, Debug)]
pub struct Info {
    /// a-z, 0-9 and -; at most 31 bytes.
    pub name: &'static CStr,
    /// The filter's own version.
    pub version: &'static CStr,
    /// Who makes it.
    pub vendor: &'static CStr,
    /// One line.
    pub summary: &'static CStr,
    /// Its place in the chain.
    pub class: Class,
    /// `start_io` is called for these.
    pub ops: OpSet,
    /// With the data to read.
    pub sees: OpSet,
    /// With the data to change: of a write on its way down, of a read on its way up.
    pub changes: OpSet,
    /// It may say `done` to these.
    pub answers: OpSet,
    /// It issues requests of its own.
    pub issues: bool,
    /// It keeps a state of its own; see [`Instance::sidecar`](crate::Instance::sidecar).
    pub sidecar: bool,
    /// It asks what its disks consist of; see [`Instance::extents`](crate::Instance::extents).
    pub extents: bool,
}

impl Info {
    /// A start to build on with `..Info::NEW`: sees no data, changes and answers nothing.
    pub const NEW: Info = Info {
        name: c"",
        version: c"0",
        vendor: c"",
        summary: c"",
        class: Class::Inspection,
        ops: OpSet::NONE,
        sees: OpSet::NONE,
        changes: OpSet::NONE,
        answers: OpSet::NONE,
        issues: false,
        sidecar: false,
        extents: false,
    };

    /// Fails the build of a filter that the framework would refuse.
    pub(crate) const fn check(&self) {
        assert!(is_name(self.name, b'-'), "name: a-z, 0-9 and -, 1 to 31 bytes");
        assert!(self.ops.contains_all(self.sees), "sees: must be a part of ops");
        assert!(self.ops.contains_all(self.changes), "changes: must be a part of ops");
        assert!(self.ops.contains_all(self.answers), "answers: must be a part of ops");
        assert!(OpSet::DATA.contains_all(self.sees), "sees: read and write only");
        assert!(OpSet::DATA.contains_all(self.changes), "changes: read and write only");
        assert!(self.ops.mask() != 0, "ops: must not be empty");
        let decides = self.changes.union(self.answers).mask() != 0;
        assert!(
            !decides || self.ops.contains_all(OpSet::DATA),
            "ops: a filter that changes or answers must handle read and write"
        );
        let answers_writes = self.answers.contains(Op::Write)
            || self.answers.contains(Op::Discard)
            || self.answers.contains(Op::WriteZeroes);
        assert!(
            !answers_writes || self.ops.contains(Op::Flush),
            "ops: a filter that answers write, discard or write-zeroes must handle flush"
        );
    }
}

/// Whether it is 1 to 31 bytes of a-z, 0-9 and `extra`.
const fn is_name(name: &CStr, extra: u8) -> bool {
    let bytes = name.to_bytes();
    let mut index = 0;
    while index < bytes.len() {
        let byte = bytes[index];
        if !(byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == extra) {
            return false;
        }
        index += 1;
    }
    !bytes.is_empty() && bytes.len() <= 31
}

/// One parameter that the operator may set. The framework checks a value against it
/// before the filter is opened; a wrong one never reaches the filter.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Param(pub(crate) sys::Param);

// SAFETY: the pointers are to immutable memory that lives as long as the program: they
// only ever come from `&'static CStr`.
unsafe impl Sync for Param {}
// SAFETY: as above.
unsafe impl Send for Param {}

/// The arguments are the parameter's name (a-z, 0-9 and _), a sentence for people, the
/// default as the operator would write it (or `None`: it must be given), and its bounds; if
/// both are 0, any value is allowed.
impl Param {
    /// A whole number.
    pub const fn int(
        name: &'static CStr,
        doc: &'static CStr,
        default: Option<&'static CStr>,
        min: i64,
        max: i64,
    ) -> Param {
        Self::new(sys::PARAM_INT, name, doc, default, None, min, max)
    }

    /// Yes or no; read it with `param_int`, as 0 or 1.
    pub const fn bool(
        name: &'static CStr,
        doc: &'static CStr,
        default: Option<&'static CStr>,
    ) -> Param {
        Self::new(sys::PARAM_BOOL, name, doc, default, None, 0, 1)
    }

    /// Text of `min` to `max` bytes.
    pub const fn string(
        name: &'static CStr,
        doc: &'static CStr,
        default: Option<&'static CStr>,
        min: i64,
        max: i64,
    ) -> Param {
        Self::new(sys::PARAM_STRING, name, doc, default, None, min, max)
    }

    /// Bytes, with an optional K, M, G or T.
    pub const fn size(
        name: &'static CStr,
        doc: &'static CStr,
        default: Option<&'static CStr>,
        min: i64,
        max: i64,
    ) -> Param {
        Self::new(sys::PARAM_SIZE, name, doc, default, None, min, max)
    }

    /// A time in milliseconds, or with a unit behind it.
    pub const fn millis(
        name: &'static CStr,
        doc: &'static CStr,
        default: Option<&'static CStr>,
        min: i64,
        max: i64,
    ) -> Param {
        Self::new(sys::PARAM_MILLIS, name, doc, default, None, min, max)
    }

    /// One of `choices`, which are written `one|two|three`.
    pub const fn choice(
        name: &'static CStr,
        doc: &'static CStr,
        default: Option<&'static CStr>,
        choices: &'static CStr,
    ) -> Param {
        Self::new(sys::PARAM_CHOICE, name, doc, default, Some(choices), 0, 0)
    }

    /// 0 to 1, as in 0.25; read it with `param_fraction`.
    pub const fn fraction(
        name: &'static CStr,
        doc: &'static CStr,
        default: Option<&'static CStr>,
    ) -> Param {
        Self::new(sys::PARAM_FRACTION, name, doc, default, None, 0, 1)
    }

    /// A file that the framework opens for reading. May be absent.
    pub const fn file_read(name: &'static CStr, doc: &'static CStr) -> Param {
        Self::new(sys::PARAM_FILE_READ, name, doc, None, None, 0, 0)
    }

    /// A file that the framework opens for appending, and makes if it is missing. May be
    /// absent.
    pub const fn file_append(name: &'static CStr, doc: &'static CStr) -> Param {
        Self::new(sys::PARAM_FILE_APPEND, name, doc, None, None, 0, 0)
    }

    /// `unix:PATH` or `HOST:PORT`, connected by the framework. May be absent.
    pub const fn address(name: &'static CStr, doc: &'static CStr) -> Param {
        Self::new(sys::PARAM_ADDRESS, name, doc, None, None, 0, 0)
    }

    const fn new(
        kind: u32,
        name: &'static CStr,
        doc: &'static CStr,
        default: Option<&'static CStr>,
        choices: Option<&'static CStr>,
        min: i64,
        max: i64,
    ) -> Param {
        assert!(is_name(name, b'_'), "parameter name: a-z, 0-9 and _, 1 to 31 bytes");
        assert!(min <= max, "parameter: min must not be above max");
        Param(sys::Param {
            size: size_of::<sys::Param>() as u32,
            r#type: kind,
            name: name.as_ptr(),
            doc: doc.as_ptr(),
            default_value: match default {
                Some(text) => text.as_ptr(),
                None => ptr::null(),
            },
            choices: match choices {
                Some(text) => text.as_ptr(),
                None => ptr::null(),
            },
            min: sys::I64(min),
            max,
        })
    }

    /// Its name.
    pub fn name(&self) -> &'static CStr {
        // SAFETY: `new` took the pointer from a `&'static CStr`.
        unsafe { CStr::from_ptr(self.0.name) }
    }

    /// Its sentence for people.
    pub fn doc(&self) -> &'static CStr {
        // SAFETY: as in `name`.
        unsafe { CStr::from_ptr(self.0.doc) }
    }

    /// Its default, as the operator would write it.
    pub fn default_value(&self) -> Option<&'static CStr> {
        // SAFETY: as in `name`, or null.
        unsafe { self.0.default_value.as_ref().map(|text| CStr::from_ptr(text)) }
    }

    /// The choices, as in `one|two|three`.
    pub fn choices(&self) -> Option<&'static CStr> {
        // SAFETY: as in `name`, or null.
        unsafe { self.0.choices.as_ref().map(|text| CStr::from_ptr(text)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: Info = Info { name: c"good-1", ops: OpSet::ALL, ..Info::NEW };

    fn is_refused(info: Info) -> bool {
        std::panic::catch_unwind(move || info.check()).is_err()
    }

    #[test]
    fn what_the_framework_would_refuse_does_not_compile() {
        // The same function runs in a const context; see `table`.
        assert!(!is_refused(GOOD));
        assert!(is_refused(Info { name: c"", ..GOOD }));
        assert!(is_refused(Info { name: c"Upper", ..GOOD }));
        assert!(is_refused(Info { name: c"a234567890123456789012345678901x", ..GOOD }));
        assert!(is_refused(Info { sees: OpSet::of(&[Op::Flush]), ..GOOD }));
        assert!(is_refused(Info { changes: OpSet::of(&[Op::Discard]), ..GOOD }));
        let reads = OpSet::of(&[Op::Read]);
        let writes = OpSet::of(&[Op::Write]);
        assert!(is_refused(Info { ops: reads, sees: writes, ..GOOD }));
        assert!(is_refused(Info { ops: reads, changes: writes, ..GOOD }));
        assert!(is_refused(Info { ops: reads, answers: writes, ..GOOD }));
        assert!(is_refused(Info { ops: OpSet::NONE, ..GOOD }));
        assert!(is_refused(Info { ops: writes, changes: writes, ..GOOD }), "read is missing");
        assert!(!is_refused(Info { ops: OpSet::DATA, changes: writes, ..GOOD }));
        for op in [Op::Write, Op::Discard, Op::WriteZeroes] {
            let (ops, answers) = (OpSet::DATA.with(op), OpSet::of(&[op]));
            assert!(is_refused(Info { ops, answers, ..GOOD }), "flush is missing");
            assert!(!is_refused(Info { ops: ops.with(Op::Flush), answers, ..GOOD }));
        }
    }
}
