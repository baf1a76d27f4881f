//! How a filter host is set up: for its first life when the worker starts, and again, with
//! the same descriptors and numbers, for each life after that.
//!
//! Always true: nothing is opened by the filter's path again: the file that was checked is
//! the file that is started. A life gets channels, an issue arena and counters of its own;
//! the arenas are the disks', and outlive it. What parameters name is opened anew by us.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use upcall_abi::control::Disk as WireDisk;
use upcall_abi::filter::{EVENT_MIGRATE_IN, ISSUE_ARENA_SIZE};
use upcall_chain::OnFailure;
use upcall_filterhost::params::Checked;
use upcall_filterhost::{
    Bounds, Counters, Description, FilterError, FilterFile, HostProcess, LogSink, OpenInstance,
    Placement,
};
use upcall_ring::channel::Channel;
use upcall_ring::{Access, Doorbell, Mapping, memfd};

use crate::engine::Way;
use crate::error::StartError;
use crate::extents::{self, DiskExtents};

/// Entries of each ring of a channel.
const RING_ENTRIES: u32 = 1024;

/// All that a filter host is given.
pub(crate) struct Recipe {
    pub(crate) file: FilterFile,
    pub(crate) placement: Placement,
    pub(crate) log: LogSink,
    /// Its private memory, if it was said: the most that one of its instances asks for.
    pub(crate) memory_bytes: Option<u64>,
    pub(crate) description: Description,
    pub(crate) arenas: Vec<GivenArena>,
    /// By number.
    pub(crate) channels: Vec<GivenChannel>,
    pub(crate) instances: Vec<GivenInstance>,
}

/// The data pages of a disk.
pub(crate) struct GivenArena {
    /// The disk's number and name.
    pub(crate) number: u32,
    pub(crate) disk: Arc<str>,
    /// Cannot be mapped for writing if the filter may not write.
    pub(crate) fd: OwnedFd,
    pub(crate) size: u64,
    pub(crate) writable: bool,
}

impl GivenArena {
    fn try_clone(&self) -> std::io::Result<GivenArena> {
        let fd = self.fd.try_clone()?;
        Ok(GivenArena { fd, disk: self.disk.clone(), ..*self })
    }
}

/// A channel to a queue thread.
#[derive(Clone)]
pub(crate) struct GivenChannel {
    /// The number and name of the disk whose queue it is.
    pub(crate) number: u32,
    pub(crate) disk: Arc<str>,
    /// The queue thread, counted through the worker, and its doorbell.
    pub(crate) engine: usize,
    pub(crate) wake: Doorbell,
}

/// An instance on a disk.
#[derive(Clone)]
pub(crate) struct GivenInstance {
    pub(crate) instance: u32,
    /// The number and name of its disk.
    pub(crate) number: u32,
    pub(crate) disk: Arc<str>,
    /// The own disk, then the granted ones.
    pub(crate) disks: Vec<WireDisk>,
    pub(crate) params: Checked,
    /// Where it is shown in the page of counters.
    pub(crate) hop: usize,
    pub(crate) on_failure: OnFailure,
    /// Its state: one file for all lives, of which one at a time runs.
    pub(crate) sidecar: Option<Arc<OwnedFd>>,
    /// Of what its disks consist, as `disks`.
    pub(crate) extents: Vec<Arc<DiskExtents>>,
    /// Its guest came from another host: what the instance there had saved, if anything. For
    /// the worker's first life of it.
    pub(crate) arrival: Option<Option<Vec<u8>>>,
}

/// What a life that serves is reached and watched by.
pub(crate) struct SetUp {
    /// By channel.
    pub(crate) ways: Vec<Way>,
    /// By instance.
    pub(crate) counters: Vec<Counters>,
}

impl Recipe {
    /// Starts the first life, and asks the filter what it is.
    pub(crate) fn first(
        file: FilterFile,
        placement: Placement,
        log: LogSink,
    ) -> Result<(Recipe, HostProcess), FilterError> {
        let mut process = HostProcess::start(&file, placement, log.clone())?;
        let description = process.describe()?;
        let recipe = Recipe {
            file,
            placement,
            log,
            memory_bytes: None,
            description,
            arenas: Vec::new(),
            channels: Vec::new(),
            instances: Vec::new(),
        };
        Ok((recipe, process))
    }

    /// Starts another life and sets it up. Takes as long as the filter's code does, within
    /// the timeouts of each step.
    pub(crate) fn again(&self) -> Result<(HostProcess, SetUp), StartError> {
        let failed = |source| self.failed("", source);
        let mut process =
            HostProcess::start(&self.file, self.placement, self.log.clone()).map_err(failed)?;
        // The chain was built on what it said of itself; it must not say something else now.
        if process.describe().map_err(failed)? != self.description {
            return Err(failed(FilterError::Declaration {
                filter: self.description.name.clone(),
                what: "it describes itself otherwise than at its first start".into(),
            }));
        }
        let set_up = self.set_up(&mut process)?;
        Ok((process, set_up))
    }

    /// Gives a filter host that has described itself everything, up to the point at which it
    /// serves.
    pub(crate) fn set_up(&self, process: &mut HostProcess) -> Result<SetUp, StartError> {
        let ways = self.prepare(process)?;
        let counters = self.activate(process)?;
        Ok(SetUp { ways, counters })
    }

    /// As [`set_up`](Self::set_up), of the first life under this worker: who has come from
    /// another host hears of it.
    pub(crate) fn set_up_first(&mut self, process: &mut HostProcess) -> Result<SetUp, StartError> {
        let ways = self.prepare(process)?;
        let counters = self.open_all(process)?;
        for given in &self.instances {
            if let Some(state) = &given.arrival {
                self.arrive(process, given, state.as_deref())?;
            }
        }
        self.instances.iter_mut().for_each(|given| given.arrival = None);
        process.serve().map_err(|source| self.failed("", source))?;
        Ok(SetUp { ways, counters })
    }

    /// As far as it goes without an instance: the filter's code is loaded.
    pub(crate) fn prepare(&self, process: &mut HostProcess) -> Result<Vec<Way>, StartError> {
        process.bound(&self.bounds()).map_err(|source| self.failed("", source))?;
        for arena in &self.arenas {
            process
                .arena(arena.number, arena.fd.as_fd(), arena.size, arena.writable)
                .map_err(|source| self.failed(&arena.disk, source))?;
        }
        let issue_arena = self.give_issue_arena(process)?;
        let mut ways = Vec::new();
        for (number, channel) in self.channels.iter().enumerate() {
            ways.push(self.give_channel(process, number as u32, channel, &issue_arena)?);
        }
        process.load().map_err(|source| self.failed("", source))?;
        Ok(ways)
    }

    /// Opens the instances of a host that is prepared, and lets it serve.
    pub(crate) fn activate(&self, process: &mut HostProcess) -> Result<Vec<Counters>, StartError> {
        let counters = self.open_all(process)?;
        process.serve().map_err(|source| self.failed("", source))?;
        Ok(counters)
    }

    fn open_all(&self, process: &mut HostProcess) -> Result<Vec<Counters>, StartError> {
        self.instances.iter().map(|given| self.open(process, given)).collect()
    }

    /// The same without an instance, which is closed.
    pub(crate) fn without(&self, instance: u32) -> std::io::Result<Recipe> {
        let stays = |given: &&GivenInstance| given.instance != instance;
        Ok(Recipe {
            file: self.file.try_clone()?,
            placement: self.placement,
            log: self.log.clone(),
            memory_bytes: self.memory_bytes,
            description: self.description.clone(),
            arenas: self.arenas.iter().map(GivenArena::try_clone).collect::<Result<_, _>>()?,
            channels: self.channels.clone(),
            instances: self.instances.iter().filter(stays).cloned().collect(),
        })
    }

    /// The numbers of its instances, in their order.
    pub(crate) fn instance_numbers(&self) -> Vec<u32> {
        self.instances.iter().map(|given| given.instance).collect()
    }

    fn bounds(&self) -> Bounds {
        Bounds {
            memory_bytes: self.memory_bytes.unwrap_or(Bounds::MEMORY_BYTES),
            channels: self.channels.len(),
            arenas: self.arenas.len() + 1, // that of what it issues
            instances: self.instances.len(),
        }
    }

    fn give_issue_arena(
        &self,
        process: &mut HostProcess,
    ) -> Result<Option<Arc<Mapping>>, StartError> {
        if !self.description.issues() || self.channels.is_empty() {
            return Ok(None);
        }
        let failed = |source| self.system("", "make an arena", source);
        let fd = memfd("upcall-issue-arena", ISSUE_ARENA_SIZE as usize).map_err(failed)?;
        process
            .issue_arena(fd.as_fd(), ISSUE_ARENA_SIZE)
            .map_err(|source| self.failed("", source))?;
        let mapping =
            Mapping::new(&fd, 0, ISSUE_ARENA_SIZE as usize, Access::ReadWrite).map_err(failed)?;
        Ok(Some(Arc::new(mapping)))
    }

    fn give_channel(
        &self,
        process: &mut HostProcess,
        number: u32,
        given: &GivenChannel,
        issue_arena: &Option<Arc<Mapping>>,
    ) -> Result<Way, StartError> {
        let failed = |source| self.system(&given.disk, "make a channel", source);
        let (channel, fd) = Channel::create(RING_ENTRIES).map_err(failed)?;
        let doorbell = Doorbell::new().map_err(failed)?;
        process
            .channel(number, given.number, fd.as_fd(), doorbell.as_fd(), given.wake.as_fd())
            .map_err(|source| self.failed(&given.disk, source))?;
        Ok(Way { channel, doorbell, issue_arena: issue_arena.clone() })
    }

    /// Opens one instance.
    pub(crate) fn open(
        &self,
        process: &mut HostProcess,
        given: &GivenInstance,
    ) -> Result<Counters, StartError> {
        let params = given.params.open().map_err(|source| StartError::Param {
            disk: given.disk.to_string(),
            source: Box::new(source),
        })?;
        let counters =
            Counters::new().map_err(|source| self.system(&given.disk, "make counters", source))?;
        let asks = self.description.asks_extents();
        let extents = asks
            .then(|| extents::serve(given.instance, &given.extents, &given.disks))
            .transpose()
            .map_err(|source| self.system(&given.disk, "start a thread", source))?;
        process
            .open(&OpenInstance {
                instance: given.instance,
                arena: given.number,
                disks: &given.disks,
                params: &params,
                counters: &counters,
                sidecar: given.sidecar.as_ref().map(|file| file.as_fd()),
                extents: extents.as_ref().map(|socket| socket.as_fd()),
            })
            .map_err(|source| self.failed(&given.disk, source))?;
        Ok(counters)
    }

    /// Tells an instance that its guest has come from another host, with what it had saved.
    fn arrive(
        &self,
        process: &mut HostProcess,
        given: &GivenInstance,
        state: Option<&[u8]>,
    ) -> Result<(), StartError> {
        let failed = |source| self.failed(&given.disk, source);
        if let Some(state) = state {
            process.load_state(given.instance, state).map_err(failed)?;
        }
        process.event(given.instance, EVENT_MIGRATE_IN).map_err(failed)
    }

    /// A failure at a disk; at all of those that the filter serves if `disk` is empty.
    fn failed(&self, disk: &str, source: FilterError) -> StartError {
        StartError::Filter { disk: self.disk(disk), source: Box::new(source) }
    }

    fn system(&self, disk: &str, what: &'static str, source: std::io::Error) -> StartError {
        StartError::System { disk: self.disk(disk), what, source }
    }

    fn disk(&self, disk: &str) -> String {
        if !disk.is_empty() {
            return disk.to_owned();
        }
        let mut names: Vec<&str> = self.instances.iter().map(|given| &*given.disk).collect();
        names.dedup();
        names.join(", ")
    }
}
