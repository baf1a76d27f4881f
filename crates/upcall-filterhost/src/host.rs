//! A filter host, from outside: the dialogue on its control socket.
//!
//! The worker calls, in this order: [`describe`](HostProcess::describe), then
//! [`arena`](HostProcess::arena), [`issue_arena`](HostProcess::issue_arena) and
//! [`channel`](HostProcess::channel), then [`load`](HostProcess::load),
//! [`open`](HostProcess::open), [`serve`](HostProcess::serve). Each waits for its answer, at
//! most the timeout (10 s unless told otherwise), and passes on the log lines that come in
//! between.
//!
//! The filter host may be hostile, hung or dead: then the call returns an error that says so,
//! in time. After any error except [`FilterError::Refused`] and [`FilterError::TooLarge`] the
//! dialogue is over: every later call fails, and the host is to be dropped, which kills it.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use upcall_ring::memfd;

use upcall_abi::WIRE_VERSION;
use upcall_abi::control::{
    DESCRIPTORS_MAX, Disk, Header, MESSAGE_MAX, OPEN_EXTENTS, OPEN_SIDECAR, kind,
};
use upcall_abi::filter::STATE_MAX;

use crate::bounds::Bounds;
use crate::counters::Counters;
use crate::description::Description;
use crate::error::FilterError;
use crate::file::{FilterFile, Width};
use crate::inline::{self, InlineChannel, InlineHost};
use crate::launch::{self, HostChild};
use crate::params::ResolvedParams;
use crate::socket::{self, ControlSocket, HEADER_SIZE, Received};
use crate::text::{clean, clean_path};

/// Where a filter's code runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Placement {
    /// In a process of its own.
    #[default]
    Isolated,
    /// In this process. For filters that are trusted as this program is: one that fails
    /// takes the disks along.
    Inline,
}

/// How important a line is, `UPCALL_LOG_ERROR` and so on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    /// Something does not work.
    Error,
    /// Something may not work.
    Warn,
    /// Good to know.
    Info,
    /// For the filter's author.
    Debug,
}

/// A line that a filter logged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLine {
    /// The filter's name (its path before it has said its name).
    pub filter: Arc<str>,
    /// The instance that it is about.
    pub instance: Option<u32>,
    /// How important.
    pub level: LogLevel,
    /// One line, cleaned, at most 600 bytes.
    pub text: String,
}

/// Takes the lines that filters log. Called on the thread that talks to the filter host.
pub type LogSink = Arc<dyn Fn(LogLine) + Send + Sync>;

/// What OPEN needs.
#[derive(Debug)]
pub struct OpenInstance<'a> {
    /// Number of the instance, chosen by the worker; it stands in every entry of the rings.
    pub instance: u32,
    /// Number of the disk whose arena the instance uses.
    pub arena: u32,
    /// The own disk, then the granted ones.
    pub disks: &'a [Disk],
    /// As resolved for this instance.
    pub params: &'a ResolvedParams,
    /// Where it shall count.
    pub counters: &'a Counters,
    /// Where its state is kept, for a filter that [wants one](Description::wants_sidecar): a
    /// file as `upcall-state` makes it, open for reading and writing. The same file after a
    /// restart, once the host before is gone.
    pub sidecar: Option<BorrowedFd<'a>>,
    /// Where it may ask what its disks consist of, for a filter that
    /// [does](Description::asks_extents): a socket as [`upcall_abi::extents`] says.
    pub extents: Option<BorrowedFd<'a>>,
}

/// A filter host: the process (or, inline, the threads) that runs one filter for this worker.
///
/// Dropping it kills an isolated one and waits until it is gone. An inline one cannot be
/// killed: dropping it cancels what its filter holds, closes and unloads it, and waits for
/// that, a second at most; but one with an [`InlineChannel`] left goes on until that is
/// dropped too.
pub struct HostProcess {
    name: Arc<str>,
    width: Width,
    // Dropped before the engine: an inline one ends when its socket does.
    socket: ControlSocket,
    engine: Engine,
    log: LogSink,
    log_budget: LogBudget,
    timeout: Duration,
    channels: Vec<u32>,
    is_serving: bool,
    is_over: bool,
}

enum Engine {
    Isolated(HostChild),
    Inline(InlineHost),
}

impl Engine {
    /// Readable when it has ended.
    fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Engine::Isolated(child) => Some(child.pidfd()),
            Engine::Inline(_) => None,
        }
    }

    fn exit(&mut self) -> Option<String> {
        match self {
            Engine::Isolated(child) => child.exit(),
            Engine::Inline(host) => host.exit(),
        }
    }

    fn exit_within(&mut self, patience: Duration) -> Option<String> {
        match self {
            Engine::Isolated(child) => child.exit_within(patience),
            Engine::Inline(host) => host.exit_within(patience),
        }
    }
}

/// What a host answered.
enum Answer {
    Result { errno: i32, value: u32, text: String },
    Description(Vec<u8>),
}

const TIMEOUT: Duration = Duration::from_secs(10);
/// How long a host that closed its socket may take to end, so that we can say how it did.
const END_PATIENCE: Duration = Duration::from_secs(1);
const TEXT_MAX: usize = 600;
/// ENOTSUP, as filters say it.
const NOT_SUPPORTED: i32 = 95;

impl HostProcess {
    /// Starts a filter host for `file`. No code of the filter runs before
    /// [`describe`](Self::describe).
    pub fn start(
        file: &FilterFile,
        placement: Placement,
        log: LogSink,
    ) -> Result<HostProcess, FilterError> {
        let name: Arc<str> = clean_path(file.path()).into();
        let failed = |source| FilterError::System {
            filter: name.to_string(),
            step: "start its filter host",
            source,
        };
        let (socket, theirs) = socket::pair().map_err(failed)?;
        let engine = match placement {
            Placement::Isolated if !launch::is_available(file.width()) => {
                return Err(FilterError::No32BitHost { path: file.path().to_owned() });
            }
            Placement::Isolated => Engine::Isolated(
                HostChild::start(file.width(), theirs, file.as_fd(), file.path())
                    .map_err(failed)?,
            ),
            Placement::Inline if file.width() != Width::Bits64 => {
                return Err(FilterError::InlineWidth { path: file.path().to_owned() });
            }
            Placement::Inline => {
                let copy = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map_err(failed);
                let (filter, ours) = (copy(file.as_fd())?, copy(socket.as_fd())?);
                Engine::Inline(InlineHost::start(theirs, filter, ours).map_err(failed)?)
            }
        };
        Ok(HostProcess::over(name, file.width(), socket, engine, log))
    }

    fn over(
        name: Arc<str>,
        width: Width,
        socket: ControlSocket,
        engine: Engine,
        log: LogSink,
    ) -> HostProcess {
        HostProcess {
            name,
            width,
            socket,
            engine,
            log,
            log_budget: LogBudget::new(),
            timeout: TIMEOUT,
            channels: Vec::new(),
            is_serving: false,
            is_over: false,
        }
    }

    /// How long each step may take from now on.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// The filter's name, or its path before [`describe`](Self::describe).
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Loads the shared object into the host and asks for its table.
    pub fn describe(&mut self) -> Result<Description, FilterError> {
        const STEP: &str = "DESCRIBE";
        match self.ask(STEP, header(kind::DESCRIBE, 0, 0), &[], &[])? {
            Answer::Description(text) => match Description::parse(&text, self.width) {
                Ok(description) => {
                    self.name = description.name.as_str().into();
                    Ok(description)
                }
                Err(what) => {
                    self.is_over = true;
                    Err(FilterError::Declaration { filter: self.name.to_string(), what })
                }
            },
            Answer::Result { errno: 0, .. } => {
                Err(self.misbehaved(STEP, "described nothing".into()))
            }
            Answer::Result { errno, text, .. } => Err(self.refused(STEP, errno, text)),
        }
    }

    /// Says what the host may use from now on, before it is given what they count. One that
    /// runs inline has no bounds but ours.
    pub fn bound(&mut self, bounds: &Bounds) -> Result<(), FilterError> {
        let bounded = match &self.engine {
            Engine::Isolated(child) => child.bound(bounds),
            Engine::Inline(_) => Ok(()),
        };
        bounded.map_err(|error| self.system("bound its filter host", error))
    }

    /// The processor time that its threads have wanted so far: they ran, or were ready to.
    /// None for one that is not a process of its own, or is gone.
    pub fn wanted_ns(&mut self) -> Option<u64> {
        match &mut self.engine {
            Engine::Isolated(child) => child.wanted_ns().ok(),
            Engine::Inline(_) => None,
        }
    }

    /// Has it give way to everybody else who wants the processor, or no longer: the latter
    /// needs a privilege (CAP_SYS_NICE), or that RLIMIT_NICE allows it.
    pub fn give_way(&self, gives: bool) -> std::io::Result<()> {
        match &self.engine {
            Engine::Isolated(child) => child.set_niceness(if gives { 19 } else { 0 }),
            Engine::Inline(_) => Ok(()),
        }
    }

    /// Gives the arena of disk `disk`: `size` bytes, mapped for writing only if `writable`.
    /// For a filter that may not write, give a descriptor that cannot be mapped for it.
    pub fn arena(
        &mut self,
        disk: u32,
        arena: BorrowedFd<'_>,
        size: u64,
        writable: bool,
    ) -> Result<(), FilterError> {
        let mut payload = size.to_le_bytes().to_vec();
        payload.extend([u32::from(writable), 0].map(u32::to_le_bytes).concat());
        self.expect("ARENA", header(kind::ARENA, disk, 0), &payload, &[arena])
    }

    /// Gives the arena for the data of requests that the filter issues.
    pub fn issue_arena(&mut self, arena: BorrowedFd<'_>, size: u64) -> Result<(), FilterError> {
        let payload = size.to_le_bytes();
        self.expect("ISSUE_ARENA", header(kind::ISSUE_ARENA, 0, 0), &payload, &[arena])
    }

    /// Gives the channel of a queue thread: `id` counts from 0, `disk` is the one served.
    pub fn channel(
        &mut self,
        id: u32,
        disk: u32,
        ring: BorrowedFd<'_>,
        host_doorbell: BorrowedFd<'_>,
        worker_doorbell: BorrowedFd<'_>,
    ) -> Result<(), FilterError> {
        let fds = [ring, host_doorbell, worker_doorbell];
        self.expect("CHANNEL", header(kind::CHANNEL, id, disk), &[], &fds)?;
        self.channels.push(id);
        Ok(())
    }

    /// Calls the filter's `load`.
    pub fn load(&mut self) -> Result<(), FilterError> {
        self.expect("LOAD", header(kind::LOAD, 0, 0), &[], &[])
    }

    /// Opens an instance: calls the filter's `open`.
    pub fn open(&mut self, open: &OpenInstance<'_>) -> Result<(), FilterError> {
        let mut fds = vec![open.counters.as_fd()];
        fds.extend(open.sidecar);
        fds.extend(open.extents);
        let files_max = DESCRIPTORS_MAX - fds.len();
        let payload = open_payload(open, &mut fds);
        if fds.len() > DESCRIPTORS_MAX {
            return Err(self.too_large(format!("at most {files_max} files")));
        }
        match payload {
            Some(payload) if payload.len() <= MESSAGE_MAX - HEADER_SIZE => {
                self.expect("OPEN", header(kind::OPEN, open.instance, 0), &payload, &fds)
            }
            _ => Err(self.too_large(format!("at most {MESSAGE_MAX} bytes"))),
        }
    }

    /// From now on the channels are served.
    pub fn serve(&mut self) -> Result<(), FilterError> {
        self.expect("START", header(kind::START, 0, 0), &[], &[])?;
        self.is_serving = true;
        Ok(())
    }

    /// Delivers an event of the chain to an instance.
    pub fn event(&mut self, instance: u32, event: u32) -> Result<(), FilterError> {
        self.expect("EVENT", header(kind::EVENT, instance, 0), &event.to_le_bytes(), &[])
    }

    /// Asks an instance, which has no request, for its state, for the one that takes its place.
    /// None: it has nothing to hand over.
    pub fn save_state(&mut self, instance: u32) -> Result<Option<Vec<u8>>, FilterError> {
        const STEP: &str = "SAVE_STATE";
        let memory = memfd("upcall-state", STATE_MAX).map_err(|error| self.system(STEP, error))?;
        let saved =
            self.expect_value(STEP, header(kind::SAVE_STATE, instance, 0), &[], &[memory.as_fd()]);
        let length = match saved {
            Ok(length) if length as usize <= STATE_MAX => length,
            Ok(length) => return Err(self.misbehaved(STEP, format!("saved {length} bytes"))),
            Err(FilterError::Refused { errno: NOT_SUPPORTED, .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        // Read, not mapped: the host may still do with that memory what it likes.
        let mut state = vec![0; length as usize];
        match std::fs::File::from(memory).read_exact_at(&mut state, 0) {
            Ok(()) => Ok(Some(state)),
            Err(_) => Err(self.misbehaved(STEP, "took back the state that it saved".into())),
        }
    }

    /// Hands an instance the state of the one before, before its first request.
    pub fn load_state(&mut self, instance: u32, state: &[u8]) -> Result<(), FilterError> {
        const STEP: &str = "LOAD_STATE";
        if state.len() > STATE_MAX {
            return Err(self.too_large(format!("a state has at most {STATE_MAX} bytes")));
        }
        let memory = memfd("upcall-state", STATE_MAX).map_err(|error| self.system(STEP, error))?;
        let memory = std::fs::File::from(memory);
        memory.write_all_at(state, 0).map_err(|error| self.system(STEP, error))?;
        let header = header(kind::LOAD_STATE, instance, state.len() as u32);
        self.expect(STEP, header, &[], &[memory.as_fd()])
    }

    /// Closes an instance. None of its requests may be with the filter, and those that it
    /// issued must have ended.
    pub fn close(&mut self, instance: u32) -> Result<(), FilterError> {
        self.expect("CLOSE", header(kind::CLOSE, instance, 0), &[], &[])
    }

    /// Ends the host in good order, with all instances closed. One that does not end in time
    /// is killed, and that is an error. An inline one must have no [`InlineChannel`] left.
    pub fn quit(mut self) -> Result<(), FilterError> {
        const STEP: &str = "QUIT";
        let in_order = match &self.engine {
            Engine::Isolated(_) => launch::IN_ORDER,
            Engine::Inline(host) if host.is_in_use() => {
                return Err(self.system(STEP, std::io::ErrorKind::ResourceBusy.into()));
            }
            Engine::Inline(_) => inline::IN_ORDER,
        };
        self.send(STEP, header(kind::QUIT, 0, 0), &[], &[])?;
        match self.engine.exit_within(self.timeout) {
            None => Err(self.silent(STEP)),
            Some(how) if how == in_order => {
                // What the filter logged while it unloaded is still on the socket.
                while let Ok(None) = self.next_message(STEP) {}
                Ok(())
            }
            Some(how) => Err(FilterError::Ended { filter: self.name.to_string(), step: STEP, how }),
        }
    }

    /// The way to deliver to channel `id` of an inline host, once [`serve`](Self::serve) has
    /// succeeded; only one for each channel. `None` if there is none to have.
    pub fn inline_channel(&mut self, id: u32) -> Option<InlineChannel> {
        match &mut self.engine {
            Engine::Inline(host) if self.is_serving && self.channels.contains(&id) => {
                host.channel(id)
            }
            _ => None,
        }
    }

    /// Takes what the host said by itself: log lines, some of them if there are many. To be called when [`AsFd`] is readable.
    /// An error means that the host is gone or must go.
    pub fn service(&mut self) -> Result<(), FilterError> {
        const STEP: &str = "service";
        match self.next_message(STEP)? {
            None => Ok(()),
            Some(_) => Err(self.misbehaved(STEP, "answered without a question".into())),
        }
    }

    /// Readable when the host's process has ended; `None` for an inline one.
    pub fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        self.engine.pidfd()
    }

    /// Its process; `None` for an inline one.
    pub fn process_id(&self) -> Option<u32> {
        match &self.engine {
            Engine::Isolated(child) => Some(child.id() as u32),
            Engine::Inline(_) => None,
        }
    }

    /// How the host ended, for people; `None` while it runs.
    pub fn exit_description(&mut self) -> Option<String> {
        self.engine.exit()
    }

    /// Kills an isolated host, as when a deadline of a request has passed. Does not wait.
    pub fn kill(&mut self) {
        self.is_over = true;
        if let Engine::Isolated(child) = &mut self.engine {
            child.kill();
        }
    }
}

impl HostProcess {
    /// Asks for something that is answered with RESULT.
    fn expect(
        &mut self,
        step: &'static str,
        header: Header,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), FilterError> {
        self.expect_value(step, header, payload, fds).map(drop)
    }

    /// The same, and what its `value` says.
    fn expect_value(
        &mut self,
        step: &'static str,
        header: Header,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<u32, FilterError> {
        match self.ask(step, header, payload, fds)? {
            Answer::Result { errno: 0, value, .. } => Ok(value),
            Answer::Result { errno, text, .. } => Err(self.refused(step, errno, text)),
            Answer::Description(_) => Err(self.misbehaved(step, "described itself".into())),
        }
    }

    fn ask(
        &mut self,
        step: &'static str,
        header: Header,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Answer, FilterError> {
        let deadline = Instant::now() + self.timeout;
        self.send(step, header, payload, fds)?;
        loop {
            if let Some(answer) = self.next_message(step)? {
                return Ok(answer);
            }
            if Instant::now() >= deadline {
                return Err(self.silent(step));
            }
            self.wait(step, deadline)?;
        }
    }

    fn send(
        &mut self,
        step: &'static str,
        header: Header,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), FilterError> {
        if self.is_over {
            return Err(self.ended(step));
        }
        match self.socket.send(header, payload, fds) {
            Ok(()) => Ok(()),
            Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => Err(self.ended(step)),
            Err(Errno::AGAIN) => {
                Err(self.misbehaved(step, "does not read its control socket".into()))
            }
            Err(error) => Err(self.system(step, error.into())),
        }
    }

    /// Waits for a message, the end of the host, or the deadline.
    fn wait(&mut self, step: &'static str, deadline: Instant) -> Result<(), FilterError> {
        // The process is watched too: a child of the filter may keep the socket open.
        self.socket.wait(self.engine.pidfd(), deadline).map_err(|error| self.system(step, error))
    }

    /// The next message that is no log line, if one is there.
    fn next_message(&mut self, step: &'static str) -> Result<Option<Answer>, FilterError> {
        // A host that logs without end gets a turn like any other; the caller looks at the
        // clock in between.
        const LOGS_MAX: usize = 64;
        for _ in 0..LOGS_MAX {
            // Asked before looking: what a process sent before it ended is there to find.
            let has_ended = self.engine.exit().is_some();
            let (header, payload) = match self.socket.receive() {
                Ok(Received::Message(header, payload)) => (header, payload),
                Ok(Received::Nothing) if has_ended => return Err(self.ended(step)),
                Ok(Received::Nothing) => return Ok(None),
                Ok(Received::End) => return Err(self.ended(step)),
                Ok(Received::Violation(what)) => return Err(self.misbehaved(step, what)),
                Err(error) => return Err(self.system(step, error)),
            };
            match header.kind {
                kind::LOG => {
                    let line = log_line(&self.name, header, payload);
                    self.log_budget.pass(line, &*self.log);
                }
                kind::DESCRIPTION => return Ok(Some(Answer::Description(payload.to_vec()))),
                kind::RESULT => match errno_of(header.id) {
                    Some(errno) => {
                        let text = clean(payload, TEXT_MAX);
                        return Ok(Some(Answer::Result { errno, value: header.value, text }));
                    }
                    None => {
                        let what = format!("answered with {}, which is no errno", header.id as i32);
                        return Err(self.misbehaved(step, what));
                    }
                },
                other => {
                    return Err(self.misbehaved(step, format!("sent a message of kind {other}")));
                }
            }
        }
        Ok(None)
    }

    fn ended(&mut self, step: &'static str) -> FilterError {
        let how = if self.is_over {
            "it was given up before".into()
        } else {
            self.engine
                .exit_within(END_PATIENCE)
                .unwrap_or_else(|| "it closed its control socket".into())
        };
        self.is_over = true;
        FilterError::Ended { filter: self.name.to_string(), step, how }
    }

    fn silent(&mut self, step: &'static str) -> FilterError {
        self.is_over = true;
        FilterError::Silent { filter: self.name.to_string(), step, after: self.timeout }
    }

    fn misbehaved(&mut self, step: &'static str, what: String) -> FilterError {
        self.is_over = true;
        FilterError::Misbehaved { filter: self.name.to_string(), step, what }
    }

    fn system(&mut self, step: &'static str, source: std::io::Error) -> FilterError {
        self.is_over = true;
        FilterError::System { filter: self.name.to_string(), step, source }
    }

    fn refused(&self, step: &'static str, errno: i32, text: String) -> FilterError {
        FilterError::Refused { filter: self.name.to_string(), step, errno, text }
    }

    fn too_large(&self, what: String) -> FilterError {
        FilterError::TooLarge { filter: self.name.to_string(), what }
    }
}

/// The control socket, to wait for [`service`](HostProcess::service).
impl AsFd for HostProcess {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl fmt::Debug for HostProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "filter host of {} (process {:?})", self.name, self.process_id())
    }
}

fn header(kind: u32, id: u32, value: u32) -> Header {
    Header { kind, version: WIRE_VERSION, id, value }
}

/// A positive errno of a RESULT's `id`, 0 for success, `None` for anything else.
fn errno_of(id: u32) -> Option<i32> {
    let result = id as i32;
    (-4095..=0).contains(&result).then(|| -result)
}

fn log_line(filter: &Arc<str>, header: Header, payload: &[u8]) -> LogLine {
    LogLine {
        filter: filter.clone(),
        instance: (header.id != u32::MAX).then_some(header.id),
        level: match header.value {
            1 => LogLevel::Error,
            2 => LogLevel::Warn,
            4 => LogLevel::Debug,
            _ => LogLevel::Info,
        },
        text: clean(payload, TEXT_MAX),
    }
}

/// The payload of OPEN; the descriptors of its parameters are added to `fds`. `None` if a
/// length does not fit into its field.
fn open_payload<'a>(open: &OpenInstance<'a>, fds: &mut Vec<BorrowedFd<'a>>) -> Option<Vec<u8>> {
    let words =
        |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    let files_from = fds.len();
    let mut payload = words(&[
        open.arena,
        open.disks.len() as u32,
        open.params.iter().len() as u32,
        (u32::from(open.sidecar.is_some()) * OPEN_SIDECAR)
            | (u32::from(open.extents.is_some()) * OPEN_EXTENTS),
    ]);
    for disk in open.disks {
        payload.extend(disk.capacity.to_le_bytes());
        payload.extend(words(&[disk.block_size, disk.read_only]));
    }
    for (name, value, fd) in open.params.iter() {
        let index = match fd {
            Some(fd) => {
                fds.push(fd);
                (fds.len() - 1 - files_from) as u32
            }
            None => u32::MAX,
        };
        payload.extend(u16::try_from(name.len()).ok()?.to_le_bytes());
        payload.extend(u16::try_from(value.len()).ok()?.to_le_bytes());
        payload.extend(index.to_le_bytes());
        payload.extend(name.as_bytes());
        payload.extend(value.as_bytes());
    }
    Some(payload)
}

/// Lets so many lines through each second, and says how many it did not.
struct LogBudget {
    second: Instant,
    passed: u32,
    dropped: u32,
}

const LINES_PER_SECOND: u32 = 100;

impl LogBudget {
    fn new() -> LogBudget {
        LogBudget { second: Instant::now(), passed: 0, dropped: 0 }
    }

    fn pass(&mut self, line: LogLine, log: &dyn Fn(LogLine)) {
        if self.second.elapsed() >= Duration::from_secs(1) {
            if self.dropped > 0 {
                let text = format!("{} lines of this filter were dropped", self.dropped);
                log(LogLine { instance: None, level: LogLevel::Warn, text, ..line.clone() });
            }
            *self = LogBudget::new();
        }
        if self.passed < LINES_PER_SECOND {
            self.passed += 1;
            log(line);
        } else {
            self.dropped += 1;
        }
    }
}

#[cfg(test)]
mod tests;
