//! The image lock: one writer, or any number of readers.
//!
//! It is an advisory lock of the open file description (F_OFD_SETLK), so it goes when the last
//! descriptor does, however the process ends. The kernel may hold a description a little
//! longer than the process that had it (a ring is taken down in the background, a forked child
//! has not yet called exec), so a lock is given up explicitly where that can be done, and one
//! that is in the way is waited for a moment.
//!
//! QEMU locks images in the same way, by single
//! bytes: byte 100 + n is locked, shared, by whoever uses permission n, and byte 200 + n by
//! whoever forbids it to others. A writer here locks all bytes for itself, which no user of
//! QEMU's scheme can share; a reader says "I read, nobody may write" in QEMU's words and
//! checks that nobody does.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

/// QEMU's byte for "reads and relies on what it reads".
const USES_READ: i64 = 100;
/// QEMU's byte for "writes".
const USES_WRITE: i64 = 101;
/// QEMU's byte for "bears no other writer".
const FORBIDS_WRITE: i64 = 201;

/// How long a lock may outlive its holder.
const GRACE: Duration = Duration::from_secs(1);
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// Takes the lock of `file`. `Ok(false)`: somebody else has it in a way that excludes us.
pub(crate) fn take(file: &File, read_only: bool) -> io::Result<bool> {
    let is_refused = |result: &io::Result<bool>| matches!(result, Ok(false));
    with_grace(|| try_take(file, read_only), is_refused)
}

/// As [`take`], but leaves alone the bytes that QEMU uses: a QEMU that is given the file locks
/// those itself. Raw stores exclude each other and it, through the bytes before.
pub(crate) fn take_beside_qemu(file: &File, read_only: bool) -> io::Result<bool> {
    let kind = if read_only { libc::F_RDLCK } else { libc::F_WRLCK };
    let is_refused = |result: &io::Result<bool>| matches!(result, Ok(false));
    with_grace(|| set(file, kind, 0, USES_READ), is_refused)
}

/// Tries again for a moment while something is in the way.
pub(crate) fn with_grace<T>(attempt: impl Fn() -> T, is_refused: impl Fn(&T) -> bool) -> T {
    let start = Instant::now();
    loop {
        let result = attempt();
        if !is_refused(&result) || start.elapsed() > GRACE {
            return result;
        }
        std::thread::sleep(RETRY_INTERVAL);
    }
}

/// Gives up all locks of `file`, whoever else has its description open.
pub(crate) fn release(file: &File) {
    let _ = set(file, libc::F_UNLCK, 0, 0);
}

pub(crate) fn try_take(file: &File, read_only: bool) -> io::Result<bool> {
    if !read_only {
        return set(file, libc::F_WRLCK, 0, 0);
    }
    Ok(set(file, libc::F_RDLCK, USES_READ, 1)?
        && set(file, libc::F_RDLCK, FORBIDS_WRITE, 1)?
        && is_free(file, USES_WRITE)?)
}

fn request(kind: i32, start: i64, length: i64) -> libc::flock {
    // l_pid must be 0 for locks of an open file description.
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: length,
        l_pid: 0,
    }
}

fn set(file: &File, kind: i32, start: i64, length: i64) -> io::Result<bool> {
    let mut lock = request(kind, start, length);
    match fcntl(file, libc::F_OFD_SETLK, &mut lock) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

fn is_free(file: &File, byte: i64) -> io::Result<bool> {
    let mut lock = request(libc::F_WRLCK, byte, 1);
    fcntl(file, libc::F_OFD_GETLK, &mut lock)?;
    Ok(i32::from(lock.l_type) == libc::F_UNLCK)
}

fn fcntl(file: &File, command: i32, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: both commands read and write one flock, which lives across the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, lock as *mut libc::flock) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Who holds a lock on `file`, as far as /proc lets us see: locks of an open file description
/// have no process in /proc/locks, but are shown with the descriptors that hold them.
pub(crate) fn holder(file: &File) -> String {
    let found = file.metadata().ok().and_then(|meta| {
        let inode = format!(
            "{:02x}:{:02x}:{} ",
            libc::major(meta.dev()),
            libc::minor(meta.dev()),
            meta.ino()
        );
        let processes = std::fs::read_dir("/proc").ok()?;
        let pids =
            processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        pids.into_iter().find(|pid| holds(*pid, &inode))
    });
    let Some(pid) = found else { return "another process".to_owned() };
    let command = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    format!("process {pid} ({})", command.trim())
}

fn holds(pid: u32, inode: &str) -> bool {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fdinfo")) else { return false };
    entries
        .flatten()
        .filter_map(|entry| std::fs::read_to_string(entry.path()).ok())
        .any(|text| text.lines().any(|line| line.starts_with("lock:") && line.contains(inode)))
}
