//! Where what is in the page; see the crate.

pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"UPCLSTAT");
pub(crate) const VERSION: u32 = 2;
/// Where the directory begins.
pub(crate) const DIRECTORY: usize = 4096;
/// Bytes of one of its entries, of a name, and of a block.
pub(crate) const ENTRY: usize = 256;
pub(crate) const NAME: usize = 48;
pub(crate) const BLOCK: usize = 4096;
/// In a block, behind what is counted for each operation.
pub(crate) const HISTOGRAM: usize = 1024;
pub(crate) const NOW: usize = 64 * 6;
pub(crate) const VIOLATIONS: usize = NOW + 8;
pub(crate) const RETRIES: usize = NOW + 16;
pub(crate) const SKIPPED: usize = NOW + 24;
/// In a hop's entry of the directory.
pub(crate) const KIND: usize = 96;
pub(crate) const QUEUES: usize = 104;
pub(crate) const BLOCKS: usize = 112;
pub(crate) const COUNTERS_AT: usize = 120;
/// How its filter is.
pub(crate) const STANDING: usize = 128;
pub(crate) const FAILURES: usize = 136;
pub(crate) const LONGEST_STALL: usize = 144;
/// Its place among the hops of its disk.
pub(crate) const RANK: usize = 152;
/// A filter's own counters: how many, and the bytes that they take.
pub(crate) const COUNTERS: usize = 63;
pub(crate) const COUNTERS_SIZE: usize = 4096;

/// Text as a padded field; what does not fit is cut off.
pub(crate) fn name_bytes(name: &str) -> [u8; NAME] {
    let mut bytes = [0; NAME];
    let mut end = name.len().min(NAME - 1);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    bytes[..end].copy_from_slice(&name.as_bytes()[..end]);
    bytes
}

/// The text in a padded field, made fit for a terminal.
pub(crate) fn name_text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let text = String::from_utf8_lossy(&bytes[..end]);
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
