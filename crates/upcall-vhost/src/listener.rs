//! Where connections come from: a socket that we make at a path, or one that we are given.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

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
    #[error("{path}: too long for the path of a socket: choose one of at most 107 bytes")]
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
    file: Identity,
}

/// Which file is at a path. Inode numbers are used again, so the time of birth counts too
/// where the file system knows it.
#[derive(Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    born: Option<SystemTime>,
}

impl Identity {
    fn of(path: &Path) -> io::Result<Identity> {
        let found = fs::symlink_metadata(path)?;
        let (device, inode, born) = (found.dev(), found.ino(), found.created().ok());
        Ok(Identity { device, inode, born })
    }
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
        let bound = Bound { path: path.into(), file: Identity::of(path).map_err(io_error)? };
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
        let Some(Bound { path, file }) = &self.bound else { return };
        let _lock = lock_directory(path);
        if Identity::of(path).is_ok_and(|found| found == *file) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixDatagram;
    use upcall_ring::Doorbell;

    /// A directory of its own for each test.
    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Directory {
            let name = format!("upcall-listener-{name}-{}", std::process::id());
            let path = std::env::temp_dir().join(name);
            let _ = fs::remove_dir_all(&path);
            fs::create_dir(&path).unwrap();
            Directory(path)
        }

        fn socket(&self) -> PathBuf {
            self.0.join("disk.sock")
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn connections_are_accepted_until_shutdown() {
        let directory = Directory::new("accept");
        let path = directory.socket();
        let listener = Listener::bind(&path, Some(0o660)).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        assert_eq!(listener.path(), Some(path.as_path()));
        let shutdown = Doorbell::new().unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        assert!(listener.accept(shutdown.as_fd()).unwrap().is_some());
        shutdown.ring();
        assert!(listener.accept(shutdown.as_fd()).unwrap().is_none());
        drop(listener);
        assert!(!path.exists(), "removed with its listener");
    }

    #[test]
    fn a_live_socket_is_left_alone_and_a_dead_one_replaced() {
        let directory = Directory::new("stale");
        let path = directory.socket();
        let live = UnixListener::bind(&path).unwrap();
        assert!(matches!(Listener::bind(&path, None), Err(ListenError::InUse { .. })));
        UnixStream::connect(&path).unwrap();
        drop(live);
        let listener = Listener::bind(&path, None).unwrap();
        UnixStream::connect(&path).unwrap();
        assert!(matches!(Listener::bind(&path, None), Err(ListenError::InUse { .. })));
        drop(listener);
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let directory = Directory::new("file");
        let path = directory.socket();
        fs::write(&path, "precious").unwrap();
        assert!(matches!(Listener::bind(&path, None), Err(ListenError::NotASocket { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        let link = directory.0.join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(Listener::bind(&link, None), Err(ListenError::NotASocket { .. })));
        assert!(matches!(Listener::bind(&directory.0, None), Err(ListenError::NotASocket { .. })));
    }

    #[test]
    fn a_file_that_is_no_longer_ours_stays() {
        let directory = Directory::new("ours");
        let path = directory.socket();
        let listener = Listener::bind(&path, None).unwrap();
        // Kept under another name, so that its number is not given to the next file.
        fs::rename(&path, directory.0.join("old")).unwrap();
        let other = UnixListener::bind(&path).unwrap();
        drop(listener);
        assert!(path.exists());
        drop(other);
    }

    #[test]
    fn paths_that_cannot_be_are_named_in_the_error() {
        let directory = Directory::new("paths");
        let long = directory.0.join("x".repeat(120));
        assert!(matches!(Listener::bind(&long, None), Err(ListenError::TooLong { .. })));
        let nowhere = directory.0.join("no/such");
        let error = Listener::bind(&nowhere, None).unwrap_err();
        assert!(error.to_string().contains("no/such"), "{error}");
    }

    #[test]
    fn of_those_who_find_a_dead_socket_at_once_one_gets_it() {
        let directory = Directory::new("race");
        let path = directory.socket();
        let threads = 4;
        for _ in 0..200 {
            drop(UnixListener::bind(&path).unwrap());
            let start = std::sync::Barrier::new(threads);
            let bind = || {
                start.wait();
                Listener::bind(&path, None)
            };
            let results: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..threads).map(|_| scope.spawn(bind)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1, "{results:?}");
        }
    }

    #[test]
    fn only_listening_unix_stream_sockets_are_adopted() {
        let directory = Directory::new("adopt");
        let path = directory.socket();
        let listening = UnixListener::bind(&path).unwrap();
        let listener = Listener::adopt(listening.into()).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(listener);
        assert!(path.exists(), "it was not ours to remove");
        let refused = |fd: OwnedFd| Listener::adopt(fd).unwrap_err().to_string();
        assert!(refused(UnixStream::pair().unwrap().0.into()).contains("not listening"));
        assert!(refused(UnixDatagram::unbound().unwrap().into()).contains("not a stream"));
        assert!(refused(File::open("/dev/null").unwrap().into()).contains("not a socket"));
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(refused(tcp.into()).contains("not a Unix"));
    }
}
