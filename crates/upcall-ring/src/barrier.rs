//! A memory barrier in all threads of the process at once.

use std::io;

/// `membarrier(2)`: a barrier in all running threads of the process, and the one-time
/// registration that it wants.
const PRIVATE_EXPEDITED: libc::c_int = 1 << 3;
const REGISTER_PRIVATE_EXPEDITED: libc::c_int = 1 << 4;

/// When this returns, each other thread of the process has passed a full memory barrier since
/// the call. So a thread that checks a flag often need not pay for one: whoever changes the
/// flag and then calls this knows that what a thread stored before it saw the old value is
/// visible, and that it sees the new one from now on. An error on kernels before 4.14, or where
/// the call is forbidden: then nothing is promised.
pub fn barrier_everywhere() -> io::Result<()> {
    for command in [REGISTER_PRIVATE_EXPEDITED, PRIVATE_EXPEDITED] {
        // SAFETY: these commands take no pointers and change no memory.
        let result = unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering, compiler_fence};

    use super::*;

    #[test]
    fn a_thread_that_saw_the_old_value_has_shown_what_it_stored_before() {
        // The flag is raised in rounds; a thread that still sees the old round stores that it
        // did, before it looks. After the barrier no such store may be missing.
        let (flag, stored, rounds) = (AtomicU64::new(0), AtomicU64::new(0), 2000);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut number = 0;
                while flag.load(Ordering::Relaxed) < rounds {
                    number += 1;
                    stored.store(number, Ordering::Relaxed);
                    compiler_fence(Ordering::SeqCst);
                    if flag.load(Ordering::Relaxed) % 2 == 1 {
                        // Stopped: says where, and waits to go on.
                        stored.store(u64::MAX, Ordering::Release);
                        while flag.load(Ordering::Acquire) % 2 == 1 {
                            std::hint::spin_loop();
                        }
                    }
                }
            });
            for round in (0..rounds).step_by(2) {
                flag.store(round + 1, Ordering::Relaxed);
                barrier_everywhere().unwrap();
                let seen = stored.load(Ordering::Relaxed);
                // At most one more store can follow: of the loop that began after the barrier.
                let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
                let mut last = seen;
                while last != u64::MAX {
                    last = stored.load(Ordering::Acquire);
                    assert!(last == u64::MAX || last <= seen + 1, "{last} after {seen}");
                    assert!(std::time::Instant::now() < deadline);
                }
                flag.store(round + 2, Ordering::Release);
            }
        });
    }
}
