//! What the sectors of a verified disk hold.

/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// Gives each write a stamp, and each sector of that write content of its own: a byte that
/// went to the wrong sector, or is of an older write, is seen.
#[derive(Clone, Copy, Debug)]
pub struct Pattern {
    seed: u64,
}

impl Pattern {
    /// Content depends on the seed too, so that what an earlier run left is never right.
    pub fn new(seed: u64) -> Pattern {
        Pattern { seed }
    }

    /// Fills `bytes`, whole sectors from `sector` on, as write number `stamp` wrote them.
    /// Stamp 0 is a sector never written: zeroes.
    pub fn fill(self, sector: u64, stamp: u32, bytes: &mut [u8]) {
        assert!(bytes.len().is_multiple_of(SECTOR));
        for (index, part) in bytes.chunks_exact_mut(SECTOR).enumerate() {
            if stamp == 0 {
                part.fill(0);
                continue;
            }
            let mut word = (sector + index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
                ^ u64::from(stamp) << 32
                ^ self.seed;
            for eight in part.chunks_exact_mut(8) {
                word ^= word << 13;
                word ^= word >> 7;
                word ^= word << 17;
                eight.copy_from_slice(&word.to_le_bytes());
            }
        }
    }

    /// Says what is wrong with `bytes`, the content of `sector`, if it is not what write
    /// `stamp` wrote.
    pub fn check(self, sector: u64, stamp: u32, bytes: &[u8]) -> Result<(), String> {
        let mut expected = [0; SECTOR];
        self.fill(sector, stamp, &mut expected);
        match bytes.iter().zip(&expected).position(|(is, should)| is != should) {
            None => Ok(()),
            Some(at) => Err(format!(
                "sector {sector}, stamp {stamp}: byte {at} is {:#04x}, not {:#04x}",
                bytes[at], expected[at]
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_of_another_sector_stamp_or_seed_is_seen() {
        let pattern = Pattern::new(7);
        let mut bytes = [0; SECTOR];
        pattern.fill(10, 3, &mut bytes);
        assert!(pattern.check(10, 3, &bytes).is_ok());
        assert!(pattern.check(11, 3, &bytes).is_err());
        assert!(pattern.check(10, 4, &bytes).is_err());
        assert!(pattern.check(10, 0, &bytes).is_err());
        assert!(Pattern::new(8).check(10, 3, &bytes).is_err());
        bytes[511] ^= 1;
        assert!(pattern.check(10, 3, &bytes).is_err());
    }
}
