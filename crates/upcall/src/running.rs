//! Finding the workers that run: by their pages of counters and their control sockets, in the
//! places where `upcall serve` puts them.

use std::collections::BTreeMap;
use std::fs::FileType;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::time::Timespec;
use upcall_stats::PageReader;

use crate::serve::runtime_folder;

/// Whether a process runs; one that has ended and was not waited for does not.
pub fn is_alive(pid: u32) -> bool {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return false };
    match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => {
            let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
            // Readable once it has ended.
            !matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1..))
        }
        Err(errno) => errno != Errno::SRCH,
    }
}

/// The usual places.
pub fn folders() -> Vec<PathBuf> {
    let mut folders =
        vec![PathBuf::from("."), runtime_folder(), "/run".into(), std::env::temp_dir()];
    // For root, the runtime folder is /run.
    folders.dedup();
    folders
}

/// The pages in `folders` whose workers run, by process, so that one that is found twice counts
/// once.
pub fn pages(folders: &[PathBuf]) -> BTreeMap<u32, (PathBuf, PageReader)> {
    let mut found = BTreeMap::new();
    for path in files(folders, "stats", |kind| kind.is_file()) {
        if let Ok(page) = PageReader::open(&path)
            && is_alive(page.pid())
        {
            found.entry(page.pid()).or_insert((path, page));
        }
    }
    found
}

/// The control sockets in `folders`, each once, but not those that nobody listens at any more; and
/// why one that is there cannot be asked.
pub fn sockets(folders: &[PathBuf]) -> Vec<(PathBuf, io::Result<()>)> {
    let paths = files(folders, "control", |kind| kind.is_socket());
    let mut paths: Vec<PathBuf> =
        paths.iter().filter_map(|path| path.canonicalize().ok()).collect();
    paths.sort();
    paths.dedup();
    let asked = paths.into_iter().map(|path| {
        let connected = UnixStream::connect(&path).map(drop);
        (path, connected)
    });
    let is_dead = |error: &io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    asked.filter(|(_, connected)| !connected.as_ref().is_err_and(is_dead)).collect()
}

/// Paths for a message.
pub fn list<'a>(paths: impl IntoIterator<Item = &'a PathBuf>) -> String {
    let texts: Vec<String> = paths.into_iter().map(|path| path.display().to_string()).collect();
    texts.join(", ")
}

fn files(folders: &[PathBuf], extension: &str, is_it: fn(&FileType) -> bool) -> Vec<PathBuf> {
    let entries = |folder: &Path| folder.read_dir().into_iter().flatten().flatten();
    folders
        .iter()
        .flat_map(|folder| entries(folder))
        .filter(|entry| entry.file_type().is_ok_and(|kind| is_it(&kind)))
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|end| end == extension))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_alive_until_it_ends() {
        assert!(is_alive(std::process::id()));
        assert!(!is_alive(0) && !is_alive(u32::MAX));
        let mut child =
            std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        assert!(is_alive(child.id()));
        drop(child.stdin.take());
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while is_alive(child.id()) && std::time::Instant::now() < end {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(!is_alive(child.id()), "it has ended, though nobody waited for it yet");
        child.wait().unwrap();
    }
}
