//! Finding the page of the one worker that runs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::time::Timespec;
use upcall_stats::PageReader;

use crate::failure::Failure;
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

/// The page of the only worker that runs, among the usual places.
pub fn only_live_page() -> Result<PathBuf, Failure> {
    let mut folders =
        vec![PathBuf::from("."), runtime_folder(), "/run".into(), std::env::temp_dir()];
    // For root, the runtime folder is /run.
    folders.dedup();
    choose(live_pages(&folders), &folders)
}

/// By the worker's process, so that one that is found twice counts once.
fn live_pages(folders: &[PathBuf]) -> BTreeMap<u32, PathBuf> {
    let mut found = BTreeMap::new();
    for path in folders.iter().flat_map(|folder| pages_in(folder)) {
        if let Ok(page) = PageReader::open(&path)
            && is_alive(page.pid())
        {
            found.entry(page.pid()).or_insert(path);
        }
    }
    found
}

fn pages_in(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = folder.read_dir() else { return Vec::new() };
    let paths =
        entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()));
    paths
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "stats"))
        .collect()
}

fn choose(found: BTreeMap<u32, PathBuf>, folders: &[PathBuf]) -> Result<PathBuf, Failure> {
    let list = |paths: &mut dyn Iterator<Item = &PathBuf>| {
        paths.map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
    };
    match found.len() {
        0 => Err(Failure::new(format_args!(
            "no worker runs that has its page (*.stats) in {}; give the path that upcall serve \
             printed under \"Live counters\"",
            list(&mut folders.iter())
        ))),
        1 => Ok(found.into_values().next().unwrap_or_default()),
        _ => Err(Failure::new(format_args!(
            "several workers run; give one of {}",
            list(&mut found.values())
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_page_is_chosen_and_none_or_several_are_errors() {
        let folders = ["/a".into()];
        let one = BTreeMap::from([(1, PathBuf::from("/a/x.stats"))]);
        let mut two = one.clone();
        two.insert(2, "/a/y.stats".into());
        assert_eq!(choose(one, &folders).unwrap(), Path::new("/a/x.stats"));
        assert!(choose(two, &folders).unwrap_err().to_string().contains("/a/x.stats, /a/y.stats"));
        assert!(choose(BTreeMap::new(), &folders).unwrap_err().to_string().contains("/a"));
    }

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
