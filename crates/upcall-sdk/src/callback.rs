//! Timers, watched descriptors and blocking work: closures that the framework calls.
//!
//! Always true: a closure is freed once, never while it runs, and only when the framework
//! will not call it again; when an instance is closed none of its closures runs.

use std::collections::HashMap;
use std::ffi::c_void;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::instance::Shared;
use crate::table::guard;
use crate::{Errno, Instance, sys};

/// A running timer. Dropping it stops it, and waits for its closure if that is running on
/// another thread; so do not drop it while holding a lock that the closure takes.
#[must_use = "dropping a timer stops it"]
pub struct Timer {
    _handle: Handle,
}

/// A watched descriptor. Dropping it ends that, as for [`Timer`].
#[must_use = "dropping a watch ends it"]
pub struct Watch {
    _handle: Handle,
}

impl Instance {
    /// Calls `run` on the timer thread after `delay`, then every `period` if there is
    /// one. Both are rounded up to milliseconds. `run` must not block. Keep the timer: a
    /// dropped one is stopped. Fails with `ENOMEM`, or `ESHUTDOWN` when the instance is
    /// closing.
    pub fn timer(
        &self,
        delay: Duration,
        period: Option<Duration>,
        run: impl Fn() + Send + Sync + 'static,
    ) -> Result<Timer, Errno> {
        let (delay, period) = (millis(delay), period.map_or(0, millis));
        let handle = self.start_callback(Box::new(move |_| run()), |services, raw, arg| {
            // SAFETY: `arg` is what `run_timer` expects and outlives the timer.
            let timer =
                unsafe { (services.timer_start)(raw, delay, period, run_timer, arg.as_ptr()) };
            NonNull::new(timer).map(Stop::Timer)
        })?;
        Ok(Timer { _handle: handle })
    }

    /// Calls `run` on the timer thread whenever `source` is ready for `events` (those of
    /// poll(2), as `libc::POLLIN`), with what it is ready for. `run` must not block, and
    /// must take away what makes it ready. The watch owns `source`. Fails as
    /// [`timer`](Self::timer).
    pub fn watch<S: AsFd + Send + Sync + 'static>(
        &self,
        source: S,
        events: i16,
        run: impl Fn(&S, i16) + Send + Sync + 'static,
    ) -> Result<Watch, Errno> {
        let fd = source.as_fd().as_raw_fd();
        let run = Box::new(move |revents| run(&source, revents as i16));
        let handle = self.start_callback(run, |services, raw, arg| {
            let events = u32::from(events as u16);
            // SAFETY: `arg` is what `run_watch` expects and outlives the watch, and so
            // does the descriptor, which the closure owns.
            let watch = unsafe { (services.watch_start)(raw, fd, events, run_watch, arg.as_ptr()) };
            NonNull::new(watch).map(Stop::Watch)
        })?;
        Ok(Watch { _handle: handle })
    }

    /// Runs `work` once on a worker thread, where it may block. Closing the instance
    /// waits for it. Fails with `ENOMEM`, or `ESHUTDOWN` when the instance is closing.
    pub fn run_blocking(&self, work: impl FnOnce() + Send + 'static) -> Result<(), Errno> {
        let callbacks = &self.shared.callbacks;
        callbacks.begin_job()?;
        let job = Box::new(Job { work: Box::new(work), shared: self.shared.clone() });
        let arg = Box::into_raw(job);
        let started = self.open_call(|services, raw| {
            // SAFETY: `arg` is what `run_job` expects, once.
            unsafe { (services.run_blocking)(raw, run_job, arg.cast()) }
        });
        let result = started.and_then(Errno::result);
        if result.is_err() {
            // SAFETY: the framework refused, so `arg` is still ours.
            drop(unsafe { Box::from_raw(arg) });
            callbacks.end_job();
        }
        result
    }

    fn start_callback(
        &self,
        run: Box<dyn Fn(u32) + Send + Sync>,
        start: impl FnOnce(&'static sys::Services, *mut sys::Instance, NonNull<c_void>) -> Option<Stop>,
    ) -> Result<Handle, Errno> {
        let callback = Arc::new(Callback { run });
        let mut list = self.shared.callbacks.lock();
        if list.is_closing {
            return Err(Errno::ESHUTDOWN);
        }
        let arg = NonNull::from(&*callback).cast();
        let stop = self.open_call(|services, raw| start(services, raw, arg))?;
        let stop = stop.ok_or(Errno::ENOMEM)?;
        let id = list.next;
        list.next += 1;
        list.running.insert(id, Running { stop, _callback: callback });
        Ok(Handle { shared: self.shared.clone(), id })
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

/// The closures of one instance.
#[derive(Default)]
pub(crate) struct Callbacks {
    list: Mutex<List>,
    changed: Condvar,
}

#[derive(Default)]
struct List {
    is_closing: bool,
    next: u64,
    running: HashMap<u64, Running>,
    /// Handles that are in `timer_stop` just now.
    stopping: usize,
    /// Blocking work that has not ended.
    jobs: usize,
}

/// A started timer or watch. The framework has the address of the callback.
struct Running {
    stop: Stop,
    _callback: Arc<Callback>,
}

enum Stop {
    Timer(NonNull<sys::Timer>),
    Watch(NonNull<sys::Watch>),
}

// SAFETY: the pointers are only handed to `timer_stop` and `watch_stop`, from any thread.
unsafe impl Send for Stop {}

struct Callback {
    run: Box<dyn Fn(u32) + Send + Sync>,
}

struct Job {
    work: Box<dyn FnOnce() + Send>,
    shared: Arc<Shared>,
}

struct Handle {
    shared: Arc<Shared>,
    id: u64,
}

impl Callbacks {
    pub(crate) fn begin_close(&self) {
        self.lock().is_closing = true;
    }

    /// Stops what runs, and waits for what cannot be stopped.
    pub(crate) fn stop_all(&self, services: &'static sys::Services) {
        let running = std::mem::take(&mut self.lock().running);
        for running in running.into_values() {
            running.stop(services);
        }
        let mut list = self.lock();
        while list.stopping > 0 || list.jobs > 0 {
            list = self.changed.wait(list).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn begin_job(&self) -> Result<(), Errno> {
        let mut list = self.lock();
        if list.is_closing {
            return Err(Errno::ESHUTDOWN);
        }
        list.jobs += 1;
        Ok(())
    }

    fn end_job(&self) {
        self.lock().jobs -= 1;
        self.changed.notify_all();
    }

    fn stop(&self, id: u64, services: &'static sys::Services) {
        let mut list = self.lock();
        let Some(running) = list.running.remove(&id) else {
            return; // close was faster
        };
        list.stopping += 1;
        drop(list);
        running.stop(services);
        self.lock().stopping -= 1;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Running {
    fn stop(self, services: &'static sys::Services) {
        // SAFETY: each was started once and leaves the list once, to be stopped here;
        // the services may be called, for `close` waits for this. When it returns, the
        // closure does not run, or it runs below us on this very thread, where
        // `Callback::call` keeps it alive.
        unsafe {
            match self.stop {
                Stop::Timer(timer) => (services.timer_stop)(timer.as_ptr()),
                Stop::Watch(watch) => (services.watch_stop)(watch.as_ptr()),
            }
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.callbacks.stop(self.id, self.shared.services());
    }
}

impl Callback {
    /// # Safety
    ///
    /// `arg` is the address of a callback in an `Arc` that has not been stopped.
    unsafe fn call(arg: *mut c_void, revents: u32) {
        // SAFETY: the caller's duty. The count goes up before the closure runs, so that it
        // may stop itself; and nobody else can have stopped it, for that waits for us.
        let callback = unsafe {
            Arc::increment_strong_count(arg.cast::<Callback>());
            Arc::from_raw(arg.cast::<Callback>())
        };
        (callback.run)(revents);
    }
}

unsafe extern "C" fn run_timer(arg: *mut c_void) {
    // SAFETY: the framework calls with what `Instance::timer` gave it.
    guard("a timer", || unsafe { Callback::call(arg, 0) });
}

unsafe extern "C" fn run_watch(arg: *mut c_void, revents: u32) {
    // SAFETY: the framework calls with what `Instance::watch` gave it.
    guard("a watch", || unsafe { Callback::call(arg, revents) });
}

unsafe extern "C" fn run_job(arg: *mut c_void) {
    guard("blocking work", || {
        // SAFETY: the framework calls once with what `run_blocking` gave it.
        let job = unsafe { Box::from_raw(arg.cast::<Job>()) };
        (job.work)();
        job.shared.callbacks.end_job();
    });
}
