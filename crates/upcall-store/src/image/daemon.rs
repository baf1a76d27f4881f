//! Daemons: one qemu-storage-daemon at a time, started, watched, ended.
//!
//! One thread, confined for ever, starts them all: what it starts is confined as it is. It
//! lives as long as the store, because a daemon asks to be told when its parent dies, and for the
//! kernel that is the thread that started it.
//!
//! A daemon has an empty environment, its own process group (a Ctrl-C for us is not one for
//! it: we flush first), `/dev/null` as standard input and output, and besides its standard
//! error exactly the descriptors of its [`Plan`] and its [`Sockets`].
//!
//! Always true: a [`Daemon`] that was ended is gone, with all its threads, so that nothing
//! writes to the image or to our memory any more.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::FdFlags;
use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, Signal};

use crate::image::confine::{Program, Reason, confine};
use crate::image::extents::Oracle;
use crate::image::plan::{Aio, Plan, Sockets, TOP};

/// Bytes that are kept of what a daemon says.
const SAID_BYTES: usize = 4096;

/// The thread that starts daemons.
pub(crate) struct Starter {
    orders: Option<Sender<Order>>,
    thread: Option<JoinHandle<()>>,
    plan: Arc<Plan>,
    oracle: Arc<Oracle>,
    /// The program was built with what [`Aio::Native`] needs.
    knows_native: bool,
}

struct Order {
    sockets: Sockets,
    aio: Aio,
    answer: Sender<io::Result<Child>>,
}

impl Starter {
    /// Starts the thread and confines it. Each daemon is made known to `oracle`.
    pub fn new(program: Program, plan: Arc<Plan>, oracle: Arc<Oracle>) -> Result<Starter, Reason> {
        let (orders, todo) = channel::<Order>();
        let (ready, is_ready) = channel();
        let its_plan = plan.clone();
        let knows_native = program.is_linked_with("libaio");
        let run = move || {
            let plan = its_plan;
            let confined = confine(&program, &plan);
            let go_on = confined.is_ok();
            let _ = ready.send(confined);
            if go_on {
                for Order { sockets, aio, answer } in todo {
                    let _ = answer.send(spawn(&program, &plan, sockets, aio));
                }
            }
        };
        let thread = std::thread::Builder::new().name("image-starter".into()).spawn(run);
        let thread = thread.map_err(|error| format!("cannot start a thread: {error}"))?;
        is_ready.recv().unwrap_or_else(|_| Err("the thread that starts it ended".into()))?;
        Ok(Starter { orders: Some(orders), thread: Some(thread), plan, oracle, knows_native })
    }

    /// Starts a daemon, and connects to it. It may not have opened the image yet.
    pub fn start(&self) -> io::Result<(Daemon, UnixStream)> {
        let (requests, socket) = rendezvous()?;
        let (questions, asking) = rendezvous()?;
        let (answer, answered) = channel();
        let gone = || io::Error::other("the thread that starts daemons is gone");
        self.plan.wait_for_late_io();
        let server = self.plan.connect()?;
        let sockets = Sockets { requests: requests.into(), questions: questions.into(), server };
        // Not done where daemons are started: /proc cannot be read there.
        let native = self.knows_native && has_room_for_native();
        let aio = if native { Aio::Native } else { Aio::Threads };
        let order = Order { sockets, aio, answer };
        self.orders.as_ref().ok_or_else(gone)?.send(order).map_err(|_| gone())?;
        let child = answered.recv().map_err(|_| gone())??;
        self.oracle.renew(asking, TOP);
        Ok((Daemon::adopt(child)?, socket))
    }
}

impl Drop for Starter {
    fn drop(&mut self) {
        drop(self.orders.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Events of native AIO that a daemon may reserve, generously: QEMU asks for 1024 for each of its
/// event loops.
const NATIVE_EVENTS: u64 = 4096;

/// Whether the system has so many left. A daemon that finds none cannot open its image.
fn has_room_for_native() -> bool {
    let number = |name| std::fs::read_to_string(name).ok()?.trim().parse::<u64>().ok();
    let most = number("/proc/sys/fs/aio-max-nr");
    let taken = number("/proc/sys/fs/aio-nr");
    most.zip(taken).is_some_and(|(most, taken)| taken.saturating_add(NATIVE_EVENTS) <= most)
}

/// A socket that listens, and a connection to it. Nobody else can connect: the folder it is in
/// for a moment is ours alone, and then it is nowhere.
fn rendezvous() -> io::Result<(UnixListener, UnixStream)> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let folder = loop {
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("upcall-{}-{number}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        match std::fs::DirBuilder::new().mode(0o700).create(&folder) {
            Ok(()) => break folder,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    };
    let path = folder.join("s");
    let made = UnixListener::bind(&path)
        .and_then(|listener| UnixStream::connect(&path).map(|socket| (listener, socket)));
    let _ = std::fs::remove_file(&path);
    let _ = std::fs::remove_dir(&folder);
    made
}

fn spawn(program: &Program, plan: &Arc<Plan>, sockets: Sockets, aio: Aio) -> io::Result<Child> {
    let parent = rustix::process::getpid();
    let mut command = Command::new(&program.path);
    command
        .args(plan.arguments(&sockets, aio))
        .env_clear()
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let plan = plan.clone();
    let prepare = move || prepare(parent, plan.inherited().chain(sockets.all()));
    // SAFETY: between fork and exec `prepare` makes system calls only; it neither allocates
    // nor locks. It owns what it uses.
    unsafe { command.pre_exec(prepare) };
    command.spawn()
}

/// In the child: everything but standard files and `inherited` closes on exec, and it leaves no
/// dump of guest data. When its parent dies it is asked to end, not killed: it alone has what
/// was completed and is not yet in the image. It holds the image's locks until it has ended.
fn prepare<'a>(parent: Pid, inherited: impl Iterator<Item = BorrowedFd<'a>>) -> io::Result<()> {
    const CLOSE_RANGE_CLOEXEC: libc::c_uint = 4;
    // SAFETY: a plain system call on numbers.
    let done =
        unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, CLOSE_RANGE_CLOEXEC) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    for fd in inherited {
        rustix::io::fcntl_setfd(fd, FdFlags::empty())?;
    }
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(Resource::Core, none)?;
    rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
    // It may have ended before that.
    if rustix::process::getppid() == Some(parent) {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::ECANCELED))
    }
}

/// A running daemon. Dropping it kills it and waits for its end.
pub(crate) struct Daemon {
    child: Child,
    pidfd: OwnedFd,
    stderr: Option<ChildStderr>,
    said: Vec<u8>,
}

impl Daemon {
    fn adopt(mut child: Child) -> io::Result<Daemon> {
        // It is our child and not yet waited for, so the id is still its own.
        let opened = rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
        let stderr = child.stderr.take();
        let ready = opened.and_then(|pidfd| {
            if let Some(stderr) = &stderr {
                rustix::io::ioctl_fionbio(stderr, true)?;
            }
            Ok(pidfd)
        });
        match ready {
            Ok(pidfd) => Ok(Daemon { child, pidfd, stderr, said: vec![] }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error.into())
            }
        }
    }

    /// Becomes readable when it has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Becomes readable when it says something.
    pub fn stderr(&self) -> Option<BorrowedFd<'_>> {
        self.stderr.as_ref().map(|stderr| stderr.as_fd())
    }

    /// Takes what it says, so that it can go on; the last of it is kept.
    pub fn listen(&mut self) {
        let Some(stderr) = &mut self.stderr else { return };
        let mut bytes = [0; 1024];
        loop {
            match stderr.read(&mut bytes) {
                Ok(0) => break,
                Ok(count) => {
                    self.said.extend(&bytes[..count]);
                    let surplus = self.said.len().saturating_sub(SAID_BYTES);
                    self.said.drain(..surplus);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => break,
            }
        }
        self.stderr = None;
    }

    /// Its last words: one line, for people.
    fn last_words(&mut self) -> Option<String> {
        self.listen();
        let text = String::from_utf8_lossy(&self.said);
        let lines = text.lines().map(|line| {
            let line = line.trim();
            line.strip_prefix("qemu-storage-daemon: ").unwrap_or(line)
        });
        // It repeats an option before it says what is wrong with it.
        let plain = lines.map(|line| match line.rsplit_once("}: ") {
            Some((option, rest)) if option.starts_with("--blockdev") => rest,
            _ => line,
        });
        let text = plain.filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
        let clean = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>();
        (!clean.is_empty()).then_some(clean)
    }

    /// Waits until it has ended by itself, for so long; then ends it. Says how it ended.
    pub fn end_within(&mut self, patience: Duration) -> String {
        let limit = Timespec {
            tv_sec: patience.as_secs() as i64,
            tv_nsec: i64::from(patience.subsec_nanos()),
        };
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let _ = rustix::event::poll(&mut fds, Some(&limit));
        self.kill()
    }

    /// Asks it to close the image and end.
    pub fn ask_to_end(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::TERM);
    }

    /// Ends it and waits for that, however long it takes: nothing is safe before. Says how it
    /// ended, or what it was killed for is for the caller to say.
    pub fn kill(&mut self) -> String {
        let _ = self.child.kill(); // fails only if it has ended already
        let status = match self.child.wait() {
            Err(error) => format!("is lost ({error})"),
            Ok(status) => match (status.code(), status.signal()) {
                (Some(code), _) => format!("ended with exit code {code}"),
                (None, Some(signal)) => format!("was ended by signal {signal}"),
                (None, None) => "ended".into(),
            },
        };
        match self.last_words() {
            Some(words) => format!("{status}: {words}"),
            None => status,
        }
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
