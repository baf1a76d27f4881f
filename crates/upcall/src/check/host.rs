//! The filter host as the kernel sees it: its memory and its open descriptors.

use std::path::PathBuf;

/// What a filter host uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Memory of its own, in KiB.
    pub memory_kib: u64,
    /// Open descriptors.
    pub descriptors: u64,
}

/// The filter host that this process has started: its only child. None if there is none.
pub fn find() -> Option<PathBuf> {
    let own = std::process::id();
    let entries = std::fs::read_dir("/proc").ok()?;
    entries
        .flatten()
        .map(|entry| entry.path())
        .find(|path| field(path, "PPid:") == Some(own.into()) && usage(path).is_some())
}

/// What it uses now; None if it is gone.
pub fn usage(host: &std::path::Path) -> Option<Usage> {
    let descriptors = host.join("fd").read_dir().ok()?.count() as u64;
    Some(Usage { memory_kib: field(host, "RssAnon:")?, descriptors })
}

fn field(process: &std::path::Path, name: &str) -> Option<u64> {
    let status = std::fs::read_to_string(process.join("status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Whether use grew in every phase after the first (in which a filter warms up) by more than
/// `slack` allows; then how much, from the end of the first phase on.
pub fn growth(after_each: &[u64], slack: u64) -> Option<u64> {
    let grows = after_each.len() >= 3
        && after_each.windows(2).all(|pair| pair[1] > pair[0].saturating_add(slack));
    grows.then(|| after_each[after_each.len() - 1] - after_each[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_growth_that_does_not_end_is_a_leak() {
        for (uses, slack, leak) in [
            (&[100, 100, 100, 100][..], 0, None),
            (&[100, 900, 900, 900], 0, None),
            (&[100, 300, 500, 700], 50, Some(600)),
            (&[100, 300, 500, 700], 200, None),
            (&[100, 300, 290, 700], 0, None),
            (&[100, 300], 0, None),
        ] {
            assert_eq!(growth(uses, slack), leak, "{uses:?}");
        }
    }

    #[test]
    fn a_process_is_read() {
        let usage = usage(std::path::Path::new("/proc/self")).unwrap();
        assert!(usage.memory_kib > 0 && usage.descriptors >= 3);
    }
}
