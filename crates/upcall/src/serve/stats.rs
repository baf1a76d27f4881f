//! Where the page of counters goes.

use std::path::{Path, PathBuf};

use rustix::process::Pid;
use upcall_stats::{PageReader, ReadError};

use super::plan::Place;
use crate::failure::Failure;

/// The path that was given, or one beside the first socket, or one named after the process
/// `owner`. What is there and is no page of counters is never replaced.
pub fn place(given: Option<PathBuf>, disks: &[Place], owner: Pid) -> Result<PathBuf, Failure> {
    let path = given.unwrap_or_else(|| usual(disks, owner));
    // What an older version left, whose process was killed, is one.
    let is_a_page = || matches!(PageReader::open(&path), Ok(_) | Err(ReadError::OtherVersion));
    if path.symlink_metadata().is_ok() && !is_a_page() {
        return Err(Failure::new(format_args!(
            "{}: exists and is no page of counters, so it is not replaced; \
             name another place with --stats, or remove it",
            path.display()
        )));
    }
    Ok(path)
}

/// Where the control socket goes if nobody says so: beside the page of counters.
pub fn control_beside(stats: &Path) -> PathBuf {
    let mut name = stats.with_extension("").into_os_string();
    name.push(".control");
    name.into()
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
    fn what_another_version_left_is_replaced() {
        let path = std::env::temp_dir().join(format!("upcall-old-page-{}", std::process::id()));
        let mut page = vec![0; 1 << 16];
        page[..12].copy_from_slice(b"UPCLSTAT\x01\0\0\0");
        std::fs::write(&path, &page).unwrap();
        let placed = place(Some(path.clone()), &[], Pid::INIT);
        page[0] = b'X';
        std::fs::write(&path, &page).unwrap();
        let refused = place(Some(path.clone()), &[], Pid::INIT);
        std::fs::remove_file(&path).unwrap();
        assert!(placed.is_ok() && refused.is_err());
    }

    #[test]
    fn what_is_no_page_is_not_replaced() {
        let said = place(Some("/etc/passwd".into()), &[], Pid::INIT).unwrap_err().to_string();
        assert!(said.contains("/etc/passwd") && said.contains("--stats"), "{said}");
    }
}
