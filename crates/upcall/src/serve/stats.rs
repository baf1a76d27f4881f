//! Where the page of counters goes.

use std::path::{Path, PathBuf};

use rustix::process::Pid;
use upcall_stats::PageReader;

use super::plan::Place;
use crate::failure::Failure;

/// The path that was given, or one beside the first socket, or one named after the process
/// `owner`. What is there and is no page of counters is never replaced.
pub fn place(given: Option<PathBuf>, disks: &[Place], owner: Pid) -> Result<PathBuf, Failure> {
    let path = given.unwrap_or_else(|| usual(disks, owner));
    if path.symlink_metadata().is_ok() && PageReader::open(&path).is_err() {
        return Err(Failure::new(format_args!(
            "{}: exists and is no page of counters, so it is not replaced; \
             name another place with --stats, or remove it",
            path.display()
        )));
    }
    Ok(path)
}

fn usual(disks: &[Place], owner: Pid) -> PathBuf {
    let sockets = disks.iter().filter_map(|place| match place {
        Place::Path(path) => Some(path),
        Place::Inherited | Place::Nbd | Place::Granted => None,
    });
    match sockets.into_iter().next() {
        Some(path) => {
            let mut name = path.clone().into_os_string();
            name.push(".stats");
            name.into()
        }
        None => runtime_folder().join(format!("upcall-{}.stats", owner.as_raw_pid())),
    }
}

/// Where programs of this user keep such files while they run.
pub fn runtime_folder() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(folder) => folder.into(),
        None if rustix::process::geteuid().is_root() && Path::new("/run").is_dir() => "/run".into(),
        None => std::env::temp_dir(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_place_is_beside_the_first_socket() {
        let disks = [Place::Granted, Place::Path("/run/a.sock".into()), Place::Inherited];
        assert_eq!(usual(&disks, Pid::INIT), Path::new("/run/a.sock.stats"));
        assert_eq!(usual(&[Place::Inherited], Pid::INIT).parent(), Some(&*runtime_folder()));
    }

    #[test]
    fn what_is_no_page_is_not_replaced() {
        let said = place(Some("/etc/passwd".into()), &[], Pid::INIT).unwrap_err().to_string();
        assert!(said.contains("/etc/passwd") && said.contains("--stats"), "{said}");
    }
}
