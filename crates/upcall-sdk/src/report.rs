//! Counters and the log: what a filter tells its operator.

use std::ffi::{CStr, CString};
use std::fmt;

use crate::{Instance, sys};

/// A counter of an instance, which `upcall top` shows. Cheap to clone and to add to.
#[derive(Clone)]
pub struct Counter {
    instance: Instance,
    /// -1: there was no room for it.
    handle: i32,
}

impl Counter {
    /// Adds `delta`. Does nothing after the instance is closed.
    pub fn add(&self, delta: u64) {
        if self.handle < 0 {
            return;
        }
        self.instance.shared.call(|services, raw| {
            // SAFETY: a handle of this instance, which is open.
            unsafe { (services.counter_add)(raw, self.handle, delta) }
        });
    }
}

/// How much a line of the log matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Level {
    /// Something does not work.
    Error = 1,
    /// Something might soon not work.
    Warn = 2,
    /// Worth knowing.
    Info = 3,
    /// For the filter's author.
    Debug = 4,
}

impl Instance {
    /// The counter `name`, of at most 47 bytes. The same name gives the same counter. An
    /// instance has at most 63; adding to one beyond that has no effect.
    pub fn counter(&self, name: &CStr) -> Counter {
        // SAFETY: `name` ends in a zero; the instance is open.
        let handle =
            self.shared.call(|services, raw| unsafe { (services.counter)(raw, name.as_ptr()) });
        Counter { instance: self.clone(), handle: handle.unwrap_or(-1) }
    }

    /// One line to the worker's log, cut at 500 bytes. Rather use [`error!`](crate::error!),
    /// [`warn!`](crate::warn!), [`info!`](crate::info!) and [`debug!`](crate::debug!).
    pub fn log(&self, level: Level, text: fmt::Arguments<'_>) {
        let text = c_string(text);
        // SAFETY: `text` ends in a zero; the instance is open.
        self.shared
            .call(|services, raw| unsafe { (services.log)(raw, level as u32, text.as_ptr()) });
    }
}

/// A line that belongs to no instance.
pub(crate) fn log_global(services: &'static sys::Services, level: Level, text: fmt::Arguments<'_>) {
    let text = c_string(text);
    // SAFETY: `log` takes no instance; `text` ends in a zero.
    unsafe { (services.log)(std::ptr::null_mut(), level as u32, text.as_ptr()) }
}

fn c_string(text: fmt::Arguments<'_>) -> CString {
    let mut bytes = text.to_string().into_bytes();
    bytes.iter_mut().filter(|byte| **byte == 0).for_each(|byte| *byte = b'?');
    CString::new(bytes).unwrap_or_default()
}

/// `error!(instance, "format {}", argument)`: a line of level error.
#[macro_export]
macro_rules! error {
    ($instance:expr, $($text:tt)+) => { $instance.log($crate::Level::Error, format_args!($($text)+)) };
}

/// `warn!(instance, "format {}", argument)`: a line of level warn.
#[macro_export]
macro_rules! warn {
    ($instance:expr, $($text:tt)+) => { $instance.log($crate::Level::Warn, format_args!($($text)+)) };
}

/// `info!(instance, "format {}", argument)`: a line of level info.
#[macro_export]
macro_rules! info {
    ($instance:expr, $($text:tt)+) => { $instance.log($crate::Level::Info, format_args!($($text)+)) };
}

/// `debug!(instance, "format {}", argument)`: a line of level debug.
#[macro_export]
macro_rules! debug {
    ($instance:expr, $($text:tt)+) => { $instance.log($crate::Level::Debug, format_args!($($text)+)) };
}
