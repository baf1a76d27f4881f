//! When a worker that died is started again: pure arithmetic on how long it had served.
//!
//! Always true: it is always started again; the first deaths cost no pause; a worker that dies
//! again and again is started after longer and longer pauses, up to the longest; and one that
//! has served for a minute is one that works.

/// Serving for so long makes the deaths before forgotten.
const SOUND_MS: u64 = 60_000;
/// Deaths after which the worker is started at once.
const FREE: u32 = 2;
/// The pause after the next one; each further one doubles it.
const PAUSE_MS: u64 = 100;
/// From this many deaths on, the pause is the longest, and the operator is told.
const MANY: u32 = 8;

/// See the module.
#[derive(Debug)]
pub struct Policy {
    pause_ms_max: u64,
    /// Deaths in a row, of workers that did not serve for [`SOUND_MS`].
    deaths: u32,
}

/// What follows a death.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Next {
    /// How long to wait before the next start.
    pub pause_ms: u64,
    /// It has now died so often that the operator should be told (once in a row of deaths).
    pub tell_deaths: Option<u32>,
}

impl Policy {
    /// `pause_ms_max`: the longest pause.
    pub fn new(pause_ms_max: u64) -> Policy {
        Policy { pause_ms_max, deaths: 0 }
    }

    /// The longest pause.
    pub fn pause_ms_max(&self) -> u64 {
        self.pause_ms_max
    }

    /// A worker died that had served for `served_ms` (0: it had not come that far).
    pub fn handle_death(&mut self, served_ms: u64) -> Next {
        if served_ms >= SOUND_MS {
            self.deaths = 0;
        }
        self.deaths = self.deaths.saturating_add(1);
        let pause_ms = match self.deaths {
            0..=FREE => 0,
            MANY.. => self.pause_ms_max,
            deaths => (PAUSE_MS << (deaths - FREE - 1)).min(self.pause_ms_max),
        };
        Next { pause_ms, tell_deaths: (self.deaths == MANY).then_some(MANY) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pauses(policy: &mut Policy, served_ms: &[u64]) -> Vec<u64> {
        served_ms.iter().map(|served_ms| policy.handle_death(*served_ms).pause_ms).collect()
    }

    #[test]
    fn pauses_grow_to_the_longest_and_stay_there() {
        let mut policy = Policy::new(10_000);
        let expected = [0, 0, 100, 200, 400, 800, 1600, 10_000, 10_000, 10_000];
        assert_eq!(pauses(&mut policy, &[5; 10]), expected);
        assert_eq!(pauses(&mut Policy::new(150), &[5; 5]), [0, 0, 100, 150, 150]);
        assert_eq!(pauses(&mut Policy::new(0), &[5; 10]), [0; 10]);
    }

    #[test]
    fn a_worker_that_served_for_a_minute_is_started_at_once() {
        let mut policy = Policy::new(10_000);
        pauses(&mut policy, &[0; 10]);
        assert_eq!(pauses(&mut policy, &[59_999]), [10_000]);
        assert_eq!(pauses(&mut policy, &[60_000, 0, 0]), [0, 0, 100]);
    }

    #[test]
    fn the_operator_is_told_once_of_a_row_of_deaths() {
        let mut policy = Policy::new(10_000);
        let mut told = || (0..20).filter_map(|_| policy.handle_death(0).tell_deaths).count();
        assert_eq!(told(), 1);
        policy.handle_death(60_000);
        let told = (0..20).filter_map(|_| policy.handle_death(0).tell_deaths).count();
        assert_eq!(told, 1, "and again when it had worked in between");
    }

    #[test]
    fn deaths_without_end_are_counted_without_harm() {
        let mut policy = Policy::new(u64::MAX);
        policy.deaths = u32::MAX;
        assert_eq!(policy.handle_death(0).pause_ms, u64::MAX);
    }
}
