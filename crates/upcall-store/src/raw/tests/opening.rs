//! What can be opened, what cannot, and what the message says.

use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;

use crate::OpenError;
use crate::raw::lock;

use super::*;

fn message(options: RawOptions) -> String {
    RawStore::open(options).expect_err("it opened").to_string()
}

#[test]
fn what_is_no_image_is_refused_with_the_way_out() {
    let dir = TempDir::new();
    let at = |name: &str| RawOptions::new(dir.0.join(name));
    let missing = message(at("nothing"));
    assert!(missing.contains("nothing: no such file; create"), "{missing}");
    let directory = message(RawOptions::new(&dir.0));
    assert!(directory.contains("is a directory; a disk needs"), "{directory}");
    rustix::fs::mkfifoat(rustix::fs::CWD, dir.0.join("pipe"), 0o600.into()).unwrap();
    assert!(message(at("pipe")).contains("is a pipe"));
    let _socket = std::os::unix::net::UnixListener::bind(dir.0.join("socket")).unwrap();
    assert!(message(at("socket")).contains("is a socket"));
    assert!(message(RawOptions::new("/dev/null")).contains("is a character device"));

    std::fs::write(dir.0.join("empty"), "").unwrap();
    assert!(message(at("empty")).contains("is empty; give it a size"));
    std::fs::write(dir.0.join("odd"), [0; 1000]).unwrap();
    let odd = message(at("odd"));
    assert!(
        odd.contains("1000 bytes")
            && odd.contains("1024 bytes")
            && odd.contains("truncate -s %512"),
        "{odd}"
    );
}

#[test]
fn an_image_without_permission_says_for_what() {
    let dir = TempDir::new();
    let path = dir.image(4096);
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o444)).unwrap();
    let ordinary = std::thread::spawn(move || {
        // SAFETY: changes the rights of this thread only, which ends with the test.
        unsafe { libc::setfsuid(65534) };
        let writing = message(RawOptions::new(&path));
        assert!(writing.contains("permission denied for reading and writing"), "{writing}");
        let reading = RawOptions { read_only: true, ..RawOptions::new(&path) };
        assert!(RawStore::open(reading).is_ok());
    });
    ordinary.join().unwrap();
}

#[test]
fn a_descriptor_is_used_as_it_came_if_it_is_good_for_it() {
    for engine in ENGINES {
        let dir = TempDir::new();
        let path = dir.image(1 << 20);
        let options = options(&path, engine, true);
        let reading = File::open(&path).unwrap();
        let refused = RawStore::from_file(reading.try_clone().unwrap(), options.clone());
        let text = refused.expect_err("it may not write").to_string();
        assert!(text.contains("open for reading only"), "{text}");
        let read_only = RawOptions { read_only: true, ..options.clone() };
        let mut disk = Disk::new(RawStore::from_file(reading, read_only).unwrap());
        assert_eq!(disk.read(0, 512), Ok(vec![0; 512]));
        let writing = disk.write(0, &[1; 512]);
        assert_eq!(writing, Err(upcall_block::Errno::EROFS));
        assert_eq!(disk.flush(), Ok(()));
        drop(disk);

        let appending = File::options().read(true).append(true).open(&path).unwrap();
        let mut disk = Disk::new(RawStore::from_file(appending, options).unwrap());
        disk.write(4096, &[1; 512]).unwrap();
        assert_eq!(disk.read(4096, 512), Ok(vec![1; 512]));
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 20, "nothing was appended");
    }
}

#[test]
fn an_image_has_one_writer_or_many_readers_and_the_message_names_the_holder() {
    let dir = TempDir::new();
    let path = dir.image(1 << 20);
    let writing = RawOptions::new(&path);
    let reading = RawOptions { read_only: true, ..writing.clone() };
    let unlocked = RawOptions { lock: false, ..writing.clone() };

    let writer = RawStore::open(writing.clone()).unwrap();
    let busy = message(writing.clone());
    let holder = format!("in use by process {}", std::process::id());
    assert!(busy.contains(&holder) && busy.contains("one writer"), "{busy}");
    let busy = message(reading.clone());
    assert!(busy.contains(&holder) && busy.contains("lock = false"), "{busy}");
    let second = RawStore::open(unlocked).unwrap();
    assert!(second.describe().contains("not locked"));
    drop((writer, second));

    let readers = [reading.clone(), reading].map(|options| RawStore::open(options).unwrap());
    assert!(matches!(RawStore::open(writing.clone()), Err(OpenError::Busy { .. })));
    drop(readers);
    RawStore::open(writing).unwrap();
}

#[test]
fn locks_of_qemu_are_understood() {
    let dir = TempDir::new();
    let path = dir.image(1 << 20);
    let set = |file: &File, kind: i32, byte: i64| {
        let mut lock = libc::flock {
            l_type: kind as libc::c_short,
            l_whence: 0,
            l_start: byte,
            l_len: 1,
            l_pid: 0,
        };
        // SAFETY: the command reads and writes one flock, which lives across the call.
        let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw mut lock) };
        result == 0
    };
    let open = |read_only| RawStore::open(RawOptions { read_only, ..RawOptions::new(&path) });

    // A virtual machine that reads (100) and writes (101), and bears no other writer (201).
    let qemu = File::options().read(true).write(true).open(&path).unwrap();
    for byte in [100, 101, 201] {
        assert!(set(&qemu, libc::F_RDLCK, byte));
    }
    assert!(matches!(open(false), Err(OpenError::Busy { .. })));
    assert!(matches!(open(true), Err(OpenError::Busy { .. })));
    drop(qemu);

    // One that only reads, as ours do.
    let qemu = File::open(&path).unwrap();
    for byte in [100, 201] {
        assert!(set(&qemu, libc::F_RDLCK, byte));
    }
    assert!(matches!(open(false), Err(OpenError::Busy { .. })));
    let reader = open(true).unwrap();
    // What keeps a writing QEMU out: it asks whether it could lock byte 201 alone.
    let writing = File::options().read(true).write(true).open(&path).unwrap();
    assert!(!set(&writing, libc::F_WRLCK, 201));
    drop((qemu, reader));
    let _writer = open(false).unwrap();
    assert!(!set(&writing, libc::F_RDLCK, 100));
}

#[test]
fn the_image_is_free_as_soon_as_the_store_and_its_queues_are_gone() {
    for engine in ENGINES {
        let dir = TempDir::new();
        let path = dir.image(1 << 20);
        for _ in 0..50 {
            let mut disk = Disk::new(RawStore::open(options(&path, engine, true)).unwrap());
            disk.write(0, &[1; 4096]).unwrap();
            disk.run(Op::Discard, 0, 4096, PLAIN).unwrap();
            // As a forked child that has not called exec yet.
            let _kept = disk.store.shared.file.try_clone().unwrap();
            drop(disk);
            // At once, without the moment of grace that a store gives.
            let file = File::options().read(true).write(true).open(&path).unwrap();
            assert!(lock::try_take(&file, false).unwrap(), "{engine:?}");
            lock::release(&file);
        }
    }
}

#[test]
fn a_lock_that_outlives_its_holder_is_waited_for() {
    let dir = TempDir::new();
    let path = dir.image(1 << 20);
    let holder = File::options().read(true).write(true).open(&path).unwrap();
    assert!(lock::try_take(&holder, false).unwrap());
    let late = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(100));
        drop(holder);
    });
    RawStore::open(RawOptions::new(&path)).unwrap();
    late.join().unwrap();
}

/// Forbids io_uring to this thread and those it starts, as containers do.
fn forbid_uring() {
    let filter = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut program = [
        // Load the number of the call; is it io_uring_setup? then EPERM, else allow.
        filter(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        filter(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_io_uring_setup as u32),
        filter(libc::BPF_RET, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        filter(libc::BPF_RET, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: 4, filter: program.as_mut_ptr() };
    // SAFETY: both concern this thread only; the kernel copies the program.
    let result = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
    };
    assert_eq!(result, 0);
}

#[test]
fn where_io_uring_is_forbidden_threads_do_the_work_and_the_description_says_so() {
    let dir = TempDir::new();
    let path = dir.image(1 << 20);
    let before = RawStore::open(options(&path, Engine::Auto, true)).unwrap();
    assert!(before.describe().ends_with("direct, io_uring"), "{}", before.describe());
    let confined = std::thread::spawn(move || {
        forbid_uring();
        // Forbidden between opening the store and opening the queue.
        let mut disk = Disk::new(before);
        assert_eq!(disk.write(0, &[1; 4096]), Ok(()));
        let text = disk.store.describe();
        assert!(text.contains("threads (no io_uring: Operation not permitted"), "{text}");
        drop(disk);

        let refused = message(options(&path, Engine::IoUring, true));
        assert!(refused.contains("kernel.io_uring_disabled"), "{refused}");
        let mut disk = Disk::new(RawStore::open(options(&path, Engine::Auto, true)).unwrap());
        let text = disk.store.describe();
        assert!(text.contains("threads (no io_uring: Operation not permitted"), "{text}");
        assert_eq!(disk.read(0, 4096), Ok(vec![1; 4096]));
        assert_eq!(disk.flush(), Ok(()));
    });
    confined.join().unwrap();
}

#[test]
fn what_the_disk_offers_is_what_was_asked_for() {
    let dir = TempDir::new();
    let path = dir.image(1 << 20);
    for direct in [true, false] {
        let store = RawStore::open(options(&path, Engine::Threads, direct)).unwrap();
        let info = store.info();
        assert_eq!((info.capacity, info.read_only), (1 << 20, false));
        assert_eq!(info.ops, upcall_block::OpSet::ALL);
        assert!(info.block_size.is_power_of_two() && info.physical_block_size >= info.block_size);
        let flags = rustix::fs::fcntl_getfl(&store.shared.file).unwrap();
        assert_eq!(flags.contains(rustix::fs::OFlags::DIRECT), direct);
        drop(store);
        let read_only = RawOptions { read_only: true, ..options(&path, Engine::Threads, direct) };
        let store = RawStore::open(read_only).unwrap();
        let ops: Vec<_> = store.info().ops.iter().collect();
        assert_eq!((store.info().read_only, ops), (true, vec![Op::Read, Op::Flush]));
    }
}

#[test]
fn an_image_that_came_as_a_descriptor_is_free_soon() {
    for engine in ENGINES {
        let dir = TempDir::new();
        let path = dir.image(1 << 20);
        let file = || File::options().read(true).write(true).open(&path).unwrap();
        let mut waited = std::time::Duration::ZERO;
        for _ in 0..50 {
            let store = RawStore::from_file(file(), options(&path, engine, true)).unwrap();
            let mut disk = Disk::new(store);
            disk.write(0, &[1; 4096]).unwrap();
            drop(disk);
            let start = std::time::Instant::now();
            let file = file();
            while !lock::try_take(&file, false).unwrap() {}
            waited += start.elapsed();
        }
        // Without care it takes the kernel some 40 ms each time.
        assert!(waited.as_millis() < 500, "{engine:?}: {waited:?}");
    }
}
