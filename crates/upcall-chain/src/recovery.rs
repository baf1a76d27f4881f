//! When a filter host that failed is started again.
//!
//! A [`Recovery`] counts the failures of one host and says what is next; it starts and kills
//! nothing. Time is what the caller says; it never goes back.
//!
//! Always true: at most one start is asked for at a time; between two starts of one host lies
//! at least the back-off, which doubles with each failure that is not old; a host that failed
//! too often is quarantined, which is said once, and is then tried at long intervals only.

use std::collections::VecDeque;

/// How patiently a filter host is started again. The defaults are for a filter that fails
/// rarely, and whose guest should not notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecoveryPolicy {
    /// The wait before the second start within the window; the first has none. Doubles
    /// with each further one.
    pub backoff_ms_min: u64,
    /// Where the doubling ends.
    pub backoff_ms_max: u64,
    /// So many failures within the window are borne; with one more it is quarantined.
    pub failures_max: usize,
    /// How long a failure counts.
    pub window_ms: u64,
    /// How often a quarantined host is tried.
    pub quarantine_ms: u64,
}

impl Default for RecoveryPolicy {
    fn default() -> RecoveryPolicy {
        RecoveryPolicy {
            backoff_ms_min: 10,
            backoff_ms_max: 5_000,
            failures_max: 5,
            window_ms: 60_000,
            quarantine_ms: 30_000,
        }
    }
}

/// How a filter host is, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// It serves.
    Up,
    /// It failed and is being started again.
    Restarting,
    /// It failed too often, and is tried at long intervals.
    Quarantined,
    /// It is not started again.
    Gone,
}

/// What follows from a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failed {
    /// It is to be started again, so many milliseconds later.
    Restart {
        /// The wait.
        after_ms: u64,
    },
    /// It has just been quarantined: raise an alarm. It is tried so much later.
    Alarm {
        /// The wait.
        after_ms: u64,
    },
    /// Nobody needs it any more.
    Gone,
}

/// See the module.
#[derive(Debug)]
pub struct Recovery {
    policy: RecoveryPolicy,
    /// When it failed, the latest last; as many as can matter.
    failures: VecDeque<u64>,
    state: State,
    is_quarantined: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Up,
    /// To be started then.
    Waiting {
        until_ns: u64,
    },
    Starting,
    Gone,
}

const MS: u64 = 1_000_000;

impl Recovery {
    /// Of a host that serves.
    pub fn new(policy: RecoveryPolicy) -> Recovery {
        Recovery { policy, failures: VecDeque::new(), state: State::Up, is_quarantined: false }
    }

    /// It died, was killed for a hang or for broken rules, or a start failed. `is_needed`:
    /// somebody waits for it to come back.
    pub fn handle_failure(&mut self, now_ns: u64, is_needed: bool) -> Failed {
        if !is_needed {
            self.state = State::Gone;
            return Failed::Gone;
        }
        self.forget(now_ns);
        self.failures.push_back(now_ns);
        let was_quarantined = self.is_quarantined;
        self.is_quarantined |= self.failures.len() > self.policy.failures_max;
        // As many as decide are enough to remember, however fast it fails.
        if self.failures.len() > self.policy.failures_max + 1 {
            self.failures.pop_front();
        }
        let after_ms = match self.is_quarantined {
            true => self.policy.quarantine_ms,
            false => self.backoff_ms(),
        };
        self.state = State::Waiting { until_ns: now_ns.saturating_add(after_ms * MS) };
        match self.is_quarantined && !was_quarantined {
            true => Failed::Alarm { after_ms },
            false => Failed::Restart { after_ms },
        }
    }

    /// When it is to be started; `None` if it is not to be, or is being started.
    pub fn start_at_ns(&self) -> Option<u64> {
        match self.state {
            State::Waiting { until_ns } => Some(until_ns),
            _ => None,
        }
    }

    /// Whether it is to be started now. From a yes on it is being started.
    pub fn poll_start(&mut self, now_ns: u64) -> bool {
        let is_due = self.start_at_ns().is_some_and(|at_ns| at_ns <= now_ns);
        if is_due {
            self.state = State::Starting;
        }
        is_due
    }

    /// It serves again.
    pub fn handle_started(&mut self) {
        if self.state == State::Starting {
            self.state = State::Up;
        }
    }

    /// How it is. A host in quarantine that serves again is up; but until the failures that
    /// brought it there are old, one more brings it back.
    pub fn health(&self) -> Health {
        match self.state {
            State::Up => Health::Up,
            State::Gone => Health::Gone,
            _ if self.is_quarantined => Health::Quarantined,
            _ => Health::Restarting,
        }
    }

    fn backoff_ms(&self) -> u64 {
        match self.failures.len() {
            0 | 1 => 0,
            more => {
                let doubled = 1u64.checked_shl(more as u32 - 2).unwrap_or(u64::MAX);
                self.policy.backoff_ms_min.saturating_mul(doubled).min(self.policy.backoff_ms_max)
            }
        }
    }

    /// What is old counts no more.
    fn forget(&mut self, now_ns: u64) {
        let window_ns = self.policy.window_ms.saturating_mul(MS);
        while self.failures.front().is_some_and(|at| now_ns.saturating_sub(*at) > window_ns) {
            self.failures.pop_front();
        }
        if self.failures.is_empty() {
            self.is_quarantined = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waits(recovery: &mut Recovery, now_ms: u64) -> u64 {
        match recovery.handle_failure(now_ms * MS, true) {
            Failed::Restart { after_ms } => {
                assert!(after_ms == 0 || !recovery.poll_start((now_ms + after_ms) * MS - 1));
                assert!(recovery.poll_start((now_ms + after_ms) * MS));
                assert!(!recovery.poll_start(u64::MAX), "one start at a time");
                recovery.handle_started();
                assert_eq!(recovery.health(), Health::Up);
                after_ms
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_first_restart_is_at_once_and_the_next_ones_wait_twice_as_long_each() {
        let policy = RecoveryPolicy { failures_max: 100, ..RecoveryPolicy::default() };
        let mut recovery = Recovery::new(policy);
        let all: Vec<u64> = (0..13).map(|at| waits(&mut recovery, at)).collect();
        assert_eq!(all, [0, 10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5000, 5000, 5000]);
    }

    #[test]
    fn failures_that_are_old_do_not_count() {
        let mut recovery = Recovery::new(RecoveryPolicy::default());
        for minute in 0..20 {
            assert_eq!(waits(&mut recovery, minute * 60_001), 0);
        }
    }

    #[test]
    fn one_failure_too_many_is_a_quarantine_that_is_said_once() {
        let mut recovery = Recovery::new(RecoveryPolicy::default());
        (0..5).for_each(|at| assert!(waits(&mut recovery, at) < 100));
        assert_eq!(recovery.handle_failure(5 * MS, true), Failed::Alarm { after_ms: 30_000 });
        assert_eq!(recovery.health(), Health::Quarantined);
        assert_eq!(recovery.start_at_ns(), Some(30_005 * MS));
        assert!(!recovery.poll_start(30_004 * MS) && recovery.poll_start(30_005 * MS));
        let again = recovery.handle_failure(30_006 * MS, true);
        assert_eq!(again, Failed::Restart { after_ms: 30_000 }, "no second alarm");
        assert_eq!(recovery.health(), Health::Quarantined);
    }

    #[test]
    fn who_behaves_for_a_whole_window_leaves_quarantine() {
        let mut recovery = Recovery::new(RecoveryPolicy::default());
        (0..5).for_each(|at| assert!(waits(&mut recovery, at) < 100));
        assert!(matches!(recovery.handle_failure(5 * MS, true), Failed::Alarm { .. }));
        assert!(recovery.poll_start(30_005 * MS));
        recovery.handle_started();
        assert_eq!(waits(&mut recovery, 100_000), 0, "as if nothing had been");
    }

    #[test]
    fn a_host_that_nobody_needs_is_not_started_again() {
        let mut recovery = Recovery::new(RecoveryPolicy::default());
        assert_eq!(recovery.handle_failure(0, false), Failed::Gone);
        assert!(!recovery.poll_start(u64::MAX));
        assert_eq!((recovery.health(), recovery.start_at_ns()), (Health::Gone, None));
    }

    #[test]
    fn however_fast_it_fails_what_is_remembered_stays_small() {
        let mut recovery = Recovery::new(RecoveryPolicy::default());
        for at in 0..1000 {
            let _ = recovery.handle_failure(at, true);
        }
        assert!(recovery.failures.len() <= 6);
    }
}
