//! What other processes cost and where they run, as `/proc` tells.
//!
//! Always true: a process that is gone used nothing; nothing here changes a process but
//! [`pin`].

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// What threads used so far, or between two looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// Processor time; of `/proc/PID/task/TID/schedstat`.
    pub cpu_ns: u64,
    /// Times that a thread gave up its core to wait: it slept.
    pub sleeps: u64,
    /// Times that a thread lost its core and could have gone on: it yielded to somebody, or
    /// was preempted.
    pub switches: u64,
}

impl Used {
    /// Of all threads that a process has now. Those that have ended are not counted.
    pub fn by_process(pid: u32) -> Used {
        let mut sum = Used::default();
        for (tid, _) in threads(pid) {
            let used = Used::by_thread(pid, tid);
            sum.cpu_ns += used.cpu_ns;
            sum.sleeps += used.sleeps;
            sum.switches += used.switches;
        }
        sum
    }

    /// Of one thread.
    pub fn by_thread(pid: u32, tid: u32) -> Used {
        let folder = format!("/proc/{pid}/task/{tid}");
        let schedstat = fs::read_to_string(format!("{folder}/schedstat")).unwrap_or_default();
        let status = fs::read_to_string(format!("{folder}/status")).unwrap_or_default();
        Used {
            cpu_ns: schedstat.split(' ').next().and_then(|text| text.parse().ok()).unwrap_or(0),
            sleeps: field(&status, "voluntary_ctxt_switches:"),
            switches: field(&status, "nonvoluntary_ctxt_switches:"),
        }
    }

    /// Of the calling thread.
    pub fn by_this_thread() -> Used {
        Used::by_thread(std::process::id(), own_thread())
    }

    /// What was used since an earlier look.
    #[must_use]
    pub fn since(self, before: Used) -> Used {
        Used {
            cpu_ns: self.cpu_ns.saturating_sub(before.cpu_ns),
            sleeps: self.sleeps.saturating_sub(before.sleeps),
            switches: self.switches.saturating_sub(before.switches),
        }
    }

    /// Both together.
    #[must_use]
    pub fn and(self, other: Used) -> Used {
        Used {
            cpu_ns: self.cpu_ns + other.cpu_ns,
            sleeps: self.sleeps + other.sleeps,
            switches: self.switches + other.switches,
        }
    }
}

fn field(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
}

/// The calling thread's number.
pub fn own_thread() -> u32 {
    rustix::thread::gettid().as_raw_nonzero().get() as u32
}

/// Numbers and names of a process's threads; none if it is gone.
pub fn threads(pid: u32) -> Vec<(u32, String)> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let tids = tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse().ok());
    tids.map(|tid: u32| {
        let name = fs::read_to_string(format!("/proc/{pid}/task/{tid}/comm")).unwrap_or_default();
        (tid, name.trim().to_owned())
    })
    .collect()
}

/// The processes that a process has started and not waited for.
pub fn children(pid: u32) -> Vec<u32> {
    let mut all = BTreeSet::new();
    for (tid, _) in threads(pid) {
        let list = fs::read_to_string(format!("/proc/{pid}/task/{tid}/children"));
        all.extend(
            list.unwrap_or_default().split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()),
        );
    }
    all.into_iter().collect()
}

/// KiB of memory that a process has resident, and how much of that is its own alone. None
/// if it is gone.
pub fn resident_kib(pid: u32) -> Option<(u64, u64)> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let kib = |name| {
        rollup
            .lines()
            .filter_map(|line| line.strip_prefix(name))
            .find_map(|rest: &str| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok())
    };
    let private = kib("Private_Clean:").unwrap_or(0) + kib("Private_Dirty:").unwrap_or(0);
    Some((kib("Rss:")?, private))
}

/// The cores that this process may run on, in order.
pub fn cores() -> Vec<usize> {
    let Ok(set) = sched_getaffinity(None) else { return vec![0] };
    (0..CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).collect()
}

/// Has a thread run on these cores alone; of another process too.
pub fn pin(tid: Option<u32>, cores: &[usize]) -> io::Result<()> {
    let mut set = CpuSet::new();
    cores.iter().for_each(|core| set.set(*core));
    let tid = tid.and_then(|tid| Pid::from_raw(tid as i32));
    Ok(sched_setaffinity(tid, &set)?)
}

/// Has all threads of a process run on these cores alone.
pub fn pin_process(pid: u32, cores: &[usize]) -> io::Result<()> {
    threads(pid).iter().try_for_each(|(tid, _)| pin(Some(*tid), cores))
}

/// What several processes used during `what`, by the names they are given.
pub fn while_watching<T>(
    watched: &[(String, u32)],
    what: impl FnOnce() -> T,
) -> (T, Vec<(String, Used)>) {
    let look = || watched.iter().map(|(_, pid)| Used::by_process(*pid)).collect::<Vec<_>>();
    let before = look();
    let result = what();
    let after = look();
    let mut sums: Vec<(String, Used)> = Vec::new();
    for (((name, _), before), after) in watched.iter().zip(before).zip(after) {
        let used = after.since(before);
        match sums.iter_mut().find(|(known, _)| known == name) {
            Some((_, sum)) => *sum = sum.and(used),
            None => sums.push((name.clone(), used)),
        }
    }
    (result, sums)
}

/// Waits until a file is there.
pub fn wait_for_file(path: &Path, patience: Duration) -> Result<(), String> {
    let end = std::time::Instant::now() + patience;
    while !path.exists() {
        if std::time::Instant::now() > end {
            return Err(format!("{} does not appear", path.display()));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_costs_processor_time_and_a_sleep_is_seen() {
        let before = Used::by_this_thread();
        let start = std::time::Instant::now();
        while start.elapsed() < Duration::from_millis(30) {
            std::hint::spin_loop();
        }
        std::thread::sleep(Duration::from_millis(1));
        let used = Used::by_this_thread().since(before);
        assert!(used.cpu_ns > 1_000_000, "{used:?}");
        assert!(used.sleeps >= 1, "{used:?}");
        let all = Used::by_process(std::process::id());
        assert!(all.cpu_ns >= used.cpu_ns);
    }

    #[test]
    fn a_child_is_found_and_one_that_is_gone_used_nothing() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        assert!(children(std::process::id()).contains(&child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(Used::by_process(child.id()), Used::default());
        assert_eq!(resident_kib(child.id()), None);
        assert!(resident_kib(std::process::id()).unwrap().0 > 100);
    }

    #[test]
    fn processes_of_one_name_are_counted_together() {
        let own = std::process::id();
        let watched = [("a".to_owned(), own), ("a".to_owned(), own), ("b".to_owned(), own)];
        let ((), used) = while_watching(&watched, || ());
        assert_eq!(used.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    }
}
