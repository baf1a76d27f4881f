//! The one thread that carries requests to the daemon and completions back, and that starts
//! another daemon when one is gone.
//!
//! Decisions are the [`Ledger`]'s; here is what happens. Data goes through memory shared with
//! the daemon: a write's is copied there once, when it is first sent, and a read's is copied
//! from there when it has ended, so that the daemon never sees a guest's memory and a guest
//! never a second look.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use upcall_block::{Errno, Op, Range, Status, StoreDone, StoreIo, StoreToken};
use upcall_ring::{Arena, ArenaSlice, Buffers, Doorbell, PAGE_SIZE, Turn, Waiter};

use crate::image::daemon::{Daemon, Starter};
use crate::image::ledger::{Ask, Key, Ledger, Next, Outcome};
use crate::image::plan::Plan;
use crate::image::ring::{ClientRing, Command, SLOT_COUNT};
use crate::image::vhost::{Client, Device};
use crate::image::{Message, Port, Shared};
use crate::raw::Inbox;

/// Bytes for data on its way and data kept until it is durable.
pub(crate) const DATA_BYTES: usize = 32 << 20;
/// More than this in use: a flush of our own is due.
const TIGHT_PAGES: u32 = (DATA_BYTES / PAGE_SIZE / 2) as u32;
/// As for memory, where requests need none.
const KEPT_MAX: usize = 4096;
/// Largest piece of a read or write.
const DATA_PIECE_BYTES: u32 = 4 << 20;
/// Daemons in a row that end before they have completed anything, and for how long: after
/// both, there will be no other.
const ATTEMPTS_MAX: u32 = 8;
const USELESS_MAX: Duration = Duration::from_secs(60);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// How often a thread that has too much to do to sleep looks how the daemon is.
const CHECK_NS: u64 = 100_000_000;
/// How long a daemon may take to close the image.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// A daemon and the way to it.
pub(crate) struct Link {
    daemon: Daemon,
    client: Client,
    kick: Doorbell,
    call: Doorbell,
}

impl Link {
    /// Starts a daemon, and waits until it serves the image.
    pub fn start(
        starter: &Starter,
        ring: &ClientRing,
        patience: Duration,
    ) -> Result<(Link, Device), String> {
        let said = |error: io::Error| error.to_string();
        let (kick, call) = (Doorbell::new().map_err(said)?, Doorbell::new().map_err(said)?);
        let (mut daemon, socket) =
            starter.start().map_err(|error| format!("cannot start it: {error}"))?;
        let started = Client::new(socket, patience).and_then(|mut client| {
            let device = client.start(ring, kick.as_fd(), call.as_fd())?;
            Ok((client, device))
        });
        match started {
            Ok((client, device)) => Ok((Link { daemon, client, kick, call }, device)),
            // Its own words say more than that the socket was closed.
            Err(error) if is_end(&error) => Err(daemon.end_within(Duration::from_secs(1))),
            Err(error) => {
                daemon.kill();
                Err(format!("it {error}"))
            }
        }
    }
}

fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), UnexpectedEof | BrokenPipe | ConnectionReset)
}

/// See the module.
pub(crate) struct Keeper {
    shared: Arc<Shared>,
    port: Arc<Port>,
    plan: Arc<Plan>,
    starter: Starter,
    device: Device,
    /// None: given up.
    link: Option<Link>,
    ring: ClientRing,
    arena: Arena,
    ledger: Ledger<ArenaSlice>,
    /// What is in each slot of the ring, and since when.
    slots: [Option<(Key, Instant)>; SLOT_COUNT],
    parents: HashMap<u64, Parent>,
    next_parent: u64,
    /// Daemons in a row that have completed nothing, and since when.
    attempts: u32,
    useless_since: Instant,
    patience: Duration,
}

/// A request of a queue, of which the ledger has pieces.
struct Parent {
    token: StoreToken,
    inbox: Arc<Inbox>,
    range: Range,
    data: Buffers,
    pieces_left: u32,
    status: Status,
}

impl Keeper {
    pub fn new(
        shared: Arc<Shared>,
        port: Arc<Port>,
        plan: Arc<Plan>,
        starter: Starter,
        ring: ClientRing,
        (link, device): (Link, Device),
        patience: Duration,
    ) -> io::Result<Keeper> {
        let arena = Arena::new(ring.memory().clone(), ring.data_offset(), DATA_BYTES)?;
        let mut ledger = Ledger::new();
        if shared.failure.get().is_some() {
            // As it was under whoever opened the image before.
            ledger.fail(&mut Outcome::default());
        }
        Ok(Keeper {
            shared,
            port,
            plan,
            starter,
            device,
            link: Some(link),
            ring,
            arena,
            ledger,
            slots: [const { None }; SLOT_COUNT],
            parents: HashMap::new(),
            next_parent: 0,
            attempts: 0,
            useless_since: Instant::now(),
            patience,
        })
    }

    /// Serves until there will be no more requests, and ends the daemon in order.
    pub fn run(mut self) {
        let mut messages = Vec::new();
        let mut is_stopping = false;
        let mut waiter = Waiter::default();
        let start = Instant::now();
        let now_ns = || start.elapsed().as_nanos() as u64;
        let mut checked_ns = 0;
        loop {
            self.port.take(&mut messages);
            let mut is_busy = !messages.is_empty();
            for message in messages.drain(..) {
                match message {
                    Message::Ask(io, inbox) => self.admit(io, inbox),
                    Message::Stop => {
                        is_stopping = true;
                        // What only the daemon has shall not end with it.
                        self.ledger.want_flush();
                    }
                }
            }
            match self.turn() {
                Ok(did) => is_busy |= did,
                Err(reason) => {
                    self.recover(&reason);
                    continue;
                }
            }
            let is_idle = self.ledger.is_idle() && self.ledger.next().is_none();
            if is_stopping && (is_idle || self.link.is_none()) {
                break;
            }
            if self.ring.busy_count() == 0 && self.link.is_some() && self.ledger.next().is_some() {
                continue;
            }
            let looked_ns = now_ns();
            match waiter.turn(is_busy, looked_ns) {
                Turn::Sleep => {
                    if self.port.before_sleep() && self.ring.before_sleep() {
                        self.watch(true);
                        self.ring.after_sleep();
                    }
                    checked_ns = now_ns();
                }
                _ if looked_ns - checked_ns > CHECK_NS => {
                    self.watch(false);
                    checked_ns = looked_ns;
                }
                Turn::Yield => {
                    rustix::thread::sched_yield();
                    waiter.yielded(now_ns() - looked_ns);
                }
                Turn::Poll => std::hint::spin_loop(),
            }
        }
        self.end();
    }

    /// Takes a request apart and into the ledger.
    fn admit(&mut self, io: StoreIo, inbox: Arc<Inbox>) {
        let StoreIo { token, op, range, flags, data } = io;
        let refused = if op.has_data() && data.len() != range.length() as usize {
            Some(Err(Errno::EINVAL))
        } else if self.link.is_none() {
            Some(Err(Errno::EIO))
        } else if op.is_modification() && self.device.is_read_only {
            Some(Err(Errno::EROFS))
        } else if op != Op::Flush && range.length() == 0 {
            Some(Ok(()))
        } else {
            None
        };
        if let Some(status) = refused {
            drop(data);
            inbox.push(StoreDone { token, status });
            return;
        }
        let piece_max = match op {
            Op::Read | Op::Write => DATA_PIECE_BYTES,
            Op::Flush => u32::MAX,
            // Whole mebibytes, so that pieces begin where clusters do.
            Op::Discard | Op::WriteZeroes => {
                let bytes = u64::from(self.device.write_zeroes_max) * 512;
                (bytes.min(1 << 30) as u32 & !0xf_ffff).max(512)
            }
        };
        let id = self.next_parent;
        self.next_parent += 1;
        let unmap = op == Op::Discard || flags.unmap;
        let pieces_left = range.length().div_ceil(piece_max).max(1);
        self.parents.insert(id, Parent { token, inbox, range, data, pieces_left, status: Ok(()) });
        let mut out = Outcome::default();
        for piece in 0..pieces_left {
            let range = range.part(piece.saturating_mul(piece_max), piece_max);
            self.ledger.push(Ask { id, op, range, fua: flags.fua, unmap }, &mut out);
        }
        self.settle(out);
    }

    /// One round: completions in, requests out. True if there were completions.
    fn turn(&mut self) -> Result<bool, String> {
        let has_reaped = self.reap()?;
        self.fly();
        Ok(has_reaped)
    }

    fn reap(&mut self) -> Result<bool, String> {
        if self.link.is_none() {
            return Ok(false);
        }
        let mut ended = Vec::new();
        let result = self.ring.reap(&mut ended);
        let mut out = Outcome::default();
        let has_reaped = !ended.is_empty();
        for (slot, status) in ended {
            let Some((key, _)) = self.slots[slot].take() else { continue };
            self.attempts = 0;
            if status.is_ok() {
                self.fetch(key);
            }
            self.ledger.complete(key, status, &mut out);
        }
        let is_lost = out.is_lost;
        self.settle(out);
        if is_lost {
            self.lose();
        }
        result.map(|()| has_reaped).map_err(|violation| format!("it {}", violation.0))
    }

    /// A read's data, from the daemon's memory to the guest's.
    fn fetch(&mut self, key: Key) {
        if let Some(ask) = self.ledger.flying(key)
            && ask.op == Op::Read
            && let Some(slice) = self.ledger.memory(key)
            && let Some(parent) = self.parents.get(&ask.id)
        {
            let here = self.arena.buffers(slice, ask.range.length());
            here.copy_to(&parent.part(ask.range));
        }
    }

    /// Sends what can be sent.
    fn fly(&mut self) {
        let Some(link) = &self.link else { return };
        if self.arena.in_use_pages() > TIGHT_PAGES || self.ledger.kept_count() > KEPT_MAX {
            self.ledger.want_flush();
        }
        let mut has_sent = false;
        while let Some(slot) = self.ring.free_slot()
            && let Some(next) = self.ledger.next()
        {
            let mut memory = None;
            if next.op.has_data() && self.ledger.memory(next.key).is_none() {
                memory = self.arena.allocate(next.range.length());
                let Some(slice) = &memory else {
                    // Either what is kept gives way to a flush, or what flies will land.
                    self.ledger.want_flush();
                    if self.ledger.next().is_some_and(|next| next.key == Key::OwnFlush) {
                        continue;
                    }
                    break;
                };
                if next.op == Op::Write
                    && let Some(parent) = next.id.and_then(|id| self.parents.get(&id))
                {
                    let there = self.arena.buffers(slice, next.range.length());
                    parent.part(next.range).copy_to(&there);
                }
            }
            self.ledger.launch(&next, memory);
            let at = self.ledger.memory(next.key).map_or(0, ArenaSlice::offset);
            self.ring.submit(slot, command(&next, at));
            self.slots[slot] = Some((next.key, Instant::now()));
            has_sent = true;
        }
        if has_sent && self.ring.wants_kick() {
            link.kick.ring();
        }
    }

    /// Hands on what has ended, and takes memory back.
    fn settle(&mut self, out: Outcome<ArenaSlice>) {
        for slice in out.freed {
            self.arena.free(slice);
        }
        for (id, status) in out.ended {
            let Some(parent) = self.parents.get_mut(&id) else { continue };
            parent.pieces_left -= 1;
            parent.status = parent.status.and(status);
            if parent.pieces_left > 0 {
                continue;
            }
            if let Some(Parent { token, inbox, data, status, .. }) = self.parents.remove(&id) {
                // The guest's memory is let go before the guest can hear of it.
                drop(data);
                inbox.push(StoreDone { token, status });
            }
        }
        if self.ledger.has_failed() {
            self.shared.fail(
                "a flush failed: what was not written cannot be known, so nothing more is written",
            );
        }
    }

    /// What was kept cannot be written again: the daemon goes, so that nothing flies, and
    /// another one serves what can still be read.
    fn lose(&mut self) {
        self.shared.fail(
            "what was written before could not be written again to the image after \
             qemu-storage-daemon had ended, so nothing more is written",
        );
        self.ground();
        let mut out = Outcome::default();
        self.ledger.fail(&mut out);
        self.settle(out);
        self.revive();
    }

    /// The daemon is gone or of no use any more.
    fn recover(&mut self, reason: &str) {
        let ended = self.ground();
        self.shared
            .tell(&format!("qemu-storage-daemon is started again: {reason} (the old one {ended})"));
        self.revive();
    }

    /// Ends the daemon; nothing flies any more. Says how it ended.
    fn ground(&mut self) -> String {
        let ended = self.link.take().map(|mut link| link.daemon.kill());
        self.slots.fill(None);
        self.ring.reset();
        self.ledger.restart();
        ended.unwrap_or_default()
    }

    /// Starts another daemon; after too many in a row that were of no use, none.
    fn revive(&mut self) {
        loop {
            if self.attempts == 0 {
                self.useless_since = Instant::now();
            }
            self.attempts += 1;
            if self.attempts > ATTEMPTS_MAX && self.useless_since.elapsed() > USELESS_MAX {
                self.shared.fail(&format!(
                    "{} qemu-storage-daemons in a row served nothing; the disk gives \
                     errors until it is served anew",
                    self.attempts - 1
                ));
                let mut out = Outcome::default();
                self.ledger.give_up(&mut out);
                return self.settle(out);
            }
            if self.attempts > 1 {
                let pause = Duration::from_millis(50 << self.attempts.min(10));
                std::thread::sleep(pause.min(PAUSE_MAX));
            }
            self.ring.reset();
            match Link::start(&self.starter, &self.ring, self.patience) {
                Ok((link, device)) if device == self.device => {
                    self.link = Some(link);
                    return;
                }
                Ok((mut link, device)) => {
                    link.daemon.kill();
                    let text = format!("it is another disk now: {device:?}, not {:?}", self.device);
                    self.shared.tell(&text);
                }
                Err(what) => {
                    self.shared.tell(&format!("qemu-storage-daemon does not start again: {what}"))
                }
            }
        }
    }

    /// Looks how the daemon is, and ends it if it has a request for too long. `sleeps`: first waits
    /// until something happens, or that is so.
    fn watch(&mut self, sleeps: bool) {
        let oldest = self.slots.iter().flatten().map(|(_, since)| *since).min();
        let Some(link) = &mut self.link else {
            if sleeps {
                let mut fds = [PollFd::from_borrowed_fd(self.port.doorbell(), PollFlags::IN)];
                let _ = rustix::event::poll(&mut fds, None);
            }
            return;
        };
        let until_late = |since: Instant| {
            let left = (since + self.patience).saturating_duration_since(Instant::now());
            // Rounded up, so that the time is over when it wakes.
            let tv_nsec = i64::from(left.subsec_nanos() | 0xf_ffff).min(999_999_999);
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec }
        };
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let limit = if sleeps { oldest.map(until_late) } else { Some(at_once) };
        let (is_gone, has_said) = {
            let mut fds = vec![
                PollFd::from_borrowed_fd(self.port.doorbell(), PollFlags::IN),
                PollFd::new(&link.call, PollFlags::IN),
                PollFd::from_borrowed_fd(link.client.fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(link.daemon.pidfd(), PollFlags::IN),
            ];
            fds.extend(link.daemon.stderr().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            let _ = rustix::event::poll(&mut fds, limit.as_ref());
            link.call.clear();
            let is_ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
            (is_ready(2) || is_ready(3), is_ready(4))
        };
        if has_said {
            link.daemon.listen();
        }
        let reason = if is_gone {
            let ended = link.daemon.has_ended();
            Some(if ended { "it has ended" } else { "it closed the connection" }.to_owned())
        } else {
            let is_late = oldest.is_some_and(|since| since.elapsed() >= self.patience);
            is_late.then(|| format!("it has not answered for {} ms", self.patience.as_millis()))
        };
        if let Some(reason) = reason {
            // What it completed before counts.
            let _ = self.reap();
            // A late request may just have ended.
            let is_late = |(_, since): &(Key, Instant)| since.elapsed() >= self.patience;
            if is_gone || self.slots.iter().flatten().any(is_late) {
                self.recover(&reason);
            }
        }
    }

    /// The orderly end: the daemon closes the image.
    fn end(mut self) {
        if let Some(Link { mut daemon, client, .. }) = self.link.take() {
            drop(client);
            daemon.ask_to_end();
            daemon.end_within(END_PATIENCE);
        }
        if let Err(error) = self.plan.settle() {
            let text = format!("cannot write the content id into its descriptor: {error}");
            self.shared.tell(&text);
        }
    }
}

impl Parent {
    /// The memory of a part of the request.
    fn part(&self, range: Range) -> Buffers {
        let skip = (range.offset() - self.range.offset()) as usize;
        self.data.part(skip, range.length() as usize)
    }
}

fn command(next: &Next, at: u64) -> Command {
    let (sector, length) = (next.range.offset() / 512, next.range.length());
    match next.op {
        Op::Read => Command::Read { sector, at, length },
        Op::Write => Command::Write { sector, at, length },
        Op::Flush => Command::Flush,
        Op::Discard | Op::WriteZeroes => {
            Command::WriteZeroes { sector, sectors: length / 512, unmap: next.unmap }
        }
    }
}
