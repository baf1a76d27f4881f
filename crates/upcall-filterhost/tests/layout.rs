//! The C side's types and numbers are those of the Rust side, for 64 and for 32 bits.

mod common;

use std::collections::HashMap;
use std::fs;
use std::mem::{align_of, offset_of, size_of};
use std::path::Path;
use std::process::Command;

use common::{compile, has_m32};
use upcall_abi::control::{self, Disk, Header, Open, kind};
use upcall_abi::filter::{self, filter_flag, op, request_flag, verdict};
use upcall_abi::ring::{self, Completion, Submission, completion_kind, submission_kind};
use upcall_filterhost::{CLASSES, ParamType};

/// Lines "NAME NUMBER NUMBER".
type Layout = HashMap<String, (usize, usize)>;

fn run(program: &Path) -> String {
    let output = Command::new(program).output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

fn layout(width: &str) -> Layout {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("c/layout.c");
    let text = run(&compile(&source, &[width]));
    let line = |line: &str| {
        let mut words = line.split(' ');
        let name = words.next()?.to_owned();
        Some((name, (words.next()?.parse().ok()?, words.next()?.parse().ok()?)))
    };
    text.lines().map(|text| line(text).expect(text)).collect()
}

fn widths() -> Vec<&'static str> {
    if has_m32() { vec!["-m64", "-m32"] } else { vec!["-m64"] }
}

fn size_of_field<T: Default, F>(_: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

macro_rules! compare {
    ($layout:expr, $c:literal, $rust:ident: $($field:ident),+) => {
        assert_eq!($layout[$c], (size_of::<$rust>(), align_of::<$rust>()), $c);
        let mut count = 0;
        $(
            let name = concat!($c, ".", stringify!($field));
            let size = size_of_field(|entry: &$rust| &entry.$field);
            assert_eq!($layout[name], (offset_of!($rust, $field), size), "{name}");
            count += 1;
        )+
        let prefix = concat!($c, ".");
        assert_eq!($layout.keys().filter(|name| name.starts_with(prefix)).count(), count, $c);
    };
}

#[test]
fn the_types_of_the_wire_have_one_layout() {
    for width in widths() {
        let c = layout(width);
        compare!(c, "wire_submission", Submission: seq, kind, op, flags, token, offset, length,
            status, data, cookie, instance, disk, reserved);
        compare!(c, "wire_completion", Completion: seq, kind, code, flags, token, offset, length,
            status, data, cookie, instance, disk, reserved);
        compare!(c, "wire_header", Header: kind, version, id, value);
        compare!(c, "wire_open", Open: arena, disks, parameters, files);
        compare!(c, "wire_disk", Disk: capacity, block_size, read_only);
        // These have no Rust type; the numbers are those of upcall-abi's control.rs.
        assert_eq!(c["wire_arena"], (16, 8));
        assert_eq!((c["wire_arena.size"], c["wire_arena.writable"]), ((0, 8), (8, 4)));
        assert_eq!(c["wire_counter"], (64, 8));
        assert_eq!((c["wire_counter.name"], c["wire_counter.value"]), ((0, 48), (48, 8)));
    }
}

#[test]
fn what_filters_see_differs_between_widths_only_by_their_pointers() {
    for width in widths() {
        let c = layout(width);
        let pointer = c["pointer"].0;
        assert_eq!(pointer, if width == "-m64" { 8 } else { 4 });
        assert_eq!(c["upcall_request.offset"], (8, 8));
        assert_eq!(c["upcall_request.status"], (20, 4));
        assert_eq!(c["upcall_request.data"], (24, pointer));
        assert_eq!(c["upcall_request.context"], (24 + pointer, pointer));
        assert_eq!(c["upcall_disk"], (24, 8));
        assert_eq!(c["upcall_issue.disk"], (20, 4));
        assert_eq!(c["upcall_param.name"].0, 8);
        assert_eq!(c["upcall_param.min"].0 % 8, 0);
        assert_eq!(c["upcall_filter.ops"].0, c["upcall_filter.flags"].0 + 4);
    }
}

fn expected_numbers() -> Vec<(&'static str, u64)> {
    let mut numbers: Vec<(&'static str, u64)> = vec![
        ("UPCALL_ABI_VERSION", filter::ABI_VERSION.into()),
        ("UPCALL_ABI_MAJOR", filter::ABI_MAJOR.into()),
        ("UPCALL_ABI_MINOR", filter::ABI_MINOR.into()),
        ("UPCALL_READ", op::READ.into()),
        ("UPCALL_WRITE", op::WRITE.into()),
        ("UPCALL_FLUSH", op::FLUSH.into()),
        ("UPCALL_DISCARD", op::DISCARD.into()),
        ("UPCALL_WRITE_ZEROES", op::WRITE_ZEROES.into()),
        ("UPCALL_PASS", verdict::PASS.into()),
        ("UPCALL_WATCH", verdict::WATCH.into()),
        ("UPCALL_DONE", verdict::DONE.into()),
        ("UPCALL_FAIL", verdict::FAIL.into()),
        ("UPCALL_HOLD", verdict::HOLD.into()),
        ("UPCALL_REQ_FUA", request_flag::FUA.into()),
        ("UPCALL_REQ_UNMAP", request_flag::UNMAP.into()),
        ("UPCALL_REQ_RETRY", request_flag::RETRY.into()),
        ("UPCALL_FILTER_ISSUES", filter_flag::ISSUES.into()),
        ("UPCALL_FILTER_SIDECAR", filter_flag::SIDECAR.into()),
        ("UPCALL_FILTER_EXTENTS", filter_flag::EXTENTS.into()),
        ("UPCALL_EXTENT_DATA", 0),
        ("UPCALL_EXTENT_ZERO", 1),
        ("UPCALL_EXTENT_HOLE", 2),
        ("UPCALL_EXTENTS_MAX", upcall_abi::extents::EXTENTS_MAX as u64),
        ("WIRE_OPEN_SIDECAR", control::OPEN_SIDECAR.into()),
        ("WIRE_OPEN_EXTENTS", control::OPEN_EXTENTS.into()),
        ("UPCALL_SIDECAR_MAX", filter::SIDECAR_MAX as u64),
        ("WIRE_SIDECAR_MAX", filter::SIDECAR_MAX as u64),
        ("UPCALL_LOG_ERROR", 1),
        ("UPCALL_LOG_WARN", 2),
        ("UPCALL_LOG_INFO", 3),
        ("UPCALL_LOG_DEBUG", 4),
        ("UPCALL_EVENT_STUN", 1),
        ("UPCALL_EVENT_UNSTUN", 2),
        ("UPCALL_EVENT_ATTACH", 3),
        ("UPCALL_EVENT_DETACH", 4),
        ("UPCALL_EVENT_MIGRATE_OUT", upcall_abi::filter::EVENT_MIGRATE_OUT.into()),
        ("UPCALL_EVENT_MIGRATE_IN", upcall_abi::filter::EVENT_MIGRATE_IN.into()),
        ("UPCALL_STATE_MAX", filter::STATE_MAX as u64),
        ("WIRE_VERSION", upcall_abi::WIRE_VERSION.into()),
        ("WIRE_MAGIC", ring::MAGIC),
        ("WIRE_ENTRY_SIZE", ring::ENTRY_SIZE as u64),
        ("WIRE_ENTRIES_MAX", ring::ENTRIES_MAX.into()),
        ("WIRE_ENTRIES_OFFSET", ring::ENTRIES_OFFSET as u64),
        ("WIRE_SUBMISSION_SLEEPING_OFFSET", ring::SUBMISSION_SLEEPING_OFFSET as u64),
        ("WIRE_COMPLETION_SLEEPING_OFFSET", ring::COMPLETION_SLEEPING_OFFSET as u64),
        ("WIRE_SUBMISSION_HEAD_OFFSET", ring::SUBMISSION_HEAD_OFFSET as u64),
        ("WIRE_COMPLETION_HEAD_OFFSET", ring::COMPLETION_HEAD_OFFSET as u64),
        ("WIRE_RINGS_OFFSET", ring::RINGS_OFFSET as u64),
        ("WIRE_NO_DATA", ring::NO_DATA),
        ("WIRE_START", submission_kind::START.into()),
        ("WIRE_DONE", submission_kind::DONE.into()),
        ("WIRE_CANCEL", submission_kind::CANCEL.into()),
        ("WIRE_ISSUED", submission_kind::ISSUED.into()),
        ("WIRE_VERDICT", completion_kind::VERDICT.into()),
        ("WIRE_ISSUE", completion_kind::ISSUE.into()),
        ("WIRE_HELD", completion_kind::HELD.into()),
        ("WIRE_MESSAGE_MAX", control::MESSAGE_MAX as u64),
        ("WIRE_DESCRIPTORS_MAX", control::DESCRIPTORS_MAX as u64),
        ("WIRE_SOCKET_FD", control::SOCKET_FD as u64),
        ("WIRE_FILTER_FD", control::FILTER_FD as u64),
        ("WIRE_MSG_DESCRIBE", kind::DESCRIBE.into()),
        ("WIRE_MSG_ARENA", kind::ARENA.into()),
        ("WIRE_MSG_ISSUE_ARENA", kind::ISSUE_ARENA.into()),
        ("WIRE_MSG_CHANNEL", kind::CHANNEL.into()),
        ("WIRE_MSG_LOAD", kind::LOAD.into()),
        ("WIRE_MSG_OPEN", kind::OPEN.into()),
        ("WIRE_MSG_START", kind::START.into()),
        ("WIRE_MSG_EVENT", kind::EVENT.into()),
        ("WIRE_MSG_CLOSE", kind::CLOSE.into()),
        ("WIRE_MSG_QUIT", kind::QUIT.into()),
        ("WIRE_MSG_SAVE_STATE", kind::SAVE_STATE.into()),
        ("WIRE_MSG_LOAD_STATE", kind::LOAD_STATE.into()),
        ("WIRE_MSG_DESCRIPTION", kind::DESCRIPTION.into()),
        ("WIRE_MSG_RESULT", kind::RESULT.into()),
        ("WIRE_MSG_LOG", kind::LOG.into()),
        ("WIRE_COUNTERS", control::COUNTERS as u64),
        ("WIRE_COUNTERS_SIZE", control::COUNTERS_SIZE as u64),
        ("WIRE_LENGTH_MAX", filter::LENGTH_MAX.into()),
        ("WIRE_DATA_LENGTH_MAX", filter::DATA_LENGTH_MAX.into()),
        ("WIRE_ISSUED_MAX", filter::ISSUED_MAX as u64),
    ];
    let classes = [
        "UPCALL_CLASS_INSPECTION",
        "UPCALL_CLASS_COMPRESSION",
        "UPCALL_CLASS_ENCRYPTION",
        "UPCALL_CLASS_REPLICATION",
        "UPCALL_CLASS_CACHE",
        "UPCALL_CLASS_PROVIDER",
        "UPCALL_CLASS_QOS",
        "UPCALL_CLASS_CAPTURE",
    ];
    for (name, class) in classes.iter().zip(CLASSES) {
        assert_eq!(name.strip_prefix("UPCALL_CLASS_"), Some(class.to_uppercase().as_str()));
    }
    numbers.extend(classes.iter().zip(1..).map(|(name, number)| (*name, number)));
    let types = [
        ("UPCALL_PARAM_INT", ParamType::Int),
        ("UPCALL_PARAM_BOOL", ParamType::Bool),
        ("UPCALL_PARAM_STRING", ParamType::String),
        ("UPCALL_PARAM_SIZE", ParamType::Size),
        ("UPCALL_PARAM_MILLIS", ParamType::Millis),
        ("UPCALL_PARAM_CHOICE", ParamType::Choice),
        ("UPCALL_PARAM_FRACTION", ParamType::Fraction),
        ("UPCALL_PARAM_FILE_READ", ParamType::FileRead),
        ("UPCALL_PARAM_FILE_APPEND", ParamType::FileAppend),
        ("UPCALL_PARAM_ADDRESS", ParamType::Address),
    ];
    numbers.extend(types.map(|(name, kind)| {
        (
            name,
            (1..=99).find(|number| ParamType::from_number(*number) == Some(kind)).unwrap() as u64,
        )
    }));
    numbers
}

#[test]
fn the_numbers_of_both_sides_are_the_same() {
    let numbers = expected_numbers();
    let mut source = "#include <stdio.h>\n#include <upcall/filter.h>\n#include \"wire.h\"\n\
                      int main(void) {\n"
        .to_owned();
    for (name, _) in &numbers {
        source += &format!("printf(\"{name} %llu\\n\", (unsigned long long){name});\n");
    }
    source += "return 0; }\n";
    let path =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-numbers.c", std::process::id()));
    fs::write(&path, source).unwrap();
    for width in widths() {
        let expected: Vec<String> =
            numbers.iter().map(|(name, number)| format!("{name} {number}")).collect();
        assert_eq!(run(&compile(&path, &[width])).lines().collect::<Vec<_>>(), expected);
    }
}

#[test]
fn no_number_of_the_c_headers_is_left_out() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let known = expected_numbers();
    for header in ["../../sdk/c/include/upcall/filter.h", "c/wire.h"] {
        let text = fs::read_to_string(root.join(header)).unwrap();
        let words: Vec<&str> = text.split_whitespace().collect();
        let mut count = 0;
        for triple in words.windows(3) {
            let number = triple[2].trim_end_matches(',').parse::<u64>();
            if triple[1] == "=" && triple[0].starts_with(char::is_uppercase) && number.is_ok() {
                assert!(known.iter().any(|(name, _)| *name == triple[0]), "{}", triple[0]);
                count += 1;
            }
        }
        assert!(count >= 20, "only {count} numbers found in {header}");
    }
}
