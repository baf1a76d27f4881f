//! The protocol's state: what was negotiated, the guest's memory, which rings run.
//!
//! One `Device` per connection; it handles the frontend's messages one after the other,
//! as the `vhost` crate hands them over. A ring runs while it is enabled and has a size,
//! addresses and a kick descriptor. Whatever changes one of these stops the ring, changes
//! it, and starts it again if it can run; other rings go on.
//!
//! Always true: the host has exactly the queues that run, and has none when the `Device`
//! is dropped.

mod host;
mod messages;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use upcall_ring::Doorbell;
use vhost::vhost_user::Error;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserMemoryRegion};

use crate::channel::BackendChannel;
use crate::config::BlkConfig;
use crate::dirty::{DirtyLog, LogError, seen_everywhere};
use crate::inflight::{Extent, Inflight, InflightError};
use crate::memory::{GuestMemory, MEMORY_SLOTS_MAX, MemoryError, Region, RegionAddress};
use crate::queue::{Shared, Signals, VirtQueue};
use crate::ring::{self, PackedRing, Position, RingAddress, SplitRing};
use crate::virtio::*;
pub use host::QueueHost;

/// How long a ring that stops may take to end what a worker before us had begun, and how long
/// it runs at a time for that.
const LEFT_TIMEOUT: Duration = Duration::from_secs(10);
const LEFT_INTERVAL: Duration = Duration::from_millis(1);

/// What the frontend asked for and did not get. Ends the connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the fields are the facts that the message names")]
pub enum Refusal {
    /// The frontend uses more rings than were offered.
    #[error("ring {index} of {count}")]
    RingIndex { index: u32, count: u16 },
    /// Make the frontend's ring smaller, or `queue_size_max` larger.
    #[error("ring {index} with {size} entries: must be a power of two, {size_max} at most")]
    RingSize { index: u32, size: u32, size_max: u16 },
    /// A ring's position does not fit into 16 bits.
    #[error("ring {index} at position {base}")]
    RingBase { index: u32, base: u32 },
    /// The frontend told of the memory too late, or the addresses are wrong.
    #[error("ring {index} at {address:x?} is not in the guest's memory")]
    RingAddress { index: u16, address: String },
    /// The frontend wants us to poll without end. Configure it to use kick descriptors.
    #[error("ring {index} without a kick descriptor")]
    NoKick { index: u8 },
    /// The frontend accepted features that were not offered.
    #[error("features {features:#x} were not offered")]
    Features { features: u64 },
    /// The frontend writes a part of the configuration space that is not to be written.
    #[error("write of {length} bytes at {offset} of the configuration space")]
    ConfigWrite { offset: u32, length: usize },
    /// A packed ring's position in use: nothing says which requests are in flight. Keep
    /// the file of GET_INFLIGHT_FD and hand it over.
    #[error("ring {index} at position {base:#x}, with requests in flight that nobody knows of")]
    RingUnknown { index: u16, base: u32 },
    /// Memory was not accepted.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A file for tracking what is in flight was not accepted, or not found fit for a ring.
    #[error(transparent)]
    Inflight(#[from] InflightError),
    /// A log of what we write was not accepted, or does not cover it.
    #[error(transparent)]
    Log(#[from] LogError),
    /// Rings were to start while others ran, and either side ended before they could.
    #[error("rings cannot start: this end or the frontend's is closing")]
    Ending,
    /// A message of a protocol feature that was not offered.
    #[error("{0} was not offered")]
    NotOffered(&'static str),
}

/// A ring as the frontend described it so far.
#[derive(Debug, Default)]
struct Ring {
    size: Option<u16>,
    address: Option<RingAddress>,
    /// Where it starts, or was when it stopped; as GET_VRING_BASE says it.
    base: u32,
    /// When it stopped, requests of a worker before us had not been taken again.
    left: bool,
    kick: Option<Doorbell>,
    enabled: bool,
    running: bool,
    signals: Arc<Signals>,
}

/// See the module.
pub(crate) struct Device<'a> {
    host: &'a mut dyn QueueHost,
    shared: Arc<Shared>,
    rings: Vec<Ring>,
    /// Virtio features that the frontend accepted.
    features: u64,
    /// The frontend may ask that messages be acknowledged.
    acknowledges: bool,
    /// Why the last message was refused: `vhost`'s errors have no place for it.
    refusal: Option<Refusal>,
    /// We end the connection, not the frontend.
    shut_down: bool,
    /// Where the frontend hears of changes.
    channel: Arc<BackendChannel>,
    /// The descriptor that came with a message about to be handled.
    offered_channel: Option<OwnedFd>,
    /// Where what is in flight is kept for who comes after us.
    inflight: Option<Inflight>,
    /// The host lets our rings run.
    claimed: bool,
}

type Answer<T = ()> = Result<T, Refusal>;

impl<'a> Device<'a> {
    pub fn new(config: Arc<BlkConfig>, host: &'a mut dyn QueueHost) -> Device<'a> {
        let rings = (0..config.queues()).map(|_| Ring::default()).collect();
        let channel = Arc::new(BackendChannel::default());
        config.add_channel(&channel);
        let shared = Shared::new(config);
        Device {
            host,
            shared,
            rings,
            features: 0,
            acknowledges: false,
            refusal: None,
            shut_down: false,
            channel,
            offered_channel: None,
            inflight: None,
            claimed: false,
        }
    }

    /// Why the last message was refused, if it was us who did.
    pub fn take_refusal(&mut self) -> Option<Refusal> {
        self.refusal.take()
    }

    /// What comes with the next message, which sets the channel.
    pub fn offer_channel(&mut self, fd: Option<OwnedFd>) {
        self.offered_channel = fd;
    }

    fn config(&self) -> &Arc<BlkConfig> {
        &self.shared.config
    }

    /// The place of ring `index` in `rings`.
    fn place(&self, index: u32) -> Answer<usize> {
        let count = self.config().queues();
        if index < u32::from(count) {
            Ok(index as usize)
        } else {
            Err(Refusal::RingIndex { index, count })
        }
    }

    /// Changes a ring while it is stopped, and starts it again if it can run.
    fn change(&mut self, index: u32, change: impl FnOnce(&mut Ring)) -> Answer {
        let at = self.place(index)?;
        self.stop(at);
        change(&mut self.rings[at]);
        self.start_if_ready(at)
    }

    fn stop(&mut self, at: usize) {
        let ring = &mut self.rings[at];
        if ring.running {
            ring.running = false;
            let stopped = self.host.stop(at as u16);
            (ring.base, ring.left) = (stopped.position(), stopped.left() > 0);
        }
    }

    /// Lets a stopped ring run until nothing that a worker before us took is left: whoever
    /// asks where the ring stands may go on elsewhere, without the in-flight region.
    fn finish_left(&mut self, at: usize) -> Answer {
        let deadline = Instant::now() + LEFT_TIMEOUT;
        while self.rings[at].left && Instant::now() < deadline {
            let enabled = std::mem::replace(&mut self.rings[at].enabled, true);
            self.start_if_ready(at)?;
            std::thread::sleep(LEFT_INTERVAL);
            self.stop(at);
            self.rings[at].enabled = enabled;
        }
        Ok(())
    }

    /// After a message that may leave no ring running for longer than itself. A ring in which
    /// something of a worker before us is left runs again when its position is asked for.
    fn release_if_idle(&mut self) {
        if self.rings.iter().all(|ring| !ring.running && !ring.left) {
            self.release();
        }
    }

    fn release(&mut self) {
        if self.claimed {
            self.claimed = false;
            self.host.release();
        }
    }

    fn stop_all(&mut self) {
        for at in 0..self.rings.len() {
            self.stop(at);
        }
    }

    fn start_if_ready(&mut self, at: usize) -> Answer {
        let starts_device = self.rings.iter().all(|ring| !ring.running);
        let ring = &self.rings[at];
        // Without protocol features there is no message that enables.
        let enabled = ring.enabled || self.features & PROTOCOL_FEATURES == 0;
        let (Some(size), Some(address), Some(kick)) = (ring.size, ring.address, &ring.kick) else {
            return Ok(());
        };
        // What is written before the log is there would be in none.
        let unlogged = self.features & LOG_ALL != 0 && self.shared.dirty.covers().is_none();
        if !enabled || ring.running || unlogged {
            return Ok(());
        }
        // Before anything of the ring is looked at: somebody else may be writing it.
        self.claimed = self.claimed || self.host.claim();
        if !self.claimed {
            return Err(Refusal::Ending);
        }
        let index = at as u16;
        let event_idx = self.features & RING_EVENT_IDX != 0;
        let packed = self.features & RING_PACKED != 0;
        let region = match &self.inflight {
            Some(inflight) => inflight.region(index, size, packed)?,
            None => None,
        };
        let (_, memory) = self.shared.memory();
        self.check_log(&memory)?;
        let ring = &self.rings[at];
        let found = if packed {
            let tracked = region.as_ref().is_some_and(Inflight::is_used);
            let position = packed_position(index, ring.base, size, tracked)?;
            PackedRing::new(&memory, address, size, position, event_idx).map(ring::Ring::Packed)
        } else {
            let base = u16::try_from(ring.base)
                .map_err(|_| Refusal::RingBase { index: index.into(), base: ring.base })?;
            SplitRing::new(&memory, address, size, base, event_idx).map(ring::Ring::Split)
        };
        let found = found
            .ok_or_else(|| Refusal::RingAddress { index, address: format!("{address:x?}") })?;
        let queue = VirtQueue::new(
            index,
            found,
            region,
            self.features & RING_INDIRECT_DESC != 0,
            self.shared.clone(),
            ring.signals.clone(),
            kick.clone(),
        );
        self.rings[at].running = true;
        self.host.start(index, queue);
        if starts_device {
            // QEMU does not look at the configuration when it reconnects or starts again, and
            // drops what it is told while the device is stopped.
            self.channel.say_config_change();
        }
        Ok(())
    }

    /// What a file for tracking is for, as a frontend describes it.
    fn extent(&self, inflight: &VhostUserInflight) -> Answer<Extent> {
        let &VhostUserInflight { num_queues, queue_size, .. } = inflight;
        let config = self.config();
        let packed = self.features & RING_PACKED != 0;
        Ok(Extent::new(
            (num_queues, config.queues()),
            (queue_size, config.queue_size_max()),
            packed,
        )?)
    }

    /// From now on, what is in flight is kept in `file`, where a worker before us may have
    /// left something.
    fn track(&mut self, inflight: &VhostUserInflight, file: &File) -> Answer {
        let extent = self.extent(inflight)?;
        let &VhostUserInflight { mmap_offset, mmap_size, .. } = inflight;
        let inflight = Inflight::map(file, extent, mmap_offset, mmap_size)?;
        let running = self.running();
        self.stop_all();
        if let Some(on) = inflight.write_cache() {
            self.config().set_write_cache(on);
        }
        inflight.set_write_cache(self.config().write_cache());
        self.inflight = Some(inflight);
        running.into_iter().try_for_each(|at| self.start_if_ready(at))
    }

    fn running(&self) -> Vec<usize> {
        (0..self.rings.len()).filter(|at| self.rings[*at].running).collect()
    }

    fn add_region(&mut self, region: &VhostUserMemoryRegion, file: &File) -> Answer {
        let region = Region::map(region_address(region), file, region.mmap_offset)?;
        let (_, memory) = self.shared.memory();
        self.accept_memory(memory.with(region)?)
    }

    fn accept_memory(&mut self, memory: GuestMemory) -> Answer {
        self.check_log(&memory)?;
        self.shared.set_memory(memory);
        Ok(())
    }

    fn set_regions(&mut self, regions: &[VhostUserMemoryRegion], files: &[File]) -> Answer {
        let map = |(region, file): (&VhostUserMemoryRegion, &File)| {
            Region::map(region_address(region), file, region.mmap_offset)
        };
        let mapped: Result<Vec<_>, _> = regions.iter().zip(files).map(map).collect();
        self.accept_memory(GuestMemory::new(mapped?)?)
    }

    fn set_accepted_features(&mut self, features: u64) -> Answer {
        let unknown = features & !self.config().features();
        if unknown != 0 {
            return Err(Refusal::Features { features: unknown });
        }
        // Rings have parts of it built in.
        let running = self.running();
        // Logging alone comes and goes while they run, once there is a log.
        let unlogged = features & LOG_ALL != 0 && self.shared.dirty.covers().is_none();
        if (features ^ self.features) & !LOG_ALL != 0 || unlogged {
            self.stop_all();
        }
        if self.features & !features & LOG_ALL != 0 {
            // The next time begins with a new one.
            self.shared.dirty.set_log(None);
        }
        self.features = features;
        self.shared.set_flush_negotiated(features & BLK_FLUSH != 0);
        self.switch_logging();
        running.into_iter().try_for_each(|at| self.start_if_ready(at))
    }

    /// Logs from now on, or no more, as was negotiated. Nothing is written unmarked after it.
    fn switch_logging(&mut self) {
        let dirty = &self.shared.dirty;
        let on = self.features & LOG_ALL != 0 && dirty.covers().is_some();
        if on != dirty.is_on() {
            self.host.logging(on);
        }
        if !dirty.set_on(on) {
            self.stop_all();
        }
    }

    /// That each page which we may write has a place in the log, if there is one.
    fn check_log(&self, memory: &GuestMemory) -> Answer {
        let Some(covered) = self.shared.dirty.covers() else { return Ok(()) };
        let short = |what, end| {
            if end > covered { Err(LogError::Short { covered, what, end }) } else { Ok(()) }
        };
        short("its memory", memory.end())?;
        for ring in &self.rings {
            if let (Some(at), Some(size)) = (ring.signals.log_address(), ring.size) {
                short("a used ring", at.saturating_add(ring::used_bytes(size)))?;
            }
        }
        Ok(())
    }

    fn set_log(&mut self, log: DirtyLog) -> Answer {
        let (_, memory) = self.shared.memory();
        self.shared.dirty.set_log(Some(log));
        self.check_log(&memory)?;
        let running = self.running();
        self.switch_logging();
        // Those that were stopped to see it, and those that waited for it.
        let waiting =
            (0..self.rings.len()).filter(|at| self.features & LOG_ALL != 0 || running.contains(at));
        waiting.collect::<Vec<_>>().into_iter().try_for_each(|at| self.start_if_ready(at))
    }

    /// What to ring when something was logged. Says whether the frontend negotiated that
    /// messages be acknowledged.
    pub fn set_log_signal(&mut self, fd: Option<OwnedFd>) -> bool {
        self.shared.dirty.set_signal(fd);
        self.acknowledges
    }

    /// Where the ring is, and under which address it is logged.
    fn place_ring(&mut self, index: u32, address: RingAddress, log: Option<u64>) -> Answer {
        let at = self.place(index)?;
        let ring = &mut self.rings[at];
        let logged_before = ring.signals.log_address();
        ring.signals.set_log_address(log);
        let (_, memory) = self.shared.memory();
        self.check_log(&memory)?;
        if self.rings[at].address != Some(address) {
            return self.change(index, |ring| ring.address = Some(address));
        }
        if log != logged_before && self.rings[at].running && !seen_everywhere() {
            self.stop(at);
            return self.start_if_ready(at);
        }
        Ok(())
    }

    fn write_config(&mut self, offset: u32, bytes: &[u8]) -> Answer {
        let &[byte] = bytes else {
            return Err(Refusal::ConfigWrite { offset, length: bytes.len() });
        };
        if !BlkConfig::is_write_cache(offset, bytes.len()) {
            return Err(Refusal::ConfigWrite { offset, length: bytes.len() });
        }
        // A guest that did not negotiate it may write it all the same: to no effect.
        if self.features & BLK_CONFIG_WCE != 0 {
            self.config().set_write_cache(byte != 0);
            if let Some(inflight) = &self.inflight {
                inflight.set_write_cache(byte != 0);
            }
        }
        Ok(())
    }

    /// Says that we end the connection: the frontend is still there.
    pub fn shut_down(&mut self) {
        self.shut_down = true;
    }

    /// Keeps a refusal for [`take_refusal`](Self::take_refusal).
    fn answer<T>(&mut self, answer: Answer<T>) -> Result<T, Error> {
        answer.map_err(|refusal| {
            let text = refusal.to_string();
            self.refusal = Some(refusal);
            Error::ReqHandlerError(io::Error::other(text))
        })
    }

    fn not_offered<T>(&mut self, what: &'static str) -> Result<T, Error> {
        self.answer(Err(Refusal::NotOffered(what)))
    }
}

impl Drop for Device<'_> {
    fn drop(&mut self) {
        if !self.shut_down {
            self.host.disconnected();
        }
        self.stop_all();
        self.release();
    }
}

/// Where a packed ring starts. `tracked`: its in-flight region knows better.
fn packed_position(index: u16, base: u32, size: u16, tracked: bool) -> Answer<Position> {
    let wrong = Refusal::RingBase { index: index.into(), base };
    let available = Position::parse(base as u16, size).ok_or(wrong)?;
    let used = (base >> 16) as u16;
    // Some frontends say one position for both.
    if !tracked && used != 0 && used != base as u16 {
        return Err(Refusal::RingUnknown { index, base });
    }
    Ok(available)
}

fn region_address(region: &VhostUserMemoryRegion) -> RegionAddress {
    let &VhostUserMemoryRegion { guest_phys_addr, user_addr, memory_size, .. } = region;
    RegionAddress { guest: guest_phys_addr, user: user_addr, length: memory_size }
}

/// A kick descriptor that cannot block whoever empties it. The frontend only writes it.
fn kick_doorbell(file: File) -> Doorbell {
    let fd = OwnedFd::from(file);
    if let Ok(flags) = rustix::fs::fcntl_getfl(&fd) {
        let _ = rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK);
    }
    Doorbell::from_fd(fd)
}
