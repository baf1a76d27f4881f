//! What one worker hands to the next on another host, when a guest moves: the file `handover`.
//!
//! Numbers are little-endian. What we assume of the media: nothing; a file that is not whole is
//! no handover.
//!
//! | bytes | what |
//! | --- | --- |
//! | 8 | `UPCALLHO` |
//! | 4 | version: 1 |
//! | 4 | 1 if the guest uses a write cache, else 0 |
//! | 4, n | the length of what was said when the disk failed for good, and that, in UTF-8 |
//! | 4 | how many filters the chain has |
//! | 4, n | of each, from the guest to the store: the length of its name, and the name |
//! | 4 | how many states follow |
//! | 4, n, 4, m | of each: the length of the instance's name, the name, that of its state, the state |
//! | 4 | CRC-32C of all before |

use crate::SIDECAR_MAX;

const MAGIC: &[u8; 8] = b"UPCALLHO";
const VERSION: u32 = 1;
/// Most bytes of a name, or of what was said.
const TEXT_MAX: usize = 4096;
/// Most bytes of a state: as much as the filter interface allows.
const STATE_MAX: usize = 1 << 20;
/// More filters than any chain has.
const FILTERS_MAX: usize = 64;
/// Most bytes of the whole file.
pub(crate) const FILE_MAX: usize = (STATE_MAX + 2 * TEXT_MAX + 12) * FILTERS_MAX + 2 * TEXT_MAX;

const _: () = assert!(SIDECAR_MAX <= STATE_MAX);

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Handover {
    /// The guest flushes what it wants to be durable.
    pub write_cache: bool,
    /// The disk has failed for good: what was said then. Nobody could find it out again.
    pub failed: Option<String>,
    /// The chain, by the names of its filters' places, from the guest to the store. Data is as
    /// these have made it: whoever takes the disk up must have the same.
    pub chain: Vec<String>,
    /// What filter instances saved, by the names of their files in the folder.
    pub states: Vec<(String, Vec<u8>)>,
}

impl Handover {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        let mut put = |part: &[u8]| {
            bytes.extend_from_slice(&(part.len() as u32).to_le_bytes());
            bytes.extend_from_slice(part);
        };
        let failed = self.failed.as_deref().unwrap_or_default();
        let mut end = failed.len().min(TEXT_MAX);
        while !failed.is_char_boundary(end) {
            end -= 1;
        }
        put(&failed.as_bytes()[..end]);
        let head = [VERSION, self.write_cache.into()].map(u32::to_le_bytes).concat();
        bytes.splice(8..8, head);
        bytes.extend_from_slice(&(self.chain.len() as u32).to_le_bytes());
        for name in &self.chain {
            bytes.extend_from_slice(&(name.len() as u32).to_le_bytes());
            bytes.extend_from_slice(name.as_bytes());
        }
        bytes.extend_from_slice(&(self.states.len() as u32).to_le_bytes());
        for part in self.states.iter().flat_map(|(name, state)| [name.as_bytes(), state]) {
            bytes.extend_from_slice(&(part.len() as u32).to_le_bytes());
            bytes.extend_from_slice(part);
        }
        bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
        bytes
    }

    /// None: these bytes are no handover, or not all of one.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Handover> {
        let (body, sum) = bytes.split_last_chunk::<4>()?;
        if crc32c::crc32c(body) != u32::from_le_bytes(*sum) {
            return None;
        }
        let mut rest = body.strip_prefix(MAGIC)?;
        let rest = &mut rest;
        if number(rest)? != VERSION {
            return None;
        }
        let write_cache = number(rest)? != 0;
        let failed = text(rest)?;
        let chain = (0..count(rest)?).map(|_| text(rest)).collect::<Option<Vec<_>>>()?;
        let states = (0..count(rest)?)
            .map(|_| Some((text(rest)?, piece(rest, STATE_MAX)?.to_vec())))
            .collect::<Option<Vec<_>>>()?;
        let failed = (!failed.is_empty()).then_some(failed);
        rest.is_empty().then_some(Handover { write_cache, failed, chain, states })
    }
}

fn number(rest: &mut &[u8]) -> Option<u32> {
    let (bytes, left) = rest.split_first_chunk::<4>()?;
    *rest = left;
    Some(u32::from_le_bytes(*bytes))
}

fn count(rest: &mut &[u8]) -> Option<usize> {
    number(rest).map(|count| count as usize).filter(|count| *count <= FILTERS_MAX)
}

fn piece<'a>(rest: &mut &'a [u8], max: usize) -> Option<&'a [u8]> {
    let length = number(rest)? as usize;
    let (bytes, left) = rest.split_at_checked(length).filter(|_| length <= max)?;
    *rest = left;
    Some(bytes)
}

fn text(rest: &mut &[u8]) -> Option<String> {
    String::from_utf8(piece(rest, TEXT_MAX)?.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Handover {
        let states = vec![("xor-0".to_owned(), vec![1, 2, 3]), ("trace-0".to_owned(), Vec::new())];
        let chain = vec!["trace-0".to_owned(), "xor-0".to_owned()];
        Handover { write_cache: true, failed: Some("a flush failed".into()), chain, states }
    }

    #[test]
    fn what_was_handed_over_is_taken_up() {
        for handover in [example(), Handover::default()] {
            assert_eq!(Handover::parse(&handover.bytes()), Some(handover));
        }
    }

    #[test]
    fn what_is_damaged_or_cut_short_is_no_handover() {
        let bytes = example().bytes();
        for at in 0..bytes.len() {
            assert_eq!(Handover::parse(&bytes[..at]), None, "cut at {at}");
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert_eq!(Handover::parse(&damaged), None, "byte {at}");
        }
    }

    #[test]
    fn lengths_that_are_not_there_are_refused_even_if_the_sum_is_right() {
        let body = &example().bytes();
        let body = &body[..body.len() - 4];
        for at in (8..body.len() - 3).step_by(4) {
            let mut forged = body.to_vec();
            forged[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
            forged.extend_from_slice(&crc32c::crc32c(&forged).to_le_bytes());
            // It must not panic, and what comes out is bounded.
            if let Some(handover) = Handover::parse(&forged) {
                assert!(handover.states.len() <= FILTERS_MAX);
            }
        }
    }
}
