//! A sidecar whose two slots are what the input says: it travels with the image.
//!
//! Always true, whatever the bytes: no panic; what is found is what a whole slot holds, of two the
//! one with the larger number; it is called doubled exactly if both hold the same.
#![no_main]

use std::fs::File;
use std::os::unix::fs::FileExt;

use libfuzzer_sys::fuzz_target;
use upcall_state::{SIDECAR_MAX, State, parse, volatile};

const HEADER: usize = 64;
const SLOTS_AT: [u64; 2] = [0, 131_072];

/// Puts the right sum where the slot's length says that it belongs, as anybody could.
fn sign(slot: &mut [u8]) {
    let Some(length) = slot.get(12..16) else { return };
    let length = u32::from_le_bytes(length.try_into().expect("four bytes")) as usize;
    if let Some(state) = slot.get(HEADER..HEADER.saturating_add(length)) {
        let sum = crc32c::crc32c_append(crc32c::crc32c(&slot[..60]), state);
        slot[60..HEADER].copy_from_slice(&sum.to_le_bytes());
    }
}

fn file_of(slots: [&[u8]; 2]) -> File {
    let file = volatile().expect("a file in memory");
    file.set_len(0).expect("emptied");
    for (slot, at) in slots.iter().zip(SLOTS_AT) {
        file.write_all_at(slot, at).expect("written");
    }
    file
}

fn read(slots: [&[u8]; 2]) -> Option<State> {
    parse(&file_of(slots)).expect("memory can be read")
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&how, bytes)) = bytes.split_first() else { return };
    let (first, second) = bytes.split_at(bytes.len() * usize::from(how >> 2) / 63);
    let (mut first, mut second) = (first.to_vec(), second.to_vec());
    if !second.is_empty() {
        // A file that goes on to a second slot has zeroes where the first ends early.
        first.resize(HEADER + SIDECAR_MAX, 0);
    }
    if how & 1 == 1 {
        sign(&mut first);
    }
    if how & 2 == 2 {
        sign(&mut second);
    }
    let alone = [read([&first, &[]]), read([&[], &second])];
    for (state, slot) in alone.iter().zip([&first, &second]) {
        let Some(state) = state else { continue };
        assert!(state.bytes.len() <= SIDECAR_MAX && !state.is_doubled);
        assert_eq!(state.bytes, slot[HEADER..HEADER + state.bytes.len()]);
        assert_eq!(state.sequence.to_le_bytes(), slot[16..24]);
    }
    let (both, numbered) = (read([&first, &second]), alone.iter().flatten());
    let newest = numbered.clone().map(|state| state.sequence).max();
    assert_eq!(both.as_ref().map(|state| state.sequence), newest);
    let Some(both) = both else { return };
    assert!(numbered.clone().any(|one| (one.sequence, &one.bytes) == (both.sequence, &both.bytes)));
    assert_eq!(both.is_doubled, alone[0].is_some() && alone[0] == alone[1]);
});
