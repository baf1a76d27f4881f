//! What hypervisors may hand over, and what a region may say.

use std::sync::Arc;

use upcall_block::RequestQueue;

use super::*;
use crate::mock::*;
use crate::virtio::*;

const SIZE: u16 = 16;

#[test]
fn regions_are_where_the_specification_has_them() {
    assert_eq!(region_bytes(false, 128), 2112, "16 + 128 * 16, to whole 64");
    assert_eq!(region_bytes(false, 4), 128);
    assert_eq!(region_bytes(true, 128), 4160, "32 + 128 * 32, to whole 64");
    let extent = Extent::new((3, 4), (128, 256), false).unwrap();
    assert_eq!(extent.bytes(), 3 * 2112);
}

#[test]
fn a_file_is_as_asked_for_or_refused() {
    // CVE-2021-3839: the number of rings went unchecked.
    for (queues, size) in [(0, 16), (5, 16), (u16::MAX, 16), (1, 0), (1, 24), (1, 512)] {
        assert!(Extent::new((queues, 4), (size, 256), false).is_err(), "{queues} of {size}");
    }
    let extent = Extent::new((2, 4), (SIZE, 256), true).unwrap();
    let (bytes, file) = (extent.bytes() as u64, extent.make_file().unwrap());
    assert!(Inflight::map(&file, extent, 0, bytes).is_ok());
    assert!(Inflight::map(&file, extent, 0, bytes + 1).is_ok(), "told of more than is needed");
    assert!(Inflight::map(&file, extent, 0, bytes - 1).is_err(), "told of less");
    assert!(Inflight::map(&file, extent, 64, bytes).is_err(), "not at a page");
    assert!(Inflight::map(&file, extent, 1 << 63, bytes).is_err(), "behind the file");
    let larger = Extent { queues: 4, ..extent };
    let short = Inflight::map(&file, larger, 0, larger.bytes() as u64).unwrap_err();
    assert!(matches!(short, InflightError::Map(_)), "told of more than is there: {short}");
    let loose = rustix::fs::memfd_create("loose", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&loose, bytes).unwrap();
    let refused = Inflight::map(&loose, extent, 0, bytes).unwrap_err();
    assert!(matches!(refused, InflightError::Resizable));
    let null = std::fs::File::open("/dev/null").unwrap();
    assert!(Inflight::map(&null, extent, 0, bytes).is_err());
}

#[test]
fn a_region_is_for_rings_of_its_kind_that_fit() {
    let extent = Extent { queues: 2, queue_size: SIZE, packed: true };
    let file = extent.make_file().unwrap();
    let inflight = Inflight::map(&file, extent, 0, extent.bytes() as u64).unwrap();
    assert!(inflight.region(1, SIZE, true).unwrap().is_some());
    assert!(inflight.region(1, SIZE / 2, true).unwrap().is_some());
    assert!(inflight.region(2, SIZE, true).unwrap().is_none(), "not tracked");
    assert!(inflight.region(0, SIZE * 2, true).is_err());
    assert!(inflight.region(0, SIZE, false).is_err());
}

#[test]
fn the_write_cache_setting_outlives_the_worker_and_doubt_means_durable() {
    for packed in [false, true] {
        let extent = Extent { queues: 1, queue_size: SIZE, packed };
        let file = extent.make_file().unwrap();
        let map = || Inflight::map(&file, extent, 0, extent.bytes() as u64).unwrap();
        assert_eq!(map().write_cache(), None, "nobody was there");
        for on in [false, true, false] {
            map().set_write_cache(on);
            assert_eq!(map().write_cache(), Some(on));
        }
        let first = map().place(0);
        first.store_u8(map().write_cache_at(), 77);
        assert_eq!(map().write_cache(), None);
        first.store_u16(VERSION_AT, 1, Ordering::Relaxed);
        assert_eq!(map().write_cache(), Some(false), "a ring was in use, and nothing is known");
    }
}

/// A queue that has taken three requests of which the second is used, and what it left.
fn left(packed: bool) -> (Box<dyn GuestDriver>, InflightFile, Arc<Memory>) {
    let memory = Arc::new(Memory::new(64 << 10));
    let mut driver: Box<dyn GuestDriver> = if packed {
        Box::new(PackedDriver::new(memory.clone(), SIZE, false))
    } else {
        Box::new(Driver::new(memory.clone(), SIZE, false, 0))
    };
    let file = InflightFile::new(SIZE, packed);
    let mut device = Device::with_capacity(1 << 20, memory.table());
    device.track(&file);
    let mut queue = driver.queue(&device);
    for sector in 0..3 {
        let (chain, data, status) = memory.request(T_IN, sector, &[], 512);
        driver.submit_parts(&chain, data, status, false);
    }
    let mut requests = Vec::new();
    queue.take(64, &mut requests).unwrap();
    queue.complete(requests[1].tag, Ok(()));
    queue.publish();
    (driver, file, memory)
}

/// What a successor takes, by sector; or what it says is wrong.
fn taken(
    driver: &dyn GuestDriver,
    file: &InflightFile,
    memory: &Memory,
) -> Result<Vec<u64>, String> {
    let mut device = Device::with_capacity(1 << 20, memory.table());
    device.track(file);
    let mut queue = driver.queue(&device);
    let mut requests = Vec::new();
    assert_eq!(queue.before_sleep(), device.error.clear(), "what was left is an arrival");
    match queue.take(64, &mut requests) {
        Ok(()) => Ok(requests.iter().map(|request| request.range.offset() / 512).collect()),
        Err(error) => {
            assert!(requests.is_empty(), "{error}");
            Err(error.reason)
        }
    }
}

#[test]
fn what_a_region_says_is_believed_only_if_it_can_be() {
    let number = |value: u16| value.to_le_bytes().to_vec();
    let cases: Vec<(bool, usize, Vec<u8>, &str)> = vec![
        (false, 8, number(2), "version 2"),
        (false, 0, vec![1], "features 0x1"),
        (false, 10, number(8), "for 8 descriptors"),
        (false, 10, number(0), "for 0 descriptors"),
        (false, 16, vec![2], "descriptor 0 with 2"),
        (false, 12, number(SIZE), "not a list at descriptor 16"),
        (false, 14, number(0x4000), "the in-flight region's 16384"),
        (true, 8, number(9), "version 9"),
        (true, 10, number(32), "for 32 descriptors"),
        (true, 12, [number(16), number(17)].concat(), "not a list at descriptor 17"),
        (true, 14, number(16), "not a list"),
        (true, 16, number(16), "position 16"),
        (true, 18, number(0xffff), "position 65535"),
        (true, 20, vec![2], "wrap counter 2"),
        (true, 32, vec![7], "descriptor 0 with 7"),
        (true, 32, vec![0], "not a list at descriptor 0"),
        (true, 32 + 4, number(9), "not a list"),
        (true, 32 + 6, number(0), "not a list"),
        (true, 32 + 6, number(17), "not a list"),
        (true, 32 + 32 + 2, number(1), "not a list"),
    ];
    for (packed, at, bytes, reason) in cases {
        let (driver, file, memory) = left(packed);
        file.write(at, &bytes);
        match taken(&*driver, &file, &memory) {
            Err(text) if text.contains(reason) => {}
            other => panic!("packed {packed}, {bytes:?} at {at}: {other:?}, not {reason}"),
        }
    }
}

#[test]
fn a_batch_longer_than_its_list_breaks_the_ring() {
    let (driver, file, memory) = left(false);
    // The used index was one further than is accounted for, and the list leads outside.
    file.write(14, &0u16.to_le_bytes());
    file.write(12, &3u16.to_le_bytes());
    assert!(taken(&*driver, &file, &memory).is_ok(), "a batch of one");
    let (driver, file, memory) = left(false);
    file.write(14, &u16::MAX.to_le_bytes());
    file.write(16 + 3 * 16 + 6, &99u16.to_le_bytes());
    let reason = taken(&*driver, &file, &memory).unwrap_err();
    assert!(reason.contains("not a list at descriptor 99"), "{reason}");
}

#[test]
fn untouched_regions_give_what_was_in_flight_in_its_order() {
    for packed in [false, true] {
        let (driver, file, memory) = left(packed);
        assert_eq!(taken(&*driver, &file, &memory), Ok(vec![0, 2]), "packed {packed}");
    }
    // The counters decide, not the heads.
    let (driver, file, memory) = left(false);
    file.write(16 + 8, &100u64.to_le_bytes());
    assert_eq!(taken(&*driver, &file, &memory), Ok(vec![2, 0]));
}

#[test]
fn a_ring_that_began_anew_with_nothing_in_flight_goes_on() {
    let memory = Arc::new(Memory::new(64 << 10));
    let mut driver = Driver::new(memory.clone(), SIZE, false, 700);
    let file = InflightFile::new(SIZE, false);
    let mut device = Device::with_capacity(1 << 20, memory.table());
    device.track(&file);
    let mut disk = RamDisk(vec![0; 1 << 20]);
    let mut queue = device.queue(&driver);
    driver.submit(T_FLUSH, 0, &[], 0);
    assert_eq!(disk.serve(&mut queue), 1);
    queue.finish();
    driver.reset();
    let mut queue = device.queue(&driver);
    driver.submit(T_FLUSH, 0, &[], 0);
    assert_eq!(disk.serve(&mut queue), 1);
    assert_eq!(driver.reap().len(), 1);
}
