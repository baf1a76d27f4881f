//! What operators may write, and what they are told.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use super::*;
use crate::file::Width;

fn param(name: &str, kind: ParamType, default: Option<&str>, min: i64, max: i64) -> Param {
    let choices = match kind {
        ParamType::Choice => vec!["low".into(), "high".into()],
        _ => Vec::new(),
    };
    let default = default.map(Into::into);
    Param { name: name.into(), kind, doc: String::new(), default, choices, min, max }
}

fn filter(params: Vec<Param>) -> Description {
    let sample = crate::description::tests::sample().to_string();
    Description { params, ..Description::parse(sample.as_bytes(), Width::Bits64).unwrap() }
}

fn given(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
}

/// A folder that is gone after the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("upcall-{}-{name}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Folder(path)
    }

    fn at(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().into()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

#[test]
fn values_become_what_the_filter_host_reads() {
    use ParamType::*;
    for (kind, min, max, text, normal) in [
        (Int, -5, 5, "-5", "-5"),
        (Int, -5, 5, " 5 ", "5"),
        (Int, 0, 0, "-9223372036854775808", "-9223372036854775808"),
        (Int, 1, 9, "+7", "7"),
        (Bool, 0, 0, "yes", "1"),
        (Bool, 0, 0, "on", "1"),
        (Bool, 0, 0, "true", "1"),
        (Bool, 0, 0, "0", "0"),
        (Bool, 0, 0, "no", "0"),
        (Bool, 0, 0, "off", "0"),
        (Bool, 0, 0, "false", "0"),
        (String, 0, 5, "a b", "a b"),
        (String, 0, 5, "", ""),
        (Size, 0, 1 << 50, "4096", "4096"),
        (Size, 0, 1 << 50, "4K", "4096"),
        (Size, 0, 1 << 50, "1m", "1048576"),
        (Size, 0, 1 << 50, "2 G", "2147483648"),
        (Size, 0, 1 << 50, "1T", "1099511627776"),
        (Millis, 0, 100_000_000, "250", "250"),
        (Millis, 0, 100_000_000, "250ms", "250"),
        (Millis, 0, 100_000_000, "2s", "2000"),
        (Millis, 0, 100_000_000, "3m", "180000"),
        (Millis, 0, 100_000_000, "1h", "3600000"),
        (Choice, 0, 0, "high", "high"),
        (Fraction, 0, 0, "0.25", "0.25"),
        (Fraction, 0, 0, "1", "1"),
        (Fraction, 0, 0, "0", "0"),
        (Address, 0, 0, "unix:/run/x", "unix:/run/x"),
        (Address, 0, 0, "localhost:80", "localhost:80"),
        (Address, 0, 0, "[::1]:80", "[::1]:80"),
    ] {
        let param = param("p", kind, None, min, max);
        assert_eq!(param.check(text), Ok(normal.to_owned()), "{kind:?} {text:?}");
    }
}

#[test]
fn wrong_values_are_refused_and_the_message_says_what_was_expected() {
    use ParamType::*;
    for (kind, min, max, text, says) in [
        (Int, 1, 9, "0", "from 1 to 9"),
        (Int, 1, 9, "10", "from 1 to 9"),
        (Int, 1, 9, "five", "whole number"),
        (Int, 1, 9, "", "whole number"),
        (Int, 0, 0, "9223372036854775808", "whole number"),
        (Bool, 0, 0, "maybe", "yes, no"),
        (Bool, 0, 0, "2", "yes, no"),
        (String, 2, 3, "a", "2 to 3 bytes"),
        (String, 2, 3, "abcd", "2 to 3 bytes"),
        (String, 0, 9, "a\0b", "bytes of text"),
        (Size, 4096, 1 << 20, "4095", "4K to 1M"),
        (Size, 4096, 1 << 20, "2M", "4K to 1M"),
        (Size, 0, 0, "-1", "bytes"),
        (Size, 0, 0, "1X", "K, M, G or T"),
        (Size, 0, 0, "1.5G", "K, M, G or T"),
        (Size, 0, 0, "9999999999T", "bytes"),
        (Size, 0, 0, "K", "bytes"),
        (Millis, 10, 1000, "2s", "10 to 1000 ms"),
        (Millis, 0, 0, "1d", "ms, s, m or h"),
        (Millis, 0, 0, "99999999999999999h", "milliseconds"),
        (Choice, 0, 0, "mid", "one of low, high"),
        (Choice, 0, 0, "", "one of low, high"),
        (Fraction, 0, 0, "1.01", "0 to 1"),
        (Fraction, 0, 0, "-0.1", "0 to 1"),
        (Fraction, 0, 0, "nan", "0 to 1"),
        (Fraction, 0, 0, "1e-3", "0 to 1"),
        (Fraction, 0, 0, ".", "0 to 1"),
        (Fraction, 0, 0, "", "0 to 1"),
        (FileRead, 0, 0, "", "path"),
        (FileAppend, 0, 0, "a\0", "path"),
        (Address, 0, 0, "localhost", "HOST:PORT"),
        (Address, 0, 0, "localhost:0", "HOST:PORT"),
        (Address, 0, 0, "localhost:65536", "HOST:PORT"),
        (Address, 0, 0, ":80", "HOST:PORT"),
        (Address, 0, 0, "::1:80", "HOST:PORT"),
        (Address, 0, 0, "unix:", "unix:PATH"),
    ] {
        let said = param("p", kind, None, min, max).check(text).unwrap_err();
        assert!(said.contains(says), "{kind:?} {text:?}: {said}");
    }
    let long = "x".repeat(VALUE_MAX + 1);
    assert!(param("p", FileRead, None, 0, 0).check(&long).is_err());
    assert!(param("p", Address, None, 0, 0).check(&format!("unix:{}", &long[..108])).is_err());
}

#[test]
fn defaults_fill_in_and_absent_files_stay_absent() {
    let filter = filter(vec![
        param("rate", ParamType::Size, Some("1M"), 0, 0),
        param("log", ParamType::FileAppend, None, 0, 0),
        param("peer", ParamType::Address, None, 0, 0),
        param("mode", ParamType::Choice, Some("low"), 0, 0),
    ]);
    let params = resolve(&filter, &given(&[("mode", "high")])).unwrap();
    let all: Vec<_> = params.iter().map(|(name, value, fd)| (name, value, fd.is_some())).collect();
    assert_eq!(all, [("rate", "1048576", false), ("mode", "high", false)]);
    assert_eq!(params.get("log"), None);
}

#[test]
fn an_unknown_parameter_lists_the_known_and_suggests_the_nearest() {
    let filter = filter(vec![
        param("iops", ParamType::Int, Some("5"), 0, 0),
        param("burst", ParamType::Int, Some("5"), 0, 0),
    ]);
    let said = check(&filter, &given(&[("brust", "1")])).unwrap_err().to_string();
    let expected =
        "filter xor: it has no parameter \"brust\"; did you mean \"burst\"? It has: iops, burst";
    assert_eq!(said, expected);
    let said = check(&filter, &given(&[("colour\u{1b}", "1")])).unwrap_err().to_string();
    assert_eq!(said, "filter xor: it has no parameter \"colour\u{fffd}\". It has: iops, burst");
    let bare = self::filter(vec![]);
    let said = check(&bare, &given(&[("x", "1")])).unwrap_err().to_string();
    assert_eq!(said, "filter xor: it has no parameter \"x\"; it has none");
}

#[test]
fn missing_duplicate_and_wrong_ones_are_named() {
    let filter = filter(vec![param("key", ParamType::Int, None, 1, 9)]);
    let said = check(&filter, &[]).unwrap_err().to_string();
    assert_eq!(said, "filter xor: parameter key must be given: a whole number from 1 to 9");
    let said = check(&filter, &given(&[("key", "1"), ("key", "2")])).unwrap_err().to_string();
    assert_eq!(said, "filter xor: parameter key is given twice");
    let said = check(&filter, &given(&[("key", "10")])).unwrap_err().to_string();
    assert_eq!(
        said,
        "filter xor: parameter key cannot be \"10\": expected a whole number from 1 to 9"
    );
}

#[test]
fn files_are_opened_closed_on_exec_and_created_private() {
    let folder = Folder::new("files");
    fs::write(folder.at("in"), "text").unwrap();
    let filter = filter(vec![
        param("in", ParamType::FileRead, None, 0, 0),
        param("out", ParamType::FileAppend, None, 0, 0),
    ]);
    let (input, output) = (folder.at("in"), folder.at("out"));
    for line in ["one\n", "two\n"] {
        let params = resolve(&filter, &given(&[("in", &input), ("out", &output)])).unwrap();
        let fds: Vec<_> = params.iter().map(|(_, _, fd)| fd.unwrap()).collect();
        for fd in &fds {
            let flags = rustix::io::fcntl_getfd(fd).unwrap();
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
            assert!(!rustix::fs::fcntl_getfl(fd).unwrap().contains(OFlags::NONBLOCK));
        }
        rustix::io::write(fds[1], line.as_bytes()).unwrap();
        assert!(rustix::io::write(fds[0], b"x").is_err(), "opened for reading only");
    }
    assert_eq!(fs::read_to_string(&output).unwrap(), "one\ntwo\n");
    assert_eq!(fs::metadata(&output).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn a_link_that_the_operator_names_is_followed() {
    let folder = Folder::new("link");
    symlink(folder.at("real"), folder.at("link")).unwrap();
    let filter = filter(vec![param("out", ParamType::FileAppend, None, 0, 0)]);
    resolve(&filter, &given(&[("out", &folder.at("link"))])).unwrap();
    assert!(fs::metadata(folder.at("real")).unwrap().is_file());
}

#[test]
fn files_that_cannot_be_had_are_named_and_nothing_is_left_behind() {
    let folder = Folder::new("bad-files");
    let filter = filter(vec![
        param("out", ParamType::FileAppend, None, 0, 0),
        param("in", ParamType::FileRead, None, 0, 0),
    ]);
    let (made, missing) = (folder.at("made"), folder.at("missing"));
    let error = resolve(&filter, &given(&[("out", &made), ("in", &missing)])).unwrap_err();
    let said = error.to_string();
    assert!(said.contains("parameter in: cannot open for reading"), "{said}");
    assert!(said.contains("missing") && said.contains("No such file"), "{said}");
    assert!(!fs::exists(&made).unwrap(), "a file was created in vain");
    for name in ["in", "out"] {
        let said = resolve(&filter, &given(&[(name, &folder.at(""))])).unwrap_err().to_string();
        assert!(said.contains("directory"), "{said}");
    }
    let pipe = folder.at("pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &pipe,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    assert!(resolve(&filter, &given(&[("out", &pipe)])).is_err(), "nobody reads the pipe");
}

#[test]
fn addresses_are_connected() {
    let folder = Folder::new("addresses");
    let filter = filter(vec![param("peer", ParamType::Address, None, 0, 0)]);
    let path = folder.at("socket");
    let unix = UnixListener::bind(&path).unwrap();
    let params = resolve(&filter, &given(&[("peer", &format!("unix:{path}"))])).unwrap();
    let (_, _, fd) = params.iter().next().unwrap();
    rustix::io::write(fd.unwrap(), b"hello").unwrap();
    drop(params);
    let mut heard = String::new();
    unix.accept().unwrap().0.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "hello");

    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("localhost:{}", tcp.local_addr().unwrap().port());
    let params = resolve(&filter, &given(&[("peer", &address)])).unwrap();
    tcp.accept().unwrap().0.write_all(b"ok").unwrap();
    let (_, _, fd) = params.iter().next().unwrap();
    let mut two = [0; 2];
    assert_eq!(rustix::io::read(fd.unwrap(), &mut two), Ok(2));

    drop(tcp);
    let said = resolve(&filter, &given(&[("peer", &address)])).unwrap_err().to_string();
    assert!(said.contains(&format!("parameter peer: cannot connect to {address:?}")), "{said}");
}
