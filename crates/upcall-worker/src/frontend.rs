//! A disk's frontend: one thread that accepts connections, one after the other, and hands
//! queues to the queue threads as the hypervisor starts and stops them.

use std::any::Any;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use std::os::fd::AsFd;
use upcall_ring::Doorbell;
use upcall_vhost::{BlkConfig, Ended, Listener, QueueHost, Stopped, VirtQueue, serve_connection};

use crate::config::{LogLevel, LogSink};
use crate::engine::Command;
use crate::hosts::EngineHandle;
use crate::worker::stop_queue;

/// See the module.
pub(crate) struct Frontend {
    shutdown: Doorbell,
    thread: JoinHandle<()>,
    socket: Option<PathBuf>,
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
            Accepting { disk, listener, config, shutdown: shutdown.clone(), drain_ms, log };
        let mut queues = Queues { engines, drain_ms };
        let name = format!("vhost-{}", accepting.disk);
        let thread =
            std::thread::Builder::new().name(name).spawn(move || accepting.run(&mut queues))?;
        Ok(Frontend { shutdown, thread, socket })
    }

    /// Where it listens, if it made the socket.
    pub(crate) fn socket(&self) -> Option<&Path> {
        self.socket.as_deref()
    }

    /// Ends the connection, its queues first, and removes the socket.
    pub(crate) fn stop(self) {
        self.shutdown.ring();
        // A thread that panicked has said so; its queues are stopped by their owners.
        let _ = self.thread.join();
    }
}

struct Accepting {
    disk: Arc<str>,
    listener: Listener,
    config: Arc<BlkConfig>,
    shutdown: Doorbell,
    drain_ms: u64,
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
            queues.drain_ms = self.drain_ms;
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
    /// How long requests that filters hold may take when a ring stops; 0 once nobody waits
    /// for their answers any more.
    drain_ms: u64,
}

impl QueueHost for Queues {
    fn start(&mut self, index: u16, queue: VirtQueue) {
        self.engines[usize::from(index)].send(Command::Start(Box::new(queue)));
    }

    fn stop(&mut self, index: u16) -> Stopped {
        let queue = stop_queue(&self.engines[usize::from(index)], self.drain_ms);
        let queue = queue
            .map(|queue| queue as Box<dyn Any>)
            .and_then(|queue| queue.downcast::<VirtQueue>().ok());
        match queue {
            Some(queue) => queue.finish(),
            None => unreachable!("a queue thread gives back the queue that it was given"),
        }
    }

    fn disconnected(&mut self) {
        self.drain_ms = 0;
    }
}
