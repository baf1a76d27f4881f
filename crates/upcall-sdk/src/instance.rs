//! What the framework does for an instance, and the end of that.
//!
//! An [`Instance`] can be cloned and kept, by threads that outlive the instance too. So
//! every call goes through a gate that closes when the framework closes the instance:
//! behind it, the framework is not called any more. Closing is orderly:
//!
//! 1. no new timers, watches, blocking work or requests;
//! 2. the filter is dropped;
//! 3. timers and watches that it left behind are stopped, blocking work is waited for;
//! 4. the gate closes, once the calls that are inside are out.

use std::ffi::CStr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use crate::callback::Callbacks;
use crate::{Errno, sys};

/// One filter on one disk, as its author sees it: the way to the framework's services.
/// Any thread may use it. After the instance is closed its methods do nothing and say so.
#[derive(Clone)]
pub struct Instance {
    pub(crate) shared: Arc<Shared>,
}

/// What an instance's disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Bytes; a power of two, at least 512.
    pub block_size: u32,
    /// Bytes.
    pub capacity: u64,
    /// Whether writes are refused.
    pub read_only: bool,
}

pub(crate) struct Shared {
    raw: *mut sys::Instance,
    services: &'static sys::Services,
    is_open: RwLock<bool>,
    pub(crate) callbacks: Callbacks,
    disk: Disk,
    epoch: Instant,
}

// SAFETY: `raw` is only handed to services, which may be called from any thread as long as
// the instance is open, which `is_open` guards.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Calls the framework, if the instance is open. Short: holds up `close`.
    pub(crate) fn call<R>(
        &self,
        service: impl FnOnce(&'static sys::Services, *mut sys::Instance) -> R,
    ) -> Option<R> {
        let is_open = self.is_open.read().unwrap_or_else(PoisonError::into_inner);
        is_open.then(|| service(self.services, self.raw))
    }

    /// The framework's table, for what `close` waits for.
    pub(crate) fn services(&self) -> &'static sys::Services {
        self.services
    }

    /// Closing, steps 3 and 4.
    pub(crate) fn finish_close(&self) {
        self.callbacks.stop_all(self.services);
        *self.is_open.write().unwrap_or_else(PoisonError::into_inner) = false;
    }
}

impl Instance {
    /// # Safety
    ///
    /// `raw` is an instance that is being opened, `services` what `load` was handed; both
    /// may be used until [`Shared::finish_close`] has returned.
    pub(crate) unsafe fn new(
        raw: *mut sys::Instance,
        services: &'static sys::Services,
    ) -> Option<Instance> {
        // SAFETY: the caller's duty; disk 0 is the instance's own.
        let disk = unsafe { read_disk(services, raw, 0) }?;
        Some(Instance {
            shared: Arc::new(Shared {
                raw,
                services,
                is_open: RwLock::new(true),
                callbacks: Callbacks::default(),
                disk,
                epoch: Instant::now(),
            }),
        })
    }

    /// The instance's disk, as it was when the instance was opened.
    pub fn disk(&self) -> Disk {
        self.shared.disk
    }

    /// Granted disk `index`, counting from 1; none if there is none.
    pub fn granted_disk(&self, index: u32) -> Option<Disk> {
        // SAFETY: `call` passes what `new` was given.
        self.shared.call(|services, raw| unsafe { read_disk(services, raw, index) }).flatten()
    }

    /// The value of an int, bool (0 or 1), size (bytes) or millis parameter. 0 for a name
    /// that is none.
    pub fn param_int(&self, name: &CStr) -> i64 {
        self.shared
            // SAFETY: `name` ends in a zero; the instance is open.
            .call(|services, raw| unsafe { (services.param_int)(raw, name.as_ptr()) })
            .unwrap_or(0)
    }

    /// The value of any parameter as text; none for a name that is none, and for text
    /// that is not UTF-8.
    pub fn param_string(&self, name: &CStr) -> Option<String> {
        self.shared
            .call(|services, raw| {
                // SAFETY: `name` ends in a zero; the instance is open.
                let text = unsafe { (services.param_string)(raw, name.as_ptr()) };
                if text.is_null() {
                    return None;
                }
                // SAFETY: the framework's string, valid until close, which waits for us.
                let text = unsafe { CStr::from_ptr(text) };
                text.to_str().ok().map(str::to_owned)
            })
            .flatten()
    }

    /// The value of a fraction parameter, from 0 to 1. None for one that is no number.
    pub fn param_fraction(&self, name: &CStr) -> Option<f64> {
        let value: f64 = self.param_string(name)?.parse().ok()?;
        (0.0..=1.0).contains(&value).then_some(value)
    }

    /// A descriptor of the file or connection of a parameter; none if none was given. It
    /// is a duplicate: the caller's own, but it shares the position in the file.
    pub fn param_fd(&self, name: &CStr) -> Option<OwnedFd> {
        self.shared
            .call(|services, raw| {
                // SAFETY: `name` ends in a zero; the instance is open.
                let fd = unsafe { (services.param_fd)(raw, name.as_ptr()) };
                if fd < 0 {
                    return None;
                }
                // SAFETY: the framework keeps it open until close, which waits for us.
                unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned().ok()
            })
            .flatten()
    }

    /// Time since the instance was opened; never goes back. A filter that takes its time
    /// from here can be tested in virtual time.
    pub fn now(&self) -> Duration {
        #[cfg(feature = "testing")]
        if let Some(now) = self.virtual_now() {
            return now;
        }
        self.shared.epoch.elapsed()
    }

    #[cfg(feature = "testing")]
    fn virtual_now(&self) -> Option<Duration> {
        self.shared.call(crate::testing::virtual_now).flatten()
    }

    pub(crate) fn is_same(&self, other: &Instance) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    pub(crate) fn open_call<R>(
        &self,
        service: impl FnOnce(&'static sys::Services, *mut sys::Instance) -> R,
    ) -> Result<R, Errno> {
        self.shared.call(service).ok_or(Errno::ESHUTDOWN)
    }
}

/// # Safety
///
/// `raw` is an open instance.
unsafe fn read_disk(
    services: &'static sys::Services,
    raw: *mut sys::Instance,
    index: u32,
) -> Option<Disk> {
    // SAFETY: the caller's duty.
    let disk = unsafe { (services.disk)(raw, index).as_ref() }?;
    Some(Disk {
        block_size: disk.block_size,
        capacity: disk.capacity.0,
        read_only: disk.read_only != 0,
    })
}
