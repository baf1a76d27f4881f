//! Block devices, other sector sizes, full file systems, real failures: needs root and loop
//! devices. Without them these tests fail, unless UPCALL_TEST_NO_LOOP=1 says that this is known.

use std::process::Command;
use std::sync::{Mutex, MutexGuard};

use upcall_block::Errno;

use crate::OpenError;

use super::*;

/// Loop devices are few; one test at a time.
fn may_run() -> Option<MutexGuard<'static, ()>> {
    static TURN: Mutex<()> = Mutex::new(());
    let is_root = rustix::process::geteuid().is_root();
    if is_root && Path::new("/dev/loop-control").exists() {
        return Some(TURN.lock().unwrap_or_else(|poison| poison.into_inner()));
    }
    assert!(
        std::env::var_os("UPCALL_TEST_NO_LOOP").is_some(),
        "needs root and loop devices; UPCALL_TEST_NO_LOOP=1 goes without this test"
    );
    eprintln!("SKIPPED: no loop devices here");
    None
}

fn run(command: &str, arguments: &[&str]) -> String {
    let output = Command::new(command).args(arguments).output().unwrap();
    assert!(output.status.success(), "{command} {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

struct Loop(PathBuf);

impl Loop {
    fn new(file: &Path, sector: &str) -> Loop {
        let file = file.to_str().unwrap();
        Loop(run("losetup", &["--find", "--show", "--sector-size", sector, file]).into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

struct Mount(PathBuf);

impl Mount {
    fn new(dir: &TempDir, arguments: &[&str]) -> Mount {
        let path = dir.0.join("mount");
        std::fs::create_dir(&path).unwrap();
        run("mount", &[arguments, &[path.to_str().unwrap()]].concat());
        Mount(path)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // The kernel may hold the image a little longer than the store; lazily it goes later.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[test]
fn a_block_device_does_every_operation() {
    let Some(_turn) = may_run() else { return };
    for (sector, engine) in [("512", Engine::IoUring), ("4096", Engine::Threads)] {
        for direct in [true, false] {
            let dir = TempDir::new();
            let device = Loop::new(&dir.image(8 << 20), sector);
            let mut disk = Disk::new(RawStore::open(options(&device.0, engine, direct)).unwrap());
            let info = disk.store.info().clone();
            assert_eq!((info.capacity, info.block_size), (8 << 20, sector.parse().unwrap()));

            let mut bytes = Random::new("device").bytes(4 << 20);
            assert_eq!(disk.write_flagged(8192, &bytes, FUA), Ok(()));
            assert_eq!(disk.run(Op::Discard, 8192, 1 << 20, PLAIN), Ok(()));
            assert_eq!(disk.run(Op::WriteZeroes, 2 << 20, 65536, PLAIN), Ok(()));
            assert_eq!(disk.run(Op::WriteZeroes, 3 << 20, 65536, UNMAP), Ok(()));
            assert_eq!(disk.flush(), Ok(()));
            bytes[..1 << 20].fill(0);
            bytes[(2 << 20) - 8192..][..65536].fill(0);
            bytes[(3 << 20) - 8192..][..65536].fill(0);
            assert!(disk.read(8192, 4 << 20).unwrap() == bytes);
            assert_eq!(disk.read((8 << 20) - 4096, 4096), Ok(vec![0; 4096]));
            drop(disk);
            for _ in 0..10 {
                let again = RawStore::open(options(&device.0, engine, direct)).unwrap();
                let mut disk = Disk::new(again);
                assert_eq!(disk.run(Op::Discard, 0, 4096, PLAIN), Ok(()));
            }
        }
    }
}

#[test]
fn a_mounted_device_is_not_written() {
    let Some(_turn) = may_run() else { return };
    let dir = TempDir::new();
    let device = Loop::new(&dir.image(8 << 20), "512");
    run("mkfs.ext4", &["-q", device.0.to_str().unwrap()]);
    let _mount = Mount::new(&dir, &[device.0.to_str().unwrap()]);
    let text = RawStore::open(RawOptions::new(&device.0)).expect_err("mounted").to_string();
    assert!(text.contains("mounted"), "{text}");
}

#[test]
fn where_direct_io_needs_blocks_of_4096_the_disk_has_them_or_is_refused() {
    let Some(_turn) = may_run() else { return };
    let dir = TempDir::new();
    let device = Loop::new(&dir.image(32 << 20), "4096");
    run("mkfs.ext4", &["-q", "-b", "4096", device.0.to_str().unwrap()]);
    let mount = Mount::new(&dir, &[device.0.to_str().unwrap()]);
    let path = mount.0.join("image");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    for engine in ENGINES {
        let mut disk = Disk::new(RawStore::open(options(&path, engine, true)).unwrap());
        assert_eq!(disk.store.info().block_size, 4096);
        // Whole blocks in memory that is only good for 512.
        let memory = memory(65536);
        let data = Buffers::of(&memory, 512, 8192, true).unwrap();
        data.write(0, &[3; 8192]);
        let io = disk.io(1, Op::Write, 4096, 8192, data.clone());
        assert_eq!(disk.run_io(io), Ok(()));
        assert_eq!(disk.read(4096, 8192), Ok(vec![3; 8192]));
    }
    let buffered = RawStore::open(options(&path, Engine::Auto, false)).unwrap();
    assert_eq!(buffered.info().block_size, 512);
    drop(buffered);
    File::options().write(true).open(&path).unwrap().set_len((1 << 20) + 512).unwrap();
    let refused = RawStore::open(options(&path, Engine::Auto, true));
    assert!(matches!(refused, Err(OpenError::Size { block_size: 4096, .. })), "{refused:?}");
    RawStore::open(options(&path, Engine::Auto, false)).unwrap();
}

#[test]
fn a_full_file_system_fails_the_write_and_nothing_else() {
    let Some(_turn) = may_run() else { return };
    for engine in ENGINES {
        let dir = TempDir::new();
        let mount = Mount::new(&dir, &["-t", "tmpfs", "-o", "size=1m", "tmpfs"]);
        let path = mount.0.join("image");
        File::create(&path).unwrap().set_len(8 << 20).unwrap();
        let mut disk = Disk::new(RawStore::open(options(&path, engine, false)).unwrap());
        assert_eq!(disk.write(0, &[1; 512 << 10]), Ok(()));
        assert_eq!(disk.write(1 << 20, &[1; 1 << 20]), Err(Errno::ENOSPC));
        assert_eq!(disk.flush(), Ok(()));
        assert_eq!(disk.read(0, 4096), Ok(vec![1; 4096]));
        // tmpfs punches holes but zeroes no ranges: those are written.
        assert_eq!(disk.run(Op::Discard, 1 << 20, 1 << 20, PLAIN), Ok(()));
        assert_eq!(disk.run(Op::WriteZeroes, 0, 256 << 10, PLAIN), Ok(()));
        assert_eq!(disk.write(4 << 20, &[2; 256 << 10]), Ok(()));
        assert_eq!(disk.read(0, 4096), Ok(vec![0; 4096]));
        assert_eq!(disk.store.failure(), None);
    }
}

#[test]
fn a_device_that_really_loses_writes_fails_its_flush_and_stays_failed() {
    let Some(_turn) = may_run() else { return };
    for engine in ENGINES {
        // A device of 8 MiB over a file system with room for one.
        let dir = TempDir::new();
        let mount = Mount::new(&dir, &["-t", "tmpfs", "-o", "size=1m", "tmpfs"]);
        let path = mount.0.join("image");
        File::create(&path).unwrap().set_len(8 << 20).unwrap();
        let device = Loop::new(&path, "512");
        let store = RawStore::open(options(&device.0, engine, false)).unwrap();
        let mut other = store.open_queue().unwrap();
        let mut disk = Disk::new(store);
        assert_eq!(disk.write(0, &vec![1; 4 << 20]), Ok(()), "into the page cache");
        assert_eq!(disk.flush(), Err(Errno::EIO));
        // The kernel tells once; without the store's memory this would succeed.
        assert_eq!(disk.flush(), Err(Errno::EIO));
        std::mem::swap(&mut disk.queue, &mut other);
        assert_eq!(disk.flush(), Err(Errno::EIO));
        assert_eq!(disk.write(0, &[1; 512]), Err(Errno::EIO));
        assert!(disk.store.failure().is_some());
        drop((disk, other));
    }
}
