//! A gap file on its medium: made, read, and its pages written.

use std::io;

use crate::format::{
    Bits, HEADERS_AT, Header, HeaderFound, PAGE_BYTES, page_at, page_count, page_to_bytes,
    parse_page,
};
use crate::map::Map;
use crate::medium::Medium;

/// Most bytes of one call.
const CHUNK_BYTES: usize = 1 << 20;
const CHUNK_PAGES: u64 = (CHUNK_BYTES / PAGE_BYTES) as u64;

/// An opened gap file.
pub(crate) struct GapFile<M> {
    medium: M,
    header: Header,
}

/// What was wrong with a gap file, all of which now counts as marked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Damage {
    /// Both headers were damaged: nothing in the file could be believed.
    pub headers: bool,
    /// So many pages were torn, rotten, missing or could not be read.
    pub pages: u64,
}

impl Damage {
    /// Whether there was any.
    pub fn is_some(&self) -> bool {
        *self != Damage::default()
    }
}

/// Why a gap file cannot be used.
#[derive(Debug)]
pub(crate) enum FileError {
    Version(u32),
    Io(&'static str, io::Error),
}

impl<M: Medium> GapFile<M> {
    /// Makes a new file in which nothing is marked; durable when this returns.
    pub fn create(medium: M, id: [u8; 16], capacity: u64) -> Result<(Self, Map), FileError> {
        let mut file = GapFile { medium, header: Header { id, capacity } };
        let mut map = Map::new(capacity);
        map.soil_all();
        file.store_with_header(&mut map)?;
        Ok((file, map))
    }

    /// Reads a file for a disk of `capacity` bytes. What is damaged in it counts as marked, and
    /// is written so; what the disk has grown by since is not marked. `new_id` is for a file
    /// whose headers are lost.
    pub fn open(
        mut medium: M,
        new_id: [u8; 16],
        capacity: u64,
    ) -> Result<(Self, Map, Damage), FileError> {
        let mut map = Map::new(capacity);
        let Some(header) = read_header(&mut medium)? else {
            let mut file = GapFile { medium, header: Header { id: new_id, capacity } };
            (0..page_count(capacity)).for_each(|page| map.load(page, None));
            file.store_with_header(&mut map)?;
            return Ok((file, map, Damage { headers: true, pages: page_count(capacity) }));
        };
        let mut file = GapFile { medium, header };
        let old_pages = page_count(header.capacity.min(capacity));
        let mut damage = Damage::default();
        file.load_pages(0..old_pages, &mut map, &mut damage);
        if damage.is_some() {
            let pages: Vec<_> = map.dirty().collect();
            file.write(&map, &pages).map_err(|error| FileError::Io("repair", error))?;
            map.stored(&pages);
        }
        if capacity > header.capacity {
            file.extend(&mut map, capacity).map_err(|error| FileError::Io("extend", error))?;
        }
        Ok((file, map, damage))
    }

    /// Makes room for a disk that has grown to `capacity`, and grows `map`, which nobody else
    /// may change meanwhile.
    pub fn grow(&mut self, map: &mut Map, capacity: u64) -> io::Result<Damage> {
        let mut damage = Damage::default();
        let first = page_count(map.capacity());
        let had = page_count(self.header.capacity.min(capacity));
        if capacity > self.header.capacity {
            self.extend(map, capacity)?;
        } else {
            map.grow(capacity);
        }
        // A disk that was larger once: the marks of that time are still there.
        self.load_pages(first..had.max(first), map, &mut damage);
        Ok(damage)
    }

    /// Writes and syncs pages, as they are in `map`.
    pub fn write(&mut self, map: &Map, pages: &[u64]) -> io::Result<()> {
        let encoded = self.encode(map, pages);
        self.write_encoded(pages, &encoded)
    }

    /// Pages as bytes, one after the other.
    pub fn encode(&self, map: &Map, pages: &[u64]) -> Vec<u8> {
        let bytes = |page: &u64| page_to_bytes(&self.header.id, *page, map.page(*page));
        pages.iter().flat_map(bytes).collect()
    }

    /// Writes what [`encode`](Self::encode) gave and syncs: pages that are neighbours at once.
    pub fn write_encoded(&mut self, pages: &[u64], encoded: &[u8]) -> io::Result<()> {
        let mut rest = encoded;
        for run in pages.chunk_by(|one, next| one + 1 == *next) {
            let (bytes, others) = rest.split_at(run.len() * PAGE_BYTES);
            for (index, chunk) in bytes.chunks(CHUNK_BYTES).enumerate() {
                let at = page_at(run[0]) + (index * CHUNK_BYTES) as u64;
                self.medium.write_at(chunk, at)?;
            }
            rest = others;
        }
        self.medium.sync()
    }

    /// Pages that are new are written first: a header speaks of pages that are there.
    fn extend(&mut self, map: &mut Map, capacity: u64) -> io::Result<()> {
        let old = page_count(self.header.capacity);
        let blank = Map::new(capacity);
        let pages: Vec<_> = (old..page_count(capacity)).collect();
        for some in pages.chunks(CHUNK_PAGES as usize) {
            let encoded = self.encode(&blank, some);
            self.write_encoded(some, &encoded)?;
        }
        let header = Header { capacity, ..self.header };
        self.write_header(header)?;
        self.header = header;
        map.grow(capacity);
        Ok(())
    }

    fn store_with_header(&mut self, map: &mut Map) -> Result<(), FileError> {
        let pages: Vec<_> = map.dirty().collect();
        let result = pages
            .chunks(CHUNK_PAGES as usize)
            .try_for_each(|some| self.write(map, some))
            .and_then(|()| self.write_header(self.header));
        result.map_err(|error| FileError::Io("write", error))?;
        map.stored(&pages);
        Ok(())
    }

    /// One copy after the other, so that one is always whole.
    fn write_header(&mut self, header: Header) -> io::Result<()> {
        for at in HEADERS_AT {
            self.medium.write_at(&header.to_bytes(), at)?;
            self.medium.sync()?;
        }
        Ok(())
    }

    fn load_pages(&mut self, pages: std::ops::Range<u64>, map: &mut Map, damage: &mut Damage) {
        let id = self.header.id;
        read_pages(&mut self.medium, &id, pages, |page, bits| {
            damage.pages += u64::from(bits.is_none());
            map.load(page, bits);
        });
    }
}

/// The header of the larger capacity, if both copies are valid; None if none is.
pub(crate) fn read_header(medium: &mut impl Medium) -> Result<Option<Header>, FileError> {
    let mut best: Option<Header> = None;
    for at in HEADERS_AT {
        let mut bytes = [0; PAGE_BYTES];
        // What cannot be read is as good as damaged.
        if !matches!(medium.read_at(&mut bytes, at), Ok(PAGE_BYTES)) {
            continue;
        }
        match Header::parse(&bytes) {
            HeaderFound::Valid(header) => {
                if best.is_none_or(|best| best.id == header.id && best.capacity < header.capacity) {
                    best = Some(header);
                }
            }
            HeaderFound::Unknown { version } => return Err(FileError::Version(version)),
            HeaderFound::Damaged => {}
        }
    }
    Ok(best)
}

/// Gives each page to `each`; None for one that is damaged or cannot be read.
pub(crate) fn read_pages(
    medium: &mut impl Medium,
    id: &[u8; 16],
    pages: std::ops::Range<u64>,
    mut each: impl FnMut(u64, Option<&Bits>),
) {
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut next = pages.start;
    while next < pages.end {
        let count = (pages.end - next).min(CHUNK_PAGES) as usize;
        let bytes = &mut buffer[..count * PAGE_BYTES];
        let length = match medium.read_at(bytes, page_at(next)) {
            Ok(length) => length,
            // Somewhere in there: find out where, page by page.
            Err(_) => {
                for (index, page) in bytes.chunks_mut(PAGE_BYTES).enumerate() {
                    if medium.read_at(page, page_at(next + index as u64)).is_err() {
                        // No page has this checksum, as its own number is in it.
                        page.fill(0);
                    }
                }
                bytes.len()
            }
        };
        for (index, page) in bytes.chunks(PAGE_BYTES).enumerate() {
            let number = next + index as u64;
            let is_whole = (index + 1) * PAGE_BYTES <= length;
            let bits = if is_whole { parse_page(id, number, page) } else { None };
            each(number, bits.as_ref());
        }
        next += count as u64;
    }
}
