//! A disk's frontend: a thread that accepts connections, and one for each that hands queues to
//! the queue threads as its hypervisor starts and stops them.
//!
//! Two hypervisors may be connected at once, while a guest moves from one to the other. Always
//! true: the rings of one connection run at a time; those of another wait until the first
//! has stopped its own, and heard of it.

use std::any::Any;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use upcall_ring::Doorbell;
use upcall_vhost::{BlkConfig, Ended, Listener, QueueHost, Stopped, VirtQueue, serve_connection};

use crate::config::{LogLevel, LogSink};
use crate::engine::Command;
use crate::hosts::EngineHandle;
use crate::worker::StoppingQueue;

/// Most connections at a time: who moves needs two, who reconnects may have one more that we
/// have not seen end. Others wait.
const CONNECTIONS_MAX: usize = 4;
/// How often somebody who waits for something looks whether it is still worth it.
const WAIT_INTERVAL: Duration = Duration::from_millis(20);
/// How long somebody else's rings may be in the way before that is said.
const PATIENCE: Duration = Duration::from_secs(2);

/// Where a disk's queue threads come from. They may be there all the time ([`Served`]), or
/// only while the disk is in use here.
pub(crate) trait Supply: Send + Sync {
    /// A guest is about to use the disk: its queue threads. Blocks until they are there, or
    /// `is_over`: then none.
    fn take(&self, is_over: &mut dyn FnMut() -> bool) -> Option<Vec<EngineHandle>>;

    /// No ring runs any more.
    fn leave(&self, left: Left);

    /// The guest's memory is being copied elsewhere from now on, or no more.
    fn moving(&self, _on: bool) {}
}

/// How a guest has left a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// For a while.
    Stopped,
    /// While its memory was copied elsewhere, and nobody else is connected: for another host.
    Moved,
    /// Nobody is connected any more.
    Gone,
}

/// Queue threads that are always there.
pub(crate) struct Served(pub(crate) Vec<EngineHandle>);

impl Supply for Served {
    fn take(&self, _is_over: &mut dyn FnMut() -> bool) -> Option<Vec<EngineHandle>> {
        Some(self.0.clone())
    }

    fn leave(&self, _left: Left) {}
}

/// See the module.
/// Dropping it ends the connection, its queues first, and removes the socket.
pub(crate) struct Frontend {
    shutdown: Doorbell,
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    socket: Option<PathBuf>,
    config: Arc<BlkConfig>,
}

impl Frontend {
    pub(crate) fn start(
        disk: Arc<str>,
        listener: Listener,
        config: Arc<BlkConfig>,
        supply: Arc<dyn Supply>,
        drain_ms: u64,
        log: LogSink,
    ) -> std::io::Result<Frontend> {
        let shutdown = Doorbell::new()?;
        let socket = listener.path().map(Path::to_owned);
        let ending = Arc::new(AtomicBool::new(false));
        let say = Say { disk, log };
        let name = format!("vhost-{}", say.disk);
        let accepting = Accepting {
            listener,
            config: config.clone(),
            shutdown: shutdown.clone(),
            ending: ending.clone(),
            supply,
            drain_ms,
            turn: Arc::default(),
            connected: Arc::default(),
            say,
        };
        let thread = std::thread::Builder::new().name(name).spawn(move || accepting.run())?;
        Ok(Frontend { shutdown, ending, thread: Some(thread), socket, config })
    }

    /// Where it listens, if it made the socket.
    pub(crate) fn socket(&self) -> Option<&Path> {
        self.socket.as_deref()
    }

    /// The disk as its guest sees it.
    pub(crate) fn config(&self) -> &BlkConfig {
        &self.config
    }

    /// Begins to end it; returns at once.
    pub(crate) fn end(&self) {
        self.ending.store(true, Ordering::SeqCst);
        self.shutdown.ring();
    }
}

impl Drop for Frontend {
    fn drop(&mut self) {
        self.end();
        // A thread that panicked has said so; its queues are stopped by their owners.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Says something of a disk.
#[derive(Clone)]
struct Say {
    disk: Arc<str>,
    log: LogSink,
}

impl Say {
    fn say(&self, level: LogLevel, text: &str) {
        (self.log)(level, &format!("disk {}: {text}", self.disk));
    }
}

struct Accepting {
    listener: Listener,
    config: Arc<BlkConfig>,
    shutdown: Doorbell,
    ending: Arc<AtomicBool>,
    supply: Arc<dyn Supply>,
    drain_ms: u64,
    turn: Arc<Turn>,
    /// How many connections there are.
    connected: Arc<AtomicUsize>,
    say: Say,
}

impl Accepting {
    /// Returns once all connections have ended.
    fn run(&self) {
        let mut connections: Vec<JoinHandle<()>> = Vec::new();
        let mut number = 0;
        while let Some(stream) = self.accept() {
            number += 1;
            match self.serve(stream, number) {
                Ok(connection) => connections.push(connection),
                Err(error) => {
                    let text = format!("a frontend is turned away: {error}");
                    self.say.say(LogLevel::Error, &text);
                }
            }
            connections.retain(|connection| !connection.is_finished());
            while connections.len() >= CONNECTIONS_MAX && !self.ending.load(Ordering::SeqCst) {
                std::thread::sleep(WAIT_INTERVAL);
                connections.retain(|connection| !connection.is_finished());
            }
        }
        // One that panicked has said so.
        connections.into_iter().for_each(|connection| drop(connection.join()));
    }

    fn accept(&self) -> Option<UnixStream> {
        self.listener.accept(self.shutdown.as_fd()).unwrap_or_else(|error| {
            let text = format!("no more connections can be taken: {error}; serve it anew");
            self.say.say(LogLevel::Error, &text);
            None
        })
    }

    fn serve(&self, stream: UnixStream, number: u64) -> std::io::Result<JoinHandle<()>> {
        let queues = usize::from(self.config.queues());
        let mut queues = Queues {
            turn: self.turn.clone(),
            supply: self.supply.clone(),
            connected: self.connected.clone(),
            is_logged: false,
            number,
            stream: stream.try_clone()?,
            say: self.say.clone(),
            drain_ms: self.drain_ms,
            ending: self.ending.clone(),
            started: vec![false; queues],
            stopping: (0..queues).map(|_| None).collect(),
            engines: Vec::new(),
        };
        let (config, shutdown, say) =
            (self.config.clone(), self.shutdown.clone(), self.say.clone());
        say.say(LogLevel::Info, "a frontend connected");
        let name = format!("vhost{number}-{}", say.disk);
        self.connected.fetch_add(1, Ordering::SeqCst);
        std::thread::Builder::new().name(name).spawn(move || {
            match serve_connection(stream, config, &mut queues, shutdown.as_fd()) {
                Ok(Ended::PeerClosed) => say.say(LogLevel::Info, "the frontend disconnected"),
                Ok(Ended::ShutDown) => {}
                Err(error) => say.say(LogLevel::Warn, &format!("the connection ended: {error}")),
            }
            if queues.is_logged {
                queues.supply.moving(false);
            }
            if queues.connected.fetch_sub(1, Ordering::SeqCst) == 1
                && !queues.ending.load(Ordering::SeqCst)
            {
                queues.supply.leave(Left::Gone);
            }
        })
    }
}

/// Whose rings may run: the number of a connection, if it has any.
#[derive(Default)]
struct Turn {
    of: Mutex<Option<u64>>,
    free: Condvar,
}

impl Turn {
    fn lock(&self) -> MutexGuard<'_, Option<u64>> {
        self.of.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it is nobody's, and takes it; gives up when `is_over` says so.
    fn take(&self, number: u64, mut is_over: impl FnMut() -> bool) -> bool {
        let mut of = self.lock();
        while of.is_some_and(|other| other != number) {
            if is_over() {
                return false;
            }
            let waited = self.free.wait_timeout(of, WAIT_INTERVAL);
            (of, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        *of = Some(number);
        true
    }

    fn give_back(&self, number: u64) {
        let mut of = self.lock();
        if *of == Some(number) {
            *of = None;
            self.free.notify_all();
        }
    }
}

/// The queue threads of a disk, as a connection sees them.
struct Queues {
    turn: Arc<Turn>,
    /// The connection's.
    number: u64,
    /// The connection, to see whether it has ended.
    stream: UnixStream,
    say: Say,
    supply: Arc<dyn Supply>,
    connected: Arc<AtomicUsize>,
    /// The guest's memory is being copied elsewhere.
    is_logged: bool,
    /// Those that were supplied, while it has its turn.
    engines: Vec<EngineHandle>,
    /// How long requests that filters hold may take when a ring stops.
    drain_ms: u64,
    /// It is we who end the connection.
    ending: Arc<AtomicBool>,
    /// By queue, as the two that follow.
    started: Vec<bool>,
    stopping: Vec<Option<StoppingQueue>>,
}

fn has_hung_up(stream: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(stream, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}

impl QueueHost for Queues {
    fn claim(&mut self) -> bool {
        let began = std::time::Instant::now();
        let mut is_said = false;
        let (say, ending, stream) = (&self.say, &self.ending, self.stream.as_fd());
        let mut is_over = || ending.load(Ordering::SeqCst) || has_hung_up(stream);
        let has_turn = self.turn.take(self.number, || {
            if !is_said && began.elapsed() > PATIENCE {
                is_said = true;
                let text = "a frontend wants to start while another one's guest uses the disk: \
                            it waits until that one stops or disconnects";
                say.say(LogLevel::Warn, text);
            }
            is_over()
        });
        if !has_turn {
            return false;
        }
        // Where it was in the way of another end, it is not to begin now.
        let supplied = if is_over() { None } else { self.supply.take(&mut is_over) };
        if supplied.is_none() {
            self.turn.give_back(self.number);
        }
        self.engines = supplied.unwrap_or_default();
        !self.engines.is_empty()
    }

    fn release(&mut self) {
        let is_alone = self.connected.load(Ordering::SeqCst) == 1;
        let moved = self.is_logged && is_alone && !self.ending.load(Ordering::SeqCst);
        self.supply.leave(if moved { Left::Moved } else { Left::Stopped });
        self.turn.give_back(self.number);
    }

    fn logging(&mut self, on: bool) {
        self.is_logged = on;
        self.supply.moving(on);
        let text = match on {
            true => "its guest's memory is copied elsewhere (a migration): writes to it are logged",
            false => "its guest's memory is no longer copied: writes to it are not logged",
        };
        self.say.say(LogLevel::Info, text);
    }

    fn start(&mut self, index: u16, queue: VirtQueue) {
        self.started[usize::from(index)] = true;
        self.engines[usize::from(index)].send(Command::Start(Box::new(queue)));
    }

    fn stop(&mut self, index: u16) -> Stopped {
        let at = usize::from(index);
        self.started[at] = false;
        let stopping = self.stopping[at].take();
        let queue = stopping
            .unwrap_or_else(|| StoppingQueue::begin(&self.engines[at], self.drain_ms))
            .wait()
            .map(|queue| queue as Box<dyn Any>)
            .and_then(|queue| queue.downcast::<VirtQueue>().ok());
        match queue {
            Some(queue) => queue.finish(),
            None => unreachable!("a queue thread that lives gives back the queue it was given"),
        }
    }

    fn disconnected(&mut self) {
        // Nobody waits for what filters hold, unless it is we who go.
        let drain_ms = if self.ending.load(Ordering::SeqCst) { self.drain_ms } else { 0 };
        // All at once: their patience runs in parallel.
        for (at, engine) in self.engines.iter().enumerate().filter(|(at, _)| self.started[*at]) {
            self.stopping[at] = Some(StoppingQueue::begin(engine, drain_ms));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use upcall_vhost::mock;

    use super::*;

    /// Two queues that run, whose threads are the test.
    fn running(drain_ms: u64) -> (Queues, Vec<Receiver<Command>>) {
        let (engines, receivers): (Vec<_>, Vec<_>) = (0..3)
            .map(|_| {
                let (commands, receiver) = channel();
                (EngineHandle { commands, wake: Doorbell::new().unwrap() }, receiver)
            })
            .unzip();
        let mut queues = Queues {
            turn: Arc::default(),
            number: 1,
            stream: UnixStream::pair().unwrap().0,
            say: Say { disk: "disk".into(), log: Arc::new(|_, _| {}) },
            supply: Arc::new(Served(Vec::new())),
            connected: Arc::default(),
            is_logged: false,
            engines,
            drain_ms,
            ending: Arc::default(),
            started: vec![false; 3],
            stopping: vec![None, None, None],
        };
        let memory = Arc::new(mock::Memory::new(1 << 20));
        let device = mock::Device::with_capacity(1 << 20, memory.table());
        for index in 0..2 {
            let driver = mock::Driver::new(memory.clone(), 16, false, 7);
            queues.start(index, device.queue(&driver));
        }
        (queues, receivers)
    }

    /// Plays a queue thread that is told to stop: how patiently?
    fn stopped(receiver: &Receiver<Command>) -> u64 {
        let Ok(Command::Start(queue)) = receiver.try_recv() else { panic!("not started") };
        let Ok(Command::Stop { drain_ms, reply }) = receiver.try_recv() else {
            panic!("not stopped yet")
        };
        reply.send(Some(queue)).unwrap();
        drain_ms
    }

    #[test]
    fn a_connection_that_ends_stops_all_its_queues_at_once_and_nobody_waits_for_filters() {
        let (mut queues, receivers) = running(500);
        queues.disconnected();
        assert_eq!([stopped(&receivers[0]), stopped(&receivers[1])], [0, 0]);
        assert!(receivers[2].try_recv().is_err(), "it does not run");
        assert_eq!(queues.stop(0).next_available(), 7);
        assert_eq!(queues.stop(1).next_available(), 7);
    }

    #[test]
    fn when_it_is_we_who_end_it_filters_have_their_time() {
        let (mut queues, receivers) = running(500);
        queues.ending.store(true, Ordering::SeqCst);
        queues.disconnected();
        assert_eq!([stopped(&receivers[0]), stopped(&receivers[1])], [500, 500]);
    }

    #[test]
    fn one_ring_that_stops_leaves_the_others() {
        let (mut queues, receivers) = running(500);
        std::thread::scope(|scope| {
            let stopping = scope.spawn(|| queues.stop(1).next_available());
            let Ok(Command::Start(queue)) = receivers[1].recv() else { panic!("not started") };
            let Ok(Command::Stop { drain_ms, reply }) = receivers[1].recv() else {
                panic!("not stopped")
            };
            assert_eq!(drain_ms, 500);
            reply.send(Some(queue)).unwrap();
            assert_eq!(stopping.join().unwrap(), 7);
        });
        assert!(matches!(receivers[0].try_recv(), Ok(Command::Start(_))));
        assert!(receivers[0].try_recv().is_err());
        queues.disconnected();
        assert!(matches!(receivers[0].try_recv(), Ok(Command::Stop { drain_ms: 0, .. })));
        assert!(receivers[1].try_recv().is_err(), "it has stopped already");
    }

    #[test]
    fn one_connections_rings_run_at_a_time_and_who_gives_up_gets_none() {
        let turn = Turn::default();
        assert!(turn.take(1, || true));
        assert!(turn.take(1, || panic!("it has it already")));
        assert!(!turn.take(2, || true));
        turn.give_back(2);
        assert!(!turn.take(2, || true), "it was not its own to give back");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| turn.take(2, || false));
            std::thread::sleep(WAIT_INTERVAL * 2);
            assert!(!waiting.is_finished());
            turn.give_back(1);
            assert!(waiting.join().unwrap());
        });
        assert!(!turn.take(1, || true));
    }
}
