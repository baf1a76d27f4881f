//! The store on real images, with the daemon that is installed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use upcall_block::{Allocation, Extent, OpSet};
use upcall_ring::{Access, Mapping, memfd};

use super::*;

/// A folder that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("upcall-image-{name}-{}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Folder(path)
    }

    fn qcow2(&self, more: &[&str]) -> PathBuf {
        let path = self.0.join("disk.qcow2");
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2"]).args(more).arg(&path).arg("16M");
        // For an encrypted one QEMU measures how fast keys are derived here, and gives up ("Unable
        // to get accurate CPU usage") when a busy machine let it do too little.
        assert!((0..50).any(|_| command.status().unwrap().success()));
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn options(path: &Path) -> ImageOptions {
    let mut options = ImageOptions::new(ImageFormat::Qcow2, path);
    // Not every temporary folder knows O_DIRECT.
    options.direct = false;
    options
}

/// Submits one request and waits for it.
fn run(store: &ImageStore, op: Op, at: u64, data: &Buffers, length: u64, fua: bool) -> Status {
    let mut queue = store.open_queue().unwrap();
    let range = Range::new(at, length, store.info()).unwrap();
    let flags = RequestFlags { fua, ..RequestFlags::default() };
    queue.submit(StoreIo { token: StoreToken(5), op, range, flags, data: data.clone() });
    let mut done = Vec::new();
    let begun = Instant::now();
    while done.is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{op} does not end");
        queue.poll(&mut done);
        if done.is_empty() && queue.before_sleep() {
            sleep_on(queue.doorbell().unwrap());
        }
    }
    assert_eq!(done[0].token, StoreToken(5));
    done[0].status
}

fn filled(length: usize, byte: u8) -> Buffers {
    let fd = memfd("guest", length).unwrap();
    let memory = Arc::new(Mapping::new(&fd, 0, length, Access::ReadWrite).unwrap());
    let data = Buffers::of(&memory, 0, length, true).unwrap();
    data.write(0, &vec![byte; length]);
    data
}

fn read(store: &ImageStore, at: u64, length: usize) -> Vec<u8> {
    let data = filled(length, 0xee);
    assert_eq!(run(store, Op::Read, at, &data, length as u64, false), Ok(()));
    let mut bytes = vec![0; length];
    data.read(0, &mut bytes);
    bytes
}

/// The daemon that has a file of this name open.
fn daemon_of(image: &Path) -> Option<Pid> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let found = pids.filter(|pid| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd"));
        let mut files = fds.into_iter().flatten().flatten();
        name.starts_with("qemu-storage")
            && files.any(|fd| std::fs::read_link(fd.path()).is_ok_and(|path| path == image))
    });
    found.filter_map(Pid::from_raw).next()
}

#[test]
fn what_goes_past_the_page_cache_is_handed_to_the_kernel_in_batches_where_that_can_be_done() {
    let folder = Folder::new("aio");
    let image = folder.qcow2(&[]);
    let native_nodes = |direct, aio| {
        let options = ImageOptions { direct, ..options(&image) };
        let plan = plan::Plan::open(&options, plan::Purpose::Serve).unwrap();
        let fd = || memfd("socket", 4096).unwrap();
        let sockets = plan::Sockets { requests: fd(), questions: fd(), server: None };
        let arguments = plan.arguments(&sockets, aio);
        arguments.iter().filter(|text| text.contains(r#""aio":"native""#)).count()
    };
    assert_eq!(native_nodes(true, plan::Aio::Native), 1, "the file; its format has no aio");
    assert_eq!(native_nodes(false, plan::Aio::Native), 0, "QEMU refuses it without O_DIRECT");
    assert_eq!(native_nodes(true, plan::Aio::Threads), 0);
}

#[test]
fn a_daemon_that_hangs_is_replaced() {
    let folder = Folder::new("hang");
    let image = folder.qcow2(&[]);
    let told = Arc::new(Mutex::new(Vec::new()));
    let mut options = options(&image);
    options.patience = Duration::from_secs(2);
    let into = told.clone();
    options.on_restart =
        Some(Arc::new(move |text: &str| into.lock().unwrap().push(text.to_owned())));
    let store = ImageStore::open(options).unwrap();
    assert_eq!(run(&store, Op::Write, 0, &filled(4096, 3), 4096, false), Ok(()));
    kill_process(daemon_of(&image).unwrap(), Signal::STOP).unwrap();
    assert_eq!(run(&store, Op::Write, 4096, &filled(4096, 4), 4096, false), Ok(()));
    assert_eq!(read(&store, 0, 8192), [vec![3; 4096], vec![4; 4096]].concat());
    let told = told.lock().unwrap();
    assert!(told.len() == 1 && told[0].contains("has not answered for 2000 ms"), "{told:?}");
    assert_eq!(store.failure(), None);
}

#[test]
fn requests_of_any_size_and_kind_do_what_they_say() {
    let folder = Folder::new("kinds");
    let image = folder.qcow2(&[]);
    let store = ImageStore::open(options(&image)).unwrap();
    assert_eq!((store.info().capacity, store.info().ops), (16 << 20, OpSet::ALL));
    // More than one piece, and more than half of the memory for data.
    for at in [0, 8 << 20] {
        assert_eq!(run(&store, Op::Write, at, &filled(8 << 20, 9), 8 << 20, false), Ok(()));
    }
    assert_eq!(run(&store, Op::Write, 512, &filled(1024, 1), 1024, true), Ok(()));
    assert_eq!(run(&store, Op::Discard, 1 << 20, &Buffers::new(), 15 << 20, true), Ok(()));
    assert_eq!(run(&store, Op::WriteZeroes, 2048, &Buffers::new(), 512, false), Ok(()));
    assert_eq!(run(&store, Op::Flush, 0, &Buffers::new(), 0, false), Ok(()));
    let mut expected = vec![9; 1 << 20];
    expected[512..1536].fill(1);
    expected[2048..2560].fill(0);
    expected.resize(16 << 20, 0);
    assert!(read(&store, 0, 16 << 20) == expected);
    assert_eq!(store.sync(), Ok(()));
    drop(store);
    let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&image).unwrap());
    assert!(blocks < 8 << 11, "the discard gave nothing back: {blocks} blocks");
}

#[test]
fn an_encrypted_image_opens_with_its_secret_alone() {
    let folder = Folder::new("luks");
    let secret = folder.0.join("secret");
    std::fs::write(&secret, "open sesame").unwrap();
    let object = format!("secret,id=s,file={}", secret.display());
    // Few rounds: this is not about strength.
    let format = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let image = folder.qcow2(&["--object", &object, "-o", format]);
    let mut with = options(&image);
    with.secret = Some(secret.clone());
    let store = ImageStore::open(with.clone()).unwrap();
    assert_eq!(run(&store, Op::Write, 0, &filled(65536, b'P'), 65536, true), Ok(()));
    drop(store);
    let bytes = std::fs::read(&image).unwrap();
    assert!(!bytes.windows(512).any(|window| window == [b'P'; 512]), "it is not encrypted");
    let store = ImageStore::open(with.clone()).unwrap();
    assert_eq!(read(&store, 0, 65536), [b'P'; 65536]);
    drop(store);
    let refused = ImageStore::open(options(&image)).unwrap_err().to_string();
    assert!(refused.contains("disk.qcow2: cannot be served as qcow2"), "{refused}");
    std::fs::write(&secret, "open says me").unwrap();
    assert!(ImageStore::open(with).is_err(), "with the wrong secret");
}

#[test]
fn the_image_is_free_and_the_daemon_gone_when_the_store_and_its_queues_are() {
    let folder = Folder::new("end");
    let image = folder.qcow2(&[]);
    let store = ImageStore::open(options(&image)).unwrap();
    let queue = store.open_queue().unwrap();
    drop(store);
    assert!(daemon_of(&image).is_some(), "a queue is left");
    drop(queue);
    assert_eq!(daemon_of(&image), None);
    drop(ImageStore::open(options(&image)).unwrap());
}

#[test]
fn what_options_cannot_mean_is_refused() {
    type Change = fn(&mut ImageOptions);
    let cases: [(Change, &str); 4] = [
        (|options| options.format = ImageFormat::Raw, "without qemu-storage-daemon"),
        (
            |options| {
                options.format = ImageFormat::Vdi;
                options.secret = Some("x".into());
            },
            "for qcow2",
        ),
        (
            |options| {
                let layer = |format| Layer { format, path: "x".into() };
                options.backing = vec![layer(ImageFormat::Raw), layer(ImageFormat::Qcow2)];
            },
            "only qcow2 and vmdk",
        ),
        (|options| options.program = "upcall-no-such-program".into(), "apt-get install"),
    ];
    for (change, says) in cases {
        let mut options = ImageOptions::new(ImageFormat::Qcow2, "/nowhere/disk");
        change(&mut options);
        let said = ImageStore::open(options).unwrap_err().to_string();
        assert!(said.contains(says), "{said}");
    }
}

fn extent(length: u64, allocation: Allocation) -> Extent {
    Extent { length, allocation }
}

const HOLE: Allocation = Allocation::Hole;
const DATA: Allocation = Allocation::Data;

#[test]
fn holes_are_told_from_data_and_what_was_written_is_data_at_once() {
    let folder = Folder::new("holes");
    let image = folder.qcow2(&[]);
    let store = ImageStore::open(options(&image)).unwrap();
    let size = 16 << 20;
    assert_eq!(store.extents(0, size, 9).unwrap(), [extent(size, HOLE)]);
    let at = 1 << 20;
    assert_eq!(run(&store, Op::Write, at, &filled(65536, 3), 65536, false), Ok(()));
    let rest = size - at - 65536;
    let all = [extent(at, HOLE), extent(65536, DATA), extent(rest, HOLE)];
    assert_eq!(store.extents(0, size, 9).unwrap(), all);
    assert_eq!(store.extents(0, size, 2).unwrap(), all[..2]);
    assert_eq!(store.extents(at + 512, 1024, 9).unwrap(), [extent(1024, DATA)]);
    assert_eq!(run(&store, Op::Discard, at, &Buffers::new(), 65536, false), Ok(()));
    assert_eq!(store.extents(0, size, 9).unwrap(), [extent(size, HOLE)]);
}

/// What was completed and not flushed is gone with a killed daemon until it is written again:
/// nobody may be told of a hole there meanwhile.
#[test]
fn what_is_kept_for_the_next_daemon_is_never_called_a_hole() {
    let folder = Folder::new("kept");
    let image = folder.qcow2(&[]);
    let store = ImageStore::open(options(&image)).unwrap();
    for round in 0..8 {
        let at = round << 20;
        assert_eq!(run(&store, Op::Write, at, &filled(65536, 3), 65536, false), Ok(()));
        if round % 2 == 0 {
            // Also one that has been asked before.
            assert_eq!(store.extents(at, 65536, 9).unwrap(), [extent(65536, DATA)]);
        }
        kill_process(daemon_of(&image).unwrap(), Signal::KILL).unwrap();
        let found = store.extents(at, 1 << 20, 9).unwrap();
        assert_eq!(found, [extent(65536, DATA), extent((1 << 20) - 65536, HOLE)]);
    }
}

#[test]
fn a_daemon_that_hangs_is_asked_once_and_in_vain() {
    let folder = Folder::new("dumb");
    let image = folder.qcow2(&[]);
    let store = ImageStore::open(options(&image)).unwrap();
    assert_eq!(store.extents(0, 4096, 9).unwrap(), [extent(4096, HOLE)]);
    let daemon = daemon_of(&image).unwrap();
    kill_process(daemon, Signal::STOP).unwrap();
    let begun = Instant::now();
    assert_eq!(store.extents(0, 4096, 9).unwrap(), [extent(4096, DATA)]);
    assert!(begun.elapsed() < Duration::from_secs(25), "it was waited for too long");
    let begun = Instant::now();
    assert_eq!(store.extents(0, 4096, 9).unwrap(), [extent(4096, DATA)]);
    assert!(begun.elapsed() < Duration::from_secs(4), "it was asked again");
    kill_process(daemon, Signal::CONT).unwrap();
    assert_eq!(run(&store, Op::Flush, 0, &Buffers::new(), 0, false), Ok(()));
}
