//! The page itself: the writer's view.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use upcall_ring::{Access, Mapping};

use crate::block::Block;
use crate::hop::{FilterHealth, HopKind, HopSpec, Standing};
use crate::layout::*;
use crate::reader::PageReader;

/// The writer's view. Dropping it removes the file, unless it was replaced by another one.
pub struct Page {
    mapping: Arc<Mapping>,
    hops: Vec<HopPlace>,
    /// Where its file is, and which file that is.
    file: Option<(PathBuf, FileId)>,
    /// The file itself, locked as long as the page is kept: see [`is_kept`].
    _lock: Option<File>,
}

/// Device and inode.
type FileId = (u64, u64);

struct HopPlace {
    blocks: usize,
    counters: usize,
    queues: u16,
}

fn file_id(metadata: &std::fs::Metadata) -> FileId {
    (metadata.dev(), metadata.ino())
}

impl Page {
    /// Makes the page: as a file that is renamed to `path` when it is complete, so that no
    /// reader sees half a page; or, without a path, in memory only.
    pub fn create(path: Option<&Path>, specs: &[HopSpec]) -> io::Result<Page> {
        let mut at = (DIRECTORY + ENTRY * specs.len()).next_multiple_of(BLOCK);
        let mut hops = Vec::new();
        for spec in specs {
            let blocks = at;
            at += BLOCK * usize::from(spec.queues);
            let has_counters = matches!(spec.kind, HopKind::Filter | HopKind::Vacant);
            let counters = if has_counters { at } else { 0 };
            at += if has_counters { COUNTERS_SIZE } else { 0 };
            hops.push(HopPlace { blocks, counters, queues: spec.queues });
        }
        let (mapping, renamed, lock) = match path {
            None => (
                Mapping::new(upcall_ring::memfd("upcall-stats", at)?, 0, at, Access::ReadWrite)?,
                None,
                None,
            ),
            Some(path) => {
                let mut unfinished = path.as_os_str().to_owned();
                unfinished.push(format!(".{}", std::process::id()));
                let unfinished = PathBuf::from(unfinished);
                let _ = std::fs::remove_file(&unfinished);
                let file = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .create_new(true)
                    .mode(0o644)
                    .open(&unfinished)?;
                // Room is taken now: a full disk is an error here, not a SIGBUS later.
                let made =
                    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, at as u64)
                        .map_err(io::Error::from)
                        .and_then(|()| Mapping::new(file.as_fd(), 0, at, Access::ReadWrite))
                        .and_then(|mapping| Ok((mapping, file_id(&file.metadata()?))));
                // Before anybody finds it. Where there are no locks, its process says it alone.
                let _ = rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared);
                match made {
                    Ok((mapping, id)) => {
                        (mapping, Some((unfinished, path.to_owned(), id)), Some(file))
                    }
                    Err(error) => {
                        let _ = std::fs::remove_file(&unfinished);
                        return Err(error);
                    }
                }
            }
        };
        let mut page = Page { mapping: Arc::new(mapping), hops, file: None, _lock: lock };
        page.put(0, &MAGIC.to_le_bytes());
        page.put(8, &VERSION.to_le_bytes());
        page.put(12, &std::process::id().to_le_bytes());
        page.put(16, &(specs.len() as u64).to_le_bytes());
        page.put(24, &(at as u64).to_le_bytes());
        for (index, (spec, place)) in specs.iter().zip(&page.hops).enumerate() {
            let entry = DIRECTORY + ENTRY * index;
            page.put(entry, &name_bytes(&spec.disk));
            page.put(entry + NAME, &name_bytes(&spec.name));
            page.put(entry + KIND, &spec.kind.number().to_le_bytes());
            page.put(entry + RANK, &(index as u64).to_le_bytes());
            page.put(entry + QUEUES, &u64::from(spec.queues).to_le_bytes());
            page.put(entry + BLOCKS, &(place.blocks as u64).to_le_bytes());
            page.put(entry + COUNTERS_AT, &(place.counters as u64).to_le_bytes());
        }
        if let Some((unfinished, path, id)) = renamed {
            if let Err(error) = std::fs::rename(&unfinished, &path) {
                let _ = std::fs::remove_file(&unfinished);
                return Err(error);
            }
            page.file = Some((path, id));
        }
        Ok(page)
    }

    fn put(&self, offset: usize, bytes: &[u8]) {
        let put = self.mapping.write(offset, bytes);
        assert!(put.is_some(), "the page was made with room for all of its fields");
    }

    /// The block of one queue at one hop, for the one thread that counts there. Panics if
    /// there is no such hop or queue.
    pub fn block(&self, hop: usize, queue: u16) -> Block {
        let place = &self.hops[hop];
        assert!(queue < place.queues);
        Block { mapping: self.mapping.clone(), start: place.blocks + BLOCK * usize::from(queue) }
    }

    /// Makes a hop that is vacant, or whose filter has left, that of another filter, which has
    /// counted nothing yet. Only while nobody counts there.
    pub fn begin_filter(&self, hop: usize, name: &str) {
        let (entry, place) = (DIRECTORY + ENTRY * hop, &self.hops[hop]);
        for queue in 0..usize::from(place.queues) {
            self.put(place.blocks + BLOCK * queue, &[0; BLOCK]);
        }
        self.put(place.counters, &[0; COUNTERS_SIZE]);
        self.show_health(hop, &FilterHealth::default());
        self.put(entry + NAME, &name_bytes(name));
        self.put(entry + KIND, &HopKind::Filter.number().to_le_bytes());
    }

    /// A hop's filter has left.
    pub fn end_filter(&self, hop: usize) {
        self.put(DIRECTORY + ENTRY * hop + KIND, &HopKind::Vacant.number().to_le_bytes());
    }

    /// Shows a hop at this place among those of its disk; smaller is nearer to the guest.
    pub fn rank(&self, hop: usize, rank: u64) {
        self.put(DIRECTORY + ENTRY * hop + RANK, &rank.to_le_bytes());
    }

    /// A reader of this page.
    pub fn reader(&self) -> PageReader {
        let (pid, hops) = (std::process::id(), self.hops.len() as u64);
        PageReader { mapping: self.mapping.clone(), pid, hops }
    }

    /// Shows how a filter is. One thread at a time.
    pub fn show_health(&self, hop: usize, health: &FilterHealth) {
        let entry = DIRECTORY + ENTRY * hop;
        let standing = Standing::ALL.iter().position(|standing| *standing == health.standing);
        let words = [
            (STANDING, standing.unwrap_or(0) as u64),
            (FAILURES, health.failures),
            (LONGEST_STALL, health.longest_stall_ns),
        ];
        for (at, word) in words {
            self.put(entry + at, &word.to_le_bytes());
        }
    }

    /// Shows a filter's counters: names and values, the first 63.
    pub fn show_counters(&self, hop: usize, counters: &[(String, u64)]) {
        let start = self.hops[hop].counters;
        if start == 0 {
            return;
        }
        for (index, (name, value)) in counters.iter().take(COUNTERS).enumerate() {
            self.put(start + 64 * index, &name_bytes(name));
            self.put(start + 64 * index + NAME, &value.to_le_bytes());
        }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // Another worker may have put its page there since; that one stays.
        if let Some((path, id)) = &self.file
            && std::fs::symlink_metadata(path).is_ok_and(|found| file_id(&found) == *id)
        {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Whether a worker keeps the page at `path`, wherever that worker runs: also in a namespace where
/// its process has another number. A page whose worker has ended is nobody's.
pub fn is_kept(path: &Path) -> io::Result<bool> {
    let file = File::open(path)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(false),
        Err(Errno::WOULDBLOCK) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reader::*;

    fn specs() -> Vec<HopSpec> {
        [("request", HopKind::Request), ("xor", HopKind::Filter), ("raw file", HopKind::Store)]
            .map(|(name, kind)| HopSpec { disk: "root".into(), name: name.into(), kind, queues: 3 })
            .into()
    }

    #[test]
    fn a_reader_sees_the_sum_of_all_queues() {
        let path = std::env::temp_dir().join(format!("upcall-stats-test-{}", std::process::id()));
        let page = Page::create(Some(&path), &specs()).unwrap();
        let (a, b) = (page.block(1, 0), page.block(1, 2));
        a.enter();
        a.leave(2, 4096, 700, false);
        b.enter();
        b.leave(1, 512, 900, true);
        b.enter();
        b.violation();
        page.show_counters(1, &[("sectors".into(), 9)]);
        let reader = PageReader::open(&path).unwrap();
        assert_eq!(reader.pid(), std::process::id());
        let hops = reader.snapshot();
        assert_eq!(hops.len(), 3);
        assert_eq!(
            (hops[1].disk.as_str(), hops[1].name.as_str(), hops[1].kind),
            ("root", "xor", HopKind::Filter)
        );
        let block = &hops[1].block;
        assert_eq!(block.ops[2], OpCounts { requests: 1, bytes: 4096, errors: 0, time_ns: 700 });
        assert_eq!(block.ops[1], OpCounts { requests: 1, bytes: 512, errors: 1, time_ns: 900 });
        assert_eq!((block.now, block.violations, block.latency.total()), (1, 1, 2));
        assert_eq!(hops[1].counters, [("sectors".to_string(), 9)]);
        assert_eq!(hops[0].block, BlockSnapshot::default());
        drop(page);
        assert!(!path.exists(), "the file goes with the worker");
    }

    #[test]
    fn a_filter_that_comes_begins_at_nothing_where_its_rank_says_and_one_that_leaves_is_gone() {
        let mut specs = specs();
        let vacant = HopSpec { name: String::new(), kind: HopKind::Vacant, ..specs[1].clone() };
        specs.insert(2, vacant);
        let page = Page::create(None, &specs).unwrap();
        let names = || -> Vec<String> {
            page.reader().snapshot().into_iter().map(|hop| hop.name).collect()
        };
        assert_eq!(names(), ["request", "xor", "raw file"]);
        page.block(2, 1).enter();
        page.show_counters(2, &[("old".into(), 1)]);
        page.begin_filter(2, "trace");
        page.rank(2, 1);
        page.rank(1, 2);
        page.rank(3, 3);
        assert_eq!(names(), ["request", "trace", "xor", "raw file"]);
        let hop = &page.reader().snapshot()[1];
        assert_eq!((hop.block.now, hop.counters.len()), (0, 0));
        page.end_filter(1);
        assert_eq!(names(), ["request", "trace", "raw file"]);
    }

    #[test]
    fn a_page_that_was_replaced_leaves_the_one_that_replaced_it() {
        let path = std::env::temp_dir().join(format!("upcall-stats-two-{}", std::process::id()));
        let first = Page::create(Some(&path), &specs()).unwrap();
        let second = Page::create(Some(&path), &specs()).unwrap();
        first.block(0, 0).enter();
        second.block(0, 0).enter();
        second.block(0, 0).enter();
        drop(first);
        assert_eq!(PageReader::open(&path).unwrap().snapshot()[0].block.now, 2);
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn nothing_is_left_of_a_page_that_cannot_be_made() {
        let folder = std::env::temp_dir().join(format!("upcall-stats-none-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("page")).unwrap();
        assert!(Page::create(Some(&folder.join("page")), &specs()).is_err(), "a folder is there");
        assert!(Page::create(Some(&folder.join("none/page")), &specs()).is_err());
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn what_came_since_is_the_difference_and_now_is_now() {
        let path = std::env::temp_dir().join(format!("upcall-stats-since-{}", std::process::id()));
        let page = Page::create(Some(&path), &specs()).unwrap();
        let block = page.block(2, 1);
        let snapshot = || PageReader::open(&path).unwrap().snapshot()[2].block.clone();
        block.enter();
        block.leave(3, 0, 10, true);
        let earlier = snapshot();
        block.enter();
        block.enter();
        block.leave(3, 0, 20, false);
        block.violation();
        let since = snapshot().since(&earlier);
        let passed = OpCounts { requests: 1, bytes: 0, errors: 0, time_ns: 20 };
        assert_eq!((since.ops[3], since.total(), since.now), (passed, passed, 1));
        assert_eq!((since.violations, since.latency.total()), (1, 1));
        // A second visit of the same request is time, and no request.
        block.leave_again(3, 5, true);
        let again = snapshot().since(&earlier);
        let counted = OpCounts { requests: 1, bytes: 0, errors: 1, time_ns: 25 };
        assert_eq!((again.total(), again.now), (counted, 0));
    }

    #[test]
    fn names_are_cut_at_a_character_and_made_fit_for_a_terminal() {
        assert_eq!(name_text(&name_bytes(&"é".repeat(40))), "é".repeat(23));
        assert_eq!(name_text(b"a\x1b[31m\0rest"), "a\u{fffd}[31m");
    }

    #[test]
    fn a_file_that_is_no_page_is_refused() {
        let path = std::env::temp_dir().join(format!("upcall-stats-bad-{}", std::process::id()));
        std::fs::write(&path, b"short").unwrap();
        assert!(matches!(PageReader::open(&path), Err(ReadError::NotAPage(_))));
        std::fs::write(&path, vec![7; 8192]).unwrap();
        assert!(matches!(PageReader::open(&path), Err(ReadError::NotAPage(_))));
        let mut bytes = vec![0; 8192];
        bytes[..8].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[8] = 2;
        bytes[16] = 9; // hops whose entries point anywhere
        bytes[4096..8192].fill(0xff);
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(
            PageReader::open(&path).unwrap().snapshot().len(),
            9,
            "odd numbers, but no harm"
        );
        std::fs::remove_file(&path).unwrap();
    }
}
