//! The one word, `req->context`, that travels with a request.
//!
//! A watched request carries the address of its boxed context, which `io_done` brings back.
//! A held request carries a number. For a cancel may arrive after the filter has answered:
//! an address might be stale by then, a number is only not found. Numbers are odd and
//! addresses even, so neither is ever taken for the other.
//!
//! Always true: a context is owned by the filter or by exactly one word `req->context`.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use crate::sys;

/// The name of a held request; unique in a filter host, but for 32 bits, where it is used again
/// after two thousand million holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HoldId(usize);

impl HoldId {
    /// A new one.
    pub(crate) fn next() -> HoldId {
        static NEXT: AtomicUsize = AtomicUsize::new(1);
        HoldId(NEXT.fetch_add(2, Ordering::Relaxed))
    }

    pub(crate) fn word(self) -> *mut c_void {
        std::ptr::without_provenance_mut(self.0)
    }

    /// None for the word of a watched request, which nobody holds.
    pub(crate) fn from_word(word: *mut c_void) -> Option<HoldId> {
        (!word.addr().is_multiple_of(2)).then_some(HoldId(word.addr()))
    }
}

/// A boxed context: at an even address even if `C` has no size.
#[repr(align(2))]
struct Watched<C>(C);

pub(crate) fn into_word<C>(context: C) -> *mut c_void {
    Box::into_raw(Box::new(Watched(context))).cast()
}

/// The context behind a word; none if it is null or a number.
///
/// # Safety
///
/// An even word is of [`into_word`] of the same `C`, and comes here once.
pub(crate) unsafe fn from_word<C>(word: *mut c_void) -> Option<C> {
    if word.is_null() || HoldId::from_word(word).is_some() {
        return None;
    }
    // SAFETY: the caller's duty.
    let watched = unsafe { Box::from_raw(word.cast::<Watched<C>>()) };
    Some(watched.0)
}

/// Stores the word. The framework may read it at the same time, for a cancel of what the
/// filter is just about to answer; so it is stored at once.
///
/// # Safety
///
/// `request` is the filter's.
pub(crate) unsafe fn store(request: NonNull<sys::Request>, word: *mut c_void) {
    // SAFETY: the caller's duty; the field is aligned as the struct is.
    let field = unsafe { AtomicPtr::from_ptr(&raw mut (*request.as_ptr()).context) };
    field.store(word, Ordering::Relaxed);
}
