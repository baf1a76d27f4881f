//! Every operation, error code and limit of a served disk, as guests see them: through the
//! `virtio-driver` crate and through a client that can say anything, on one queue and on
//! several, with and without filters.

use std::time::Duration;

use upcall_tests::checks::{self, exchange};
use upcall_tests::{
    CHAINS, Client, Descriptor, Disk, Driver, Filter, Io, Mix, Outcome, Part, RawClient,
    RawOptions, Rng, Scratch, Server, Workload, feature, header, kind, range, status,
};
use virtio_driver::{VirtioBlkFeatureFlags, VirtioFeatureFlags};

const BYTES: u64 = 32 << 20;
const SECTORS: u64 = BYTES / 512;

fn connect(disk: &Disk) -> RawClient {
    RawClient::connect(&disk.socket, RawOptions::default()).unwrap()
}

/// The ways a client may use its queues.
fn manners(queues: usize) -> [RawOptions; 6] {
    let usual = RawOptions { queues, ..RawOptions::default() };
    [
        usual,
        RawOptions { indirect: true, ..usual },
        RawOptions { features: usual.features & !feature::EVENT_IDX, ..usual },
        RawOptions { queues: 1, queue_size: 16, slots: 1, ..usual },
        RawOptions { features: usual.features | feature::RING_PACKED, ..usual },
        RawOptions {
            features: (usual.features | feature::RING_PACKED) & !feature::EVENT_IDX,
            indirect: true,
            queue_size: 32,
            ..usual
        },
    ]
}

#[test]
fn operations_do_what_they_say_through_every_chain() {
    for chain in CHAINS {
        eprintln!("chain: {chain:?}");
        let mut disk = Disk::serve(BYTES, 4, "", chain);
        let mut driver = Driver::usual(&disk.socket, 4);
        checks::operations_do_what_they_say(&mut driver);
        drop(driver);
        for options in manners(2) {
            let mut client = RawClient::connect(&disk.socket, options).unwrap();
            checks::operations_do_what_they_say(&mut client);
            checks::ranges_past_the_end_are_io_errors(&mut client);
            checks::framing_does_not_matter(&mut client);
        }
        disk.stop();
    }
}

#[test]
fn random_requests_are_verified_through_every_chain() {
    let seed = Rng::seed();
    let requests = if std::env::var_os("UPCALL_LONG").is_some() { 40_000 } else { 2_000 };
    for (index, chain) in CHAINS.into_iter().enumerate() {
        for queues in [1, 4] {
            eprintln!("chain: {chain:?}, {queues} queues");
            let mut disk = Disk::serve(BYTES, queues, "", chain);
            let mut driver = Driver::usual(&disk.socket, queues);
            let mut workload = Workload::on(seed + index as u64, &mut driver);
            workload.run(&mut driver, &Mix::default(), requests);
            workload.read_back(&mut driver);
            drop(driver);
            let plain = VirtioFeatureFlags::empty();
            let mut driver = Driver::connect(&disk.socket, queues, 64, 4, plain).unwrap();
            workload.run(&mut driver, &Mix::default(), requests / 4);
            drop(driver);
            for options in manners(queues) {
                let mut client = RawClient::connect(&disk.socket, options).unwrap();
                workload.run(&mut client, &Mix::default(), requests / 4);
            }
            disk.stop();
            workload.check_image(&disk.plain_image());
        }
    }
}

#[test]
fn random_requests_are_verified_on_every_engine() {
    let seed = Rng::seed();
    for options in
        [",engine=io_uring", ",engine=threads", ",direct=on", ",direct=on,engine=threads"]
    {
        eprintln!("options: {options}");
        let mut disk = Disk::serve(BYTES, 2, options, &[]);
        let mut driver = Driver::usual(&disk.socket, 2);
        let block = u64::from(driver.config().blk_size.to_native()) / 512;
        let mix = Mix { align_sectors: block, ..Mix::default() };
        let mut workload = Workload::on(seed, &mut driver);
        workload.run(&mut driver, &mix, 3_000);
        workload.read_back(&mut driver);
        drop(driver);
        disk.stop();
        workload.check_image(&disk.image);
    }
}

#[test]
fn the_configuration_space_is_complete() {
    let disk = Disk::serve(BYTES, 4, "", &[]);
    let client = connect(&disk);
    let config = client.config().unwrap();
    assert_eq!(config.capacity_sectors, SECTORS);
    assert_eq!(config.blk_size, 512);
    assert_eq!(config.num_queues, 4);
    assert_eq!(config.writeback, 1, "the write cache is reported");
    assert!(config.seg_max >= 16 && config.size_max >= 4096, "{config:?}");
    assert!(config.seg_max * config.size_max <= 4 << 20, "{config:?}");
    assert!(config.min_io_size >= 1, "{config:?}");
    for (sectors, segments) in [
        (config.max_discard_sectors, config.max_discard_seg),
        (config.max_write_zeroes_sectors, config.max_write_zeroes_seg),
    ] {
        assert!(sectors >= 8 && segments >= 1, "{config:?}");
    }
    assert!(config.discard_sector_alignment >= 1, "{config:?}");
    assert_eq!(config.write_zeroes_may_unmap, 1);
    let offered = client.features();
    for (name, bit) in [
        ("SIZE_MAX", feature::SIZE_MAX),
        ("SEG_MAX", feature::SEG_MAX),
        ("BLK_SIZE", feature::BLK_SIZE),
        ("FLUSH", feature::FLUSH),
        ("TOPOLOGY", feature::TOPOLOGY),
        ("CONFIG_WCE", feature::CONFIG_WCE),
        ("MQ", feature::MQ),
        ("DISCARD", feature::DISCARD),
        ("WRITE_ZEROES", feature::WRITE_ZEROES),
        ("INDIRECT_DESC", feature::INDIRECT_DESC),
        ("EVENT_IDX", feature::EVENT_IDX),
        ("VERSION_1", feature::VERSION_1),
    ] {
        assert_ne!(offered & bit, 0, "{name} is not offered");
    }
    assert_eq!(offered & feature::RO, 0);
}

#[test]
fn the_write_cache_can_be_switched_and_nothing_else() {
    let disk = Disk::serve(BYTES, 1, "", &[]);
    let client = connect(&disk);
    for writeback in [0, 1, 0] {
        client.set_config(32, &[writeback]).unwrap();
        assert_eq!(client.config().unwrap().writeback, writeback);
    }
    let before = client.config().unwrap();
    // Refused, or taken without effect: never a change of what is not the guest's.
    let _ = client.set_config(0, &[0xff; 8]);
    drop(client);
    assert_eq!(connect(&disk).config().unwrap().capacity_sectors, before.capacity_sectors);
}

#[test]
fn the_largest_request_that_is_offered_works_and_a_larger_one_is_an_error() {
    for chain in [&[][..], &[Filter::Trace, Filter::Xor, Filter::Throttle]] {
        let disk = Disk::serve(BYTES, 1, "", chain);
        let options = RawOptions { queue_size: 256, ..RawOptions::default() };
        let mut client = RawClient::connect(&disk.socket, options).unwrap();
        let config = client.config().unwrap();
        let pieces = config.seg_max as usize;
        let data: Vec<u8> =
            (0..pieces * config.size_max as usize).map(|i| (i / 512 + i) as u8).collect();
        let out: Vec<Part> =
            data.chunks(config.size_max as usize).map(|part| Part::Out(part.to_vec())).collect();
        assert_eq!(client.request(0, kind::WRITE, 8, &out).0, status::OK);
        let into = vec![Part::In(config.size_max); pieces];
        let (status, read) = client.request(0, kind::READ, 8, &into);
        assert_eq!(status, status::OK);
        assert!(read == data, "the largest read is not what the largest write wrote");

        let out = Part::Out(vec![0; (4 << 20) + 512]);
        assert_eq!(client.request(0, kind::WRITE, 8, &[out]).0, status::IOERR);
        let (status, _) = client.request(0, kind::READ, 8, &[Part::In((4 << 20) + 512)]);
        assert_eq!(status, status::IOERR);
        let (_, read) = client.request(0, kind::READ, 8, &[Part::In(512)]);
        assert_eq!(read, data[..512], "the write that was refused wrote nothing");
    }
}

#[test]
fn the_serial_is_what_was_given() {
    let disk = Disk::serve(BYTES, 1, ",serial=0123456789-serial", &[Filter::Xor]);
    let mut client = connect(&disk);
    let (status, id) = client.request(0, kind::GET_ID, 0, &[Part::In(20)]);
    assert_eq!((status, id.as_slice()), (status::OK, b"0123456789-serial\0\0\0".as_slice()));
    // In pieces, and less of it than there is.
    let (status, id) = client.request(0, kind::GET_ID, 0, &[Part::In(3), Part::In(5)]);
    assert_eq!((status, id.as_slice()), (status::OK, b"01234567".as_slice()));
}

#[test]
fn unknown_requests_and_reserved_flags_are_unsupported() {
    for chain in [&[][..], &[Filter::Trace, Filter::Xor, Filter::Throttle]] {
        let disk = Disk::serve(BYTES, 1, "", chain);
        let mut client = connect(&disk);
        client.write(0, 0, &[3; 4096]);
        for unknown in [2, 3, 5, 6, 7, 9, 10, 12, 14, 16, 17, 0x8000_0000, u32::MAX] {
            let (answer, _) = client.request(0, unknown, 0, &[]);
            assert_eq!(answer, status::UNSUPP, "type {unknown}");
            let (answer, _) = client.request(0, unknown, 0, &[Part::In(512)]);
            assert_eq!(answer, status::UNSUPP, "type {unknown} with data");
        }
        for (kind, flags) in [
            (kind::DISCARD, 1),
            (kind::DISCARD, 2),
            (kind::DISCARD, 0x8000_0000),
            (kind::WRITE_ZEROES, 2),
            (kind::WRITE_ZEROES, 3),
            (kind::WRITE_ZEROES, 0x8000_0001),
        ] {
            let (answer, _) = client.request(0, kind, 0, &[Part::Out(range(0, 8, flags))]);
            assert_eq!(answer, status::UNSUPP, "type {kind}, flags {flags:#x}");
        }
        assert_eq!(client.read(0, 0, 4096), [3; 4096], "what is refused does nothing");
    }
}

#[test]
fn malformed_requests_are_io_errors_and_do_nothing() {
    let mut disk = Disk::serve(BYTES, 1, "", &[Filter::Trace, Filter::Xor]);
    let mut client = connect(&disk);
    client.write(0, 0, &[5; 8192]);
    let write = header(kind::WRITE, 0);
    for indirect in [false, true] {
        for (what, parts) in [
            ("no header at all", vec![Part::In(1)]),
            ("a header of one byte", vec![Part::Out(vec![1]), Part::In(1)]),
            ("a header of 15 bytes", vec![Part::Out(write[..15].to_vec()), Part::In(1)]),
            ("no header, but room for data", vec![Part::In(512), Part::In(1)]),
            (
                "a write of 511 bytes",
                vec![Part::Out(write.clone()), Part::Out(vec![0; 511]), Part::In(1)],
            ),
            (
                "a write of 513 bytes",
                vec![Part::Out(write.clone()), Part::Out(vec![0; 513]), Part::In(1)],
            ),
            (
                "a read of 511 bytes",
                vec![Part::Out(header(kind::READ, 0)), Part::In(511), Part::In(1)],
            ),
            ("a discard without a range", vec![Part::Out(header(kind::DISCARD, 0)), Part::In(1)]),
            (
                "a discard with half a range",
                vec![
                    Part::Out(header(kind::DISCARD, 0)),
                    Part::Out(range(0, 8, 0)[..8].to_vec()),
                    Part::In(1),
                ],
            ),
        ] {
            let (answers, _) = exchange(&mut client, &parts, indirect);
            let answer = *answers.last().unwrap().last().unwrap();
            assert_eq!(answer, status::IOERR, "{what}, indirect {indirect}");
        }
    }
    assert_eq!(client.read(0, 0, 8192), [5; 8192]);
    drop(client);
    disk.stop();
}

#[test]
fn addresses_outside_of_memory_are_io_errors() {
    let mut disk = Disk::serve(BYTES, 1, "", &[]);
    let mut client = connect(&disk);
    client.write(0, 0, &[5; 4096]);
    let end = client.guest_end();
    for (address, length) in
        [(0, 512), (end, 512), (end - 256, 512), (u64::MAX - 100, 512), (u64::MAX, 512)]
    {
        for (kind, flags) in [(kind::WRITE, 0), (kind::READ, Descriptor::WRITE)] {
            let (head, tail) = (client.place(16), client.place(1));
            client.memory().write(head, &header(kind, 0));
            client.memory().write(tail, &[status::NONE]);
            let data = Descriptor { address, length, flags, next: 0 };
            let chain = vec![
                Descriptor { address: client.guest(head), length: 16, ..Descriptor::default() },
                data,
                Descriptor {
                    address: client.guest(tail),
                    length: 1,
                    flags: Descriptor::WRITE,
                    next: 0,
                },
            ];
            client.submit_chain(0, chain, None);
            let used = client.wait_used(0, Duration::from_secs(20));
            assert!(used.is_some(), "type {kind} at {address:#x} does not end");
            assert_eq!(client.memory().copy(tail, 1), [status::IOERR], "{kind} at {address:#x}");
        }
    }
    assert_eq!(client.read(0, 0, 4096), [5; 4096]);
    drop(client);
    disk.stop();
}

/// Breaks queue 0 with what `breaks` puts there: no request of it is answered, also not
/// later ones; queue 1 goes on; a new connection starts afresh.
fn breaks_only_its_queue(what: &str, breaks: impl FnOnce(&mut RawClient)) {
    let mut disk = Disk::serve(BYTES, 2, "", &[Filter::Trace]);
    let options = RawOptions { queues: 2, ..RawOptions::default() };
    let mut client = RawClient::connect(&disk.socket, options).unwrap();
    client.write(1, 0, &[9; 4096]);
    breaks(&mut client);
    client.kick(0);
    assert_eq!(client.wait_used(0, Duration::from_millis(500)), None, "{what}: was answered");
    client.submit(0, 0, Io::Flush, &[]);
    client.kick(0);
    assert_eq!(client.wait_used(0, Duration::from_millis(300)), None, "{what}: goes on");
    assert_eq!(client.read(1, 0, 4096), [9; 4096], "{what}: the other queue");
    drop(client);
    let mut client = connect(&disk);
    assert_eq!(client.read(0, 0, 4096), [9; 4096], "{what}: a new connection");
    drop(client);
    disk.stop();
}

#[test]
fn a_chain_without_room_for_a_status_byte_breaks_its_queue_and_only_that() {
    breaks_only_its_queue("no writable byte", |client| {
        let place = client.place(1024);
        client.memory().write(place, &header(kind::WRITE, 0));
        let address = client.guest(place);
        let chain = vec![Descriptor { address, length: 528, ..Descriptor::default() }];
        client.submit_chain(0, chain, None);
    });
}

#[test]
fn a_chain_that_has_no_end_breaks_its_queue_and_only_that() {
    breaks_only_its_queue("a circle", |client| {
        let place = client.place(64);
        let address = client.guest(place);
        for (index, next) in [(100, 101), (101, 100)] {
            let flags = Descriptor::NEXT;
            client.put_descriptor(0, index, Descriptor { address, length: 16, flags, next });
        }
        client.publish(0, 100);
    });
}

#[test]
fn a_head_or_index_out_of_bounds_breaks_its_queue_and_only_that() {
    breaks_only_its_queue("a head out of bounds", |client| client.publish(0, 128));
    breaks_only_its_queue("more available than there are", |client| {
        client.set_avail_index(0, 1000);
    });
}

#[test]
fn an_indirect_table_in_an_indirect_table_breaks_its_queue_and_only_that() {
    breaks_only_its_queue("a table in a table", |client| {
        let (outer, inner) = (client.place(64), client.place(64));
        let address = client.guest(inner);
        let flags = Descriptor::INDIRECT;
        let entry = Descriptor { address, length: 16, flags, next: 0 };
        client.memory().write(outer, &entry.bytes());
        let address = client.guest(outer);
        client.submit_chain(0, vec![Descriptor { address, length: 16, flags, next: 0 }], None);
    });
}

#[test]
fn a_read_only_disk_can_be_read_and_nothing_else() {
    for chain in [&[][..], &[Filter::Trace, Filter::Xor]] {
        let mut disk = Disk::serve(BYTES, 1, "", &[]);
        let mut client = connect(&disk);
        client.write(0, 4096, &[6; 4096]);
        drop(client);
        disk.stop();
        let before = std::fs::read(&disk.image).unwrap();
        drop(disk);

        let scratch = Scratch::new();
        let image = scratch.join("disk.img");
        std::fs::write(&image, &before).unwrap();
        let mut args = vec![
            "--disk".to_owned(),
            format!(
                "name=root,file={},socket={},readonly=on",
                image.display(),
                scratch.text("disk.sock")
            ),
        ];
        for filter in chain {
            args.extend(["--filter".to_owned(), filter.argument("root", &scratch)]);
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let server = Server::start(&scratch, &args);
        let mut client =
            RawClient::connect(&scratch.join("disk.sock"), RawOptions::default()).unwrap();
        assert_ne!(client.features() & feature::RO, 0);
        let read = client.read(0, 4096, 4096);
        assert!(!chain.is_empty() || read == [6; 4096]);
        let out = Part::Out(vec![1; 512]);
        assert_eq!(client.request(0, kind::WRITE, 8, &[out]).0, status::IOERR);
        for kind in [kind::DISCARD, kind::WRITE_ZEROES] {
            let (answer, _) = client.request(0, kind, 0, &[Part::Out(range(8, 8, 0))]);
            assert_ne!(answer, status::OK, "type {kind}");
        }
        assert_eq!(client.request(0, kind::FLUSH, 0, &[]).0, status::OK);
        drop(client);
        server.stop();
        assert!(std::fs::read(&image).unwrap() == before, "a read-only image was changed");
    }
}

#[test]
fn memory_holds_its_data_and_null_forgets_it() {
    let scratch = Scratch::new();
    let (memory, null) = (scratch.text("memory.sock"), scratch.text("null.sock"));
    let server = Server::start(
        &scratch,
        &[
            "--disk",
            &format!("name=memory,memory=32M,socket={memory},queues=4"),
            "--disk",
            &format!("name=null,null=1T,socket={null}"),
        ],
    );
    let mut driver = Driver::usual(memory.as_ref(), 4);
    assert_eq!(driver.capacity(), 32 << 20);
    checks::operations_do_what_they_say(&mut driver);
    let mut workload = Workload::new(Rng::seed(), 32 << 20);
    workload.run(&mut driver, &Mix::default(), 3_000);
    workload.read_back(&mut driver);
    drop(driver);

    let mut driver = Driver::usual(null.as_ref(), 1);
    assert_eq!(driver.capacity(), 1 << 40);
    driver.write(0, 1 << 39, &[1; 4096]);
    assert_eq!(driver.read(0, 1 << 39, 4096), [0; 4096]);
    assert_eq!(driver.run(0, Io::Flush), Outcome::Ok);
    drop(driver);
    server.stop();
}

#[test]
fn sixty_four_queues_work_side_by_side() {
    let mut disk = Disk::serve(BYTES, 64, "", &[Filter::Trace]);
    let plain = VirtioFeatureFlags::empty();
    let mut driver = Driver::connect(&disk.socket, 64, 16, 1, plain).unwrap();
    assert_eq!(driver.queues_max(), 64);
    assert!(driver.features().contains(VirtioBlkFeatureFlags::MQ));
    let mut workload = Workload::on(Rng::seed(), &mut driver);
    workload.run(&mut driver, &Mix { sectors_max: 32, ..Mix::default() }, 3_000);
    drop(driver);
    disk.stop();
    workload.check_image(&disk.plain_image());
}

#[test]
fn a_guest_that_wants_no_signal_gets_none_until_the_event_it_named() {
    let disk = Disk::serve(BYTES, 1, "", &[]);
    let mut client = connect(&disk);
    assert_ne!(client.features() & feature::EVENT_IDX, 0);
    client.write(0, 0, &[1; 512]);
    client.was_called(0);
    // A signal is wanted when three more have ended.
    let start = client.used_index(0);
    client.set_used_event(0, start.wrapping_add(2));
    for slot in 0..3 {
        assert!(!client.was_called(0), "signalled after {slot} of 3");
        client.submit(0, slot, Io::Flush, &[]);
        wait_for_used_index(&client, start.wrapping_add(slot as u16 + 1));
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(client.was_called(0), "not signalled after 3 of 3");
}

fn wait_for_used_index(client: &RawClient, index: u16) {
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while client.device_index(0) != index {
        assert!(std::time::Instant::now() < deadline, "the request does not end");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_queue_that_was_stopped_goes_on_where_it_was() {
    let disk = Disk::serve(BYTES, 1, "", &[Filter::Xor]);
    let mut client = connect(&disk);
    for round in 0..20u8 {
        for _ in 0..=round {
            client.write(0, 4096 * u64::from(round), &[round; 4096]);
        }
        let base = client.stop(0).unwrap();
        assert_eq!(base, client.used_index(0), "everything that was taken has ended");
        client.submit(0, 1, Io::Flush, &[]);
        client.kick(0);
        assert_eq!(client.wait_used(0, Duration::from_millis(20)), None, "a stopped queue works");
        client.start(0, base).unwrap();
        client.kick(0);
        let ended = client.wait_used(0, Duration::from_secs(20));
        assert!(ended.is_some(), "round {round}: what was submitted meanwhile is not served");
    }
    for round in 0..20u8 {
        assert_eq!(client.read(0, 4096 * u64::from(round), 4096), [round; 4096]);
    }
}

#[test]
fn memory_may_change_while_requests_run() {
    let disk = Disk::serve(BYTES, 2, "", &[Filter::Trace]);
    let options = RawOptions { queues: 2, ..RawOptions::default() };
    let mut client = RawClient::connect(&disk.socket, options).unwrap();
    for round in 0..50u8 {
        for slot in 0..4 {
            client.put(0, slot, &[round; 65536]);
            let io = Io::Write { offset: slot as u64 * 65536, length: 65536 };
            client.submit(0, slot, io, &[65536]);
        }
        client.send_memory_table().unwrap();
        let mut ended = 0;
        while ended < 4 {
            for (_, outcome) in client.ended(0) {
                assert_eq!(outcome, Outcome::Ok);
                ended += 1;
            }
            client.wait(0, Duration::from_millis(100));
        }
        assert_eq!(client.read(1, 65536, 512), [round; 512]);
    }
}
