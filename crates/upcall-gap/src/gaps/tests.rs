use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use upcall_block::{DiskInfo, OpSet};

use super::*;
use crate::{GRANULE, read};

const CAPACITY: u64 = 64 << 20;

struct Folder(PathBuf, File);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("upcall-gap-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).unwrap();
        let file = File::open(&path).unwrap();
        Folder(path, file)
    }

    fn open(&self, capacity: u64) -> Gaps {
        let (gaps, damage) = Gaps::open_in(self.1.as_fd(), "f-0.gaps", capacity).unwrap();
        assert!(!damage.is_some());
        gaps
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn range(offset: u64, length: u64) -> Range {
    let disk = DiskInfo {
        capacity: !511,
        block_size: 512,
        physical_block_size: 512,
        read_only: false,
        ops: OpSet::ALL,
        discard_granularity: 512,
    };
    Range::new(offset, length, &disk).unwrap()
}

/// Marks, and sleeps until that is done, as a queue thread would.
fn mark(marker: &mut Marker, range: Range) -> Status {
    if marker.mark(MarkToken(7), range) == Mark::Already {
        return Ok(());
    }
    let mut done = vec![];
    while done.is_empty() {
        marker.poll(&mut done);
        if done.is_empty() && marker.before_sleep() {
            let doorbell = marker.doorbell();
            let mut polled =
                [rustix::event::PollFd::from_borrowed_fd(doorbell, rustix::event::PollFlags::IN)];
            rustix::event::poll(&mut polled, None).unwrap();
        }
    }
    assert_eq!((done.len(), done[0].token), (1, MarkToken(7)));
    done[0].status
}

#[test]
fn marks_are_found_again_and_are_answered_at_once_the_second_time() {
    let folder = Folder::new("again");
    let gaps = folder.open(CAPACITY);
    let mut marker = gaps.marker().unwrap();
    assert_eq!(mark(&mut marker, range(GRANULE - 512, 1024)), Ok(()));
    assert_eq!(marker.mark(MarkToken(0), range(0, 512)), Mark::Already);
    assert_eq!(marker.in_flight(), 0);
    drop((marker, gaps));
    let gaps = folder.open(CAPACITY);
    assert_eq!(gaps.ranges(), [Gap { offset: 0, length: 2 * GRANULE }]);
    let mut marker = gaps.marker().unwrap();
    assert_eq!(marker.mark(MarkToken(0), range(0, 512)), Mark::Already, "known from the file");
}

/// What a child of a dead worker does until it has become its program.
#[test]
fn a_lock_that_outlives_its_holder_for_a_moment_is_waited_for() {
    let folder = Folder::new("lingering");
    drop(folder.open(CAPACITY));
    let copy = File::open(folder.0.join("f-0.gaps")).unwrap();
    copy.lock().unwrap();
    let ends = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(100));
        drop(copy);
    });
    assert!(read(folder.1.as_fd(), "f-0.gaps").unwrap().is_some());
    ends.join().unwrap();
}

#[test]
fn one_process_at_a_time_has_a_gap_file_and_nobody_reads_it_meanwhile() {
    let folder = Folder::new("lock");
    let gaps = folder.open(CAPACITY);
    let again = Gaps::open_in(folder.1.as_fd(), "f-0.gaps", CAPACITY);
    assert!(matches!(again, Err(GapError::Busy { .. })));
    assert!(matches!(read(folder.1.as_fd(), "f-0.gaps"), Err(GapError::Busy { .. })));
    mark(&mut gaps.marker().unwrap(), range(0, 512)).unwrap();
    drop(gaps);
    let report = read(folder.1.as_fd(), "f-0.gaps").unwrap().unwrap();
    assert_eq!(report.capacity, CAPACITY);
    assert_eq!(report.gaps, [Gap { offset: 0, length: GRANULE }]);
    assert!(!report.damage.is_some());
    assert_eq!(read(folder.1.as_fd(), "other.gaps").unwrap(), None);
}

#[test]
fn a_damaged_file_is_reported_as_marked_where_it_is_damaged() {
    let folder = Folder::new("damage");
    drop(folder.open(CAPACITY));
    let path = folder.path().join("f-0.gaps");
    let good = std::fs::read(&path).unwrap();
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        std::fs::write(&path, bytes).unwrap();
        read(folder.1.as_fd(), "f-0.gaps").unwrap().unwrap()
    };
    let all = [Gap { offset: 0, length: CAPACITY }];
    let rotten = with(&|bytes| bytes[8192] ^= 1);
    assert_eq!((rotten.gaps.as_slice(), rotten.damage.pages), (all.as_slice(), 1));
    let cut = with(&|bytes| bytes.truncate(8192));
    assert_eq!((cut.gaps.as_slice(), cut.damage.pages), (all.as_slice(), 1));
    assert!(with(&|bytes| bytes.clear()).damage.headers);
    let (gaps, damage) = Gaps::open_in(folder.1.as_fd(), "f-0.gaps", CAPACITY).unwrap();
    assert!(damage.headers);
    assert_eq!(gaps.ranges(), all);
}

#[test]
fn a_symbolic_link_or_a_pipe_in_place_of_the_file_is_refused() {
    let folder = Folder::new("link");
    symlink("/dev/null", folder.path().join("f-0.gaps")).unwrap();
    let opened = Gaps::open_in(folder.1.as_fd(), "f-0.gaps", CAPACITY);
    assert!(matches!(opened, Err(GapError::NotAFile { .. })));
    std::fs::create_dir(folder.path().join("d.gaps")).unwrap();
    assert!(matches!(read(folder.1.as_fd(), "d.gaps"), Err(GapError::NotAFile { .. })));
}

#[test]
fn what_an_unfinished_creation_left_behind_is_in_nobodys_way() {
    let folder = Folder::new("new");
    std::fs::write(folder.path().join("f-0.gaps.new"), b"rubbish").unwrap();
    let gaps = folder.open(CAPACITY);
    assert_eq!(gaps.ranges(), []);
    assert!(!folder.path().join("f-0.gaps.new").exists());
}

#[test]
fn a_mark_behind_the_end_fails_until_the_file_has_grown() {
    let folder = Folder::new("grow");
    let gaps = folder.open(CAPACITY);
    let mut marker = gaps.marker().unwrap();
    let behind = range(900 * CAPACITY, 512);
    assert_eq!(mark(&mut marker, behind), Err(Errno::EINVAL));
    gaps.grow(1000 * CAPACITY).unwrap();
    assert_eq!(mark(&mut marker, behind), Ok(()));
    drop((marker, gaps));
    let gaps = folder.open(1000 * CAPACITY);
    assert_eq!(gaps.ranges(), [Gap { offset: 900 * CAPACITY, length: GRANULE }]);
}

#[test]
fn a_marker_that_outlives_its_file_reports_failure() {
    let folder = Folder::new("outlived");
    let gaps = folder.open(CAPACITY);
    let mut marker = gaps.marker().unwrap();
    drop(gaps);
    assert_eq!(mark(&mut marker, range(0, 512)), Err(Errno::EIO));
}

#[test]
fn a_clear_that_is_dropped_clears_nothing_and_one_that_finishes_is_durable() {
    let folder = Folder::new("clear");
    let gaps = folder.open(CAPACITY);
    let mut marker = gaps.marker().unwrap();
    mark(&mut marker, range(0, 3 * GRANULE)).unwrap();
    drop(gaps.begin_clear(0, CAPACITY));
    assert_eq!(gaps.ranges().len(), 1);
    let clearing = gaps.begin_clear(GRANULE, GRANULE);
    let again = marker.mark(MarkToken(1), range(0, 512));
    assert_eq!(again, Mark::Queued, "a dropped clear leaves the marks to be asked for again");
    clearing.finish().unwrap();
    drop((marker, gaps));
    let left = [0, 2].map(|n| Gap { offset: n * GRANULE, length: GRANULE });
    assert_eq!(folder.open(CAPACITY).ranges(), left);
}

/// Four threads mark while a fifth repairs all the time. A write that happens after its mark
/// and is not yet repaired must be marked at the end.
#[test]
fn marks_of_many_threads_survive_a_repair_that_never_stops() {
    const THREADS: usize = 4;
    const GRANULES: usize = 64;
    let folder = Folder::new("threads");
    let gaps = folder.open(GRANULES as u64 * GRANULE);
    // The "disk" and its "replica": a number for each granule that only grows.
    let disk: Vec<AtomicU64> = (0..GRANULES).map(|_| AtomicU64::new(0)).collect();
    let mut replica = [0; GRANULES];
    // What each thread is doing: odd while it is between its mark and its write.
    let busy: Vec<AtomicU64> = (0..THREADS).map(|_| AtomicU64::new(0)).collect();
    let left = AtomicU64::new(THREADS as u64);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let mut marker = gaps.marker().unwrap();
            let (disk, busy, left) = (&disk, &busy, &left);
            scope.spawn(move || {
                let mut random = thread as u64 + 1;
                for _ in 0..400 {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    let granule = random as usize % GRANULES;
                    busy[thread].fetch_add(1, Ordering::SeqCst);
                    mark(&mut marker, range(granule as u64 * GRANULE, 512)).unwrap();
                    std::thread::yield_now();
                    disk[granule].fetch_add(1, Ordering::SeqCst);
                    busy[thread].fetch_add(1, Ordering::SeqCst);
                }
                left.fetch_sub(1, Ordering::SeqCst);
            });
        }
        while left.load(Ordering::SeqCst) > 0 {
            for gap in gaps.ranges() {
                let clearing = gaps.begin_clear(gap.offset, gap.length);
                for thread in &busy {
                    let seen = thread.load(Ordering::SeqCst);
                    while seen % 2 == 1 && thread.load(Ordering::SeqCst) == seen {
                        std::thread::yield_now();
                    }
                }
                let first = (gap.offset / GRANULE) as usize;
                for granule in first..first + (gap.length / GRANULE) as usize {
                    replica[granule] = disk[granule].load(Ordering::SeqCst);
                }
                clearing.finish().unwrap();
            }
        }
    });
    drop(gaps);
    for gap in folder.open(GRANULES as u64 * GRANULE).ranges() {
        let first = (gap.offset / GRANULE) as usize;
        for granule in first..first + (gap.length / GRANULE) as usize {
            replica[granule] = disk[granule].load(Ordering::SeqCst);
        }
    }
    let disk: Vec<_> = disk.iter().map(|number| number.load(Ordering::SeqCst)).collect();
    assert_eq!(replica.as_slice(), disk, "what is not marked was repaired");
}
