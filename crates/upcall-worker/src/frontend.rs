//! A disk's frontend: one thread that accepts connections, one after the other, and hands
//! queues to the queue threads as the hypervisor starts and stops them.

use std::any::Any;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use std::os::fd::AsFd;
use upcall_ring::Doorbell;
use upcall_vhost::{BlkConfig, Ended, Listener, QueueHost, Stopped, VirtQueue, serve_connection};

use crate::config::{LogLevel, LogSink};
use crate::engine::Command;
use crate::hosts::EngineHandle;
use crate::worker::StoppingQueue;

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
        engines: Vec<EngineHandle>,
        drain_ms: u64,
        log: LogSink,
    ) -> std::io::Result<Frontend> {
        let shutdown = Doorbell::new()?;
        let socket = listener.path().map(Path::to_owned);
        let accepting =
            Accepting { disk, listener, config: config.clone(), shutdown: shutdown.clone(), log };
        let ending = Arc::new(AtomicBool::new(false));
        let stopping = engines.iter().map(|_| None).collect();
        let started = vec![false; engines.len()];
        let mut queues = Queues { engines, drain_ms, ending: ending.clone(), started, stopping };
        let name = format!("vhost-{}", accepting.disk);
        let thread =
            std::thread::Builder::new().name(name).spawn(move || accepting.run(&mut queues))?;
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

struct Accepting {
    disk: Arc<str>,
    listener: Listener,
    config: Arc<BlkConfig>,
    shutdown: Doorbell,
    log: LogSink,
}

impl Accepting {
    fn run(&self, queues: &mut Queues) {
        loop {
            let stream = match self.listener.accept(self.shutdown.as_fd()) {
                Ok(Some(stream)) => stream,
                Ok(None) => return,
                Err(error) => {
                    self.say(
                        LogLevel::Error,
                        &format!("no more connections can be taken: {error}; serve it anew"),
                    );
                    return;
                }
            };
            self.say(LogLevel::Info, "a frontend connected");
            match serve_connection(stream, self.config.clone(), queues, self.shutdown.as_fd()) {
                Ok(Ended::PeerClosed) => self.say(LogLevel::Info, "the frontend disconnected"),
                Ok(Ended::ShutDown) => return,
                Err(error) => self.say(LogLevel::Warn, &format!("the connection ended: {error}")),
            }
        }
    }

    fn say(&self, level: LogLevel, text: &str) {
        (self.log)(level, &format!("disk {}: {text}", self.disk));
    }
}

/// The queue threads of a disk, as its connection sees them.
struct Queues {
    engines: Vec<EngineHandle>,
    /// How long requests that filters hold may take when a ring stops.
    drain_ms: u64,
    /// It is we who end the connection.
    ending: Arc<AtomicBool>,
    /// By queue, as the two that follow.
    started: Vec<bool>,
    stopping: Vec<Option<StoppingQueue>>,
}

impl QueueHost for Queues {
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
}
