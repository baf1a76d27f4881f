//! What stands behind the services: virtual time, disks in memory, lists of what waits.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::mem::size_of;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::host;
use crate::{Errno, Info, Level, Op, OpSet, sys};

/// A request that the filter has issued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IssuedIo {
    /// To finish it.
    pub id: IssueId,
    /// What to do.
    pub op: Op,
    /// Bytes.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
    /// 0: the filter's own disk, below it; n: the n-th granted disk.
    pub disk: u32,
    /// Write, discard, write zeroes: durable before it completes.
    pub fua: bool,
    /// Write zeroes: may deallocate.
    pub unmap: bool,
}

/// The name of an issued request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct IssueId(u64);

/// One opened instance's surroundings. Its address is the instance's.
pub(crate) struct World {
    pub(crate) disks: Vec<sys::Disk>,
    pub(crate) params: BTreeMap<CString, (i64, CString)>,
    pub(crate) files: BTreeMap<CString, OwnedFd>,
    pub(crate) answers: OpSet,
    issues: bool,
    keeps_sidecar: bool,
    asks_extents: bool,
    state: Mutex<WorldState>,
}

pub(crate) struct WorldState {
    pub(crate) now: Duration,
    pub(crate) stores: Vec<Vec<u8>>,
    pub(crate) issued: BTreeMap<IssueId, InFlight>,
    pub(crate) issued_max: usize,
    pub(crate) jobs: VecDeque<Closure>,
    pub(crate) timers: BTreeMap<u64, VirtualTimer>,
    pub(crate) watches: BTreeMap<u64, (c_int, u32, sys::WatchFn, usize)>,
    pub(crate) counters: Vec<(CString, u64)>,
    pub(crate) log: Vec<(Level, String)>,
    pub(crate) violations: Vec<String>,
    pub(crate) memory_max: usize,
    pub(crate) sidecar: PlayedSidecar,
    buffers: HashMap<usize, Layout>,
    next: u64,
}

/// An instance's sidecar, in memory.
#[derive(Default)]
pub(crate) struct PlayedSidecar {
    /// As last written.
    pub(crate) written: Vec<u8>,
    /// What a crash would leave.
    pub(crate) durable: Vec<u8>,
    /// What reading says, until something is written.
    pub(crate) read_error: Option<Errno>,
    /// What syncing says.
    pub(crate) sync_error: Option<Errno>,
}

pub(crate) struct InFlight {
    pub(crate) io: IssuedIo,
    data: usize,
    done: unsafe extern "C" fn(*mut c_void, i32),
    arg: usize,
}

#[derive(Clone, Copy)]
pub(crate) struct Closure {
    run: sys::TimerFn,
    arg: usize,
}

pub(crate) struct VirtualTimer {
    due: Duration,
    period: Duration,
    closure: Closure,
}

impl Closure {
    pub(crate) fn call(self) {
        // SAFETY: as the filter gave it to a service, which promised to call it so.
        unsafe { (self.run)(self.arg as *mut c_void) }
    }
}

impl World {
    pub(crate) fn new(
        disks: Vec<sys::Disk>,
        params: BTreeMap<CString, (i64, CString)>,
        files: BTreeMap<CString, OwnedFd>,
        info: Info,
    ) -> World {
        let stores = disks.iter().map(|disk| vec![0; disk.capacity.0 as usize]).collect();
        let state = WorldState {
            now: Duration::ZERO,
            stores,
            issued: BTreeMap::new(),
            issued_max: 256,
            jobs: VecDeque::new(),
            timers: BTreeMap::new(),
            watches: BTreeMap::new(),
            counters: Vec::new(),
            log: Vec::new(),
            violations: Vec::new(),
            memory_max: 16 << 20,
            sidecar: PlayedSidecar::default(),
            buffers: HashMap::new(),
            next: 1,
        };
        World {
            disks,
            params,
            files,
            answers: info.answers,
            issues: info.issues,
            keeps_sidecar: info.sidecar,
            asks_extents: info.extents,
            state: Mutex::new(state),
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, WorldState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn as_instance(&self) -> *mut sys::Instance {
        std::ptr::from_ref(self).cast_mut().cast()
    }

    /// Ends an issued request: `result`, after its work is done if that is a success.
    pub(crate) fn finish(&self, id: IssueId, result: Result<(), Errno>) {
        let mut state = self.state();
        let flight = state.issued.remove(&id).expect("an issued request in flight");
        let io = &flight.io;
        let result = result.and_then(|()| {
            // SAFETY: `issue` checked that the data is a buffer of this length, and the
            // filter must not touch it before `done`.
            unsafe { state.transfer(io.disk, io.op, io.offset, io.length, flight.data as *mut u8) }
        });
        drop(state);
        let status = result.map_or_else(Errno::negative, |()| 0);
        // SAFETY: as the filter gave it to `issue`; once, for it left the list.
        unsafe { (flight.done)(flight.arg as *mut c_void, status) }
    }

    /// Runs what is due at or before `end`, in order, and sets the time to it.
    pub(crate) fn advance_to(&self, end: Duration) {
        loop {
            let mut state = self.state();
            let next = state.timers.iter().min_by_key(|(id, timer)| (timer.due, **id));
            let Some((id, due)) = next.map(|(id, timer)| (*id, timer.due)) else { break };
            if due > end {
                break;
            }
            state.now = state.now.max(due);
            let timer = state.timers.get_mut(&id).expect("it was just there");
            timer.due = if timer.period.is_zero() { Duration::MAX } else { due + timer.period };
            let closure = timer.closure;
            drop(state);
            closure.call();
        }
        let mut state = self.state();
        state.now = state.now.max(end);
    }
}

impl WorldState {
    /// When the next timer is due.
    pub(crate) fn next_due(&self) -> Option<Duration> {
        self.timers.values().map(|timer| timer.due).filter(|due| *due < Duration::MAX).min()
    }

    /// Does what a request asks of a disk in memory.
    ///
    /// # Safety
    ///
    /// `data` is `length` bytes, for a read or write; nobody else uses them.
    pub(crate) unsafe fn transfer(
        &mut self,
        disk: u32,
        op: Op,
        offset: u64,
        length: u32,
        data: *mut u8,
    ) -> Result<(), Errno> {
        let store = self.stores.get_mut(disk as usize).ok_or(Errno::ENODEV)?;
        let start = usize::try_from(offset).map_err(|_| Errno::EINVAL)?;
        let end = start.checked_add(length as usize).ok_or(Errno::EINVAL)?;
        let range = store.get_mut(start..end).ok_or(Errno::EINVAL)?;
        match op {
            Op::Read => {
                // SAFETY: the caller's duty.
                let data = unsafe { std::slice::from_raw_parts_mut(data, range.len()) };
                data.copy_from_slice(range);
            }
            Op::Write => {
                // SAFETY: the caller's duty.
                let data = unsafe { std::slice::from_raw_parts(data, range.len()) };
                range.copy_from_slice(data);
            }
            Op::Discard | Op::WriteZeroes => range.fill(0),
            Op::Flush => {}
        }
        Ok(())
    }

    pub(crate) fn buffers(&self) -> usize {
        self.buffers.len()
    }

    fn next(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

/// The table that the host hands to the filter.
pub(crate) static SERVICES: sys::Services = sys::Services {
    size: size_of::<sys::Services>() as u32,
    abi_version: sys::ABI_VERSION,
    answer: host::answer,
    issue,
    buffer_alloc,
    buffer_free,
    disk,
    param_int,
    param_string,
    param_fd,
    timer_start,
    timer_stop,
    watch_start,
    watch_stop,
    run_blocking,
    counter,
    counter_add,
    log,
    sidecar_read,
    sidecar_write,
    sidecar_sync,
    extents,
};

/// The virtual time of an instance of a test host; none for any other's.
pub(crate) fn virtual_now(
    services: &'static sys::Services,
    instance: *mut sys::Instance,
) -> Option<Duration> {
    if !std::ptr::eq(services, &SERVICES) {
        return None;
    }
    // SAFETY: an instance of ours, and open: the caller holds its gate.
    Some(unsafe { world(instance) }.state().now)
}

/// # Safety
///
/// `instance` is from [`World::as_instance`] of a world that outlives the use.
unsafe fn world<'w>(instance: *mut sys::Instance) -> &'w World {
    // SAFETY: the caller's duty.
    unsafe { &*instance.cast::<World>() }
}

unsafe extern "C" fn issue(instance: *mut sys::Instance, io: *const sys::Issue) -> i32 {
    // SAFETY: the filter's duty by the header, here and below.
    let (world, io) = unsafe { (world(instance), &*io) };
    match accept(world, io) {
        Ok(()) => 0,
        Err(errno) => errno.negative(),
    }
}

fn accept(world: &World, io: &sys::Issue) -> Result<(), Errno> {
    if !world.issues {
        return Err(Errno::from_raw(libc::EPERM));
    }
    let disk = world.disks.get(io.disk as usize).ok_or(Errno::ENODEV)?;
    let op = Op::from_number(io.op).ok_or(Errno::EINVAL)?;
    let block = u64::from(disk.block_size);
    let is_aligned =
        io.offset.0.is_multiple_of(block) && u64::from(io.length).is_multiple_of(block);
    let end = io.offset.0.checked_add(io.length.into()).ok_or(Errno::EINVAL)?;
    if !is_aligned || end > disk.capacity.0 || (op == Op::Flush) != (io.length == 0) {
        return Err(Errno::EINVAL);
    }
    let mut state = world.state();
    let buffer = state.buffers.get(&io.data.addr());
    let fits = buffer.is_some_and(|layout| layout.size() >= io.length as usize);
    if op.has_data() != fits || (!op.has_data() && !io.data.is_null()) {
        return Err(Errno::EINVAL);
    }
    if state.issued.len() >= state.issued_max {
        return Err(Errno::EAGAIN);
    }
    let id = IssueId(state.next());
    let issued = IssuedIo {
        id,
        op,
        offset: io.offset.0,
        length: io.length,
        disk: io.disk,
        fua: io.flags & sys::REQ_FUA != 0,
        unmap: io.flags & sys::REQ_UNMAP != 0,
    };
    let data = io.data.expose_provenance();
    let arg = io.arg.expose_provenance();
    state.issued.insert(id, InFlight { io: issued, data, done: io.done, arg });
    Ok(())
}

unsafe extern "C" fn buffer_alloc(instance: *mut sys::Instance, length: u32) -> *mut c_void {
    // SAFETY: as in `issue`.
    let world = unsafe { world(instance) };
    let mut state = world.state();
    let used: usize = state.buffers.values().map(Layout::size).sum();
    if length == 0 || length > 4 << 20 || used + length as usize > state.memory_max {
        return std::ptr::null_mut();
    }
    let Ok(layout) = Layout::from_size_align(length as usize, 4096) else {
        return std::ptr::null_mut();
    };
    // SAFETY: not of size 0.
    let data = unsafe { alloc_zeroed(layout) };
    if !data.is_null() {
        state.buffers.insert(data.expose_provenance(), layout);
    }
    data.cast()
}

unsafe extern "C" fn buffer_free(instance: *mut sys::Instance, data: *mut c_void) {
    // SAFETY: as in `issue`.
    let world = unsafe { world(instance) };
    let mut state = world.state();
    if state.issued.values().any(|flight| flight.data == data.addr()) {
        state.violations.push("a buffer was freed while its request was in flight".into());
        return;
    }
    match state.buffers.remove(&data.addr()) {
        // SAFETY: of `buffer_alloc`, with this layout, and now off the list.
        Some(layout) => unsafe { dealloc(data.cast(), layout) },
        None => state.violations.push("what was freed is no buffer".into()),
    }
}

unsafe extern "C" fn disk(instance: *mut sys::Instance, index: u32) -> *const sys::Disk {
    // SAFETY: as in `issue`.
    let world = unsafe { world(instance) };
    world.disks.get(index as usize).map_or(std::ptr::null(), std::ptr::from_ref)
}

unsafe extern "C" fn param_int(instance: *mut sys::Instance, name: *const c_char) -> i64 {
    // SAFETY: as in `issue`.
    let (world, name) = unsafe { (world(instance), CStr::from_ptr(name)) };
    world.params.get(name).map_or(0, |(value, _)| *value)
}

unsafe extern "C" fn param_string(
    instance: *mut sys::Instance,
    name: *const c_char,
) -> *const c_char {
    // SAFETY: as in `issue`.
    let (world, name) = unsafe { (world(instance), CStr::from_ptr(name)) };
    world.params.get(name).map_or(std::ptr::null(), |(_, text)| text.as_ptr())
}

unsafe extern "C" fn param_fd(instance: *mut sys::Instance, name: *const c_char) -> c_int {
    // SAFETY: as in `issue`.
    let (world, name) = unsafe { (world(instance), CStr::from_ptr(name)) };
    world.files.get(name).map_or(-1, AsRawFd::as_raw_fd)
}

/// What timer and watch handles point to.
struct Handle {
    world: *const World,
    id: u64,
}

unsafe extern "C" fn timer_start(
    instance: *mut sys::Instance,
    delay_ms: u64,
    period_ms: u64,
    run: sys::TimerFn,
    arg: *mut c_void,
) -> *mut sys::Timer {
    // SAFETY: as in `issue`.
    let world = unsafe { world(instance) };
    let mut state = world.state();
    let id = state.next();
    let due = state.now.saturating_add(Duration::from_millis(delay_ms));
    let closure = Closure { run, arg: arg.expose_provenance() };
    let period = Duration::from_millis(period_ms);
    state.timers.insert(id, VirtualTimer { due, period, closure });
    Box::into_raw(Box::new(Handle { world, id })).cast()
}

unsafe extern "C" fn timer_stop(timer: *mut sys::Timer) {
    // SAFETY: of `timer_start`, stopped once; the world outlives its instance.
    let handle = unsafe { Box::from_raw(timer.cast::<Handle>()) };
    // SAFETY: as above.
    unsafe { &*handle.world }.state().timers.remove(&handle.id);
}

unsafe extern "C" fn watch_start(
    instance: *mut sys::Instance,
    fd: c_int,
    events: u32,
    run: sys::WatchFn,
    arg: *mut c_void,
) -> *mut sys::Watch {
    // SAFETY: as in `issue`.
    let world = unsafe { world(instance) };
    let mut state = world.state();
    let id = state.next();
    state.watches.insert(id, (fd, events, run, arg.expose_provenance()));
    Box::into_raw(Box::new(Handle { world, id })).cast()
}

unsafe extern "C" fn watch_stop(watch: *mut sys::Watch) {
    // SAFETY: of `watch_start`, stopped once; the world outlives its instance.
    let handle = unsafe { Box::from_raw(watch.cast::<Handle>()) };
    // SAFETY: as above.
    unsafe { &*handle.world }.state().watches.remove(&handle.id);
}

unsafe extern "C" fn run_blocking(
    instance: *mut sys::Instance,
    run: sys::TimerFn,
    arg: *mut c_void,
) -> i32 {
    // SAFETY: as in `issue`.
    let world = unsafe { world(instance) };
    world.state().jobs.push_back(Closure { run, arg: arg.expose_provenance() });
    0
}

unsafe extern "C" fn counter(instance: *mut sys::Instance, name: *const c_char) -> i32 {
    // SAFETY: as in `issue`.
    let (world, name) = unsafe { (world(instance), CStr::from_ptr(name)) };
    let counters = &mut world.state().counters;
    if let Some(index) = counters.iter().position(|(known, _)| known.as_c_str() == name) {
        return index as i32;
    }
    if counters.len() == 63 || name.count_bytes() > 47 {
        return -1;
    }
    counters.push((name.to_owned(), 0));
    counters.len() as i32 - 1
}

unsafe extern "C" fn counter_add(instance: *mut sys::Instance, counter: i32, delta: u64) {
    // SAFETY: as in `issue`.
    let world = unsafe { world(instance) };
    match world.state().counters.get_mut(counter as usize) {
        Some((_, value)) => *value += delta,
        None => world.state().violations.push(format!("no counter has the handle {counter}")),
    }
}

unsafe extern "C" fn log(instance: *mut sys::Instance, level: u32, text: *const c_char) {
    // SAFETY: as in `issue`.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
    if instance.is_null() {
        eprintln!("{text}");
        return;
    }
    let level = match level {
        1 => Level::Error,
        2 => Level::Warn,
        3 => Level::Info,
        _ => Level::Debug,
    };
    // SAFETY: as in `issue`.
    unsafe { world(instance) }.state().log.push((level, text));
}

unsafe extern "C" fn sidecar_read(
    instance: *mut sys::Instance,
    buf: *mut c_void,
    size: u32,
) -> i32 {
    // SAFETY: as in `issue`.
    let world = unsafe { world(instance) };
    let state = world.state();
    match state.sidecar.read_error {
        _ if !world.keeps_sidecar => Errno::EOPNOTSUPP.negative(),
        Some(errno) => errno.negative(),
        None => {
            let written = &state.sidecar.written;
            let length = written.len().min(size as usize);
            if length > 0 {
                // SAFETY: the filter's duty: `buf` has room for `size` bytes.
                unsafe { std::ptr::copy_nonoverlapping(written.as_ptr(), buf.cast(), length) };
            }
            written.len() as i32
        }
    }
}

unsafe extern "C" fn sidecar_write(
    instance: *mut sys::Instance,
    data: *const c_void,
    length: u32,
) -> i32 {
    // SAFETY: as in `issue`.
    let world = unsafe { world(instance) };
    if !world.keeps_sidecar {
        return Errno::EOPNOTSUPP.negative();
    }
    if length as usize > sys::SIDECAR_MAX {
        return Errno::E2BIG.negative();
    }
    let written = if length == 0 {
        Vec::new()
    } else {
        // SAFETY: the filter's duty: `data` is `length` bytes.
        unsafe { std::slice::from_raw_parts(data.cast::<u8>(), length as usize) }.to_vec()
    };
    let sidecar = &mut world.state().sidecar;
    sidecar.written = written;
    sidecar.read_error = None;
    0
}

/// All is data: the disks in memory have no holes.
unsafe extern "C" fn extents(
    instance: *mut sys::Instance,
    disk: u32,
    offset: u64,
    length: u64,
    entries: *mut sys::Extent,
    max: u32,
) -> i32 {
    // SAFETY: as in `issue`.
    let world = unsafe { world(instance) };
    if !world.asks_extents {
        return Errno::from_raw(libc::EPERM).negative();
    }
    let Some(of) = world.disks.get(disk as usize) else { return Errno::ENODEV.negative() };
    let is_whole = (offset | length).is_multiple_of(u64::from(of.block_size));
    let is_inside = offset.checked_add(length).is_some_and(|end| end <= of.capacity.0);
    if !is_whole || !is_inside || length == 0 || max == 0 || entries.is_null() {
        return Errno::EINVAL.negative();
    }
    let all = sys::Extent { length: sys::U64(length), kind: sys::EXTENT_DATA, reserved0: 0 };
    // SAFETY: the filter's duty: there is room for `max` entries.
    unsafe { entries.write(all) };
    1
}

unsafe extern "C" fn sidecar_sync(instance: *mut sys::Instance) -> i32 {
    // SAFETY: as in `issue`.
    let world = unsafe { world(instance) };
    if !world.keeps_sidecar {
        return Errno::EOPNOTSUPP.negative();
    }
    let sidecar = &mut world.state().sidecar;
    match sidecar.sync_error.or(sidecar.read_error) {
        Some(errno) => errno.negative(),
        None => {
            sidecar.durable = sidecar.written.clone();
            0
        }
    }
}
