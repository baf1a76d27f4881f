//! A file `handover` that says what the input says: whoever may write beside the image can make
//! one, and the worker that takes the disk up reads it.
//!
//! Always true, whatever the bytes: no panic; without the right sum there is no handover; with it
//! (the target puts it there, as anybody could), what is taken has the bounds of what is written,
//! takes no more memory than the file is long, and means the same when it is written again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use upcall_state::{Handover, handover_bytes, parse_handover};

/// As many filters as a chain may have, and bytes as a name and a state may have; said here once
/// more, apart from the one that is tested.
const FILTERS: usize = 64;
const TEXT: usize = 4096;
const STATE: usize = 1 << 20;

fn check(handover: &Handover, file: &[u8]) {
    let Handover { failed, chain, states, .. } = handover;
    assert!(chain.len() <= FILTERS && states.len() <= FILTERS);
    let names = chain.iter().chain(states.iter().map(|(name, _)| name)).chain(failed);
    assert!(names.clone().all(|name| name.len() <= TEXT));
    assert!(states.iter().all(|(_, state)| state.len() <= STATE));
    let held: usize = names.map(String::len).chain(states.iter().map(|state| state.1.len())).sum();
    assert!(held <= file.len(), "{held} bytes out of {}", file.len());
    assert_ne!(failed.as_deref(), Some(""), "a failure that says nothing is none");
    let again = handover_bytes(handover);
    assert_eq!(parse_handover(&again).as_ref(), Some(handover));
    // One number is not as it was written: any but 0 means that a write cache is used.
    assert_eq!(again.len(), file.len());
    assert!(again[..12] == file[..12] && again[16..again.len() - 4] == file[16..file.len() - 4]);
}

fuzz_target!(|bytes: &[u8]| {
    if let Some(handover) = parse_handover(bytes) {
        check(&handover, bytes);
    }
    let mut whole = bytes.to_vec();
    let sum = crc32c::crc32c(&whole);
    whole.extend_from_slice(&sum.to_le_bytes());
    let Some(handover) = parse_handover(&whole) else { return };
    check(&handover, &whole);
    // Neither less nor more, nor with another sum.
    assert_eq!(parse_handover(bytes), None);
    whole.push(0);
    assert_eq!(parse_handover(&whole), None);
    whole.pop();
    *whole.last_mut().expect("the sum") ^= 0x80;
    assert_eq!(parse_handover(&whole), None);
});
