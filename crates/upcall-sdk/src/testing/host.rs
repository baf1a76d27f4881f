//! The host: makes requests, hands them to the filter, and keeps the books.

use std::collections::BTreeMap;
use std::ffi::{CString, c_void};
use std::marker::PhantomData;
use std::mem::size_of;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::params;
use super::world::{IssueId, IssuedIo, SERVICES, World};
use crate::table::{filter_of, table};
use crate::{Errno, Event, Filter, Level, Op, sys};

/// One instance of a filter and everything around it.
pub struct Host<F: Filter> {
    world: Box<World>,
    table: sys::Filter,
    this: *mut c_void,
    requests: Vec<*mut HostRequest>,
    _filter: PhantomData<F>,
}

/// What a [`Host`] is made from.
pub struct Builder<F> {
    capacities: Vec<u64>,
    block_size: u32,
    read_only: bool,
    params: BTreeMap<CString, CString>,
    files: BTreeMap<CString, OwnedFd>,
    sidecar: Result<Vec<u8>, Errno>,
    _filter: PhantomData<F>,
}

/// The name of a request that the test made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestId(usize);

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// In a callback of the filter.
    Calling,
    /// Held by the filter on its way down.
    Held,
    /// Passed on; see [`Host::complete`].
    Below {
        /// Whether the filter wants to see the completion.
        watched: bool,
    },
    /// Held by the filter on its way up.
    HeldUp,
    /// Over, and how.
    Ended(Result<(), Errno>),
}

/// A request as the host knows it. The filter has the address of `raw`, which is also
/// this struct's.
#[repr(C)]
pub(crate) struct HostRequest {
    raw: sys::Request,
    world: *const World,
    op: Op,
    offset: u64,
    length: u32,
    data: Box<[u8]>,
    books: Mutex<Books>,
}

struct Books {
    state: State,
    /// An answer that came before the callback returned.
    early: Option<(u32, i32)>,
    is_up: bool,
    is_cancelled: bool,
    /// `context` when the filter held it.
    cookie: *mut c_void,
}

impl<F: Filter> Builder<F> {
    /// The size of the filter's own disk; 1 MiB if not said.
    #[must_use]
    pub fn disk(mut self, capacity: u64) -> Self {
        self.capacities[0] = capacity;
        self
    }

    /// Grants another disk; the first is number 1.
    #[must_use]
    pub fn granted(mut self, capacity: u64) -> Self {
        self.capacities.push(capacity);
        self
    }

    /// Of all disks; 512 if not said.
    #[must_use]
    pub fn block_size(mut self, block_size: u32) -> Self {
        self.block_size = block_size;
        self
    }

    /// Makes all disks read-only.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// Sets a parameter, as the operator would write it.
    #[must_use]
    pub fn param(mut self, name: &str, value: &str) -> Self {
        let text = |text: &str| CString::new(text).expect("no zero byte");
        self.params.insert(text(name), text(value));
        self
    }

    /// Gives a file or address parameter its descriptor.
    #[must_use]
    pub fn file(mut self, name: &str, file: impl Into<OwnedFd>) -> Self {
        self.files.insert(CString::new(name).expect("no zero byte"), file.into());
        self
    }

    /// What the filter's sidecar holds when it is opened, or the error that reading it gives.
    #[must_use]
    pub fn sidecar(mut self, state: Result<&[u8], Errno>) -> Self {
        self.sidecar = state.map(<[u8]>::to_vec);
        self
    }

    /// Loads and opens the filter.
    ///
    /// # Panics
    ///
    /// If a parameter is unknown, missing or out of its bounds.
    pub fn open(self) -> Result<Host<F>, Errno> {
        let disks = self.capacities.iter().map(|capacity| sys::Disk {
            size: size_of::<sys::Disk>() as u32,
            block_size: self.block_size,
            capacity: sys::U64(*capacity),
            read_only: self.read_only.into(),
            reserved0: 0,
        });
        let params = params::read(F::PARAMS, &self.params);
        let world = Box::new(World::new(disks.collect(), params, self.files, F::INFO));
        {
            let played = &mut world.state().sidecar;
            match self.sidecar {
                Ok(state) => (played.written, played.durable) = (state.clone(), state),
                Err(errno) => played.read_error = Some(errno),
            }
        }
        let table = table::<F>().0;
        let mut this = std::ptr::null_mut();
        // SAFETY: the table's own functions, called as the header says: load, then open.
        let status = unsafe {
            let status = (table.load.expect("load"))(&SERVICES);
            if status != 0 {
                return Err(Errno::from_raw(-status));
            }
            (table.open.expect("open"))(world.as_instance(), &mut this)
        };
        if status != 0 {
            for (level, line) in &world.state().log {
                eprintln!("{level:?}: {line}");
            }
            return Err(Errno::from_raw(-status));
        }
        Ok(Host { world, table, this, requests: Vec::new(), _filter: PhantomData })
    }
}

impl<F: Filter> Host<F> {
    /// A disk of 1 MiB in blocks of 512 bytes, and default parameters, to begin with.
    pub fn builder() -> Builder<F> {
        Builder {
            capacities: vec![1 << 20],
            block_size: 512,
            read_only: false,
            params: BTreeMap::new(),
            files: BTreeMap::new(),
            sidecar: Ok(Vec::new()),
            _filter: PhantomData,
        }
    }

    /// What a crash would leave of the filter's sidecar now.
    pub fn sidecar(&self) -> Vec<u8> {
        self.world.state().sidecar.durable.clone()
    }

    /// From now on syncing the sidecar fails so; with `None`, it works again.
    pub fn fail_sidecar_sync(&mut self, errno: Option<Errno>) {
        self.world.state().sidecar.sync_error = errno;
    }

    /// The filter itself.
    pub fn filter(&self) -> &F {
        // SAFETY: of `open`; closed when the host is dropped.
        unsafe { filter_of(self.this) }
    }

    /// A write of `data`.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> RequestId {
        self.start(Op::Write, offset, data.into(), 0)
    }

    /// A write of `data` that must be durable before it completes.
    pub fn write_fua(&mut self, offset: u64, data: &[u8]) -> RequestId {
        self.start(Op::Write, offset, data.into(), sys::REQ_FUA)
    }

    /// A request without data of the guest's own: any but a write.
    pub fn request(&mut self, op: Op, offset: u64, length: u32) -> RequestId {
        assert!(op != Op::Write, "a write has data: use write()");
        self.start(op, offset, vec![0; length as usize].into(), 0)
    }

    /// Likewise, but it must be durable before it completes.
    pub fn request_fua(&mut self, op: Op, offset: u64, length: u32) -> RequestId {
        assert!(op != Op::Write, "a write has data: use write_fua()");
        self.start(op, offset, vec![0; length as usize].into(), sys::REQ_FUA)
    }

    /// A request that an instance which is gone had been given already.
    pub fn retry(&mut self, op: Op, offset: u64, data: &[u8]) -> RequestId {
        self.start(op, offset, data.into(), sys::REQ_RETRY)
    }

    fn start(&mut self, op: Op, offset: u64, mut data: Box<[u8]>, flags: u16) -> RequestId {
        let length = data.len() as u32;
        if !op.has_data() {
            data = Box::default();
        }
        let request = Box::into_raw(Box::new(HostRequest {
            raw: sys::Request {
                size: size_of::<sys::Request>() as u32,
                op: op as u8,
                reserved0: 0,
                flags,
                offset: sys::U64(offset),
                length,
                status: 0,
                data: std::ptr::null_mut(),
                context: std::ptr::null_mut(),
            },
            world: &*self.world,
            op,
            offset,
            length,
            data,
            books: Mutex::new(Books {
                state: State::Calling,
                early: None,
                is_up: false,
                is_cancelled: false,
                cookie: std::ptr::null_mut(),
            }),
        }));
        self.requests.push(request);
        let id = RequestId(self.requests.len() - 1);
        if !F::INFO.ops.contains(op) {
            self.books(id).state = State::Below { watched: false };
            return id;
        }
        let shown = match op {
            Op::Write => F::INFO.sees.union(F::INFO.changes).contains(op),
            Op::Read => F::INFO.answers.contains(op),
            _ => false,
        };
        self.call(id, shown, self.table.start_io.expect("start_io"));
        id
    }

    /// Where a request is.
    pub fn state(&self, id: RequestId) -> State {
        self.books(id).state
    }

    /// Lets a request that was passed on end: with the error, or, if `result` is a
    /// success, as the disk in memory says.
    ///
    /// # Panics
    ///
    /// If it is not [`State::Below`].
    pub fn complete(&mut self, id: RequestId, result: Result<(), Errno>) {
        let State::Below { watched } = self.state(id) else {
            panic!("the request is {:?}, not below", self.state(id));
        };
        let request = self.requests[id.0];
        let result = if self.books(id).is_cancelled { Err(Errno::ECANCELED) } else { result };
        // SAFETY: below the filter, the request is the host's alone.
        let result = result.and_then(|()| unsafe {
            let data = (*request).data.as_mut_ptr();
            let (op, offset, length) = ((*request).op, (*request).offset, (*request).length);
            self.world.state().transfer(0, op, offset, length, data)
        });
        if !watched {
            self.books(id).state = State::Ended(result);
            return;
        }
        let mut books = self.books(id);
        (books.state, books.is_up) = (State::Calling, true);
        drop(books);
        // SAFETY: as above.
        unsafe { (*request).raw.status = result.map_or_else(Errno::negative, |()| 0) };
        let info = F::INFO;
        let shown = self.op(id) == Op::Read && info.sees.union(info.changes).contains(Op::Read);
        self.call(id, shown, self.table.io_done.expect("io_done"));
    }

    /// As a guest reset does: tells the filter, if it holds the request, or has held it on
    /// its way down and passed it on: then the cancel and that answer have crossed. The
    /// request reaches the disk no more, but a filter that watches still sees its completion.
    pub fn cancel(&mut self, id: RequestId) {
        let mut books = self.books(id);
        if books.cookie.is_null() || matches!(books.state, State::Ended(_) | State::Calling) {
            return;
        }
        books.is_cancelled = true;
        if books.state == (State::Below { watched: false }) {
            books.state = State::Ended(Err(Errno::ECANCELED));
        }
        let cookie = books.cookie;
        drop(books);
        // SAFETY: as the header says of `cancel`.
        unsafe { (self.table.cancel.expect("cancel"))(self.this, cookie) }
    }

    /// A cancel that comes too late, of a request that is over.
    pub fn cancel_again(&mut self, id: RequestId) {
        let cookie = self.books(id).cookie;
        // SAFETY: the header allows a cancel that the filter's answer has overtaken.
        unsafe { (self.table.cancel.expect("cancel"))(self.this, cookie) }
    }

    /// An event of the disk.
    pub fn event(&mut self, event: Event) -> Result<(), Errno> {
        let number = match event {
            Event::Stun => sys::EVENT_STUN,
            Event::Unstun => sys::EVENT_UNSTUN,
            Event::Attach => sys::EVENT_ATTACH,
            Event::Detach => sys::EVENT_DETACH,
            Event::MigrateOut => sys::EVENT_MIGRATE_OUT,
            Event::MigrateIn => sys::EVENT_MIGRATE_IN,
        };
        // SAFETY: `this` is of `open`.
        Errno::result(unsafe { (self.table.event.expect("event"))(self.this, number) })
    }

    /// What the filter hands to the instance that takes its place.
    pub fn save_state(&mut self) -> Result<Option<Vec<u8>>, Errno> {
        let mut state = vec![0; sys::STATE_MAX];
        let (buf, size) = (state.as_mut_ptr().cast(), sys::STATE_MAX as u32);
        // SAFETY: `this` is of `open`; the memory is `size` bytes.
        let saved = unsafe { (self.table.save_state.expect("save_state"))(self.this, buf, size) };
        match usize::try_from(saved) {
            Ok(length) => {
                state.truncate(length);
                Ok(Some(state))
            }
            Err(_) if saved == Errno::EOPNOTSUPP.negative() => Ok(None),
            Err(_) => Errno::result(saved).map(|()| None),
        }
    }

    /// Hands the filter what another instance of it saved.
    pub fn load_state(&mut self, state: &[u8]) -> Result<(), Errno> {
        let (buf, length) = (state.as_ptr().cast(), state.len() as u32);
        // SAFETY: `this` is of `open`; the memory is `length` bytes.
        let loaded =
            unsafe { (self.table.load_state.expect("load_state"))(self.this, buf, length) };
        Errno::result(loaded)
    }

    /// Brings a request to its end: completes what is below, ends issued requests, does
    /// blocking work, and lets time pass as far as timers need it.
    ///
    /// # Panics
    ///
    /// If it is held, and nothing that could change that is left.
    pub fn run(&mut self, id: RequestId) -> Result<(), Errno> {
        loop {
            match self.state(id) {
                State::Ended(result) => return result,
                State::Below { .. } => self.complete(id, Ok(())),
                state => {
                    if !self.settle() && !self.advance_to_next() {
                        panic!("the request is {state:?}, and there is nothing left to wait for");
                    }
                }
            }
        }
    }

    /// Ends all issued requests with success and does all blocking work, until there is no
    /// more. Whether there was any.
    pub fn settle(&mut self) -> bool {
        let mut is_any = false;
        loop {
            let job = self.world.state().jobs.pop_front();
            if let Some(job) = job {
                job.call();
            } else if let Some(io) = self.issued().first() {
                self.finish(io.id, Ok(()));
            } else {
                return is_any;
            }
            is_any = true;
        }
    }

    /// The requests that the filter has issued and that have not ended, oldest first.
    pub fn issued(&self) -> Vec<IssuedIo> {
        self.world.state().issued.values().map(|flight| flight.io.clone()).collect()
    }

    /// Ends an issued request: with the error, or, if `result` is a success, as the disk
    /// in memory says.
    ///
    /// # Panics
    ///
    /// If it is not in flight.
    pub fn finish(&mut self, id: IssueId, result: Result<(), Errno>) {
        self.world.finish(id, result);
    }

    /// Lets virtual time pass; timers that come due run in order.
    pub fn advance(&mut self, time: Duration) {
        let end = self.world.state().now + time;
        self.world.advance_to(end);
    }

    /// Lets time pass up to the next timer. Whether there was one.
    pub fn advance_to_next(&mut self) -> bool {
        let due = self.world.state().next_due();
        due.inspect(|due| self.world.advance_to(*due)).is_some()
    }

    /// Virtual time since the host was made.
    pub fn now(&self) -> Duration {
        self.world.state().now
    }

    /// Calls back the watches whose descriptors are ready. Whether there was one.
    pub fn poll_watches(&mut self) -> bool {
        let watches: Vec<_> = self.world.state().watches.values().copied().collect();
        let mut is_any = false;
        for (fd, events, run, arg) in watches {
            let mut poll = libc::pollfd { fd, events: events as i16, revents: 0 };
            // SAFETY: one entry, which lives through the call.
            if unsafe { libc::poll(&mut poll, 1, 0) } > 0 {
                // SAFETY: as the filter gave it to `watch_start`.
                unsafe { run(arg as *mut c_void, u32::from(poll.revents as u16)) };
                is_any = true;
            }
        }
        is_any
    }

    /// What disk `index` holds: 0 is the filter's own.
    pub fn stored(&self, index: usize) -> Vec<u8> {
        self.world.state().stores[index].clone()
    }

    /// Changes what disk `index` holds.
    pub fn store(&mut self, index: usize, offset: usize, data: &[u8]) {
        self.world.state().stores[index][offset..offset + data.len()].copy_from_slice(data);
    }

    /// The data of a request that has ended: of a read, what the guest gets.
    pub fn data(&self, id: RequestId) -> Vec<u8> {
        assert!(matches!(self.state(id), State::Ended(_)), "the filter may still change it");
        // SAFETY: after its end the request is the host's alone.
        unsafe { (*self.requests[id.0]).data.to_vec() }
    }

    /// A counter's value; 0 if there is none of that name.
    pub fn counter(&self, name: &str) -> u64 {
        let counters = &self.world.state().counters;
        counters.iter().find(|(n, _)| n.to_bytes() == name.as_bytes()).map_or(0, |(_, v)| *v)
    }

    /// The lines of the log.
    pub fn log(&self) -> Vec<(Level, String)> {
        self.world.state().log.clone()
    }

    /// Timers that are started and not stopped.
    pub fn timers(&self) -> usize {
        self.world.state().timers.len()
    }

    /// Buffers that are allocated and not freed.
    pub fn buffers(&self) -> usize {
        self.world.state().buffers()
    }

    /// How many requests may be issued at once: 256 if not said.
    pub fn limit_issued(&mut self, count: usize) {
        self.world.state().issued_max = count;
    }

    /// How much memory there is for buffers, in bytes: 16 MiB if not said.
    pub fn limit_memory(&mut self, size: usize) {
        self.world.state().memory_max = size;
    }

    /// Takes the violations seen so far, so that they do not fail the test.
    pub fn take_violations(&mut self) -> Vec<String> {
        std::mem::take(&mut self.world.state().violations)
    }

    fn call(
        &mut self,
        id: RequestId,
        shows_data: bool,
        callback: unsafe extern "C" fn(*mut c_void, *mut sys::Request) -> u32,
    ) {
        let request = self.requests[id.0];
        // SAFETY: the request is the host's until the callback begins, and again when it
        // returns anything but HOLD; `books` is behind a lock.
        unsafe {
            let data = (*request).data.as_mut_ptr().cast();
            (*request).raw.data = if shows_data { data } else { std::ptr::null_mut() };
            let number = callback(self.this, request.cast());
            let books = &(*request).books;
            let mut books = books.lock().unwrap_or_else(PoisonError::into_inner);
            match (number, books.early.take()) {
                (sys::HOLD, Some((verdict, status))) => {
                    settle(&self.world, &mut books, (*request).op, verdict, status)
                }
                (sys::HOLD, None) => {
                    books.state = if books.is_up { State::HeldUp } else { State::Held };
                    books.cookie = (*request).raw.context;
                }
                (verdict, None) => {
                    let status = (*request).raw.status;
                    settle(&self.world, &mut books, (*request).op, verdict, status)
                }
                (_, Some(_)) => self.world.state().violations.push("answered twice".into()),
            }
        }
    }

    fn op(&self, id: RequestId) -> Op {
        // SAFETY: `op` is never written after the request is made.
        unsafe { (*self.requests[id.0]).op }
    }

    fn books(&self, id: RequestId) -> MutexGuard<'_, Books> {
        // SAFETY: requests live as long as the host; the books are behind a lock.
        let books = unsafe { &(*self.requests[id.0]).books };
        books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a verdict makes of a request.
fn settle(world: &World, books: &mut Books, op: Op, verdict: u32, status: i32) {
    let may_done = world.answers.contains(op);
    let violation = |text: String| {
        world.state().violations.push(text);
        State::Ended(Err(Errno::EIO))
    };
    books.state = match (verdict, books.is_up) {
        (sys::WATCH, false) => State::Below { watched: true },
        _ if books.is_cancelled => State::Ended(Err(Errno::ECANCELED)),
        (sys::PASS, false) => State::Below { watched: false },
        (sys::DONE, false) if !may_done => violation("done to what it does not answer".into()),
        (sys::DONE, _) => State::Ended(Ok(())),
        (sys::FAIL, _) if status >= 0 => violation(format!("failed with status {status}")),
        (sys::FAIL, _) | (sys::PASS, true) => State::Ended(Errno::result(status)),
        (verdict, _) => violation(format!("the verdict {verdict} is none")),
    };
}

pub(super) unsafe extern "C" fn answer(raw: *mut sys::Request, verdict: u32, status: i32) {
    let request = raw.cast::<HostRequest>();
    // SAFETY: a request of a host, which outlives its instance; see `HostRequest`.
    let (world, books, op) = unsafe { (&*(*request).world, &(*request).books, (*request).op) };
    let mut books = books.lock().unwrap_or_else(PoisonError::into_inner);
    match books.state {
        State::Calling if books.early.is_none() => books.early = Some((verdict, status)),
        State::Held | State::HeldUp => {
            settle(world, &mut books, op, verdict, status);
        }
        state => world.state().violations.push(format!("answered while {state:?}")),
    }
}

impl<F: Filter> Drop for Host<F> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return; // the instance may be in any state: leak it
        }
        let unfinished = self
            .requests
            .iter()
            // SAFETY: as in `books`.
            .filter(|request| unsafe {
                let books = (***request).books.lock().unwrap_or_else(PoisonError::into_inner);
                matches!(books.state, State::Held | State::HeldUp)
                    || books.state == State::Below { watched: true }
            })
            .count();
        assert_eq!(unfinished, 0, "requests that the filter still holds or watches");
        self.settle();
        // SAFETY: no request is with the filter, none issued is in flight.
        unsafe { (self.table.close.expect("close"))(self.this) };
        for request in self.requests.drain(..) {
            // SAFETY: of `start`; the filter is closed.
            drop(unsafe { Box::from_raw(request) });
        }
        let state = self.world.state();
        assert!(state.violations.is_empty(), "violations: {:?}", state.violations);
        assert_eq!(state.timers.len(), 0, "timers left running");
        assert_eq!(state.watches.len(), 0, "watches left running");
        assert_eq!(state.buffers(), 0, "buffers leaked");
    }
}
