//! Starting a filter host as a process of its own.
//!
//! The program is embedded in this one and executed from a sealed memfd, so it can neither
//! be missing, nor of another version, nor be changed. The new process has an empty
//! environment, its own process group (a Ctrl-C for us is not one for it: we drain first),
//! and these descriptors: 0 `/dev/null`, 1 and 2 our standard error, 3 the control socket, 4
//! the filter; it closes any other first. Before it hears of the filter it is bounded, see
//! `bounds.rs`.
//!
//! It is started without a copy of this process' memory, not even for a moment: a fork would
//! make every page that queue threads write to next a page fault, which waits for the fork;
//! so the death of one disk's filter would be felt by all disks.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::null_mut;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus, pidfd_send_signal, waitid,
};

use upcall_abi::control::{FILTER_FD, SOCKET_FD};

use crate::bounds::{self, Bounds};
use crate::file::Width;
use crate::socket::wait_readable;

static HOST_64: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/filterhost-64"));
static HOST_32: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/filterhost-32"));

/// Whether there is a filter host of this width in this program.
pub(crate) fn is_available(width: Width) -> bool {
    !program(width).is_empty()
}

fn program(width: Width) -> &'static [u8] {
    match width {
        Width::Bits64 => HOST_64,
        Width::Bits32 => HOST_32,
    }
}

/// A running filter host. Dropping it kills it and waits for its end.
#[derive(Debug)]
pub(crate) struct HostChild {
    pid: Pid,
    pidfd: OwnedFd,
    /// How it ended, once it was waited for.
    ended: Option<String>,
    /// At the last look: processor time that it had got, and had wanted.
    looked_ns: (u64, u64),
}

impl HostChild {
    /// Starts the filter host of `width`. `title` is what `ps` shows behind its name.
    pub(crate) fn start(
        width: Width,
        socket: OwnedFd,
        filter: BorrowedFd<'_>,
        title: &Path,
    ) -> io::Result<HostChild> {
        let program = sealed(width)?;
        let filter = above_given(filter)?;
        let socket = above_given(socket.as_fd())?;
        // A path has no byte 0 within.
        let title = CString::new(title.as_os_str().as_bytes())?;
        let child = on_launcher(move || {
            let child = HostChild::adopt(spawn(&program, &socket, &filter, &title)?)?;
            bounds::begin(child.pid)?;
            Ok(child)
        })?;
        Ok(child)
    }

    /// A child that nobody else waits for.
    pub(crate) fn adopt(pid: Pid) -> io::Result<HostChild> {
        // It is our child and not yet waited for, so the id is still its own.
        match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => Ok(HostChild { pid, pidfd, ended: None, looked_ns: (0, 0) }),
            Err(error) => {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
                let _ =
                    rustix::io::retry_on_intr(|| waitid(WaitId::Pid(pid), WaitIdOptions::EXITED));
                Err(error.into())
            }
        }
    }

    pub(crate) fn id(&self) -> i32 {
        self.pid.as_raw_pid()
    }

    /// Sets its bounds for good.
    pub(crate) fn bound(&self, bounds: &Bounds) -> io::Result<()> {
        match self.ended {
            // The id may be another's by now.
            Some(_) => Err(io::ErrorKind::NotFound.into()),
            None => bounds::impose(self.pid, bounds),
        }
    }

    /// The processor time that its threads have wanted: they ran, or were ready to. What has
    /// ended no longer counts. Cheap while it does nothing.
    pub(crate) fn wanted_ns(&mut self) -> io::Result<u64> {
        if self.ended.is_some() {
            return Err(io::ErrorKind::NotFound.into());
        }
        let used_ns = self.used_ns()?;
        if used_ns != self.looked_ns.0 {
            // Without CONFIG_SCHED_INFO, what it has got has to do.
            let wanted_ns = wanted_ns(self.id()).unwrap_or(0).max(used_ns);
            self.looked_ns = (used_ns, wanted_ns);
        }
        Ok(self.looked_ns.1)
    }

    fn used_ns(&self) -> io::Result<u64> {
        let mut clock = 0;
        // SAFETY: writes to `clock` only. The process is not yet waited for, so the id is its own.
        let error = unsafe { libc::clock_getcpuclockid(self.id(), &mut clock) };
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: writes to `time` only.
        if unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
    }

    /// Sets the niceness of all its threads, which it cannot leave the process group of.
    pub(crate) fn set_niceness(&self, niceness: i32) -> io::Result<()> {
        match self.ended {
            Some(_) => Err(io::ErrorKind::NotFound.into()),
            None => Ok(rustix::process::setpriority_pgrp(Some(self.pid), niceness)?),
        }
    }

    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    pub(crate) fn kill(&mut self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL); // fails only if it has ended already
    }

    /// How it ended; `None` if it still runs.
    pub(crate) fn exit(&mut self) -> Option<String> {
        self.wait(WaitIdOptions::NOHANG);
        self.ended.clone()
    }

    /// As [`exit`](Self::exit), but gives it some time to end.
    pub(crate) fn exit_within(&mut self, patience: Duration) -> Option<String> {
        let _ = wait_readable(&[Some(self.pidfd.as_fd())], Instant::now() + patience);
        self.exit()
    }

    fn wait(&mut self, how: WaitIdOptions) {
        if self.ended.is_some() {
            return;
        }
        let id = || WaitId::PidFd(self.pidfd.as_fd());
        let status = rustix::io::retry_on_intr(|| waitid(id(), WaitIdOptions::EXITED | how));
        self.ended = match status {
            Ok(status) => status.map(|status| describe_exit(&status)),
            // Somebody else has waited for it: it has ended.
            Err(_) => Some("it ended".into()),
        };
    }
}

impl Drop for HostChild {
    fn drop(&mut self) {
        self.kill();
        self.wait(WaitIdOptions::empty());
    }
}

/// Of all threads of a process: how long they ran or waited on a run queue.
fn wanted_ns(pid: i32) -> io::Result<u64> {
    let mut sum_ns = 0u64;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        // "run waited slices"; a thread may have ended meanwhile.
        let Ok(text) = std::fs::read_to_string(task?.path().join("schedstat")) else { continue };
        let both =
            text.split_ascii_whitespace().take(2).filter_map(|word| word.parse::<u64>().ok());
        sum_ns = both.fold(sum_ns, u64::saturating_add);
    }
    Ok(sum_ns)
}

pub(crate) const IN_ORDER: &str = "it ended with exit code 0";

fn describe_exit(status: &WaitIdStatus) -> String {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("it ended with exit code {code}"),
        (None, Some(signal)) => match signal_name(signal) {
            Some(name) => format!("it was killed by signal {signal} ({name})"),
            None => format!("it was killed by signal {signal}"),
        },
        (None, None) => "it ended".into(),
    }
}

fn signal_name(signal: i32) -> Option<&'static str> {
    Some(match signal {
        libc::SIGABRT => "SIGABRT",
        libc::SIGBUS => "SIGBUS",
        libc::SIGFPE => "SIGFPE",
        libc::SIGHUP => "SIGHUP",
        libc::SIGILL => "SIGILL",
        libc::SIGINT => "SIGINT",
        libc::SIGKILL => "SIGKILL",
        libc::SIGPIPE => "SIGPIPE",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGSYS => "SIGSYS",
        libc::SIGTERM => "SIGTERM",
        libc::SIGTRAP => "SIGTRAP",
        _ => return None,
    })
}

/// The program in a memfd that can be executed and no longer changed; made once.
fn sealed(width: Width) -> io::Result<OwnedFd> {
    static SEALED: [Mutex<Option<OwnedFd>>; 2] = [Mutex::new(None), Mutex::new(None)];
    let place = &SEALED[usize::from(width == Width::Bits32)];
    let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
    if place.is_none() {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        // Kernels before 6.3 do not know EXEC, and need not be told.
        let file = rustix::fs::memfd_create("upcall-filterhost", flags | MemfdFlags::EXEC)
            .or_else(|_| rustix::fs::memfd_create("upcall-filterhost", flags))?;
        let mut rest = program(width);
        while !rest.is_empty() {
            let written = rustix::io::retry_on_intr(|| rustix::io::write(&file, rest))?;
            rest = &rest[written..];
        }
        let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals)?;
        *place = Some(file);
    }
    match &*place {
        Some(file) => above_given(file.as_fd()),
        None => Err(io::ErrorKind::NotFound.into()),
    }
}

/// A copy with a number above those that the filter host is given, closed on exec.
fn above_given(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, FILTER_FD + 1)?)
}

/// What tells `posix_spawn` how a child begins. Freed when dropped.
struct Beginning {
    actions: libc::posix_spawn_file_actions_t,
    attributes: libc::posix_spawnattr_t,
}

impl Beginning {
    fn new() -> io::Result<Box<Beginning>> {
        // SAFETY: plain C structures, for which all zeroes are a value; they are initialized
        // before they are used, and do not move, as they are boxed.
        let mut new: Box<Beginning> = unsafe { Box::new(std::mem::zeroed()) };
        // SAFETY: both are ours alone, and initialized once.
        unsafe {
            checked(libc::posix_spawn_file_actions_init(&mut new.actions))?;
            checked(libc::posix_spawnattr_init(&mut new.attributes))?;
        }
        Ok(new)
    }

    /// The child has a copy of `from` as `to`.
    fn give(&mut self, from: i32, to: i32) -> io::Result<()> {
        // SAFETY: `actions` was initialized.
        checked(unsafe { libc::posix_spawn_file_actions_adddup2(&mut self.actions, from, to) })
    }

    /// The child has `path`, for reading, as `to`.
    fn open(&mut self, path: &CStr, to: i32) -> io::Result<()> {
        let (path, flags) = (path.as_ptr(), libc::O_RDONLY);
        // SAFETY: `actions` was initialized; the path is copied.
        checked(unsafe {
            libc::posix_spawn_file_actions_addopen(&mut self.actions, to, path, flags, 0)
        })
    }

    /// The child leads a process group of its own, and signals are to it as to a new program.
    fn alone(&mut self) -> io::Result<()> {
        let flags = libc::POSIX_SPAWN_SETPGROUP
            | libc::POSIX_SPAWN_SETSIGMASK
            | libc::POSIX_SPAWN_SETSIGDEF;
        // SAFETY: `attributes` was initialized; the sets are written before they are read.
        unsafe {
            let (mut none, mut all) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigemptyset(&mut none);
            libc::sigfillset(&mut all);
            checked(libc::posix_spawnattr_setpgroup(&mut self.attributes, 0))?;
            checked(libc::posix_spawnattr_setsigmask(&mut self.attributes, &none))?;
            checked(libc::posix_spawnattr_setsigdefault(&mut self.attributes, &all))?;
            checked(libc::posix_spawnattr_setflags(&mut self.attributes, flags as _))
        }
    }
}

impl Drop for Beginning {
    fn drop(&mut self) {
        // SAFETY: initialized, or all zeroes, which own nothing; not used after this.
        unsafe {
            libc::posix_spawn_file_actions_destroy(&mut self.actions);
            libc::posix_spawnattr_destroy(&mut self.attributes);
        }
    }
}

/// An error number that a call gave, as a result.
fn checked(error: i32) -> io::Result<()> {
    if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(error)) }
}

fn spawn(program: &OwnedFd, socket: &OwnedFd, filter: &OwnedFd, title: &CStr) -> io::Result<Pid> {
    let path = CString::new(format!("/proc/self/fd/{}", program.as_raw_fd()))?;
    let mut beginning = Beginning::new()?;
    beginning.open(c"/dev/null", 0)?;
    beginning.give(2, 1)?;
    beginning.give(socket.as_raw_fd(), SOCKET_FD)?;
    beginning.give(filter.as_raw_fd(), FILTER_FD)?;
    beginning.alone()?;
    let words = [c"upcall-filterhost".as_ptr().cast_mut(), title.as_ptr().cast_mut(), null_mut()];
    let environment = [null_mut()];
    let mut pid = 0;
    // SAFETY: all that is pointed to lives until the call returns, which is when the child has
    // executed; words and environment end with a null; the descriptors are open, and above
    // those that the child replaces.
    checked(unsafe {
        libc::posix_spawn(
            &mut pid,
            path.as_ptr(),
            &beginning.actions,
            &beginning.attributes,
            words.as_ptr(),
            environment.as_ptr(),
        )
    })?;
    Pid::from_raw(pid).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

type Job = Box<dyn FnOnce() + Send>;

/// Runs `start` on the one thread that starts all filter hosts and never ends. A filter host
/// asks to die with its parent, and for the kernel that is the thread that started it.
fn on_launcher<T: Send + 'static>(
    start: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    static LAUNCHER: OnceLock<Mutex<Sender<Job>>> = OnceLock::new();
    let launcher = LAUNCHER.get_or_init(|| {
        let (jobs, todo) = channel::<Job>();
        // If the thread cannot be made, `todo` is dropped and sending fails below.
        let _ = std::thread::Builder::new()
            .name("filter-launcher".into())
            .spawn(move || todo.into_iter().for_each(|job| job()));
        Mutex::new(jobs)
    });
    let (answer, answered) = channel();
    let job: Job = Box::new(move || {
        let _ = answer.send(start());
    });
    let gone = || io::Error::other("the thread that starts filter hosts is gone");
    launcher.lock().unwrap_or_else(PoisonError::into_inner).send(job).map_err(|_| gone())?;
    answered.recv().map_err(|_| gone())?
}
