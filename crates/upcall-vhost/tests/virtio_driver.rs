//! The `virtio-driver` crate as the other side: a driver and a hypervisor that were not
//! written by us, over a real socket.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use upcall_ring::{Access, Buffers, Doorbell, Mapping, memfd};
use upcall_vhost::mock::{ThreadHost, disk_info};
use upcall_vhost::{BlkConfig, BlkOptions, ConnectionError, Ended, Listener, serve_connection};
use virtio_driver::{VhostUser, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags};

const CAPACITY: usize = 1 << 20;
const BLOCK: usize = 4096;

fn served(features: VirtioFeatureFlags) -> Result<Ended, ConnectionError> {
    let name = format!("upcall-virtio-driver-{}-{}.sock", std::process::id(), features.bits());
    let path = std::env::temp_dir().join(name);
    let listener = Listener::bind(&path, Some(0o600)).unwrap();
    let shutdown = Doorbell::new().unwrap();
    let server = std::thread::spawn(move || {
        let options = BlkOptions { queues: 2, ..BlkOptions::default() };
        let config = BlkConfig::new(disk_info(CAPACITY as u64), options).unwrap();
        let stream = listener.accept(shutdown.as_fd()).unwrap().unwrap();
        let mut host = ThreadHost::new(CAPACITY);
        serve_connection(stream, Arc::new(config), &mut host, shutdown.as_fd())
    });
    drive(path.to_str().unwrap(), features);
    server.join().unwrap()
}

fn drive(path: &str, features: VirtioFeatureFlags) {
    // Bits of block devices that the driver must be told to take.
    let block_features = 1 << 9 | 1 << 12 | 1 << 13 | 1 << 14;
    let vhost = VhostUser::new(path, features.bits() | block_features).unwrap();
    let mut transport: Box<VirtioBlkTransport> = Box::new(vhost);
    assert_eq!(transport.max_queues(), Some(2));
    let config = transport.get_config().unwrap();
    assert_eq!(u64::from(config.capacity), CAPACITY as u64 / 512);

    let fd = memfd("buffers", 2 * BLOCK).unwrap();
    let mapping = Arc::new(Mapping::new(&fd, 0, 2 * BLOCK, Access::ReadWrite).unwrap());
    let whole = Buffers::of(&mapping, 0, 2 * BLOCK, true).unwrap();
    let (start, length) = whole.addresses().next().unwrap();
    transport.map_mem_region(start as usize, length, fd.as_raw_fd(), 0).unwrap();
    let mut queues = VirtioBlkQueue::<u64>::setup_queues(&mut *transport, 2, 32).unwrap();

    for (index, queue) in queues.iter_mut().enumerate() {
        for round in 0..100u64 {
            let offset = round * 7 % 64 * BLOCK as u64;
            let pattern = vec![round as u8 + 1; BLOCK];
            whole.write(0, &pattern);
            // SAFETY: both halves of the mapping live until the end and nobody else uses
            // them while the requests are in flight.
            unsafe { queue.write_raw(offset, start, BLOCK, 1).unwrap() };
            wait(queue, &*transport, index, 1);
            queue.flush(2).unwrap();
            wait(queue, &*transport, index, 2);
            // SAFETY: as above.
            unsafe { queue.read_raw(offset, start.wrapping_add(BLOCK), BLOCK, 3).unwrap() };
            wait(queue, &*transport, index, 3);
            let mut seen = vec![0; BLOCK];
            whole.read(BLOCK, &mut seen);
            assert_eq!(seen, pattern);
            queue.write_zeroes(offset, BLOCK as u64, true, 4).unwrap();
            wait(queue, &*transport, index, 4);
        }
    }
    // SAFETY: as above.
    unsafe { queues[0].read_raw(CAPACITY as u64, start, BLOCK, 9).unwrap() };
    transport.get_submission_notifier(0).notify().unwrap();
    assert_ne!(result(&mut queues[0], 9), 0, "a read past the end fails");
}

fn wait(
    queue: &mut VirtioBlkQueue<'_, u64>,
    transport: &VirtioBlkTransport,
    index: usize,
    context: u64,
) {
    transport.get_submission_notifier(index).notify().unwrap();
    assert_eq!(result(queue, context), 0);
}

fn result(queue: &mut VirtioBlkQueue<'_, u64>, context: u64) -> i32 {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(done) = queue.completions().next() {
            assert_eq!(done.context, context);
            return done.ret;
        }
        assert!(Instant::now() < deadline, "no completion");
        std::thread::yield_now();
    }
}

#[test]
fn an_independent_driver_reads_what_it_wrote() {
    let ended = served(VirtioFeatureFlags::VERSION_1);
    assert_eq!(ended.unwrap(), Ended::PeerClosed);
}

#[test]
fn an_independent_driver_with_event_indices_reads_what_it_wrote() {
    let ended = served(VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX);
    assert_eq!(ended.unwrap(), Ended::PeerClosed);
}
