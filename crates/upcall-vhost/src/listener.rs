//! Where connections come from: a socket that we make at a path, or one that we are given.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

/// How many connections may wait to be accepted.
const BACKLOG: i32 = 16;
/// How long others may hold the directory.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);

/// Why there is no listener.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the fields are the facts that the message names")]
pub enum ListenError {
    /// Another process serves there. Stop it, or choose another path.
    #[error("{path}: a live process listens there already")]
    InUse { path: PathBuf },
    /// Choose another path: what is there is no socket, and we do not remove it.
    #[error("{path}: exists and is not a socket")]
    NotASocket { path: PathBuf },
    /// Choose a path of 107 bytes at the most: the kernel takes no longer ones.
    #[error("{path}: too long for the path of a socket")]
    TooLong { path: PathBuf },
    /// See the reason.
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    /// The descriptor handed to us is something else.
    #[error("not a listening Unix stream socket: {0}")]
    Inherited(&'static str),
    /// The descriptor handed to us cannot be looked at.
    #[error("inherited descriptor: {0}")]
    InheritedIo(io::Error),
}

/// A listening Unix socket. Non-blocking.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    /// The file that we made, removed on drop if it is still ours.
    bound: Option<Bound>,
}

#[derive(Debug)]
struct Bound {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Listener {
    /// Listens at `path`. `mode`: permissions of the socket, such as 0o660; connecting
    /// takes the right to write. They hold from the first moment that anyone can connect.
    ///
    /// A socket that nobody listens to any more is replaced. Two processes that do this at
    /// once do not remove each other's: they lock the directory.
    pub fn bind(path: &Path, mode: Option<u32>) -> Result<Listener, ListenError> {
        let io_error = |source| ListenError::Io { path: path.into(), source };
        let address = SocketAddrUnix::new(path).map_err(|errno| match errno {
            Errno::NAMETOOLONG => ListenError::TooLong { path: path.into() },
            errno => io_error(errno.into()),
        })?;
        let _lock = lock_directory(path).map_err(io_error)?;
        make_way(path)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(|errno| io_error(errno.into()))?;
        rustix::net::bind(&fd, &address).map_err(|errno| io_error(errno.into()))?;
        let metadata = fs::symlink_metadata(path).map_err(io_error)?;
        let bound = Bound { path: path.into(), device: metadata.dev(), inode: metadata.ino() };
        // From here on, an error removes the file.
        let listener = Listener { socket: fd.into(), bound: Some(bound) };
        if let Some(mode) = mode {
            fs::set_permissions(path, Permissions::from_mode(mode)).map_err(io_error)?;
        }
        rustix::net::listen(&listener.socket, BACKLOG).map_err(|errno| io_error(errno.into()))?;
        Ok(listener)
    }

    /// Uses a socket that somebody else listens with already. Its file stays.
    pub fn adopt(fd: OwnedFd) -> Result<Listener, ListenError> {
        let io_error = |errno: Errno| match errno {
            Errno::NOTSOCK => ListenError::Inherited("not a socket"),
            errno => ListenError::InheritedIo(errno.into()),
        };
        if sockopt::socket_domain(&fd).map_err(io_error)? != AddressFamily::UNIX {
            return Err(ListenError::Inherited("not a Unix socket"));
        }
        if sockopt::socket_type(&fd).map_err(io_error)? != SocketType::STREAM {
            return Err(ListenError::Inherited("not a stream socket"));
        }
        if !sockopt::socket_acceptconn(&fd).map_err(io_error)? {
            return Err(ListenError::Inherited("not listening"));
        }
        let socket = UnixListener::from(fd);
        socket.set_nonblocking(true).map_err(ListenError::InheritedIo)?;
        Ok(Listener { socket, bound: None })
    }

    /// Where it listens, if we made the socket.
    pub fn path(&self) -> Option<&Path> {
        self.bound.as_ref().map(|bound| bound.path.as_path())
    }

    /// The next connection, or `None` if `shutdown` becomes readable first.
    pub fn accept(&self, shutdown: BorrowedFd<'_>) -> io::Result<Option<UnixStream>> {
        loop {
            let mut fds = [
                PollFd::new(&self.socket, PollFlags::IN),
                PollFd::from_borrowed_fd(shutdown, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Err(Errno::INTR) => continue,
                result => result?,
            };
            if !fds[1].revents().is_empty() {
                return Ok(None);
            }
            match self.socket.accept() {
                Ok((stream, _)) => return Ok(Some(stream)),
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock
                            | io::ErrorKind::ConnectionAborted
                            | io::ErrorKind::Interrupted
                    ) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some(Bound { path, device, inode }) = &self.bound else { return };
        let _lock = lock_directory(path);
        let ours = fs::symlink_metadata(path)
            .is_ok_and(|found| (found.dev(), found.ino()) == (*device, *inode));
        if ours {
            let _ = fs::remove_file(path);
        }
    }
}

/// Keeps other listeners out of the directory of `path` until it is dropped.
fn lock_directory(path: &Path) -> io::Result<File> {
    let parent = path.parent().filter(|parent| *parent.as_os_str() != *OsStr::new(""));
    let directory = File::open(parent.unwrap_or(Path::new(".")))?;
    let deadline = Instant::now() + LOCK_TIMEOUT;
    loop {
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(directory),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Removes a socket that nobody listens to from `path`.
fn make_way(path: &Path) -> Result<(), ListenError> {
    let io_error = |source| ListenError::Io { path: path.into(), source };
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io_error(error)),
    };
    if !found.file_type().is_socket() {
        return Err(ListenError::NotASocket { path: path.into() });
    }
    match connect(path) {
        Err(Errno::CONNREFUSED) => fs::remove_file(path).map_err(io_error),
        // A full backlog is a sign of life, too.
        Ok(()) | Err(Errno::AGAIN) => Err(ListenError::InUse { path: path.into() }),
        Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(io_error(errno.into())),
    }
}

fn connect(path: &Path) -> Result<(), Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&fd, &SocketAddrUnix::new(path)?)
}
