//! Which socket each disk listens on: a path, an inherited descriptor, or one that systemd
//! handed over.

use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;

use rustix::net::SocketAddrUnix;
use upcall_vhost::activation::{self, Inherited};
use upcall_worker::SocketSource;

use super::spec::DiskSpec;
use crate::failure::Failure;

/// Sockets from systemd that no disk has taken yet.
pub struct HandedOver(Vec<Inherited>);

impl HandedOver {
    /// What was handed to this process, but for what `is_taken` says of a name.
    pub fn take(is_taken: impl Fn(&str) -> bool) -> HandedOver {
        let mut all = activation::inherited();
        all.retain(|socket| !is_taken(&socket.name));
        HandedOver(all)
    }

    /// Chooses for each disk that says neither socket nor fd, `wants` in their order: first by
    /// name, then what is left in order. An error if sockets are left over.
    pub fn share_out(self, wants: &[&str]) -> Result<Vec<Option<Inherited>>, Failure> {
        let HandedOver(mut left) = self;
        let mut chosen: Vec<Option<Inherited>> = wants
            .iter()
            .map(|want| left.iter().position(|fd| fd.name == *want).map(|index| left.remove(index)))
            .collect();
        let mut left = left.into_iter();
        for place in chosen.iter_mut().filter(|place| place.is_none()) {
            *place = left.next();
        }
        match left.next() {
            None => Ok(chosen),
            Some(fd) => Err(Failure::new(format_args!(
                "systemd handed over a socket named {:?} (descriptor {}) that no disk takes: \
                 FileDescriptorName= must be the name of a disk without socket= and fd=",
                fd.name, fd.number
            ))),
        }
    }
}

/// The socket of `disk`, and where it is, if that can be known.
pub fn of(
    disk: &DiskSpec,
    handed_over: Option<Inherited>,
) -> Result<(SocketSource, Option<PathBuf>), Failure> {
    let given = disk.fd.map(|fd| Inherited { name: String::new(), number: fd.0.into() });
    let Some(inherited) = given.or(handed_over) else {
        let path =
            disk.socket.clone().unwrap_or_else(|| PathBuf::from(format!("./{}.sock", disk.name)));
        let mode = disk.mode.map(|mode| mode.0.0);
        return Ok((SocketSource::Path(path.clone(), mode), Some(path)));
    };
    let fd = self::inherited(&disk.name, inherited.number)?;
    let path = bound_path(&fd);
    Ok((SocketSource::Fd(fd), path))
}

/// An inherited descriptor for `disk`.
pub fn inherited(disk: &str, number: RawFd) -> Result<OwnedFd, Failure> {
    Inherited { name: String::new(), number }.open().map_err(|error| {
        Failure::new(format_args!("disk {disk}: descriptor {number} was not inherited: {error}"))
    })
}

/// The socket for `disk` that systemd handed over by this name, to this process or to the
/// supervisor that started it, and its number.
pub fn named(disk: &str, name: &str) -> Result<(RawFd, OwnedFd), Failure> {
    let all = activation::inherited_here_or_above();
    let Some(found) = all.iter().find(|socket| socket.name == name) else {
        let names: Vec<&str> = all.iter().map(|socket| socket.name.as_str()).collect();
        return Err(Failure::new(format_args!(
            "disk {disk}: systemd handed over no socket named {name:?}, but {names:?}: say \
             FileDescriptorName={name} in its socket unit"
        )));
    };
    Ok((found.number, inherited(disk, found.number)?))
}

/// The path that a socket is bound to.
pub fn bound_path(fd: &OwnedFd) -> Option<PathBuf> {
    let address: SocketAddrUnix = rustix::net::getsockname(fd).ok()?.try_into().ok()?;
    let path = address.path()?.into_owned();
    Some(PathBuf::from(std::ffi::OsString::from(path.into_string().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared_out(names: &[&str], wants: &[&str]) -> Result<Vec<Option<i32>>, Failure> {
        let inherited = names
            .iter()
            .zip(3..)
            .map(|(name, number)| Inherited { name: (*name).to_owned(), number })
            .collect();
        let chosen = HandedOver(inherited).share_out(wants)?;
        Ok(chosen.into_iter().map(|fd| fd.map(|fd| fd.number)).collect())
    }

    #[test]
    fn sockets_go_by_name_and_then_in_order() {
        for (names, wants, expected) in [
            (&[][..], &["a"][..], vec![None]),
            (&["b", "a"], &["a", "b"], vec![Some(4), Some(3)]),
            (&["unknown", "unknown"], &["a", "b"], vec![Some(3), Some(4)]),
            (&["", "a"], &["a", "b"], vec![Some(4), Some(3)]),
            (&["b"], &["a", "b"], vec![None, Some(3)]),
        ] {
            assert_eq!(shared_out(names, wants).unwrap(), expected, "{names:?} for {wants:?}");
        }
    }

    #[test]
    fn a_socket_that_no_disk_takes_is_named() {
        let said = shared_out(&["a", "spare"], &["a"]).unwrap_err().to_string();
        assert!(said.contains("\"spare\""), "{said}");
    }
}
