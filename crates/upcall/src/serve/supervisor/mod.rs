//! `upcall serve --restart`: watches a worker in a process of its own and starts it anew.
//!
//! The supervisor makes the listening sockets and keeps them, so they outlive a worker and are
//! there while none runs. It touches no data, loads no filter and maps no guest memory: there
//! is little in it that could die. The worker is this program again, executed anew each time,
//! so that it does not have the address space that an attacker may have probed.
//!
//! Always true: at most one worker runs, and no process that a dead worker left behind (a
//! filter host) lives on when the next begins; a worker that served once is started again
//! however it dies; the first worker's failure to start, and any orderly end, is the
//! program's own.

mod policy;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};
use upcall_stats::PageReader;
use upcall_vhost::{ListenError, Listener};
use upcall_worker::{LogLevel, LogSink, SocketSource};

use self::policy::Policy;
use super::handover::{self, Said, ToWorker};
use super::plan::{Place, Socket};
use super::stats;
use crate::cli::ServeArgs;
use crate::failure::Failure;
use crate::output::print;
use crate::signals::{Hangup, Shutdown};

/// How long what a dead worker left behind may take to end.
const ORPHANS_TIMEOUT: Duration = Duration::from_secs(2);
const ORPHANS_POLL: Duration = Duration::from_millis(1);
/// How long the daemon of an image may take to write what it has before it is killed, too.
const DAEMON_TIMEOUT: Duration = Duration::from_secs(30);
/// In a longer pause, who connects is sent away. A shorter one is over before QEMU would come
/// again.
const HELD_MS: u64 = 500;
/// How long a socket may be in use by a worker whose supervisor has died.
const IN_USE_TIMEOUT: Duration = Duration::from_secs(5);
const IN_USE_POLL: Duration = Duration::from_millis(50);

/// Serves until `shutdown`, or until a worker ends in order. `sockets`: by disk; `config`: the
/// text of the configuration file, which each worker gets as it was now.
pub fn run(
    args: &ServeArgs,
    shutdown: &Shutdown,
    hangup: &Hangup,
    sockets: Vec<Socket>,
    config: Option<String>,
) -> Result<(), Failure> {
    let mut listeners = Vec::new();
    let mut places = Vec::new();
    for (place, socket) in sockets.into_iter().enumerate() {
        let Some((source, path)) = socket else { continue };
        let listener = match source {
            SocketSource::Path(path, mode) => bind(&path, mode),
            SocketSource::Fd(fd) => Listener::adopt(fd),
        };
        listeners.push((place, listener.map_err(Failure::new)?));
        places.push(path.map_or(Place::Inherited, Place::Path));
    }
    let stats = stats::place(args.stats.clone(), &places, rustix::process::getpid())?;
    // What a worker leaves behind becomes ours to end.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(|errno| Failure::new(format_args!("cannot watch a worker: {errno}")))?;
    let supervisor = Supervisor {
        shutdown,
        hangup,
        listeners,
        config,
        control: args.control.clone().unwrap_or_else(|| stats::control_beside(&stats)),
        stats,
        log: upcall_control::sink(),
        policy: Policy::new(args.restart_pause_ms),
        has_served: false,
        failed: HashMap::new(),
        chains: None,
    };
    supervisor.run()
}

/// Listens at `path`, if need be once the worker of a supervisor that has just died is gone.
fn bind(path: &Path, mode: Option<u32>) -> Result<Listener, ListenError> {
    let deadline = Instant::now() + IN_USE_TIMEOUT;
    loop {
        match Listener::bind(path, mode) {
            Err(ListenError::InUse { .. }) if Instant::now() < deadline => {
                std::thread::sleep(IN_USE_POLL);
            }
            result => return result,
        }
    }
}

struct Supervisor<'a> {
    shutdown: &'a Shutdown,
    hangup: &'a Hangup,
    /// With their disks' places.
    listeners: Vec<(usize, Listener)>,
    config: Option<String>,
    /// Where workers keep their counters, and where they are controlled.
    stats: PathBuf,
    control: PathBuf,
    log: LogSink,
    policy: Policy,
    /// A worker has served, and `ready` was said.
    has_served: bool,
    /// Disks whose stores failed for good, whichever worker saw it, and what was said. The next
    /// worker could not find it out: the kernel says it once.
    failed: HashMap<String, String>,
    /// The chains that the last worker had, if they changed: what the next one begins with.
    chains: Option<String>,
}

/// A worker process.
struct Worker {
    child: Child,
    pidfd: OwnedFd,
    socket: ToWorker,
    /// What it serves, in pieces.
    text: Vec<u8>,
    serving_since: Option<Instant>,
}

/// What to do after a worker's end.
enum Verdict {
    StartAgain,
    End(Result<(), Failure>),
}

impl Supervisor<'_> {
    fn run(mut self) -> Result<(), Failure> {
        // Since when nobody serves.
        let mut dead_since = None;
        loop {
            let (how, served) = match Worker::start(&self) {
                Ok(mut worker) => {
                    let (status, asked) = self.watch(&mut worker, dead_since)?;
                    if worker.serving_since.is_some() || dead_since.is_none() {
                        dead_since = Some(Instant::now());
                    }
                    self.clean_up(worker.id());
                    if let Verdict::End(result) = self.judge(&worker, status, asked) {
                        return result;
                    }
                    let served = worker.serving_since.map_or(Duration::ZERO, |at| at.elapsed());
                    (format!("worker {} died ({})", worker.id(), describe(status)), served)
                }
                Err(error) if self.has_served => {
                    (format!("no worker can be started ({error})"), Duration::ZERO)
                }
                Err(error) => {
                    return Err(Failure::new(format_args!("no worker can be started: {error}")));
                }
            };
            if self.pause_after(&how, served)? {
                return Err(Failure::new(
                    "asked to end while the worker was dead: what it was doing for its guests \
                     is not ended; serve the disks again",
                ));
            }
        }
    }

    /// Watches a worker until it ends, and says whether it was asked to.
    fn watch(
        &mut self,
        worker: &mut Worker,
        dead_since: Option<Instant>,
    ) -> Result<(ExitStatus, bool), Failure> {
        let mut asked = false;
        loop {
            let mut fds = vec![
                PollFd::new(&worker.pidfd, PollFlags::IN),
                PollFd::new(&worker.socket, PollFlags::IN),
            ];
            if !asked {
                fds.push(PollFd::from_borrowed_fd(self.shutdown.as_fd(), PollFlags::IN));
            }
            // A worker that starts would die of it; it looks at everything then anyway.
            if !asked && worker.serving_since.is_some() {
                fds.push(PollFd::from_borrowed_fd(self.hangup.as_fd(), PollFlags::IN));
            }
            wait(&mut fds, None)?;
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            if ready[0] || ready[1] {
                // Also what it said last.
                self.listen_to(worker, dead_since);
            }
            if ready[0] {
                return Ok((worker.child.wait().map_err(system)?, asked));
            }
            if ready.get(3) == Some(&true) && self.hangup.take() {
                let _ = rustix::process::pidfd_send_signal(&worker.pidfd, Signal::HUP);
            }
            if ready.get(2) == Some(&true) {
                asked = true;
                // Fails only if it has ended, which is seen next.
                let _ = rustix::process::pidfd_send_signal(&worker.pidfd, Signal::TERM);
            }
        }
    }

    /// Hears what a worker says. It closes the socket only by its end.
    fn listen_to(&mut self, worker: &mut Worker, dead_since: Option<Instant>) {
        loop {
            match worker.socket.hear() {
                Said::Nothing => return,
                Said::Failed(disk, text) => drop(self.failed.insert(disk, text)),
                Said::Chains(text) => self.chains = Some(text),
                Said::Text(piece) => worker.text.extend(piece),
                Said::Serving => {
                    worker.serving_since = Some(Instant::now());
                    let text = std::mem::take(&mut worker.text);
                    if !std::mem::replace(&mut self.has_served, true) {
                        // Who does not read what is offered is served all the same.
                        let _ = print(&String::from_utf8_lossy(&text));
                    } else if let Some(dead_since) = dead_since {
                        let stall_ms = dead_since.elapsed().as_millis();
                        let id = worker.id();
                        (self.log)(
                            LogLevel::Warn,
                            &format!("worker {id} serves; nobody served for {stall_ms} ms"),
                        );
                    }
                }
            }
        }
    }

    /// What a worker's end means.
    fn judge(&self, worker: &Worker, status: ExitStatus, asked: bool) -> Verdict {
        let passed_on = |code: i32| match code {
            0 => Verdict::End(Ok(())),
            code => Verdict::End(Err(Failure::AlreadySaid(code as u8))),
        };
        let lost = "the worker died while it was ending in order: what it was doing for its \
                    guests is not ended";
        match (status.code(), status.signal()) {
            (Some(code), _) if asked => passed_on(code),
            // It had not come as far as to catch the signal, or to take a request.
            (None, Some(libc::SIGTERM)) if asked => Verdict::End(Ok(())),
            (None, _) if asked => {
                Verdict::End(Err(Failure::new(format_args!("{lost} ({})", describe(status)))))
            }
            (Some(code @ (0 | 2)), _) => passed_on(code),
            // It served and ended in order, with something to complain about; or the
            // configuration is wrong. If a worker has served with it before, it is not: then
            // something else is in the way, and the guests wait for it to go away.
            (Some(1), _) if worker.serving_since.is_some() || !self.has_served => passed_on(1),
            _ => Verdict::StartAgain,
        }
    }

    /// Says what happened and waits as long as the policy wants it; true: asked to end.
    fn pause_after(&mut self, how: &str, served: Duration) -> Result<bool, Failure> {
        let next = self.policy.handle_death(served.as_millis() as u64);
        let when = match next.pause_ms {
            0 => "at once".to_owned(),
            pause_ms => format!("in {pause_ms} ms"),
        };
        (self.log)(LogLevel::Error, &format!("{how}: it is started again {when}"));
        if let Some(deaths) = next.tell_deaths {
            let pause_ms = self.policy.pause_ms_max();
            (self.log)(
                LogLevel::Error,
                &format!(
                    "{deaths} workers died in a row, none of which served for a minute: from now on \
                     a new one is tried every {pause_ms} ms; see what each said before its end"
                ),
            );
        }
        let until = Instant::now().checked_add(Duration::from_millis(next.pause_ms));
        loop {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Ok(false);
            }
            let mut fds = vec![PollFd::from_borrowed_fd(self.shutdown.as_fd(), PollFlags::IN)];
            if next.pause_ms > HELD_MS {
                fds.extend(self.listeners.iter().map(|(_, fd)| PollFd::new(fd, PollFlags::IN)));
            }
            wait(&mut fds, left)?;
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            if ready[0] {
                return Ok(true);
            }
            for ((_, listener), _) in self.listeners.iter().zip(&ready[1..]).filter(|(_, on)| **on)
            {
                // QEMU would wait for an answer, and its guest and monitor with it. So it is
                // sent away, and comes again after its reconnect interval.
                while rustix::net::accept(listener).is_ok() {}
            }
        }
    }

    /// Ends what a dead worker left behind.
    fn clean_up(&self, worker: u32) {
        if !end_orphans() {
            (self.log)(
                LogLevel::Error,
                &format!(
                    "a process that worker {worker} left behind does not end; the next worker \
                     may have to wait for what it holds"
                ),
            );
        }
        for path in [&self.stats, &self.control] {
            let mut unfinished = path.clone().into_os_string();
            unfinished.push(format!(".{worker}"));
            let _ = std::fs::remove_file(unfinished);
        }
        // Where somebody still listens, it is another worker's.
        let is_socket = std::fs::symlink_metadata(&self.control)
            .is_ok_and(|found| found.file_type().is_socket());
        if is_socket && UnixStream::connect(&self.control).is_err() {
            let _ = std::fs::remove_file(&self.control);
        }
        if PageReader::open(&self.stats).is_ok_and(|page| page.pid() == worker) {
            let _ = std::fs::remove_file(&self.stats);
        }
    }
}

impl Worker {
    fn start(supervisor: &Supervisor<'_>) -> io::Result<Worker> {
        let (socket, theirs) = handover::pair()?;
        let mut arguments = std::env::args_os();
        let program = arguments.next().unwrap_or_else(|| "upcall".into());
        let mut command = Command::new("/proc/self/exe");
        command.arg0(program);
        // Our own arguments, with `--supervised` behind `serve`.
        command.args(arguments.next()).arg("--supervised").args(arguments);
        // What systemd handed to us stays open and named: LISTEN_PID says that it is its parent's.
        // A group of its own: a Ctrl-C for us is not one for it, it is told in order.
        command.stdin(theirs).stdout(Stdio::null()).process_group(0);
        let mut child = command.spawn()?;
        // What the child has of it is its own; we shall see its end.
        drop(command);
        let pidfd = Pid::from_raw(child.id() as i32)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
            .and_then(|pid| Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?));
        let pidfd = pidfd.inspect_err(|_| {
            let _ = child.kill();
            let _ = child.wait();
        })?;
        let Supervisor { listeners, config, failed, chains, .. } = supervisor;
        let sockets: Vec<_> = listeners.iter().map(|(place, fd)| (*place, fd.as_fd())).collect();
        // If it cannot be told, it ends, and that is what is heard of it.
        let _ = socket.hand_down(&sockets, config.as_deref(), failed, chains.as_deref());
        Ok(Worker { child, pidfd, socket, text: Vec::new(), serving_since: None })
    }

    fn id(&self) -> u32 {
        self.child.id()
    }
}

/// Kills and waits for every child we have; daemons of images are waited for first. False:
/// some did not end in time.
fn end_orphans() -> bool {
    let daemons_until = Instant::now() + DAEMON_TIMEOUT;
    let mut deadline = Instant::now() + ORPHANS_TIMEOUT;
    loop {
        for pid in children() {
            if Instant::now() < daemons_until && is_image_daemon(pid) {
                deadline = daemons_until + ORPHANS_TIMEOUT;
                continue;
            }
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        match rustix::process::wait(WaitOptions::NOHANG) {
            Err(Errno::CHILD) => return true,
            Ok(None) if Instant::now() >= deadline => return false,
            Ok(None) => std::thread::sleep(ORPHANS_POLL),
            _ => {}
        }
    }
}

/// Whether a child reads an image for a worker. The kernel has asked it to end when its
/// worker died; what the guest was told is written, it alone may have.
fn is_image_daemon(pid: Pid) -> bool {
    let name = std::fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_pid()));
    name.is_ok_and(|name| name.starts_with("qemu-storage"))
}

/// Our children. None of them can be another process by now: only we wait for them.
fn children() -> Vec<Pid> {
    let path = Path::new("/proc/thread-self/children");
    let list = std::fs::read_to_string(path).unwrap_or_default();
    list.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}

fn wait(fds: &mut [PollFd<'_>], timeout: Option<Duration>) -> Result<(), Failure> {
    let timeout = timeout.map(|left| Timespec {
        tv_sec: left.as_secs().min(i64::MAX as u64) as i64,
        tv_nsec: left.subsec_nanos().into(),
    });
    match poll(fds, timeout.as_ref()) {
        // Looked at again by the caller: nothing is ready.
        Err(Errno::INTR) => Ok(()),
        result => result.map(drop).map_err(|errno| system(errno.into())),
    }
}

fn system(error: io::Error) -> Failure {
    Failure::new(format_args!("the worker cannot be watched: {error}"))
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => {
            let dumped = if status.core_dumped() { ", core dumped" } else { "" };
            format!("signal {signal}{dumped}")
        }
        (None, None) => status.to_string(),
    }
}
