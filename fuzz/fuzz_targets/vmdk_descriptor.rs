//! A VMDK's descriptor that says what the input says.
//!
//! Always true, whatever the bytes: no panic; what is taken for an extent is a plain file name;
//! and the text that is made of it names, to QEMU, exactly what we put there. QEMU reads it with
//! `sscanf`, for which the end of a line is white space like any other: that reader is played
//! here, apart from the one that is tested.
#![no_main]

use libfuzzer_sys::fuzz_target;
use upcall_store::{rewrite_descriptor, vmdk_content_id};

/// What QEMU (`vmdk_parse_extents` in block/vmdk.c) would open: at the beginning of each line
/// `sscanf(line, "%9s %lld %9s \"%511[^\n\r\"]\" %lld", access, ...)`.
fn as_qemu_reads_it(text: &str) -> Vec<String> {
    let mut names = Vec::new();
    let bytes = text.as_bytes();
    let mut start = 0;
    while start < bytes.len() {
        names.extend(name_at(&bytes[start..]));
        match bytes[start..].iter().position(|byte| *byte == b'\n') {
            Some(end) => start += end + 1,
            None => break,
        }
    }
    names
}

fn name_at(mut rest: &[u8]) -> Option<String> {
    let access = word(&mut rest)?;
    number(&mut rest)?;
    word(&mut rest)?;
    skip_space(&mut rest);
    let quoted = rest.strip_prefix(b"\"")?;
    let end = quoted.iter().take(511).position(|byte| b"\n\r\"".contains(byte));
    let end = end.unwrap_or(quoted.len().min(511));
    // Version 7.2 takes lines that begin with RW; others might take others.
    let is_access = [&b"RW"[..], b"RDONLY", b"NOACCESS"].contains(&access);
    (end > 0 && is_access).then(|| String::from_utf8_lossy(&quoted[..end]).into_owned())
}

fn is_space(byte: &u8) -> bool {
    byte.is_ascii_whitespace() || *byte == 0x0b
}

fn skip_space(rest: &mut &[u8]) {
    let count = rest.iter().take_while(|byte| is_space(byte)).count();
    *rest = &rest[count..];
}

/// `%9s`.
fn word<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    skip_space(rest);
    let count = rest.iter().take(9).take_while(|byte| !is_space(byte)).count();
    let (word, after) = rest.split_at(count);
    *rest = after;
    (count > 0).then_some(word)
}

/// `%lld`.
fn number(rest: &mut &[u8]) -> Option<()> {
    skip_space(rest);
    if let Some(after) = rest.strip_prefix(b"-").or_else(|| rest.strip_prefix(b"+")) {
        *rest = after;
    }
    let count = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    *rest = &rest[count..];
    (count > 0).then_some(())
}

fuzz_target!(|bytes: &[u8]| {
    if let Some((at, digits)) = vmdk_content_id(bytes) {
        assert_eq!(bytes[at..at + 8], digits);
        assert!(bytes[..at].ends_with(b"CID="));
    }
    let ours = |index: usize| format!("/proc/self/fd/{}", 100 + index);
    let Ok((extents, text)) = rewrite_descriptor(bytes, ours) else { return };
    assert!(!extents.is_empty());
    for name in &extents {
        assert!(!name.is_empty() && name != "." && name != "..", "{name:?}");
        assert!(!name.contains(['/', '"', '\0', '\n', '\r']), "{name:?}");
    }
    let given: Vec<String> = (0..extents.len()).map(ours).collect();
    assert_eq!(as_qemu_reads_it(&text), given, "{text}");
    // Another round changes nothing but the names.
    let plain = |index: usize| format!("x{index}");
    let (_, once) = rewrite_descriptor(bytes, plain).expect("it was taken before");
    let (names, twice) = rewrite_descriptor(once.as_bytes(), plain).expect("what we made");
    assert_eq!(names, (0..extents.len()).map(plain).collect::<Vec<_>>());
    assert_eq!(once, twice);
});
