//! The sidecar's file: how a new one looks, and reading one offline. The filter host, which
//! writes it, has the same format in `sidecar.c`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::MemfdFlags;

/// Most bytes of a state.
pub const SIDECAR_MAX: usize = 64 << 10;
const SLOTS_AT: [u64; 2] = [0, 131_072];
const HEADER: usize = 64;
const CHECKSUM_AT: usize = 60;
const MAGIC: &[u8; 8] = b"UPCALLSC";
const VERSION: u32 = 1;

/// A state that was found whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Grows with each sync.
    pub sequence: u64,
    /// What the filter wrote.
    pub bytes: Vec<u8>,
    /// The other slot holds the same. Else a sync was cut off, or that slot is damaged; the
    /// next filter that opens the file mends it.
    pub is_doubled: bool,
}

/// Reads a sidecar's file; None: it has no whole slot. Reads at most both slots, whatever the
/// file claims.
pub fn parse(file: &File) -> io::Result<Option<State>> {
    let slots = [read_slot(file, SLOTS_AT[0])?, read_slot(file, SLOTS_AT[1])?];
    let is_doubled = slots[0].is_some() && slots[0] == slots[1];
    let newest = slots.into_iter().flatten().max_by_key(|(sequence, _)| *sequence);
    Ok(newest.map(|(sequence, bytes)| State { sequence, bytes, is_doubled }))
}

/// A sidecar in memory, for a disk that is gone with its worker.
pub fn volatile() -> io::Result<File> {
    let file: File = rustix::fs::memfd_create("upcall-sidecar", MemfdFlags::CLOEXEC)?.into();
    write_new(&file)?;
    Ok(file)
}

/// What a new file holds: twice the empty state.
pub(crate) fn write_new(file: &File) -> io::Result<()> {
    SLOTS_AT.iter().try_for_each(|at| file.write_all_at(&slot(0, &[]), *at))
}

fn slot(sequence: u64, state: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; HEADER];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&(state.len() as u32).to_le_bytes());
    bytes[16..24].copy_from_slice(&sequence.to_le_bytes());
    bytes.extend_from_slice(state);
    let checksum = checksum(&bytes);
    bytes[CHECKSUM_AT..HEADER].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

fn checksum(slot: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&slot[..CHECKSUM_AT]), &slot[HEADER..])
}

fn read_slot(file: &File, at: u64) -> io::Result<Option<(u64, Vec<u8>)>> {
    let mut bytes = vec![0; HEADER + SIDECAR_MAX];
    let mut have = 0;
    while have < bytes.len() {
        match file.read_at(&mut bytes[have..], at + have as u64) {
            Ok(0) => break,
            Ok(length) => have += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A block that cannot be read damages its slot, not the other.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => {
                break;
            }
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(have);
    Ok(parse_slot(bytes))
}

fn parse_slot(mut bytes: Vec<u8>) -> Option<(u64, Vec<u8>)> {
    let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let length = word(12)? as usize;
    let sequence = u64::from_le_bytes(bytes.get(16..24)?.try_into().ok()?);
    let expected = word(CHECKSUM_AT)?;
    if !bytes.starts_with(MAGIC) || word(8)? != VERSION || length > SIDECAR_MAX {
        return None;
    }
    let whole = bytes.get(..HEADER + length)?;
    if checksum(whole) != expected {
        return None;
    }
    bytes.truncate(HEADER + length);
    Some((sequence, bytes.split_off(HEADER)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_of(slots: [Option<Vec<u8>>; 2]) -> File {
        let file = volatile().unwrap();
        file.set_len(0).unwrap();
        for (slot, at) in slots.iter().zip(SLOTS_AT) {
            if let Some(bytes) = slot {
                file.write_all_at(bytes, at).unwrap();
            }
        }
        file
    }

    #[test]
    fn a_new_file_holds_the_empty_state_twice() {
        let state = parse(&volatile().unwrap()).unwrap().unwrap();
        assert_eq!(state, State { sequence: 0, bytes: vec![], is_doubled: true });
    }

    #[test]
    fn the_newer_whole_slot_counts_and_no_whole_slot_is_no_state() {
        let (old, new) = (slot(4, b"old"), slot(5, b"new"));
        let read = |slots| parse(&file_of(slots)).unwrap();
        let found = |state: Option<State>| state.map(|state| (state.sequence, state.bytes));
        for slots in [[Some(old.clone()), Some(new.clone())], [Some(new.clone()), None]] {
            assert_eq!(found(read(slots)), Some((5, b"new".to_vec())));
        }
        for byte in 0..new.len() {
            let mut rotten = new.clone();
            rotten[byte] ^= 1;
            let state = read([Some(rotten.clone()), Some(old.clone())]);
            assert_eq!(found(state), Some((4, b"old".to_vec())), "byte {byte}");
            assert_eq!(read([Some(rotten), None]), None);
            assert_eq!(read([Some(new[..byte].to_vec()), None]), None, "cut at {byte}");
        }
        let both = read([Some(new.clone()), Some(new)]).unwrap();
        assert!(both.is_doubled);
    }

    #[test]
    fn a_length_beyond_the_most_is_not_believed() {
        let mut bytes = slot(1, &vec![1; SIDECAR_MAX + 1]);
        let sum = checksum(&bytes);
        bytes[CHECKSUM_AT..HEADER].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(parse(&file_of([Some(bytes), None])).unwrap(), None);
        let largest = slot(1, &vec![1; SIDECAR_MAX]);
        assert!(parse(&file_of([None, Some(largest)])).unwrap().is_some());
    }
}
