//! Random requests, several in flight, against a plain array.

use super::*;

const CAPACITY: usize = 3 << 20;
const MEMORY: usize = 4 << 20;
const LANES: usize = 12;

/// A random piece of a lane of the disk: requests of different lanes never overlap.
fn range(random: &mut Random, lane: usize, block: usize) -> (usize, usize) {
    let lane_length = CAPACITY / LANES;
    let blocks = lane_length / block;
    let start = random.below(blocks);
    let most = if random.below(4) == 0 { blocks - start } else { (blocks - start).min(16) };
    let length = 1 + random.below(most);
    (lane * lane_length + start * block, length * block)
}

/// `length` bytes of memory of a lane in random pieces; odd ones at times.
fn pieces(random: &mut Random, memory: &Arc<Mapping>, lane: usize, length: usize) -> Buffers {
    let start = (lane * (MEMORY / LANES)) & !4095;
    let (unit, shift) = match random.below(3) {
        0 => (4096, 0),
        1 => (512, 512 * random.below(8)),
        _ => (1, random.below(4096)),
    };
    let mut buffers = Buffers::new();
    let mut at = 0;
    while at < length {
        let piece = (unit * (1 + random.below(16384 / unit.min(512)))).min(length - at);
        assert!(buffers.push(memory, start + shift + at, piece, true));
        at += piece;
    }
    buffers
}

fn compare_with_an_array(engine: Engine, direct: bool) {
    let mut random = Random::new(&format!("{engine:?}, direct {direct}"));
    let dir = TempDir::new();
    let path = dir.image(CAPACITY as u64);
    let mut disk = Disk::new(RawStore::open(options(&path, engine, direct)).unwrap());
    let block = disk.store.info().block_size as usize;
    let memory = memory(MEMORY);
    let mut model = vec![0; CAPACITY];

    for _round in 0..150 {
        let mut expected = Vec::new();
        for lane in 0..LANES {
            let (offset, length) = range(&mut random, lane, block);
            let op = Op::ALL[random.below(5)];
            let here = offset..offset + length;
            let flags = RequestFlags {
                fua: random.below(8) == 0,
                unmap: random.below(2) == 0,
                retry: false,
            };
            let (data, length) = match op {
                Op::Read | Op::Write => (pieces(&mut random, &memory, lane, length), length),
                Op::Flush => (Buffers::new(), 0),
                _ => (Buffers::new(), length),
            };
            match op {
                Op::Read => {
                    data.write(0, &vec![0xaa; length]);
                    expected.push((lane, data.clone(), model[here].to_vec()));
                }
                Op::Write => {
                    let bytes = random.bytes(length);
                    data.write(0, &bytes);
                    model[here].copy_from_slice(&bytes);
                }
                Op::Discard | Op::WriteZeroes => model[here].fill(0),
                Op::Flush => {}
            }
            let offset = if op == Op::Flush { 0 } else { offset as u64 };
            let io = disk.io(lane as u64, op, offset, length as u64, data);
            disk.queue.submit(StoreIo { flags, ..io });
        }
        assert_eq!(disk.queue.in_flight(), LANES);
        let mut done = disk.finish();
        done.sort_by_key(|done| done.token.0);
        for (lane, done) in done.iter().enumerate() {
            assert_eq!(*done, StoreDone { token: StoreToken(lane as u64), status: Ok(()) });
        }
        assert_eq!(done.len(), LANES);
        for (lane, data, bytes) in expected {
            assert!(bytes_of(&data) == bytes, "lane {lane} read something else");
        }
    }
    assert_eq!(disk.store.sync(), Ok(()));
    assert!(std::fs::read(&path).unwrap() == model, "the file differs");
}

#[test]
fn io_uring_direct_behaves_as_an_array() {
    compare_with_an_array(Engine::IoUring, true);
}

#[test]
fn io_uring_buffered_behaves_as_an_array() {
    compare_with_an_array(Engine::IoUring, false);
}

#[test]
fn threads_direct_behave_as_an_array() {
    compare_with_an_array(Engine::Threads, true);
}

#[test]
fn threads_buffered_behave_as_an_array() {
    compare_with_an_array(Engine::Threads, false);
}

#[test]
fn a_request_of_more_pieces_than_the_kernel_takes_is_whole() {
    for engine in ENGINES {
        for direct in [true, false] {
            let dir = TempDir::new();
            let path = dir.image(2 << 20);
            let mut disk = Disk::new(RawStore::open(options(&path, engine, direct)).unwrap());
            let block = disk.store.info().block_size as usize;
            let memory = memory(8 << 20);
            let count = (2 << 20) / block.max(512);
            let mut data = Buffers::new();
            for piece in 0..count {
                assert!(data.push(&memory, piece * 2 * block, block, true));
            }
            let bytes = Random::new("many pieces").bytes(count * block);
            data.write(0, &bytes);
            let io = disk.io(1, Op::Write, 0, bytes.len() as u64, data.clone());
            assert_eq!(disk.run_io(io), Ok(()));
            assert!(count > 1024);
            data.zero();
            let io = disk.io(2, Op::Read, 0, bytes.len() as u64, data.clone());
            assert_eq!(disk.run_io(io), Ok(()));
            assert!(bytes_of(&data) == bytes);
            drop(disk);
            assert!(std::fs::read(&path).unwrap() == bytes);
        }
    }
}

#[test]
fn far_more_requests_than_the_ring_has_entries_all_complete() {
    for engine in ENGINES {
        let dir = TempDir::new();
        let path = dir.image(8 << 20);
        let mut disk = Disk::new(RawStore::open(options(&path, engine, true)).unwrap());
        let memory = memory(8 << 20);
        for at in 0..2000 {
            let data = Buffers::of(&memory, at * 4096, 4096, true).unwrap();
            data.write(0, &[at as u8; 4096]);
            let io = disk.io(at as u64, Op::Write, at as u64 * 4096, 4096, data);
            disk.queue.submit(io);
        }
        assert_eq!(disk.queue.in_flight(), 2000);
        let mut done = disk.finish();
        done.sort_by_key(|done| done.token.0);
        assert!(done.iter().map(|done| done.token.0).eq(0..2000));
        assert!(done.iter().all(|done| done.status == Ok(())));
        let file = std::fs::read(&path).unwrap();
        assert!((0..2000).all(|at| file[at * 4096..][..4096] == [at as u8; 4096]));
    }
}
