//! What a guest needs to move: its frontend hears of each page that is written, and the one
//! that it moves to may be connected already.

use std::time::{Duration, Instant};

use upcall_tests::{
    CHAINS, Descriptor, Disk, Filter, Part, RawClient, RawOptions, Rng, feature, header, kind,
    status,
};

const BYTES: u64 = 8 << 20;
const PATIENCE: Duration = Duration::from_secs(10);

/// One request, of which everything but its submission is in memory already.
fn prepare(client: &mut RawClient, rng: &mut Rng) -> (Vec<Descriptor>, usize) {
    let sectors = 1 + rng.below(64);
    let sector = rng.below(BYTES / 512 - sectors);
    let length = sectors as usize * 512;
    let is_read = rng.below(3) > 0;
    let head = client.place(16);
    client.memory().write(head, &header(if is_read { kind::READ } else { kind::WRITE }, sector));
    let data = client.place(length);
    client.memory().write(data, &vec![0xa5; length]);
    // Its page is its own, so that no other mark covers it.
    let status_at = client.place(3 * 4096).next_multiple_of(4096);
    client.memory().write(status_at, &[status::NONE]);
    let descriptor = |at, length: usize, flags| Descriptor {
        address: client.guest(at),
        length: length as u32,
        flags,
        next: 0,
    };
    let data_flags = if is_read { Descriptor::WRITE } else { 0 };
    let chain = vec![
        descriptor(head, 16, 0),
        descriptor(data, length, data_flags),
        descriptor(status_at, 1, Descriptor::WRITE),
    ];
    (chain, status_at)
}

fn each_written_page_is_marked(chain: &[Filter], packed: bool) {
    let mut disk = Disk::serve(BYTES, 1, "", chain);
    let mut options = RawOptions::default();
    options.features |= if packed { feature::RING_PACKED } else { 0 };
    let mut client = RawClient::connect(&disk.socket, options).unwrap();
    let mut rng = Rng::new(7);
    let log = client.start_logging().unwrap();
    for _ in 0..12 {
        let (chain, status_at) = prepare(&mut client, &mut rng);
        let before = client.memory().copy(0, client.memory().len());
        let mut marked = log.take();
        marked.clear();
        client.submit_chain(0, chain, None);
        client.wait_used(0, PATIENCE).expect("an answer");
        assert_eq!(client.memory().copy(status_at, 1), [status::OK]);
        let changed = client.changed_pages(&before);
        let ring = client.guest(0)..client.guest(64 << 10);
        marked.extend(log.take());
        let data = changed.iter().filter(|page| !ring.contains(page));
        assert!(data.clone().count() > 0, "a status, at least");
        let unmarked: Vec<_> = data.filter(|page| !marked.contains(page)).collect();
        assert!(unmarked.is_empty(), "{unmarked:x?} unmarked when the request is used");
        // The ring is marked after it was written.
        let deadline = Instant::now() + PATIENCE;
        while !changed.is_subset(&marked) {
            assert!(Instant::now() < deadline, "{changed:x?} changed, {marked:x?} marked");
            marked.extend(log.take());
        }
    }
    client.stop_logging().unwrap();
    log.take();
    let sent = [Part::Out(header(kind::READ, 0)), Part::In(4096), Part::In(1)];
    client.exchange(0, &sent, false, PATIENCE).expect("an answer");
    client.stop(0).unwrap();
    assert!(log.take().is_empty(), "marked after it was asked to stop that");
    drop(client);
    disk.stop();
}

#[test]
fn each_page_that_the_worker_a_filter_or_the_kernel_writes_is_marked() {
    for chain in CHAINS {
        each_written_page_is_marked(chain, false);
    }
    each_written_page_is_marked(&[Filter::Xor], true);
}

fn connect(disk: &Disk) -> std::thread::JoinHandle<RawClient> {
    let socket = disk.socket.clone();
    std::thread::spawn(move || RawClient::connect(&socket, RawOptions::default()).unwrap())
}

fn write(client: &mut RawClient, sector: u64, byte: u8) {
    let (code, _) = client.request(0, kind::WRITE, sector, &[Part::Out(vec![byte; 512])]);
    assert_eq!(code, status::OK);
}

fn read(client: &mut RawClient, sector: u64) -> Vec<u8> {
    let (code, bytes) = client.request(0, kind::READ, sector, &[Part::In(512)]);
    assert_eq!(code, status::OK);
    bytes
}

#[test]
fn who_connects_while_another_uses_the_disk_is_served_when_that_one_has_stopped() {
    let mut disk = Disk::serve(BYTES, 1, "", &[Filter::Xor]);
    let mut source = connect(&disk).join().unwrap();
    write(&mut source, 1, 1);
    let target = connect(&disk);
    for round in 0..20 {
        write(&mut source, 2, round);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(!target.is_finished(), "two guests use one disk at once");
    source.stop(0).unwrap();
    let mut target = target.join().unwrap();
    assert_eq!(read(&mut target, 2), [19; 512], "what the source wrote last");
    write(&mut target, 3, 3);

    // It fails there, and goes on where it was.
    let again = std::thread::spawn(move || {
        let base = source.device_index(0);
        source.start(0, base).unwrap();
        source
    });
    std::thread::sleep(Duration::from_millis(300));
    assert!(!again.is_finished(), "two guests use one disk at once");
    write(&mut target, 4, 4);
    drop(target);
    let mut source = again.join().unwrap();
    assert_eq!((read(&mut source, 3)[0], read(&mut source, 4)[0]), (3, 4));
    drop(source);
    disk.stop();
}

#[test]
fn a_server_ends_in_order_although_somebody_waits_for_the_disk() {
    let mut disk = Disk::serve(BYTES, 1, "", &[]);
    let source = connect(&disk).join().unwrap();
    let socket = disk.socket.clone();
    let waiting =
        std::thread::spawn(move || RawClient::connect(&socket, RawOptions::default()).err());
    std::thread::sleep(Duration::from_millis(300));
    disk.stop();
    assert!(waiting.join().unwrap().is_some(), "it was never served");
    drop(source);
}
