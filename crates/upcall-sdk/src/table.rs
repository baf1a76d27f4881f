//! From a [`Filter`] to the C table that the framework calls.
//!
//! A panic never leaves here: it is caught at the border, logged, and ends the process.
//! The framework then does what it does for any filter that dies: it starts a new one and
//! delivers again what had no answer. To answer `EIO` and go on would show the guest an
//! error, and leave a filter running whose own state is no longer what it believes.

use std::any::Any;
use std::ffi::c_void;
use std::mem::size_of;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicPtr, Ordering};

use crate::report::{Level, log_global};
use crate::{Completion, Errno, Event, Filter, HoldId, Instance, Op, Request, sys};

/// The table that [`export_filter!`](crate::export_filter!) exports.
#[repr(transparent)]
pub struct Table(pub(crate) sys::Filter);

// SAFETY: the pointers are to constants.
unsafe impl Sync for Table {}

/// The table of `F`. Fails to compile where the framework would refuse it.
pub const fn table<F: Filter>() -> Table {
    let info = F::INFO;
    info.check();
    Table(sys::Filter {
        size: size_of::<sys::Filter>() as u32,
        abi_version: sys::ABI_VERSION,
        name: info.name.as_ptr(),
        version: info.version.as_ptr(),
        vendor: info.vendor.as_ptr(),
        summary: info.summary.as_ptr(),
        filter_class: info.class as u32,
        flags: (if info.issues { sys::FILTER_ISSUES } else { 0 })
            | (if info.sidecar { sys::FILTER_SIDECAR } else { 0 })
            | (if info.extents { sys::FILTER_EXTENTS } else { 0 }),
        ops: info.ops.mask(),
        sees: info.sees.mask(),
        changes: info.changes.mask(),
        answers: info.answers.mask(),
        param_count: F::PARAMS.len() as u32,
        params: F::PARAMS.as_ptr().cast(),
        load: Some(load),
        unload: None,
        open: Some(open::<F>),
        close: Some(close::<F>),
        start_io: Some(start_io::<F>),
        io_done: Some(io_done::<F>),
        cancel: Some(cancel::<F>),
        event: Some(event::<F>),
        save_state: Some(save_state::<F>),
        load_state: Some(load_state::<F>),
    })
}

/// Exports a [`Filter`] from a `cdylib`, under the one name that the framework looks for.
#[macro_export]
macro_rules! export_filter {
    ($filter:ty) => {
        #[allow(non_upper_case_globals, unsafe_code)]
        #[unsafe(no_mangle)]
        #[doc(hidden)]
        pub static upcall_filter: $crate::Table = $crate::table::<$filter>();
    };
}

/// What `load` was handed. One per shared object: the SDK is linked into each filter.
static SERVICES: AtomicPtr<sys::Services> = AtomicPtr::new(std::ptr::null_mut());

/// An opened instance: what the C side calls `self`.
struct Opened<F: Filter> {
    filter: F,
    instance: Instance,
}

/// The filter behind what `open` stored.
///
/// # Safety
///
/// `this` is of `open::<F>`, and `'a` ends before `close`.
#[cfg(feature = "testing")]
pub(crate) unsafe fn filter_of<'a, F: Filter>(this: *mut c_void) -> &'a F {
    // SAFETY: the caller's duty.
    unsafe { &(*this.cast::<Opened<F>>()).filter }
}

/// Runs a callback; see the module's promise.
pub(crate) fn guard<R>(what: &str, run: impl FnOnce() -> R) -> R {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result,
        Err(payload) => {
            if let Some(services) = services() {
                let text = panic_text(&*payload);
                log_global(services, Level::Error, format_args!("panic in {what}: {text}"));
            }
            std::process::abort();
        }
    }
}

fn panic_text(payload: &(dyn Any + Send)) -> &str {
    if let Some(text) = payload.downcast_ref::<&str>() {
        text
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text
    } else {
        "(no text)"
    }
}

pub(crate) fn services() -> Option<&'static sys::Services> {
    // SAFETY: null, or what `load` was handed: valid until the filter is unloaded, and
    // this code with it.
    unsafe { SERVICES.load(Ordering::Acquire).as_ref() }
}

unsafe extern "C" fn load(services: *const sys::Services) -> i32 {
    // SAFETY: the header: the framework's table. Its two first words are there always.
    let (size, version) = unsafe { ((*services).size, (*services).abi_version) };
    let is_major = version >> 16 == sys::ABI_MAJOR;
    if !is_major || (size as usize) < size_of::<sys::Services>() {
        return Errno::EINVAL.negative();
    }
    SERVICES.store(services.cast_mut(), Ordering::Release);
    0
}

unsafe extern "C" fn open<F: Filter>(raw: *mut sys::Instance, this: *mut *mut c_void) -> i32 {
    guard("open", || {
        let Some(services) = services() else {
            return Errno::EINVAL.negative();
        };
        // SAFETY: the framework's instance, open until `close` returns.
        let Some(instance) = (unsafe { Instance::new(raw, services) }) else {
            return Errno::EINVAL.negative();
        };
        match F::open(instance.clone()) {
            Ok(filter) => {
                let opened = Box::new(Opened { filter, instance });
                // SAFETY: the header: where the framework wants `self`.
                unsafe { *this = Box::into_raw(opened).cast() };
                0
            }
            Err(errno) => {
                instance.shared.callbacks.begin_close();
                instance.shared.finish_close();
                errno.negative()
            }
        }
    })
}

unsafe extern "C" fn close<F: Filter>(this: *mut c_void) {
    guard("close", || {
        // SAFETY: of `open`, and the last call with it.
        let Opened { filter, instance } = *unsafe { Box::from_raw(this.cast::<Opened<F>>()) };
        instance.shared.callbacks.begin_close();
        drop(filter);
        instance.shared.finish_close();
    });
}

unsafe extern "C" fn start_io<F: Filter>(this: *mut c_void, raw: *mut sys::Request) -> u32 {
    guard("start_io", || {
        // SAFETY: `this` is of `open`, shared by all callbacks until `close`.
        let opened = unsafe { &*this.cast::<Opened<F>>() };
        // SAFETY: the header: the filter's own during this call.
        let (mut raw, op) = unsafe { (NonNull::new_unchecked(raw), (*raw).op) };
        if Op::from_number(op).is_none() {
            // SAFETY: as above.
            unsafe { raw.as_mut() }.status = Errno::EOPNOTSUPP.negative();
            return sys::FAIL;
        }
        // SAFETY: as above; the only `Request` of this call.
        let request = unsafe { Request::new(raw) };
        opened.filter.start_io(request).number
    })
}

unsafe extern "C" fn io_done<F: Filter>(this: *mut c_void, raw: *mut sys::Request) -> u32 {
    guard("io_done", || {
        // SAFETY: as in `start_io`.
        let opened = unsafe { &*this.cast::<Opened<F>>() };
        // SAFETY: as in `start_io`; its `op` is one that `start_io` let in.
        let completion = unsafe { Completion::new(NonNull::new_unchecked(raw)) };
        opened.filter.io_done(completion).number
    })
}

unsafe extern "C" fn cancel<F: Filter>(this: *mut c_void, context: *mut c_void) {
    guard("cancel", || {
        // SAFETY: as in `start_io`.
        let opened = unsafe { &*this.cast::<Opened<F>>() };
        if let Some(hold) = HoldId::from_word(context) {
            opened.filter.cancel(hold);
        }
    });
}

unsafe extern "C" fn save_state<F: Filter>(this: *mut c_void, buf: *mut c_void, size: u32) -> i32 {
    guard("save_state", || {
        // SAFETY: as in `start_io`.
        let opened = unsafe { &*this.cast::<Opened<F>>() };
        let state = match opened.filter.save_state() {
            Ok(Some(state)) => state,
            Ok(None) => return Errno::EOPNOTSUPP.negative(),
            Err(errno) => return errno.negative(),
        };
        if state.len() > size as usize {
            return Errno::E2BIG.negative();
        }
        // SAFETY: the header: `size` bytes at `buf` are ours during this call.
        unsafe { std::ptr::copy_nonoverlapping(state.as_ptr(), buf.cast(), state.len()) };
        state.len() as i32
    })
}

unsafe extern "C" fn load_state<F: Filter>(
    this: *mut c_void,
    buf: *const c_void,
    length: u32,
) -> i32 {
    guard("load_state", || {
        // SAFETY: as in `start_io`.
        let opened = unsafe { &*this.cast::<Opened<F>>() };
        // SAFETY: the header: `length` bytes at `buf`, which nobody changes during this call.
        let state = unsafe { std::slice::from_raw_parts(buf.cast::<u8>(), length as usize) };
        opened.filter.load_state(state).map_or_else(Errno::negative, |()| 0)
    })
}

unsafe extern "C" fn event<F: Filter>(this: *mut c_void, event: u32) -> i32 {
    guard("event", || {
        // SAFETY: as in `start_io`.
        let opened = unsafe { &*this.cast::<Opened<F>>() };
        let event = match event {
            sys::EVENT_STUN => Event::Stun,
            sys::EVENT_UNSTUN => Event::Unstun,
            sys::EVENT_ATTACH => Event::Attach,
            sys::EVENT_DETACH => Event::Detach,
            sys::EVENT_MIGRATE_OUT => Event::MigrateOut,
            sys::EVENT_MIGRATE_IN => Event::MigrateIn,
            _ => return 0, // of a newer framework, which must bear that we do not know it
        };
        opened.filter.event(event).map_or_else(Errno::negative, |()| 0)
    })
}
