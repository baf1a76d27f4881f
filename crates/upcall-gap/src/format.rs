//! The bytes of a gap file: headers and pages, made and checked. See the crate for the table.

use crate::span::{GRANULE, granules};

/// What a gap file begins with.
const MAGIC: [u8; 8] = *b"UPCALLGP";
/// The one version there is.
const VERSION: u32 = 1;
/// Bytes of a page, and of a header.
pub(crate) const PAGE_BYTES: usize = 512;
/// Words of bits in a page.
pub(crate) const PAGE_WORDS: usize = 63;
/// Granules of a page.
const PAGE_GRANULES: u64 = 64 * PAGE_WORDS as u64;
/// Where the two copies of the header are: in different sectors of any disk.
pub(crate) const HEADERS_AT: [u64; 2] = [0, 4096];
/// Where page 0 is.
pub(crate) const PAGES_AT: u64 = 8192;
/// Where a checksum is, in a page and in a header.
const CHECKSUM_AT: usize = PAGE_BYTES - 4;

/// The bits of one page; bit `i` of word `w` is granule `64 * w + i` of the page.
pub(crate) type Bits = [u64; PAGE_WORDS];

/// A header that was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Chance, so that a page of another file is not taken for one of this.
    pub id: [u8; 16],
    /// The largest size in bytes that the disk had.
    pub capacity: u64,
}

/// What became of reading a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HeaderFound {
    Valid(Header),
    /// A later version wrote it.
    Unknown {
        version: u32,
    },
    Damaged,
}

impl Header {
    pub fn to_bytes(self) -> [u8; PAGE_BYTES] {
        let mut bytes = [0; PAGE_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&(GRANULE as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.capacity.to_le_bytes());
        bytes[24..40].copy_from_slice(&self.id);
        let checksum = crc32c::crc32c(&bytes[..CHECKSUM_AT]);
        bytes[CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    pub fn parse(bytes: &[u8; PAGE_BYTES]) -> HeaderFound {
        let checksum = u32::from_le_bytes(array(bytes, CHECKSUM_AT));
        if array(bytes, 0) != MAGIC || crc32c::crc32c(&bytes[..CHECKSUM_AT]) != checksum {
            return HeaderFound::Damaged;
        }
        let version = u32::from_le_bytes(array(bytes, 8));
        if version != VERSION {
            return HeaderFound::Unknown { version };
        }
        if u32::from_le_bytes(array(bytes, 12)) != GRANULE as u32 {
            return HeaderFound::Damaged;
        }
        let capacity = u64::from_le_bytes(array(bytes, 16));
        HeaderFound::Valid(Header { id: array(bytes, 24), capacity })
    }
}

/// The page with this number, as bytes.
pub(crate) fn page_to_bytes(id: &[u8; 16], number: u64, bits: &Bits) -> [u8; PAGE_BYTES] {
    let mut bytes = [0; PAGE_BYTES];
    for (at, word) in bytes.chunks_exact_mut(8).zip(bits) {
        at.copy_from_slice(&word.to_le_bytes());
    }
    let checksum = page_checksum(id, number, &bytes);
    bytes[CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// The bits of a page; None if it is not page `number` of file `id`, whole.
pub(crate) fn parse_page(id: &[u8; 16], number: u64, bytes: &[u8]) -> Option<Bits> {
    let bytes: &[u8; PAGE_BYTES] = bytes.try_into().ok()?;
    if page_checksum(id, number, bytes) != u32::from_le_bytes(array(bytes, CHECKSUM_AT)) {
        return None;
    }
    let mut bits = [0; PAGE_WORDS];
    for (word, at) in bits.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_le_bytes(array_of(at));
    }
    Some(bits)
}

/// Over what a page must be, too: so a page in a wrong place or of another file is none.
fn page_checksum(id: &[u8; 16], number: u64, bytes: &[u8; PAGE_BYTES]) -> u32 {
    let checksum = crc32c::crc32c_append(crc32c::crc32c(id), &number.to_le_bytes());
    crc32c::crc32c_append(checksum, &bytes[..CHECKSUM_AT])
}

/// How many pages the bits of a disk fill.
pub(crate) fn page_count(capacity: u64) -> u64 {
    granules(capacity).div_ceil(PAGE_GRANULES)
}

/// The page that has a word of the whole bitmap.
pub(crate) fn page_of_word(word: usize) -> u64 {
    (word / PAGE_WORDS) as u64
}

/// Where a page begins in the file.
pub(crate) fn page_at(number: u64) -> u64 {
    PAGES_AT + number * PAGE_BYTES as u64
}

fn array<const N: usize>(bytes: &[u8; PAGE_BYTES], at: usize) -> [u8; N] {
    array_of(&bytes[at..at + N])
}

fn array_of<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(bytes);
    array
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: [u8; 16] = [7; 16];

    #[test]
    fn a_page_is_read_as_it_was_written_and_nowhere_else() {
        let mut bits = [0; PAGE_WORDS];
        (bits[0], bits[62]) = (5, 1 << 63);
        let bytes = page_to_bytes(&ID, 3, &bits);
        assert_eq!(parse_page(&ID, 3, &bytes), Some(bits));
        assert_eq!(parse_page(&ID, 4, &bytes), None, "in the place of another page");
        assert_eq!(parse_page(&[8; 16], 3, &bytes), None, "of another file");
        assert_eq!(parse_page(&ID, 3, &bytes[..511]), None, "cut off");
        assert_eq!(parse_page(&ID, 0, &[0; PAGE_BYTES]), None, "a hole");
    }

    #[test]
    fn every_single_rotten_bit_of_a_page_or_header_is_seen() {
        let page = page_to_bytes(&ID, 0, &[0x55; PAGE_WORDS]);
        let header = Header { id: ID, capacity: 1 << 30 }.to_bytes();
        for bit in 0..PAGE_BYTES * 8 {
            let flip = |bytes: &[u8; PAGE_BYTES]| {
                let mut bytes = *bytes;
                bytes[bit / 8] ^= 1 << (bit % 8);
                bytes
            };
            assert_eq!(parse_page(&ID, 0, &flip(&page)), None);
            assert_eq!(Header::parse(&flip(&header)), HeaderFound::Damaged);
        }
    }

    #[test]
    fn a_header_of_a_later_version_is_not_taken_for_a_damaged_one() {
        let mut bytes = Header { id: ID, capacity: 512 }.to_bytes();
        bytes[8] = 2;
        let checksum = crc32c::crc32c(&bytes[..CHECKSUM_AT]);
        bytes[CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
        assert_eq!(Header::parse(&bytes), HeaderFound::Unknown { version: 2 });
    }

    #[test]
    fn the_bytes_are_those_of_the_table() {
        let header = Header { id: ID, capacity: 0x1122_3344_5566_7788 }.to_bytes();
        assert_eq!(&header[..8], b"UPCALLGP");
        assert_eq!(header[8..16], [1, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(header[16..24], [0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]);
        assert_eq!(header[24..40], ID);
        let mut bits = [0; PAGE_WORDS];
        bits[1] = 1;
        assert_eq!(page_to_bytes(&ID, 0, &bits)[8], 1, "granule 64 is bit 0 of byte 8");
        assert_eq!((page_count(0), page_count(1), page_count(4032 * GRANULE)), (0, 1, 1));
        assert_eq!((page_count(4032 * GRANULE + 1), page_at(2)), (2, 9216));
    }
}
