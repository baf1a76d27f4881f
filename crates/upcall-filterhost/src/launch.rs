//! Starting a filter host as a process of its own.
//!
//! The program is embedded in this one and executed from a sealed memfd, so it can neither
//! be missing, nor of another version, nor be changed. The new process has an empty
//! environment, its own process group (a Ctrl-C for us is not one for it: we drain first),
//! and exactly these descriptors: 0 `/dev/null`, 1 and 2 our standard error, 3 the control
//! socket, 4 the filter. From its first instruction it is bounded, see `bounds.rs`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::process::{Pid, PidfdFlags};

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
    child: Child,
    pidfd: OwnedFd,
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
        let title = title.to_owned();
        let child = on_launcher(move || spawn(&program, &socket, &filter, &title))?;
        HostChild::adopt(child)
    }

    /// A child that nobody else waits for.
    pub(crate) fn adopt(child: Child) -> io::Result<HostChild> {
        // It is our child and not yet waited for, so the id is still its own.
        let opened = Pid::from_raw(child.id() as i32)
            .ok_or(io::ErrorKind::InvalidInput.into())
            .and_then(|pid| Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?));
        match opened {
            Ok(pidfd) => Ok(HostChild { child, pidfd, looked_ns: (0, 0) }),
            Err(error) => {
                kill_and_reap(child);
                Err(error)
            }
        }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sets its bounds for good.
    pub(crate) fn bound(&self, bounds: &Bounds) -> io::Result<()> {
        // Not yet waited for, so the id is still its own.
        let pid = Pid::from_raw(self.id() as i32).ok_or(io::ErrorKind::InvalidInput)?;
        bounds::impose(pid, bounds)
    }

    /// The processor time that its threads have wanted: they ran, or were ready to. What has
    /// ended no longer counts. Cheap while it does nothing.
    pub(crate) fn wanted_ns(&mut self) -> io::Result<u64> {
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
        let error = unsafe { libc::clock_getcpuclockid(self.id() as i32, &mut clock) };
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
        Ok(rustix::process::setpriority_pgrp(Pid::from_raw(self.id() as i32), niceness)?)
    }

    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill(); // fails only if it has ended already
    }

    /// How it ended; `None` if it still runs.
    pub(crate) fn exit(&mut self) -> Option<String> {
        self.child.try_wait().ok().flatten().map(describe_exit)
    }

    /// As [`exit`](Self::exit), but gives it some time to end.
    pub(crate) fn exit_within(&mut self, patience: Duration) -> Option<String> {
        let _ = wait_readable(&[Some(self.pidfd.as_fd())], Instant::now() + patience);
        self.exit()
    }
}

impl Drop for HostChild {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Of all threads of a process: how long they ran or waited on a run queue.
fn wanted_ns(pid: u32) -> io::Result<u64> {
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

fn kill_and_reap(mut child: Child) {
    let _ = child.kill();
    let _ = child.wait();
}

pub(crate) const IN_ORDER: &str = "it ended with exit code 0";

fn describe_exit(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
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

fn spawn(program: &OwnedFd, socket: &OwnedFd, filter: &OwnedFd, title: &Path) -> io::Result<Child> {
    let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
    command
        .arg0("upcall-filterhost")
        .arg(title)
        .env_clear()
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(io::stderr().as_fd().try_clone_to_owned()?);
    let (socket, filter) = (socket.as_raw_fd(), filter.as_raw_fd());
    // SAFETY: between fork and exec this makes system calls only; it neither allocates nor
    // locks. The descriptors are open: the caller holds them until the child has executed.
    unsafe { command.pre_exec(move || keep_only(socket, filter).and_then(|()| bounds::begin())) };
    // The standard library reports a failed exec through a pipe of its own, which must not
    // get the numbers that the child is about to replace.
    let _reserved = occupy_given()?;
    command.spawn()
}

/// In the child: the two descriptors at their places; everything else closes on exec.
fn keep_only(socket: i32, filter: i32) -> io::Result<()> {
    const CLOSE_RANGE_CLOEXEC: i32 = 4;
    // SAFETY: plain system calls on numbers.
    let done = unsafe {
        libc::dup2(socket, SOCKET_FD) == SOCKET_FD
            && libc::dup2(filter, FILTER_FD) == FILTER_FD
            && libc::syscall(libc::SYS_close_range, FILTER_FD + 1, u32::MAX, CLOSE_RANGE_CLOEXEC)
                == 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn occupy_given() -> io::Result<Vec<OwnedFd>> {
    let mut held = Vec::new();
    loop {
        let fd = rustix::io::fcntl_dupfd_cloexec(io::stderr(), SOCKET_FD)?;
        if fd.as_raw_fd() > FILTER_FD {
            return Ok(held);
        }
        held.push(fd);
    }
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
