//! Disks that grow while they are served.
//!
//! Always true: a disk never shrinks under its guest; and one that somebody knows the size of
//! who cannot be told (a filter) does not grow.

use crate::config::LogLevel;
use crate::worker::ServedDisk;

/// What becomes of a disk whose store has some size now.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Same,
    Grows,
    /// It cannot: why.
    Stays(&'static str),
    Shrank,
}

fn decide(told: u64, now: u64, has_frontend: bool, has_filters: bool) -> Outcome {
    match now.cmp(&told) {
        std::cmp::Ordering::Equal => Outcome::Same,
        std::cmp::Ordering::Less => Outcome::Shrank,
        std::cmp::Ordering::Greater if has_filters => {
            Outcome::Stays("its filters were told a size when they were opened")
        }
        std::cmp::Ordering::Greater if !has_frontend => {
            Outcome::Stays("who uses it was told a size, and cannot be told another")
        }
        std::cmp::Ordering::Greater => Outcome::Grows,
    }
}

/// Looks at a disk's store, lets the disk grow if it can, and gives what there is to say.
pub(crate) fn look_again(disk: &ServedDisk, has_filters: bool) -> Option<(LogLevel, String)> {
    let frontend = disk.frontend.as_ref();
    let told = frontend.map_or(disk.info.capacity, |frontend| frontend.config().capacity());
    let now = match disk.store.measure() {
        Ok(now) => now,
        Err(error) if error.kind() == std::io::ErrorKind::Unsupported => {
            return Some((LogLevel::Info, format!("it stays as it was: {error}")));
        }
        Err(error) => {
            let text = format!("cannot find out how large it is now: {error}; it stays as it was");
            return Some((LogLevel::Error, text));
        }
    };
    Some(match decide(told, now, frontend.is_some(), has_filters) {
        Outcome::Same => return None,
        Outcome::Grows => {
            frontend?.config().grow(now);
            let text = format!("grown from {told} to {now} bytes; its guest is told");
            (LogLevel::Info, text)
        }
        Outcome::Stays(why) => (
            LogLevel::Warn,
            format!(
                "its store has grown from {told} to {now} bytes, but the disk has not: {why}; \
                 serve it anew to use all of it"
            ),
        ),
        Outcome::Shrank => (
            LogLevel::Error,
            format!(
                "its store has shrunk to {now} bytes, but its guest was told {told}, which does \
                 not change: requests behind the end fail; make it as large again"
            ),
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_grows_only_where_everybody_can_be_told() {
        assert_eq!(decide(8, 16, true, false), Outcome::Grows);
        assert!(matches!(decide(8, 16, true, true), Outcome::Stays(_)));
        assert!(matches!(decide(8, 16, false, false), Outcome::Stays(_)));
    }

    #[test]
    fn a_disk_never_shrinks_under_its_guest() {
        for (has_frontend, has_filters) in [(true, true), (true, false), (false, false)] {
            assert_eq!(decide(16, 8, has_frontend, has_filters), Outcome::Shrank);
            assert_eq!(decide(16, 16, has_frontend, has_filters), Outcome::Same);
        }
    }
}
