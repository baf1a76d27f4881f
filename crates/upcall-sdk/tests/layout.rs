//! The Rust structs are those of the C header, at 64 and at 32 bits.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use upcall_sdk::sys;

/// A C program of static assertions: every size, every offset, every constant.
fn assertions(width: usize) -> String {
    let mut text = String::from("#include <upcall/filter.h>\n");
    for layout in sys::LAYOUTS {
        let name = layout.name;
        let size = layout.size[width];
        writeln!(text, "_Static_assert(sizeof(struct {name}) == {size}, \"{name}\");").unwrap();
        for (field, offset) in layout.fields {
            let field = field.trim_start_matches("r#");
            let offset = offset[width];
            writeln!(
                text,
                "_Static_assert(offsetof(struct {name}, {field}) == {offset}, \"{name}.{field}\");"
            )
            .unwrap();
        }
    }
    let constants: &[(&str, u64)] = &[
        ("UPCALL_ABI_VERSION", sys::ABI_VERSION.into()),
        ("UPCALL_PASS", sys::PASS.into()),
        ("UPCALL_WATCH", sys::WATCH.into()),
        ("UPCALL_DONE", sys::DONE.into()),
        ("UPCALL_FAIL", sys::FAIL.into()),
        ("UPCALL_HOLD", sys::HOLD.into()),
        ("UPCALL_REQ_FUA", sys::REQ_FUA.into()),
        ("UPCALL_REQ_UNMAP", sys::REQ_UNMAP.into()),
        ("UPCALL_REQ_RETRY", sys::REQ_RETRY.into()),
        ("UPCALL_PARAM_INT", sys::PARAM_INT.into()),
        ("UPCALL_PARAM_BOOL", sys::PARAM_BOOL.into()),
        ("UPCALL_PARAM_STRING", sys::PARAM_STRING.into()),
        ("UPCALL_PARAM_SIZE", sys::PARAM_SIZE.into()),
        ("UPCALL_PARAM_MILLIS", sys::PARAM_MILLIS.into()),
        ("UPCALL_PARAM_CHOICE", sys::PARAM_CHOICE.into()),
        ("UPCALL_PARAM_FRACTION", sys::PARAM_FRACTION.into()),
        ("UPCALL_PARAM_FILE_READ", sys::PARAM_FILE_READ.into()),
        ("UPCALL_PARAM_FILE_APPEND", sys::PARAM_FILE_APPEND.into()),
        ("UPCALL_PARAM_ADDRESS", sys::PARAM_ADDRESS.into()),
        ("UPCALL_EVENT_STUN", sys::EVENT_STUN.into()),
        ("UPCALL_EVENT_UNSTUN", sys::EVENT_UNSTUN.into()),
        ("UPCALL_EVENT_MIGRATE_OUT", sys::EVENT_MIGRATE_OUT.into()),
        ("UPCALL_EVENT_MIGRATE_IN", sys::EVENT_MIGRATE_IN.into()),
        ("UPCALL_FILTER_ISSUES", sys::FILTER_ISSUES.into()),
        ("UPCALL_FILTER_SIDECAR", sys::FILTER_SIDECAR.into()),
        ("UPCALL_SIDECAR_MAX", sys::SIDECAR_MAX as u64),
        ("UPCALL_READ", upcall_sdk::Op::Read as u64),
        ("UPCALL_WRITE", upcall_sdk::Op::Write as u64),
        ("UPCALL_FLUSH", upcall_sdk::Op::Flush as u64),
        ("UPCALL_DISCARD", upcall_sdk::Op::Discard as u64),
        ("UPCALL_WRITE_ZEROES", upcall_sdk::Op::WriteZeroes as u64),
        ("UPCALL_CLASS_INSPECTION", upcall_sdk::Class::Inspection as u64),
        ("UPCALL_CLASS_COMPRESSION", upcall_sdk::Class::Compression as u64),
        ("UPCALL_CLASS_ENCRYPTION", upcall_sdk::Class::Encryption as u64),
        ("UPCALL_CLASS_REPLICATION", upcall_sdk::Class::Replication as u64),
        ("UPCALL_CLASS_CACHE", upcall_sdk::Class::Cache as u64),
        ("UPCALL_CLASS_PROVIDER", upcall_sdk::Class::Provider as u64),
        ("UPCALL_CLASS_QOS", upcall_sdk::Class::Qos as u64),
        ("UPCALL_CLASS_CAPTURE", upcall_sdk::Class::Capture as u64),
        ("UPCALL_LOG_ERROR", upcall_sdk::Level::Error as u64),
        ("UPCALL_LOG_WARN", upcall_sdk::Level::Warn as u64),
        ("UPCALL_LOG_INFO", upcall_sdk::Level::Info as u64),
        ("UPCALL_LOG_DEBUG", upcall_sdk::Level::Debug as u64),
    ];
    for (name, value) in constants {
        writeln!(text, "_Static_assert({name} == {value}, \"{name}\");").unwrap();
    }
    text
}

/// Compiles only, and needs no C library, so 32 bits work wherever the compiler knows them.
fn compile(text: &str, width: &str) -> (bool, String) {
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../sdk/c/include");
    let mut compiler = Command::new("cc")
        .args([width, "-std=c11", "-ffreestanding", "-fsyntax-only", "-xc", "-", "-I"])
        .arg(include)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a C compiler named cc");
    compiler.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = compiler.wait_with_output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn the_header_agrees_at_64_bits() {
    let (is_equal, complaint) = compile(&assertions(0), "-m64");
    assert!(is_equal, "{complaint}");
}

#[test]
fn the_header_agrees_at_32_bits() {
    let (is_equal, complaint) = compile(&assertions(1), "-m32");
    assert!(is_equal, "{complaint}");
}

#[test]
fn a_wrong_offset_is_noticed() {
    let (is_equal, complaint) = compile(&assertions(0), "-m32");
    assert!(!is_equal && complaint.contains("upcall_request.context"), "{complaint}");
}
