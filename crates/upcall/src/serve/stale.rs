//! What servers that were killed left in the runtime folder: pages of counters and control
//! sockets named after a process, which no other server would ever replace.
//!
//! Only what is certainly nobody's is removed: a file of our own user's, named after a process
//! that has ended, that no worker keeps or answers at. What cannot be looked at stays.

use std::fs::DirEntry;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;

use upcall_stats::{PageReader, ReadError};
use upcall_worker::{LogLevel, LogSink};

use crate::running::is_alive;

/// Clears a folder of what dead servers left there.
pub fn clear(folder: &Path, log: &LogSink) {
    let Ok(entries) = folder.read_dir() else { return };
    for entry in entries.flatten().filter(is_stale) {
        let path = entry.path();
        if std::fs::remove_file(&path).is_ok() {
            log(LogLevel::Info, &format!("{}: removed; its server was killed", path.display()));
        }
    }
}

fn is_stale(entry: &DirEntry) -> bool {
    let name = entry.file_name();
    let Some((owner, what)) = name.to_str().and_then(parts) else { return false };
    // Of the entry itself: no link is followed.
    let Ok(found) = entry.metadata() else { return false };
    if is_alive(owner) || found.uid() != rustix::process::geteuid().as_raw() {
        return false;
    }
    match what {
        "stats" if found.is_file() => is_abandoned(&entry.path()),
        "control" if found.file_type().is_socket() => UnixStream::connect(entry.path())
            .is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused),
        _ => false,
    }
}

/// The process in a name as a server gives it, and what the file is.
fn parts(name: &str) -> Option<(u32, &str)> {
    let (owner, what) = name.strip_prefix("upcall-")?.split_once('.')?;
    Some((owner.parse().ok()?, what))
}

/// A page whose worker has ended. Its process may be in a namespace of its own, where we see
/// nobody alive: then it is the lock that says so.
fn is_abandoned(path: &Path) -> bool {
    let is_dead = match PageReader::open(path) {
        Ok(page) => !is_alive(page.pid()),
        Err(error) => matches!(error, ReadError::OtherVersion),
    };
    is_dead && matches!(upcall_stats::is_kept(path), Ok(false))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::sync::{Arc, Mutex};

    use upcall_stats::Page;

    use super::*;

    /// No process has it: it is above the largest that the kernel gives.
    const NOBODY: u32 = (1 << 22) + 1;

    /// A page that says that process `pid` keeps it.
    fn page(path: &Path, pid: u32, version: u8) {
        let mut bytes = vec![0; 1 << 13];
        bytes[..8].copy_from_slice(b"UPCLSTAT");
        bytes[8] = version;
        bytes[12..16].copy_from_slice(&pid.to_le_bytes());
        std::fs::write(path, bytes).unwrap();
    }

    #[test]
    fn what_is_certainly_nobodys_goes_and_all_else_stays() {
        let folder = std::env::temp_dir().join(format!("upcall-stale-{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        let (own, dead) = (std::process::id(), |end: &str| format!("upcall-{NOBODY}.{end}"));
        let at = |name: &str| folder.join(name);
        let name = |pid: u32, end: &str| format!("upcall-{pid}.{end}");

        // Gone: a page and a socket of the dead, and a page of a dead one of another version.
        page(&at(&dead("stats")), NOBODY, 2);
        page(&at(&name(NOBODY + 1, "stats")), NOBODY, 1);
        drop(UnixListener::bind(at(&dead("control"))).unwrap());
        // Kept: what a living one owns, by its name or by what it says; what a worker that we do
        // not see keeps; where somebody answers; and what is something else.
        page(&at(&name(own, "stats")), NOBODY, 2);
        page(&at(&name(NOBODY + 2, "stats")), own, 2);
        let kept = Page::create(Some(&at(&name(NOBODY + 3, "stats"))), &[]).unwrap();
        let listener = UnixListener::bind(at(&name(NOBODY + 4, "control"))).unwrap();
        drop(UnixListener::bind(at(&name(own, "control"))).unwrap());
        std::fs::write(at(&name(NOBODY + 5, "stats")), "notes").unwrap();
        std::fs::write(at(&name(NOBODY + 5, "control")), "notes").unwrap();
        page(&at("mine.stats"), NOBODY, 2);
        std::os::unix::fs::symlink(at("mine.stats"), at(&name(NOBODY + 6, "stats"))).unwrap();

        let said = Arc::new(Mutex::new(Vec::new()));
        let log: LogSink = {
            let said = said.clone();
            Arc::new(move |_, text| said.lock().unwrap().push(text.to_owned()))
        };
        clear(&folder, &log);
        let mut left: Vec<String> = folder
            .read_dir()
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        drop((kept, listener));
        std::fs::remove_dir_all(&folder).unwrap();
        let mut expected = vec![
            name(own, "stats"),
            name(own, "control"),
            name(NOBODY + 2, "stats"),
            name(NOBODY + 3, "stats"),
            name(NOBODY + 4, "control"),
            name(NOBODY + 5, "stats"),
            name(NOBODY + 5, "control"),
            name(NOBODY + 6, "stats"),
            "mine.stats".into(),
        ];
        expected.sort();
        assert_eq!(left, expected);
        let said = said.lock().unwrap();
        assert_eq!(said.len(), 3, "{said:?}");
        assert!(said.iter().all(|line| line.contains("its server was killed")), "{said:?}");
    }

    #[test]
    fn a_page_whose_worker_is_not_seen_is_kept_by_its_lock_alone() {
        let path = std::env::temp_dir().join(format!("upcall-lock-{}", std::process::id()));
        page(&path, NOBODY, 2);
        assert!(is_abandoned(&path));
        let file = std::fs::File::open(&path).unwrap();
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockShared).unwrap();
        let while_locked = is_abandoned(&path);
        std::fs::remove_file(&path).unwrap();
        assert!(!while_locked);
    }
}
