//! A filter host's share of the processor, and what it costs to take more.
//!
//! Its share is one core for each queue that it serves: more than that its queue threads
//! cannot use. Who takes more by threads of its own keeps what is idle, and gives way to
//! everybody else (the lowest weight that the scheduler knows), until it has kept to its share
//! for a while. So it hurts its own disks, whose requests wait for it, and no others.
//!
//! What counts is what it wants, the time that its threads run or wait to run: what it gets says
//! little on a machine that is busy. Pure: time and want are what the caller says.

/// Between two looks that count.
const LOOK_NS: u64 = 400_000_000;
/// So long within its share, and it has its full weight again.
const CALM_NS: u64 = 10_000_000_000;

/// What weight a host is to have from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Weight {
    Low,
    Full,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Share {
    cores: u64,
    /// When it was looked at last, and what it had wanted by then.
    last: Option<(u64, u64)>,
    weight: Weight,
    calm_ns: u64,
}

impl Share {
    /// Of a host that begins to serve so many queues.
    pub(crate) fn new(queues: usize) -> Share {
        Share { cores: queues.max(1) as u64, last: None, weight: Weight::Full, calm_ns: 0 }
    }

    /// It has wanted so much processor time since its beginning. What is to change, if anything.
    pub(crate) fn look(&mut self, now_ns: u64, wanted_ns: u64) -> Option<Weight> {
        let Some((then_ns, wanted_then_ns)) = self.last else {
            self.last = Some((now_ns, wanted_ns));
            return None;
        };
        let passed_ns = now_ns.saturating_sub(then_ns);
        if passed_ns < LOOK_NS {
            return None;
        }
        self.last = Some((now_ns, wanted_ns));
        // A quarter more is within what is measured.
        let most_ns = passed_ns.saturating_mul(5 * self.cores) / 4;
        let is_over = wanted_ns.saturating_sub(wanted_then_ns) > most_ns;
        self.calm_ns = if is_over { 0 } else { self.calm_ns.saturating_add(passed_ns) };
        let weight = match self.weight {
            _ if is_over => Weight::Low,
            Weight::Low if self.calm_ns >= CALM_NS => Weight::Full,
            weight => weight,
        };
        let changes = weight != self.weight;
        self.weight = weight;
        changes.then_some(weight)
    }

    /// Its queues, for people.
    pub(crate) fn cores(&self) -> u64 {
        self.cores
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// Looks every half second, at a want of so many percent of a core each time.
    fn looks(share: &mut Share, percents: &[u64]) -> Vec<Option<Weight>> {
        let (mut now_ns, mut wanted_ns) = share.last.unwrap_or((0, 0));
        let each = percents.iter().map(|percent| {
            now_ns += 500 * MS;
            wanted_ns += 5 * MS * percent;
            share.look(now_ns, wanted_ns)
        });
        each.collect()
    }

    #[test]
    fn who_keeps_to_a_core_for_each_queue_keeps_its_weight() {
        let mut share = Share::new(2);
        assert_eq!(looks(&mut share, &[0, 100, 200, 240, 0]), [None; 5]);
    }

    #[test]
    fn who_takes_more_is_told_once_and_has_it_back_after_a_while() {
        let mut share = Share::new(1);
        let told = looks(&mut share, &[0, 300, 300, 100]);
        assert_eq!(told, [None, Some(Weight::Low), None, None]);
        let told = looks(&mut share, &[100; 19]);
        assert_eq!(told.iter().flatten().collect::<Vec<_>>(), [&Weight::Full]);
        assert_eq!(looks(&mut share, &[300]), [Some(Weight::Low)]);
    }

    #[test]
    fn a_moment_is_no_measure() {
        let mut share = Share::new(1);
        share.look(0, 0);
        assert_eq!(share.look(MS, 50 * MS), None);
        assert_eq!(share.look(500 * MS, 50 * MS), None);
    }
}
