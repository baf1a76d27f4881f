//! One client: from its first byte to the end of the last thing it asked for.
//!
//! Always true: a connection keeps a bounded number of commands ([`JOBS_MAX`]), bytes of
//! input and output, and pages of its own, whatever its client does; it is read from only
//! when there is room for what may come; each command that was begun is answered once, or
//! the client is gone; and a connection is not over before all it asked of the worker has
//! come back, so that a client that comes and goes cannot pile up work.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::Sender;

use upcall_block::{Allocation, Errno, Extent, Op, Status};
use upcall_ring::Buffers;

use crate::commands::{Command, Commands, Event, Kind};
use crate::extents::Question;
use crate::handshake::{Handshake, Outcome, Session};
use crate::job::{self, Job};
use crate::output::Output;
use crate::pool::Pool;
use crate::queue::{Answer, Submission, Ticket};
use crate::reply::{Asked, EXTENTS_MAX, Replies};
use crate::server::{Export, Level, Shared};
use crate::stream::{Received, Stream};
use crate::wire::ErrorCode;

/// Most commands of a connection that are under way.
pub(crate) const JOBS_MAX: usize = 64;
/// Bytes that are received at a time.
pub(crate) const RECEIVED_MAX: usize = 256 << 10;
/// Rounds of receiving and sending before it is another connection's turn.
const ROUNDS: usize = 8;
/// How long a client that we part from may still read and send.
const LINGER_NS: u64 = 1_000_000_000;
/// How long an idle connection keeps its pages.
const IDLE_NS: u64 = 30_000_000_000;

/// What a connection needs of the thread that serves it.
pub(crate) struct Context<'a> {
    pub shared: &'a Shared,
    /// Index of the thread.
    pub thread: usize,
    pub questions: &'a Sender<Question>,
    /// [`RECEIVED_MAX`] bytes for whatever is received.
    pub scratch: &'a mut Vec<u8>,
    pub now_ns: u64,
}

/// What a connection waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wish {
    pub read: bool,
    pub write: bool,
    /// It has more to do at once.
    pub again: bool,
    /// When to run it although nothing has happened.
    pub deadline_ns: Option<u64>,
}

enum Phase {
    Handshake(Box<Handshake>),
    /// Once the answer is sent.
    StartingTls(Box<Handshake>),
    Serving(Box<Serving>),
    /// All that was asked is answered, and then it ends. Nothing more is received.
    Closing,
    /// Ended by us: what still comes is dropped, until the client ends it too.
    Lingering {
        until_ns: u64,
    },
}

struct Serving {
    commands: Commands,
    /// A command for which there was no room.
    pending: Option<Command>,
    /// The job whose payload comes, and how much of it has come.
    writing: Option<(usize, usize)>,
}

/// What was agreed on with the client.
#[derive(Clone)]
struct Agreed {
    export: Arc<Export>,
    replies: Replies,
}

/// See the module.
pub(crate) struct Connection {
    id: u64,
    /// None: the client is gone.
    stream: Option<Stream>,
    phase: Phase,
    agreed: Option<Agreed>,
    /// Received and not yet looked at.
    input: Vec<u8>,
    output: Output,
    jobs: Vec<Option<Job>>,
    job_count: usize,
    /// Jobs of which something is with the worker.
    in_flight: usize,
    pool: Pool,
    began_ns: u64,
    progress_ns: u64,
    /// Commands are refused: the server ends.
    ending: bool,
    /// Nothing is waited for any longer than this.
    hurry_ns: Option<u64>,
}

impl Connection {
    pub fn new(id: u64, socket: OwnedFd, context: &Context) -> Connection {
        let mut output = Output::default();
        let (exports, mode) = (context.shared.infos.clone(), context.shared.tls_mode);
        let mut handshake = None;
        output.write(|out| handshake = Some(Box::new(Handshake::new(exports, mode, out))));
        Connection {
            id,
            stream: Some(Stream::new(socket)),
            phase: handshake.map_or(Phase::Closing, Phase::Handshake),
            agreed: None,
            input: Vec::new(),
            output,
            jobs: Vec::new(),
            job_count: 0,
            in_flight: 0,
            pool: Pool::default(),
            began_ns: context.now_ns,
            progress_ns: context.now_ns,
            ending: false,
            hurry_ns: None,
        }
    }

    /// Its socket, while it has one.
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.stream.as_ref().map(|stream| stream.as_fd())
    }

    /// From now on commands are refused.
    pub fn end(&mut self) {
        self.ending = true;
    }

    /// Nothing comes back from the worker any more; ends it by `until_ns`.
    pub fn hurry(&mut self, until_ns: u64) {
        self.hurry_ns = Some(until_ns);
    }

    /// The other side has closed: nobody reads what we would send.
    pub fn hung_up(&mut self) {
        self.lose();
    }

    /// Does what can be done now. None: it is over.
    pub fn run(&mut self, context: &mut Context) -> Option<Wish> {
        self.check_deadline(context);
        let mut again = false;
        for round in 0..ROUNDS {
            match self.round(context) {
                Ok(true) => again = round + 1 == ROUNDS,
                Ok(false) => break,
                Err(error) => {
                    let what = match self.phase {
                        Phase::Serving(_) => "a client was lost",
                        _ => "a client was lost in its handshake",
                    };
                    context.shared.log(Level::Info, &format!("{what}: {error}"));
                    self.lose();
                    break;
                }
            }
        }
        self.wish(context, again)
    }

    /// True if something was done.
    fn round(&mut self, context: &mut Context) -> io::Result<bool> {
        let mut progress = self.parse_input(context);
        progress |= self.send(context)?;
        progress |= self.move_on(context)?;
        if self.may_receive() {
            progress |= self.receive(context)?;
        }
        Ok(progress)
    }

    fn wish(&mut self, context: &Context, again: bool) -> Option<Wish> {
        let Some(stream) = &self.stream else {
            let over = self.in_flight == 0 || self.hurry_ns.is_some_and(|ns| context.now_ns >= ns);
            return (!over).then_some(Wish { deadline_ns: self.hurry_ns, ..Wish::default() });
        };
        let write = !self.output.is_empty() || stream.wants_write();
        let deadline_ns = [self.deadline_ns(context), self.hurry_ns].into_iter().flatten().min();
        Some(Wish { read: self.may_receive(), write, again, deadline_ns })
    }

    /// When somebody has to look whether the client still does its part.
    fn deadline_ns(&self, context: &Context) -> Option<u64> {
        let limits = &context.shared.limits;
        match &self.phase {
            Phase::Handshake(_) | Phase::StartingTls(_) => {
                Some(self.began_ns + limits.handshake_ms * 1_000_000)
            }
            Phase::Lingering { until_ns } => Some(*until_ns),
            _ if self.owes() => Some(self.progress_ns + limits.stall_ms * 1_000_000),
            _ if self.pool.is_idle() => Some(self.progress_ns + IDLE_NS),
            _ => None,
        }
    }

    /// Whether the client has begun something, and it is for it to go on.
    fn owes(&self) -> bool {
        let amid = match &self.phase {
            Phase::Serving(serving) => serving.commands.is_amid() && serving.pending.is_none(),
            _ => false,
        };
        amid || !self.output.is_empty()
    }

    fn check_deadline(&mut self, context: &Context) {
        let overdue = |at: Option<u64>| at.is_some_and(|at| context.now_ns >= at);
        if overdue(self.hurry_ns) {
            return self.lose();
        }
        if self.stream.is_none() || !overdue(self.deadline_ns(context)) {
            return;
        }
        let text = match &self.phase {
            Phase::Handshake(_) | Phase::StartingTls(_) => {
                "a client was too slow in its handshake and was disconnected"
            }
            Phase::Lingering { .. } => return self.lose(),
            _ if self.owes() => "a client neither read nor sent for too long and was disconnected",
            _ => return self.pool.release(),
        };
        context.shared.log(Level::Info, text);
        self.lose();
    }

    /// The client is gone, or is sent away.
    fn lose(&mut self) {
        self.stream = None;
        self.phase = Phase::Closing;
        self.input = Vec::new();
        self.output = Output::default();
        if self.in_flight == 0 {
            self.jobs = Vec::new();
        }
    }

    fn may_receive(&self) -> bool {
        if self.stream.is_none() {
            return false;
        }
        match &self.phase {
            Phase::Handshake(_) => !self.output.is_full(),
            Phase::Serving(serving) => serving.pending.is_none() && !self.output.is_full(),
            Phase::StartingTls(_) | Phase::Closing => false,
            Phase::Lingering { .. } => true,
        }
    }

    fn send(&mut self, context: &Context) -> io::Result<bool> {
        let Some(stream) = &mut self.stream else { return Ok(false) };
        let mut free = Vec::new();
        let progress = stream.send(&mut self.output, &mut free);
        // Also after an error: the pages are the connection's.
        free.into_iter().for_each(|slice| self.pool.free(slice));
        if progress.as_ref().is_ok_and(|progress| *progress) {
            self.progress_ns = context.now_ns;
        }
        progress
    }

    /// Goes to the next phase, where everything is sent and answered.
    fn move_on(&mut self, context: &Context) -> io::Result<bool> {
        if !self.output.is_empty() {
            return Ok(false);
        }
        let Some(stream) = &mut self.stream else { return Ok(false) };
        let is_done = self.job_count == 0;
        match std::mem::replace(&mut self.phase, Phase::Closing) {
            Phase::StartingTls(handshake) => {
                let Some(tls) = &context.shared.tls else {
                    return Err(io::Error::other("there is no TLS"));
                };
                stream.start_tls(tls).map_err(io::Error::other)?;
                self.phase = Phase::Handshake(Box::new(handshake.after_tls()));
                return Ok(true);
            }
            Phase::Closing if is_done => {
                stream.end();
                self.lose();
                return Ok(true);
            }
            Phase::Handshake(_) if self.ending => self.part(context),
            Phase::Serving(serving)
                if self.ending && is_done && serving.pending.is_none() && self.input.is_empty() =>
            {
                // What it has sent by now gets its answer first.
                self.phase = Phase::Serving(serving);
                if self.receive_one(context.now_ns)? {
                    return Ok(true);
                }
                self.part(context);
            }
            phase => {
                self.phase = phase;
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Ends the connection from our side.
    fn part(&mut self, context: &Context) {
        if let Some(stream) = &mut self.stream {
            stream.end();
        }
        self.input = Vec::new();
        self.phase = Phase::Lingering { until_ns: context.now_ns + LINGER_NS };
    }

    /// Receives a little, for later; true if there was something. The end is seen later.
    fn receive_one(&mut self, now_ns: u64) -> io::Result<bool> {
        let Some(stream) = &mut self.stream else { return Ok(false) };
        let mut bytes = [0; 4096];
        let Received::Bytes(count) = stream.receive(&mut bytes)? else { return Ok(false) };
        self.input.extend(&bytes[..count]);
        self.progress_ns = now_ns;
        Ok(true)
    }

    fn receive(&mut self, context: &mut Context) -> io::Result<bool> {
        let Some(stream) = &mut self.stream else { return Ok(false) };
        let mut scratch = std::mem::take(context.scratch);
        let received = stream.receive(&mut scratch);
        if let Ok(Received::Bytes(count)) = received {
            self.progress_ns = context.now_ns;
            self.look_at(&scratch[..count], context);
        }
        *context.scratch = scratch;
        match received? {
            Received::Bytes(_) => Ok(true),
            Received::Nothing => Ok(false),
            Received::End => {
                match self.phase {
                    Phase::Lingering { .. } => self.lose(),
                    // What it asked for is still done, and answered if it reads on.
                    _ => self.phase = Phase::Closing,
                }
                Ok(true)
            }
        }
    }

    /// Parses new bytes; what has to wait is kept.
    fn look_at(&mut self, bytes: &[u8], context: &mut Context) {
        if matches!(self.phase, Phase::Lingering { .. }) {
            return;
        }
        if self.input.is_empty() {
            let used = self.parse(bytes, context);
            self.input.extend(&bytes[used..]);
        } else {
            self.input.extend(bytes);
            self.parse_input(context);
        }
    }

    /// Parses what was kept; true if some of it was used.
    fn parse_input(&mut self, context: &mut Context) -> bool {
        let pending = self.begin_pending(context);
        if self.input.is_empty() {
            return pending;
        }
        let mut input = std::mem::take(&mut self.input);
        let used = self.parse(&input, context);
        if used < input.len() {
            input.drain(..used);
            self.input = input;
        }
        pending || used > 0
    }

    /// Parses as much as there is room for; says how much that is.
    fn parse(&mut self, bytes: &[u8], context: &mut Context) -> usize {
        let mut used = 0;
        while used < bytes.len() && !self.output.is_full() {
            let rest = &bytes[used..];
            used += match &mut self.phase {
                Phase::Handshake(_) => self.negotiate(rest, context),
                Phase::Serving(serving) if serving.pending.is_none() => self.serve(rest, context),
                Phase::Serving(_) => break,
                Phase::StartingTls(_) => {
                    // Said in the clear before our answer; it must not count as said in TLS.
                    let text = "a client sent more in the clear after asking for TLS";
                    context.shared.log(Level::Warn, text);
                    self.lose();
                    return bytes.len();
                }
                Phase::Closing | Phase::Lingering { .. } => return bytes.len(),
            };
        }
        used
    }

    fn negotiate(&mut self, bytes: &[u8], context: &Context) -> usize {
        let Phase::Handshake(handshake) = &mut self.phase else { return 0 };
        let (mut used, mut outcome) = (0, None);
        self.output.write(|out| (used, outcome) = handshake.handle(bytes, out));
        match outcome {
            None => {}
            Some(Outcome::Transmission(session)) => self.begin_serving(session, context),
            Some(Outcome::StartTls) => {
                if let Phase::Handshake(handshake) =
                    std::mem::replace(&mut self.phase, Phase::Closing)
                {
                    self.phase = Phase::StartingTls(handshake);
                }
            }
            Some(Outcome::End(why)) => {
                context.shared.log(Level::Debug, &format!("a client left in its handshake: {why}"));
                self.phase = Phase::Closing;
            }
        }
        used
    }

    fn begin_serving(&mut self, session: Session, context: &Context) {
        let export = context.shared.exports[session.export].clone();
        let text = format!("export {:?}: a client connected", export.info.name());
        context.shared.log(Level::Debug, &text);
        let commands = Commands::new(export.info.clone(), &session);
        self.agreed = Some(Agreed { export, replies: Replies(session.style) });
        let serving = Serving { commands, pending: None, writing: None };
        self.phase = Phase::Serving(Box::new(serving));
    }

    fn serve(&mut self, bytes: &[u8], context: &mut Context) -> usize {
        let Phase::Serving(serving) = &mut self.phase else { return 0 };
        let (used, event) = serving.commands.handle(bytes);
        match event {
            None => {}
            Some(Event::Command(command)) => {
                serving.pending = Some(command);
                self.begin_pending(context);
            }
            Some(Event::Payload { bytes, is_last }) => self.take_payload(bytes, is_last, context),
            Some(Event::Refused(refused)) => {
                let asked = Asked { cookie: refused.cookie, offset: refused.offset };
                self.answer_error(asked, refused.error, refused.text);
            }
            Some(Event::Disconnect) => self.phase = Phase::Closing,
            Some(Event::Broken(broken)) => {
                let text =
                    format!("a client was disconnected: its command makes no sense ({broken:?})");
                context.shared.log(Level::Info, &text);
                self.phase = Phase::Closing;
            }
        }
        used
    }

    /// Begins the command that waits for room, if there is some now.
    fn begin_pending(&mut self, context: &mut Context) -> bool {
        let Phase::Serving(serving) = &self.phase else { return false };
        let Some(command) = serving.pending else { return false };
        let begun = self.begin(command, context);
        if begun && let Phase::Serving(serving) = &mut self.phase {
            serving.pending = None;
        }
        begun
    }

    /// False: there is no room for it now.
    fn begin(&mut self, command: Command, context: &mut Context) -> bool {
        let Some(agreed) = self.agreed.clone() else { return true };
        let asked = Asked { cookie: command.cookie, offset: command.offset };
        self.progress_ns = context.now_ns;
        if self.ending {
            self.answer_error(asked, ErrorCode::Shutdown, "the server ends");
            return true;
        }
        if command.length == 0 && command.kind != Kind::Flush {
            match command.kind {
                Kind::Read => self.output.write(|out| agreed.replies.read(out, asked, 0)),
                _ => self.output.write(|out| agreed.replies.done(out, asked)),
            }
            return true;
        }
        if self.job_count == JOBS_MAX {
            return false;
        }
        let slice = match job::memory(&command) {
            0 => None,
            length => match self.pool.allocate(length) {
                Ok(Some(slice)) => Some(slice),
                Ok(None) => return false,
                Err(error) => {
                    let text = format!("no memory for the data of a command: {error}");
                    context.shared.log(Level::Warn, &text);
                    self.answer_error(asked, ErrorCode::NoMemory, "no memory for its data");
                    return true;
                }
            },
        };
        let number = self.insert(Job::new(command, slice));
        match (command.kind, &mut self.phase) {
            (Kind::Write { .. }, Phase::Serving(serving)) => serving.writing = Some((number, 0)),
            (Kind::BlockStatus { one }, _) => self.ask(number, one, context),
            _ => self.submit(number, context),
        }
        true
    }

    fn insert(&mut self, job: Job) -> usize {
        self.job_count += 1;
        match self.jobs.iter().position(Option::is_none) {
            Some(number) => {
                self.jobs[number] = Some(job);
                number
            }
            None => {
                self.jobs.push(Some(job));
                self.jobs.len() - 1
            }
        }
    }

    fn remove(&mut self, number: usize) -> Option<Job> {
        let job = self.jobs.get_mut(number)?.take()?;
        self.job_count -= 1;
        Some(job)
    }

    /// Payload of a write. If there is no job for it, its command was refused.
    fn take_payload(&mut self, bytes: &[u8], is_last: bool, context: &mut Context) {
        let Phase::Serving(serving) = &mut self.phase else { return };
        let Some((number, done)) = serving.writing else { return };
        serving.writing = (!is_last).then_some((number, done + bytes.len()));
        if let Some(Some(Job { command, slice: Some(slice), .. })) = self.jobs.get(number) {
            let buffers = self.pool.buffers(slice, command.length as u32);
            buffers.write(done, bytes);
        }
        if is_last {
            self.submit(number, context);
        }
    }

    fn ticket(&self, number: usize, context: &Context) -> Ticket {
        Ticket { thread: context.thread, connection: self.id, job: number }
    }

    /// Sends the next request of a job to the worker.
    fn submit(&mut self, number: usize, context: &Context) {
        let ticket = self.ticket(number, context);
        let Some(Agreed { export, .. }) = self.agreed.clone() else { return };
        let Some(job) = self.jobs.get_mut(number).and_then(Option::as_mut) else { return };
        let Some(part) = job.next_part(export.info.disk(), export.write_through) else {
            return self.finish(number, Ok(()), context);
        };
        let data = match &job.slice {
            Some(slice) => self.pool.buffers(slice, part.range.length()),
            None => Buffers::new(),
        };
        debug_assert_eq!(!data.is_empty(), matches!(part.op, Op::Read | Op::Write));
        let line = &export.lines[context.thread % export.lines.len()];
        let submission =
            Submission { op: part.op, range: part.range, flags: part.flags, data, ticket };
        match line.submit(submission) {
            Ok(()) => self.in_flight += 1,
            Err(errno) => self.finish(number, Err(errno), context),
        }
    }

    /// Asks what the disk consists of.
    fn ask(&mut self, number: usize, one: bool, context: &Context) {
        let ticket = self.ticket(number, context);
        let Some(Agreed { export, .. }) = self.agreed.clone() else { return };
        let Some(Some(Job { command, .. })) = self.jobs.get(number) else { return };
        let (offset, length) = (command.offset, command.length);
        let max = if one { 1 } else { EXTENTS_MAX };
        if let Some(extents) = export.extents.clone() {
            let question = Question { extents, offset, length, max, ticket };
            if context.questions.send(question).is_ok() {
                self.in_flight += 1;
                return;
            }
        }
        let whole = vec![Extent { length, allocation: Allocation::Data }];
        self.finish_status(number, Ok(whole), context);
    }

    /// Something of this connection has come back.
    pub fn handle_answer(&mut self, number: usize, answer: Answer, context: &Context) {
        self.in_flight -= 1;
        // It is the client's turn from now on.
        self.progress_ns = context.now_ns;
        if self.stream.is_none() {
            if let Some(slice) = self.remove(number).and_then(|job| job.slice) {
                self.pool.free(slice);
            }
            return;
        }
        match answer {
            Answer::Extents(extents) => self.finish_status(number, extents, context),
            Answer::Ended(status) => {
                let job = self.jobs.get_mut(number).and_then(Option::as_mut);
                match job.and_then(|job| job.handle_ended(status)) {
                    Some(status) => self.finish(number, status, context),
                    // A long command of a client that no longer waits ends here.
                    None if self.ending => self.finish(number, Err(Errno::ECANCELED), context),
                    None => self.submit(number, context),
                }
            }
        }
    }

    /// Answers a job, and forgets it.
    fn finish(&mut self, number: usize, status: Status, context: &Context) {
        let Some(Job { command, slice, .. }) = self.remove(number) else { return };
        let Some(agreed) = self.agreed.clone() else { return };
        let asked = Asked { cookie: command.cookie, offset: command.offset };
        match (status, command.kind, slice) {
            (Ok(()), Kind::Read, Some(slice)) => {
                let length = command.length as u32;
                let buffers = self.pool.buffers(&slice, length);
                self.output.write(|out| agreed.replies.read(out, asked, length));
                self.output.write_data(buffers, slice);
            }
            (Ok(()), _, slice) => {
                slice.into_iter().for_each(|slice| self.pool.free(slice));
                self.output.write(|out| agreed.replies.done(out, asked));
            }
            (Err(errno), _, slice) => {
                slice.into_iter().for_each(|slice| self.pool.free(slice));
                let is_cancelled = errno == Errno::ECANCELED;
                let error = if is_cancelled && context.shared.ends() {
                    ErrorCode::Shutdown
                } else {
                    ErrorCode::from(errno)
                };
                self.answer_error(asked, error, &errno.to_string());
            }
        }
    }

    fn finish_status(
        &mut self,
        number: usize,
        extents: io::Result<Vec<Extent>>,
        context: &Context,
    ) {
        match extents {
            Ok(extents) if !extents.is_empty() => {
                let Some(Job { command, .. }) = self.remove(number) else { return };
                let Some(agreed) = self.agreed.clone() else { return };
                let asked = Asked { cookie: command.cookie, offset: command.offset };
                self.output.write(|out| agreed.replies.block_status(out, asked, &extents));
            }
            Ok(_) => self.finish(number, Err(Errno::EIO), context),
            Err(error) => {
                let errno = Errno::from_raw(error.raw_os_error().unwrap_or(0));
                self.finish(number, Err(errno), context);
            }
        }
    }

    fn answer_error(&mut self, asked: Asked, error: ErrorCode, text: &str) {
        if let Some(agreed) = &self.agreed {
            let replies = agreed.replies;
            self.output.write(|out| replies.error(out, asked, error, text));
        }
    }
}
