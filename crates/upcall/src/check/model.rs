//! What a part of the disk must hold: the reference that reads are compared with.
//!
//! A block that is known was written (its content follows from a stamp and its place) or
//! zeroed. After a modification that failed, its blocks are unknown: any content is right.
//! Before the first write they are unknown too, because a filter that changes data shows a
//! fresh disk as it likes.

use upcall_block::Op;

use super::random::mix;

/// Bytes of a block of the model.
pub const BLOCK: usize = 512;
const UNKNOWN: u64 = u64::MAX;
const ZERO: u64 = 0;

/// A range of whole blocks of the disk.
#[derive(Clone, Debug)]
pub struct Part {
    /// Bytes from the start of the disk.
    offset: u64,
    stamps: Vec<u64>,
}

impl Part {
    /// The part at `offset` of `length` bytes, of which nothing is known.
    pub fn new(offset: u64, length: u64) -> Part {
        Part { offset, stamps: vec![UNKNOWN; (length as usize) / BLOCK] }
    }

    /// Bytes from the start of the disk.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes.
    pub fn length(&self) -> u64 {
        (self.stamps.len() * BLOCK) as u64
    }

    /// A modification of this part has ended. `stamp`: of a write.
    pub fn handle_end(&mut self, op: Op, offset: u64, length: u32, stamp: u64, is_ok: bool) {
        let content = match op {
            Op::Read | Op::Flush => return,
            _ if !is_ok => UNKNOWN,
            Op::Write => stamp,
            Op::Discard | Op::WriteZeroes => ZERO,
        };
        let first = ((offset - self.offset) as usize) / BLOCK;
        self.stamps[first..first + length as usize / BLOCK].fill(content);
    }

    /// Whether what was read at `offset` is right; else what is wrong with it.
    pub fn compare(&self, offset: u64, bytes: &[u8]) -> Result<(), String> {
        let first = ((offset - self.offset) as usize) / BLOCK;
        for (index, found) in bytes.chunks_exact(BLOCK).enumerate() {
            let stamp = self.stamps[first + index];
            let at = offset + (index * BLOCK) as u64;
            let mut expected = [0; BLOCK];
            fill(&mut expected, at, stamp);
            if stamp != UNKNOWN && found != expected {
                let what = if stamp == ZERO { "zeroed or discarded" } else { "written" };
                return Err(format!(
                    "at {at}, which was {what}, a read gave {} instead of {}",
                    show(found),
                    show(&expected)
                ));
            }
        }
        Ok(())
    }
}

/// The content of a write at `offset`: of whole blocks, each different.
pub fn fill(bytes: &mut [u8], offset: u64, stamp: u64) {
    if stamp == ZERO {
        return bytes.fill(0);
    }
    for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
        let place = offset + 8 * index as u64;
        word.copy_from_slice(&mix(stamp ^ mix(place)).to_le_bytes());
    }
}

fn show(block: &[u8]) -> String {
    match block.iter().all(|byte| *byte == block[0]) {
        true => format!("{:02x} throughout", block[0]),
        false => block[..8].iter().map(|byte| format!("{byte:02x}")).collect::<String>() + "...",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(offset: u64, stamp: u64) -> Vec<u8> {
        let mut bytes = vec![0; 2 * BLOCK];
        fill(&mut bytes, offset, stamp);
        bytes
    }

    #[test]
    fn what_was_written_last_is_expected_and_nothing_else() {
        let mut part = Part::new(4096, 8192);
        assert_eq!(part.compare(4096, &[9; 1024]), Ok(()), "nothing is known");
        part.handle_end(Op::Write, 4608, 1024, 7, true);
        assert_eq!(part.compare(4608, &written(4608, 7)), Ok(()));
        assert!(part.compare(4608, &written(4608, 8)).unwrap_err().contains("written"));
        assert!(part.compare(4608, &written(4096, 7)).is_err(), "another place's data");
        part.handle_end(Op::Discard, 4608, 512, 0, true);
        assert_eq!(part.compare(4608, &[0; 512]), Ok(()));
        assert!(part.compare(4608, &written(4608, 7)).unwrap_err().contains("discarded"));
        part.handle_end(Op::WriteZeroes, 5120, 512, 0, true);
        assert_eq!(part.compare(4608, &[0; 1024]), Ok(()));
    }

    #[test]
    fn after_a_failed_modification_nothing_is_known() {
        let mut part = Part::new(0, 4096);
        part.handle_end(Op::Write, 0, 1024, 7, true);
        part.handle_end(Op::WriteZeroes, 0, 512, 0, false);
        assert_eq!(part.compare(0, &[3; 512]), Ok(()));
        assert!(part.compare(512, &[3; 512]).is_err(), "the block behind it is still known");
    }
}
