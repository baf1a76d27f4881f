//! An image in a format of QEMU's, through a confined qemu-storage-daemon.
//!
//! No format is parsed in this process. [`ImageOptions`] say what is meant; [`Plan`] opens the
//! files and says how they belong together; [`daemon`] starts the daemon, [`confine`] keeps it to
//! those files; [`vhost`] and [`ring`] are our side of its vhost-user-blk device; [`ledger`]
//! decides what is sent when, and what is sent again when a daemon is gone; [`keeper`] is the
//! thread that does it. [`extents`] asks a daemon what its disk consists of, as a client ([`nbd`])
//! of its NBD export.
//!
//! Always true: a request is completed once, whatever happens to the daemon; a write that was
//! completed is there for whoever reads later, also through another daemon; no file is opened
//! but those the options name, whatever the image says.

mod confine;
mod daemon;
mod extents;
mod format;
mod keeper;
mod ledger;
mod nbd;
mod options;
mod plan;
mod remote;
mod ring;
#[cfg(test)]
mod tests;
mod vhost;
mod vmdk;

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use upcall_block::{
    DiskInfo, Errno, Extent, Op, Range, RequestFlags, Status, Store, StoreDone, StoreIo,
    StoreQueue, StoreToken,
};
use upcall_ring::{Access, Buffers, Mapping};

pub use format::ImageFormat;
pub use options::{ImageOptions, ImageSource, Layer};
pub use remote::{NbdPlace, NbdServer};

use crate::OpenError;
use crate::image::confine::Program;
use crate::image::daemon::Starter;
use crate::image::extents::Oracle;
use crate::image::keeper::{DATA_BYTES, Keeper, Link};
use crate::image::plan::{Plan, Purpose};
use crate::image::ring::ClientRing;
use crate::image::vhost::Device;
#[cfg(feature = "fuzzing")]
pub use crate::image::vmdk::{content_id as vmdk_content_id, rewrite as rewrite_descriptor};
use crate::raw::{Inbox, OnFailure, sleep_on};

/// An image's files, and a daemon that understands them.
struct Opened {
    link: Link,
    device: Device,
    ring: ClientRing,
    starter: Starter,
    oracle: Arc<Oracle>,
    plan: Arc<Plan>,
}

impl Opened {
    fn new(options: &ImageOptions, purpose: Purpose) -> Result<Opened, OpenError> {
        options.check()?;
        let (name, format) = (options.name(), options.format.name());
        let refused = |reason| OpenError::Image { name: name.clone(), format, reason };
        let program = Program::find(&options.program).map_err(refused)?;
        let program = program.ok_or_else(|| OpenError::NotInstalled {
            name: name.clone(),
            format,
            program: options.program.display().to_string(),
        })?;
        let plan = Arc::new(Plan::open(options, purpose)?);
        let oracle = Arc::new(Oracle::default());
        let starter = Starter::new(program, plan.clone(), oracle.clone()).map_err(refused)?;
        let ring = ClientRing::new(DATA_BYTES).map_err(|source| OpenError::System {
            name: name.clone(),
            action: "get memory for it",
            source,
        })?;
        let (link, device) = Link::start(&starter, &ring, options.patience)
            .map_err(|what| refused(format!("qemu-storage-daemon does not serve it: {what}")))?;
        if device.is_read_only != (options.read_only || purpose == Purpose::Look) {
            return Err(refused("qemu-storage-daemon serves it in another mode than asked".into()));
        }
        Ok(Opened { plan, oracle, starter, ring, link, device })
    }
}

/// What the store and its thread share.
struct Shared {
    failure: OnceLock<String>,
    on_restart: Option<OnFailure>,
    on_failure: Option<OnFailure>,
    name: String,
}

impl Shared {
    /// Says that a daemon was replaced, or could not be.
    fn tell(&self, text: &str) {
        if let Some(told) = &self.on_restart {
            told(&format!("{}: {text}", self.name));
        }
    }

    /// The first reason is kept and told.
    fn fail(&self, text: &str) {
        let text = format!("{}: {text}", self.name);
        if self.failure.set(text.clone()).is_ok()
            && let Some(told) = &self.on_failure
        {
            told(&text);
        }
    }
}

/// An opened image. Dropping it flushes, and lets the daemon close the image.
pub struct ImageStore {
    info: DiskInfo,
    shared: Arc<Shared>,
    running: Arc<Running>,
    oracle: Arc<Oracle>,
    options: ImageOptions,
}

/// What the store's thread is told.
enum Message {
    /// A request, and where its completion goes.
    Ask(StoreIo, Arc<Inbox>),
    /// There will be no more.
    Stop,
}

/// The way to the store's thread.
type Port = upcall_ring::Inbox<Message>;

/// The store's thread, which ends with the store and its last queue.
struct Running {
    port: Arc<Port>,
    thread: Option<JoinHandle<()>>,
}

impl ImageStore {
    /// Opens an image: its files, then a daemon, which must understand it.
    pub fn open(options: ImageOptions) -> Result<ImageStore, OpenError> {
        let Opened { plan, oracle, starter, ring, link, device } =
            Opened::new(&options, Purpose::Serve)?;
        let info = options.info(&device);
        let name = options.name();
        let system = |action| {
            let name = name.clone();
            move |source| OpenError::System { name, action, source }
        };
        let shared = Arc::new(Shared {
            failure: options.failed.clone().map_or_else(OnceLock::new, OnceLock::from),
            on_restart: options.on_restart.clone(),
            on_failure: options.on_failure.clone(),
            name: name.clone(),
        });
        let port = Arc::new(Port::new().map_err(system("make a doorbell"))?);
        let keeper = Keeper::new(
            shared.clone(),
            port.clone(),
            plan,
            starter,
            ring,
            (link, device),
            options.patience,
        )
        .map_err(system("get memory for it"))?;
        let thread = std::thread::Builder::new()
            .name("store-image".into())
            .spawn(move || keeper.run())
            .map_err(system("start a thread for it"))?;
        let running = Arc::new(Running { port, thread: Some(thread) });
        Ok(ImageStore { info, shared, running, oracle, options })
    }

    /// What an image would be if it were opened, and how it would describe itself. It is only
    /// read, and not locked: somebody else may have it, and write to it.
    pub fn look(options: &ImageOptions) -> Result<(DiskInfo, String), OpenError> {
        let opened = Opened::new(options, Purpose::Look)?;
        let info = options.info(&opened.device);
        let text = options.describe(&info);
        Ok((info, text))
    }

    /// Since when the store refuses what writes, or everything: what happened. None while all
    /// is well.
    pub fn failure(&self) -> Option<String> {
        self.shared.failure.get().cloned()
    }

    /// One request, on a queue of its own. Blocks.
    fn run_alone(&self, op: Op, range: Range, data: Buffers) -> Status {
        let mut queue = self.open_queue().map_err(|_| Errno::EIO)?;
        let flags = RequestFlags::default();
        queue.submit(StoreIo { token: StoreToken(0), op, range, flags, data });
        let mut done = Vec::new();
        loop {
            queue.poll(&mut done);
            if let Some(done) = done.pop() {
                return done.status;
            }
            if queue.before_sleep()
                && let Some(doorbell) = queue.doorbell()
            {
                sleep_on(doorbell);
            }
        }
    }
}

impl Store for ImageStore {
    fn info(&self) -> &DiskInfo {
        &self.info
    }

    /// Unsupported: the daemon's device has the size that it had at its start, and so does what
    /// is kept for the next one.
    fn measure(&self) -> io::Result<u64> {
        let text = match &self.options.source {
            ImageSource::File(_) => format!(
                "{} images do not grow while they are served: end this, make it larger with \
                 `qemu-img resize`, and serve it again",
                self.options.format
            ),
            ImageSource::Server(_) => "what an NBD server has does not grow while it is served: \
                                       serve it again to see its size"
                .to_owned(),
        };
        Err(io::Error::new(io::ErrorKind::Unsupported, text))
    }

    /// Format, path, size, mode, and what is wrong with it if something is.
    fn describe(&self) -> String {
        let mut text = self.options.describe(&self.info);
        if let Some(failure) = self.failure() {
            text.push_str(&format!("; FAILED: {failure}"));
        }
        text
    }

    fn open_queue(&self) -> io::Result<Box<dyn StoreQueue>> {
        let inbox = Arc::new(Inbox::new()?);
        Ok(Box::new(ImageQueue {
            running: self.running.clone(),
            inbox,
            batch: vec![],
            in_flight: 0,
        }))
    }

    fn sync(&self) -> Status {
        if self.info.read_only {
            return Ok(());
        }
        self.run_alone(Op::Flush, Range::EMPTY, Buffers::new())
    }

    /// What the daemon says; where it cannot be had, data.
    fn extents(&self, offset: u64, length: u64, max: usize) -> io::Result<Vec<Extent>> {
        let read = || {
            let block = self.info.block_size;
            let Ok(range) = Range::new(offset, u64::from(block), &self.info) else {
                return false;
            };
            let Ok(data) = scratch(block as usize) else { return false };
            // That it ended is what counts: also with an error it was the daemon's answer.
            let _ = self.run_alone(Op::Read, range, data);
            true
        };
        Ok(self.oracle.extents(offset, length, self.info.block_size, max, read))
    }
}

/// Memory for a read that nobody looks at.
fn scratch(length: usize) -> io::Result<Buffers> {
    let fd = upcall_ring::memfd("upcall-scratch", length)?;
    let memory = Arc::new(Mapping::new(&fd, 0, length, Access::ReadWrite)?);
    Buffers::of(&memory, 0, length, true).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

impl Drop for Running {
    fn drop(&mut self) {
        self.port.push(Message::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for ImageStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.describe())
    }
}

/// A queue that hands its requests to the store's thread.
struct ImageQueue {
    running: Arc<Running>,
    inbox: Arc<Inbox>,
    /// Submitted, not handed over yet.
    batch: Vec<StoreIo>,
    in_flight: usize,
}

impl ImageQueue {
    fn hand_over(&mut self) {
        for io in self.batch.drain(..) {
            self.running.port.push(Message::Ask(io, self.inbox.clone()));
        }
    }
}

impl StoreQueue for ImageQueue {
    fn submit(&mut self, io: StoreIo) {
        self.in_flight += 1;
        self.batch.push(io);
    }

    fn poll(&mut self, out: &mut Vec<StoreDone>) {
        self.hand_over();
        let before = out.len();
        self.inbox.take(out);
        self.in_flight -= out.len() - before;
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn doorbell(&self) -> Option<BorrowedFd<'_>> {
        Some(self.inbox.doorbell())
    }

    fn before_sleep(&mut self) -> bool {
        self.hand_over();
        self.inbox.before_sleep()
    }
}

impl Drop for ImageQueue {
    fn drop(&mut self) {
        let mut out = Vec::new();
        while self.in_flight > 0 {
            self.poll(&mut out);
            if self.in_flight > 0 && self.before_sleep() {
                sleep_on(self.inbox.doorbell());
            }
        }
    }
}
