//! Stamped sectors: data that says whose it is.
//!
//! Always true: a sector that parses as a stamp was written by a guest of this simulation,
//! whole, for that disk, at that place, by that request; stale, foreign, misdirected, torn
//! and wrongly (or not, or twice) changed data is told from it.

use crate::random::mix;

/// Bytes of a sector: what is written whole or not at all.
pub const SECTOR: usize = 512;
/// The bytes of a sector.
pub type Bytes = [u8; SECTOR];

const MAGIC: u64 = u64::from_le_bytes(*b"UPCLSECT");

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Content {
    /// Only zeroes: never written, discarded, or zeroed.
    Zero,
    /// Written by the request of this number; see [`stamp`].
    Stamp { disk: u32, sector: u32, request: u64 },
    /// Nothing that any request wrote.
    Garbage,
}

fn fill(disk: u32, sector: u32, request: u64) -> Bytes {
    let mut bytes = [0; SECTOR];
    let place = u64::from(disk) << 32 | u64::from(sector);
    let mut word = mix(place ^ request.rotate_left(17));
    for (number, chunk) in bytes.chunks_exact_mut(8).enumerate() {
        let value = match number {
            0 => MAGIC,
            1 => place,
            2 => request,
            _ => {
                word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(number as u64);
                word
            }
        };
        chunk.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// What request number `request`, unique in its world, writes to a sector of a disk.
pub fn stamp(disk: u32, sector: u32, request: u64) -> Bytes {
    fill(disk, sector, request)
}

/// What a sector holds.
pub fn parse(bytes: &Bytes) -> Content {
    if *bytes == [0; SECTOR] {
        return Content::Zero;
    }
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at * 8 + i]));
    let (disk, sector, request) = ((word(1) >> 32) as u32, word(1) as u32, word(2));
    if *bytes == fill(disk, sector, request) {
        Content::Stamp { disk, sector, request }
    } else {
        Content::Garbage
    }
}

/// What a data changer of the simulation does to a sector, both ways: keyed by filter and
/// place, so that a change that is missing, doubled or for another place is garbage.
pub fn change(bytes: &mut [u8], key: u64, sector: u32) {
    let mut word = mix(key ^ u64::from(sector) << 20) | 1;
    for chunk in bytes.chunks_mut(8) {
        word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        for (byte, mask) in chunk.iter_mut().zip(word.to_le_bytes()) {
            *byte ^= mask;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_says_whose_it_is_and_any_damage_shows() {
        let bytes = stamp(1, 7, 99);
        assert_eq!(parse(&bytes), Content::Stamp { disk: 1, sector: 7, request: 99 });
        for at in [0, 8, 16, 30, SECTOR - 1] {
            let mut damaged = bytes;
            damaged[at] ^= 1;
            assert_eq!(parse(&damaged), Content::Garbage, "byte {at}");
        }
        assert_eq!(parse(&[0; SECTOR]), Content::Zero);
    }

    #[test]
    fn a_change_is_undone_by_itself_at_its_place_alone() {
        let mut bytes = stamp(0, 3, 1);
        change(&mut bytes, 5, 3);
        assert_eq!(parse(&bytes), Content::Garbage);
        let mut elsewhere = bytes;
        change(&mut elsewhere, 5, 4);
        assert_eq!(parse(&elsewhere), Content::Garbage);
        change(&mut bytes, 5, 3);
        assert_eq!(bytes, stamp(0, 3, 1));
    }
}
