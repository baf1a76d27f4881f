//! Starting a filter host does not fork: that would copy the page tables, and make each next
//! write of every queue thread a page fault that waits for the fork. In a file of its own, so
//! that nothing else in its process is counted.

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};

use common::*;
use upcall_filterhost::Placement;

static FORKS: AtomicUsize = AtomicUsize::new(0);

/// Called in a process that is about to fork.
extern "C" fn count() {
    FORKS.fetch_add(1, Ordering::SeqCst);
}

#[test]
fn a_filter_host_is_started_without_a_fork() {
    // SAFETY: the function lives as long as the program and does nothing that it must not.
    assert_eq!(unsafe { libc::pthread_atfork(Some(count), None, None) }, 0);
    // SAFETY: the child only ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: ends this process at once.
        unsafe { libc::_exit(0) };
    }
    assert_eq!(FORKS.load(Ordering::SeqCst), 1, "forks are seen");
    for _ in 0..3 {
        drop(Worker::serving(&filter(&[]), Placement::Isolated));
    }
    assert_eq!(FORKS.load(Ordering::SeqCst), 1);
}
