//! A server: one listening socket, the exports behind it, and the threads that speak with
//! clients.
//!
//! There are as many client threads as the busiest export has queues; client thread n uses
//! queue n of each export (modulo), so that connections spread over the queue threads.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::thread::JoinHandle;

use crate::client_thread::ClientThread;
use crate::export::ExportInfo;
use crate::extents::{Extents, answer_all};
use crate::handshake::TlsMode;
use crate::listener::{Address, Listener};
use crate::queue::{Inbox, Line, NbdQueue};
use crate::tls::Tls;

/// Messages in a second; clients must not fill a log.
const MESSAGES_MAX: u32 = 20;

/// How much a message matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Something is broken.
    Error,
    /// Something is odd and was dealt with.
    Warn,
    /// Worth knowing.
    Info,
    /// For who looks for something.
    Debug,
}

/// Where messages go. Called from any thread.
#[derive(Clone)]
pub struct Log(Arc<Say>);

type Say = dyn Fn(Level, &str) + Send + Sync;

impl Log {
    /// To this function.
    pub fn new(log: impl Fn(Level, &str) + Send + Sync + 'static) -> Log {
        Log(Arc::new(log))
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Log")
    }
}

/// What clients may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at a time; more are closed at once. Each may take 9 MiB of memory.
    pub connections: usize,
    /// How long a handshake may take, TLS and all.
    pub handshake_ms: u64,
    /// How long a client may neither send the rest of what it began nor read what it asked
    /// for. An idle client may stay as long as it likes.
    pub stall_ms: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { connections: 256, handshake_ms: 10_000, stall_ms: 60_000 }
    }
}

/// An export, as it is given to a server.
#[derive(Debug)]
pub struct ExportConfig {
    /// What clients are told.
    pub info: ExportInfo,
    /// What the disk consists of; without it, clients are told that all of it is data.
    pub extents: Option<Extents>,
    /// Whatever a client changes is durable before it is answered.
    pub write_through: bool,
    /// How many queue threads serve it; at least one.
    pub queues: usize,
}

/// An export of a running server.
#[derive(Debug)]
pub(crate) struct Export {
    pub info: ExportInfo,
    pub extents: Option<Extents>,
    pub write_through: bool,
    /// At least one.
    pub lines: Vec<Arc<Line>>,
}

/// What all client threads share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub exports: Vec<Arc<Export>>,
    pub infos: Arc<[ExportInfo]>,
    pub tls: Option<Tls>,
    pub tls_mode: TlsMode,
    pub limits: Limits,
    pub inboxes: Arc<[Inbox]>,
    /// Connections, by thread.
    pub counts: Vec<AtomicUsize>,
    pub next_connection: AtomicU64,
    ends: AtomicBool,
    log: Log,
    /// The second, and how many messages there were in it.
    said: Mutex<(u64, u32)>,
}

impl Shared {
    pub fn ends(&self) -> bool {
        self.ends.load(Ordering::Relaxed)
    }

    /// Passes a message on, unless there are too many.
    pub fn log(&self, level: Level, text: &str) {
        let second = now_ns() / 1_000_000_000;
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.0 != second {
            *said = (second, 0);
        }
        said.1 += 1;
        let count = said.1;
        drop(said);
        match count {
            ..=MESSAGES_MAX => (self.log.0)(level, text),
            count if count == MESSAGES_MAX + 1 => {
                (self.log.0)(Level::Warn, "more messages about NBD clients are left out");
            }
            _ => {}
        }
    }
}

/// CLOCK_MONOTONIC in ns.
pub(crate) fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// A server before it listens.
#[derive(Debug)]
pub struct ServerBuilder {
    exports: Vec<Arc<Export>>,
    inboxes: Arc<[Inbox]>,
}

/// The queues of an export, for the worker's queue threads.
pub type Queues = Vec<NbdQueue>;

impl ServerBuilder {
    /// For these exports; gives also the queues of each. Their names differ.
    pub fn new(exports: Vec<ExportConfig>) -> io::Result<(ServerBuilder, Vec<Queues>)> {
        let threads = exports.iter().map(|export| export.queues).max().unwrap_or(1).max(1);
        let inboxes = std::iter::repeat_with(Inbox::new)
            .take(threads)
            .collect::<io::Result<Arc<[Inbox]>>>()?;
        let (mut made, mut all) = (Vec::new(), Vec::new());
        for ExportConfig { info, extents, write_through, queues } in exports {
            let pairs = (0..queues.max(1)).map(|_| NbdQueue::new(inboxes.clone()));
            let (queues, lines) = pairs.collect::<io::Result<(Vec<_>, Vec<_>)>>()?;
            made.push(Arc::new(Export { info, extents, write_through, lines }));
            all.push(queues);
        }
        Ok((ServerBuilder { exports: made, inboxes }, all))
    }

    /// Starts to serve. `tls`: there is TLS; with `required`, nothing else.
    pub fn start(
        self,
        listener: Listener,
        tls: Option<(Tls, bool)>,
        limits: Limits,
        log: Log,
    ) -> io::Result<Server> {
        let tls_mode = match &tls {
            None => TlsMode::Off,
            Some((_, false)) => TlsMode::Offered,
            Some((_, true)) => TlsMode::Required,
        };
        let threads = self.inboxes.len();
        let shared = Arc::new(Shared {
            infos: self.exports.iter().map(|export| export.info.clone()).collect(),
            exports: self.exports,
            tls: tls.map(|(tls, _)| tls),
            tls_mode,
            limits,
            inboxes: self.inboxes,
            counts: (0..threads).map(|_| AtomicUsize::new(0)).collect(),
            next_connection: AtomicU64::new(0),
            ends: AtomicBool::new(false),
            log,
            said: Mutex::new((0, 0)),
        });
        let address = listener.address().clone();
        let (sender, questions) = channel();
        let mut listener = Some(listener);
        // Dropped on an error: it ends what has been started.
        let mut server = Server { shared: shared.clone(), threads: Vec::new(), address };
        for index in 0..threads {
            let thread = ClientThread::new(index, shared.clone(), listener.take(), sender.clone())?;
            let name = format!("nbd-{index}");
            server
                .threads
                .push(std::thread::Builder::new().name(name).spawn(move || thread.run())?);
        }
        drop(sender);
        let answering = std::thread::Builder::new().name("nbd-extents".into());
        let inboxes = shared.inboxes.clone();
        server.threads.push(answering.spawn(move || answer_all(&questions, &inboxes))?);
        Ok(server)
    }
}

/// A running server. Dropping it ends it: clients have some seconds to take what is theirs.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    address: Address,
}

impl Server {
    /// Where it listens.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Begins to end it, and returns at once: nobody is let in, commands are refused, and
    /// connections end when what they asked for before is answered.
    pub fn end(&self) {
        self.shared.ends.store(true, Ordering::Relaxed);
        self.shared.inboxes.iter().for_each(|inbox| inbox.put(|news| news.ends = true));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
        self.shared.inboxes.iter().for_each(|inbox| inbox.put(|news| news.hurries = true));
        for thread in self.threads.drain(..) {
            // One that panicked has said so.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests;
