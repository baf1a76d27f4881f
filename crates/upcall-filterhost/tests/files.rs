//! What is no filter is refused before any of its code runs, and the message says why.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{compile, data, has_m32, start};
use upcall_filterhost::{FilterError, FilterFile, Placement, Width};

fn refusal(path: impl AsRef<Path>) -> String {
    FilterFile::open(path).unwrap_err().to_string()
}

fn made(name: &str, bytes: &[u8]) -> PathBuf {
    let path =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{name}", std::process::id()));
    fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn a_file_that_is_missing_or_no_file_is_refused_by_name() {
    let said = refusal("/nowhere/xor.so");
    assert_eq!(
        said,
        "filter /nowhere/xor.so: cannot open it: No such file or directory (os error 2)"
    );
    assert_eq!(refusal("/tmp"), "filter /tmp: not a regular file; give the filter's .so");
    assert!(refusal("/dev/null").contains("not a regular file"));
}

#[test]
fn a_pipe_is_refused_and_not_waited_for() {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-pipe", std::process::id()));
    let mode = rustix::fs::Mode::RUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    assert!(refusal(&path).contains("not a regular file"));
}

#[test]
fn a_file_that_is_no_shared_object_is_refused_with_what_it_is() {
    assert!(refusal(made("empty", b"")).contains("shorter than an ELF header"));
    assert!(refusal(made("short", b"\x7fELF\x02\x01")).contains("shorter than an ELF header"));
    assert!(refusal(made("text", &[b'a'; 100])).contains("not an ELF file"));
    let object = compile(&data("nothing.c"), &["-c"]);
    assert!(refusal(object).contains("not linked yet"));
}

#[test]
fn the_width_of_a_shared_object_is_known() {
    let file = FilterFile::open(compile(&data("nothing.c"), &["-shared", "-fPIC"])).unwrap();
    assert_eq!(file.width(), Width::Bits64);
    if has_m32() {
        let path = compile(&data("nothing.c"), &["-shared", "-fPIC", "-m32"]);
        let file = FilterFile::open(path).unwrap();
        assert_eq!(file.width(), Width::Bits32);
        let error = upcall_filterhost::HostProcess::start(
            &file,
            Placement::Inline,
            std::sync::Arc::new(|_| {}),
        );
        assert!(matches!(error.unwrap_err(), FilterError::InlineWidth { .. }));
    }
}

#[test]
fn a_shared_object_cut_short_is_an_error_of_its_host_and_nothing_else() {
    let whole = fs::read(compile(&data("nothing.c"), &["-shared", "-fPIC"])).unwrap();
    let file = FilterFile::open(made("cut.so", &whole[..200])).unwrap();
    let (mut host, _) = start(&file, Placement::Isolated);
    let error = host.describe().unwrap_err();
    assert!(error.to_string().contains("DESCRIBE failed"), "{error}");
}

#[test]
fn a_program_that_can_move_is_refused_by_the_loader() {
    let file = FilterFile::open("/bin/true").unwrap();
    let (mut host, _) = start(&file, Placement::Isolated);
    let error = host.describe().unwrap_err();
    assert!(matches!(error, FilterError::Refused { step: "DESCRIBE", .. }), "{error}");
}
