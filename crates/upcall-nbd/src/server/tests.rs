//! A server with a played worker: the rules of time, with limits short enough to wait for.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use upcall_block::{DiskInfo, Op, OpSet, Request, RequestQueue, Status};

use super::*;

const LIMITS: Limits = Limits { connections: 8, handshake_ms: 300, stall_ms: 300 };
const PATIENCE: Duration = Duration::from_secs(10);
static COUNT: AtomicU32 = AtomicU32::new(0);

/// A worker that fills reads with ones, after a while; it ends with its end of the queue.
struct Worker {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<u64>>,
}

impl Worker {
    fn start(mut queue: NbdQueue, pause: Duration) -> Worker {
        let stop = Arc::new(AtomicBool::new(false));
        let ends = stop.clone();
        let serve = move || {
            let (mut requests, mut count): (Vec<Request>, u64) = (Vec::new(), 0);
            while !ends.load(Ordering::SeqCst) {
                queue.take(16, &mut requests).unwrap();
                if requests.is_empty() {
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                }
                std::thread::sleep(pause);
                for request in requests.drain(..) {
                    count += 1;
                    if request.op == Op::Read {
                        request.data.write(0, &vec![1; request.data.len()]);
                    }
                    queue.complete(request.tag, Status::Ok(()));
                }
                queue.publish();
            }
            count
        };
        Worker { stop, thread: Some(std::thread::spawn(serve)) }
    }

    /// Ends it; gives the count of requests.
    fn stop(&mut self) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().map_or(0, |thread| thread.join().unwrap())
    }
}

struct Served {
    path: PathBuf,
    worker: Worker,
    server: Server,
}

fn serve(pause: Duration) -> Served {
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("upcall-nbd-{}-{number}", std::process::id()));
    let disk = DiskInfo {
        capacity: 1 << 30,
        block_size: 512,
        physical_block_size: 4096,
        read_only: false,
        ops: OpSet::ALL,
        discard_granularity: 4096,
    };
    let info = ExportInfo::new("x".into(), String::new(), disk, true).unwrap();
    let export = ExportConfig { info, extents: None, write_through: false, queues: 1 };
    let (builder, mut queues) = ServerBuilder::new(vec![export]).unwrap();
    let worker = Worker::start(queues.remove(0).remove(0), pause);
    let listener = Listener::adopt(UnixListener::bind(&path).unwrap().into()).unwrap();
    let server = builder.start(listener, None, LIMITS, Log::new(|_, _| {})).unwrap();
    Served { path, worker, server }
}

impl Served {
    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// A client that has chosen the export as old clients do.
    fn client(&self) -> UnixStream {
        let mut stream = self.connect();
        stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x01x").unwrap();
        stream.read_exact(&mut [0; 18 + 10]).unwrap();
        stream
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn read(offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = b"\x25\x60\x95\x13\0\0\0\0\0\0\0\0\0\0\0\x07".to_vec();
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// How long it takes until the server ends the connection, with whatever comes before.
fn ended_after(stream: &mut UnixStream) -> Duration {
    let start = Instant::now();
    match stream.read_to_end(&mut Vec::new()) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => panic!("it is not ended"),
        _ => start.elapsed(),
    }
}

#[test]
fn who_stops_amid_a_message_is_disconnected_and_who_is_idle_is_not() {
    let served = serve(Duration::ZERO);
    let mut idle = served.client();
    let mut amid = served.client();
    amid.write_all(&read(0, 512)[..20]).unwrap();
    let mut silent = served.connect();
    assert!(ended_after(&mut amid) >= Duration::from_millis(200));
    ended_after(&mut silent);
    std::thread::sleep(Duration::from_millis(500));
    idle.write_all(&read(0, 512)).unwrap();
    let mut reply = [0; 16 + 512];
    idle.read_exact(&mut reply).unwrap();
    assert!(reply[16..].iter().all(|byte| *byte == 1));
}

#[test]
fn who_does_not_read_is_disconnected() {
    let served = serve(Duration::ZERO);
    let mut greedy = served.client();
    for _ in 0..20 {
        greedy.write_all(&read(0, 1 << 20)).unwrap();
    }
    std::thread::sleep(Duration::from_millis(1500));
    let mut bytes = Vec::new();
    let _ = greedy.read_to_end(&mut bytes);
    assert!(bytes.len() < 20 << 20, "what it did not read in time it does not get");
}

#[test]
fn a_worker_that_takes_long_is_not_the_clients_fault() {
    let served = serve(Duration::from_millis(900));
    let mut patient = served.client();
    patient.write_all(&read(0, 512)).unwrap();
    patient.read_exact(&mut [0; 16 + 512]).unwrap();
    patient.write_all(&read(0, 512)).unwrap();
    patient.read_exact(&mut [0; 16 + 512]).unwrap();
}

#[test]
fn what_a_client_cannot_take_is_not_asked_of_the_worker() {
    let mut served = serve(Duration::ZERO);
    let mut greedy = served.client();
    for _ in 0..200 {
        greedy.write_all(&read(0, 4 << 20)).unwrap();
    }
    std::thread::sleep(Duration::from_millis(200));
    let count = served.worker.stop();
    assert!((1..=4).contains(&count), "{count} requests, two of which fill its memory");
}

#[test]
fn a_queue_that_is_gone_fails_commands_and_an_end_tells_why() {
    let mut served = serve(Duration::ZERO);
    let mut client = served.client();
    served.worker.stop();
    let mut reply = [0; 16];
    client.write_all(&read(0, 512)).unwrap();
    client.read_exact(&mut reply).unwrap();
    assert_eq!(reply[4..8], 5u32.to_be_bytes(), "EIO");
    served.server.end();
    client.write_all(&read(0, 512)).unwrap();
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    // It may have been parted from before it asked.
    assert!(rest.is_empty() || rest[4..8] == 108u32.to_be_bytes(), "{rest:?}");
}

#[test]
fn an_end_waits_for_nobody_for_ever() {
    let served = serve(Duration::from_secs(5));
    let mut waiting = served.client();
    waiting.write_all(&read(0, 512)).unwrap();
    let _silent = served.connect();
    std::thread::sleep(Duration::from_millis(50));
    let start = Instant::now();
    let Served { server, .. } = &served;
    server.end();
    assert_eq!(server.shared.counts.len(), 1);
    let shared = server.shared.clone();
    shared.inboxes.iter().for_each(|inbox| inbox.put(|news| news.hurries = true));
    assert_eq!(waiting.read_to_end(&mut Vec::new()).unwrap_or(0), 0);
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
}
