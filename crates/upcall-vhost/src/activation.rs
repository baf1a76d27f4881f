//! Sockets handed over by systemd (`sd_listen_fds(3)`): LISTEN_PID, LISTEN_FDS and
//! LISTEN_FDNAMES in the environment, descriptors from 3 on.

use std::io;
use std::os::fd::{OwnedFd, RawFd};

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, getpid, getppid, pidfd_getfd, pidfd_open};

/// The first descriptor handed over.
const FIRST_FD: RawFd = 3;
/// More than anybody hands over; keeps a wrong number from costing much.
const COUNT_MAX: RawFd = 1024;

/// A descriptor handed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inherited {
    /// `FileDescriptorName=` of the socket unit; empty if none was given.
    pub name: String,
    /// Its number in this process.
    pub number: RawFd,
}

impl Inherited {
    /// A descriptor of our own for it, closed on exec. The number itself stays open until
    /// the process ends or its owner closes it, and is inherited by children.
    pub fn open(&self) -> io::Result<OwnedFd> {
        let this = pidfd_open(getpid(), PidfdFlags::empty())?;
        Ok(pidfd_getfd(this, self.number, PidfdGetfdFlags::empty())?)
    }
}

/// What systemd handed to this process. Empty if it did not.
pub fn inherited() -> Vec<Inherited> {
    parse(getpid(), |name| std::env::var(name).ok())
}

/// What systemd handed to this process or to its parent, which kept it open: a worker uses
/// what its supervisor was given.
pub fn inherited_here_or_above() -> Vec<Inherited> {
    let all = [Some(getpid()), getppid()].into_iter().flatten();
    all.flat_map(|pid| parse(pid, |name| std::env::var(name).ok())).collect()
}

/// As [`inherited`], for the process `this` with the environment `variable`.
fn parse(this: Pid, variable: impl Fn(&str) -> Option<String>) -> Vec<Inherited> {
    let number = |name| variable(name).and_then(|value| value.parse::<RawFd>().ok());
    if number("LISTEN_PID") != Some(this.as_raw_nonzero().get()) {
        return Vec::new();
    }
    let count = number("LISTEN_FDS").unwrap_or(0).clamp(0, COUNT_MAX);
    let names = variable("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':');
    (FIRST_FD..FIRST_FD + count)
        .map(|number| Inherited { name: names.next().unwrap_or_default().to_owned(), number })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Listener;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    fn with(pid: i32, fds: &str, names: Option<&str>) -> Vec<Inherited> {
        parse(getpid(), |name| match name {
            "LISTEN_PID" => Some(pid.to_string()),
            "LISTEN_FDS" => Some(fds.into()),
            "LISTEN_FDNAMES" => names.map(str::to_owned),
            _ => None,
        })
    }

    #[test]
    fn descriptors_are_ours_only_if_the_process_number_is() {
        let this = getpid().as_raw_nonzero().get();
        let expected = |name: &str, number| Inherited { name: name.into(), number };
        assert_eq!(with(this, "2", Some("a:b")), [expected("a", 3), expected("b", 4)]);
        assert_eq!(with(this, "2", None), [expected("", 3), expected("", 4)]);
        assert_eq!(with(this + 1, "2", None), []);
        assert_eq!(with(this, "-5", None), []);
        assert_eq!(with(this, "x", None), []);
        assert_eq!(with(this, "2000000000", None).len(), 1024);
    }

    #[test]
    fn an_inherited_socket_is_opened_and_looked_at() {
        let (socket, _other) = UnixStream::pair().unwrap();
        let inherited = Inherited { name: String::new(), number: socket.as_raw_fd() };
        let fd = inherited.open().unwrap();
        assert_ne!(fd.as_raw_fd(), socket.as_raw_fd());
        assert!(Listener::adopt(fd).is_err(), "a connected socket does not listen");
    }
}
