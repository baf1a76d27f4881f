//! Where clients connect: a Unix socket, a TCP address, or a socket that was handed to us.

use std::fmt::{self, Write};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, acceptfrom_with, sockopt};

/// How long a TCP client may be silent before it is asked whether it is still there.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// Why there is no listener.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// Choose another address or port, or stop who listens there.
    #[error("cannot listen on {address}: {source}")]
    Tcp {
        /// As it was given.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// The descriptor is something else. Hand over a socket that listens already.
    #[error("the inherited descriptor is no listening stream socket, of Unix or TCP: {0}")]
    Inherited(&'static str),
    /// The socket cannot be looked at.
    #[error("the listening socket: {0}")]
    Io(#[from] io::Error),
}

/// Where clients find a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket at this path.
    Unix(PathBuf),
    /// TCP.
    Tcp(SocketAddr),
    /// An inherited socket, whose address is not known.
    Unknown,
}

/// A listening socket, non-blocking.
pub struct Listener {
    socket: Box<dyn AsFd + Send>,
    address: Address,
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Listener({:?})", self.address)
    }
}

impl Listener {
    /// Listens on `HOST:PORT`; a port of 0 lets the system choose.
    pub fn tcp(address: &str) -> Result<Listener, ListenError> {
        let failed = |source| ListenError::Tcp { address: address.to_owned(), source };
        let socket = TcpListener::bind(address).map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        let address = Address::Tcp(socket.local_addr().map_err(failed)?);
        Ok(Listener { socket: Box::new(socket), address })
    }

    /// Uses a non-blocking Unix socket that listens at `path`, and drops it in the end.
    pub fn unix(socket: impl AsFd + Send + 'static, path: &Path) -> Listener {
        let path = std::path::absolute(path).unwrap_or(path.into());
        Listener { socket: Box::new(socket), address: Address::Unix(path) }
    }

    /// Uses a socket that somebody else listens with already.
    pub fn adopt(fd: OwnedFd) -> Result<Listener, ListenError> {
        let io_error = |errno: Errno| match errno {
            Errno::NOTSOCK => ListenError::Inherited("it is no socket"),
            errno => ListenError::Io(errno.into()),
        };
        let domain = sockopt::socket_domain(&fd).map_err(io_error)?;
        if sockopt::socket_type(&fd).map_err(io_error)? != SocketType::STREAM {
            return Err(ListenError::Inherited("it is no stream socket"));
        }
        if !sockopt::socket_acceptconn(&fd).map_err(io_error)? {
            return Err(ListenError::Inherited("it does not listen"));
        }
        rustix::io::ioctl_fionbio(&fd, true).map_err(io_error)?;
        let address = rustix::net::getsockname(&fd).map_err(io_error)?;
        let address = match domain {
            AddressFamily::UNIX => rustix::net::SocketAddrUnix::try_from(address)
                .ok()
                .and_then(|address| address.path().map(|path| path.into_owned()))
                .and_then(|path| path.into_string().ok())
                .map_or(Address::Unknown, |path| Address::Unix(path.into())),
            AddressFamily::INET | AddressFamily::INET6 => {
                SocketAddr::try_from(address).map_or(Address::Unknown, Address::Tcp)
            }
            _ => return Err(ListenError::Inherited("it is neither")),
        };
        Ok(Listener { socket: Box::new(fd), address })
    }

    /// Where it listens.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The next connection, non-blocking; None: there is none now.
    pub(crate) fn accept(&self) -> io::Result<Option<OwnedFd>> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match acceptfrom_with(self.socket.as_fd(), flags) {
            Ok((socket, _)) => {
                if matches!(self.address, Address::Tcp(_)) {
                    // A client that is gone without a word is found out in the end. Where
                    // that cannot be had, the connection serves all the same.
                    let _ = sockopt::set_tcp_nodelay(&socket, true);
                    let _ = sockopt::set_socket_keepalive(&socket, true);
                    let _ = sockopt::set_tcp_keepidle(&socket, KEEPALIVE);
                    let _ = sockopt::set_tcp_keepintvl(&socket, KEEPALIVE / 4);
                    let _ = sockopt::set_tcp_keepcnt(&socket, 4);
                }
                Ok(Some(socket))
            }
            Err(Errno::AGAIN | Errno::CONNABORTED | Errno::INTR) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Address {
    /// What a client is given to find `export` there; `tls`: it must speak TLS.
    pub fn uri(&self, export: &str, tls: bool) -> Option<String> {
        let scheme = if tls { "nbds" } else { "nbd" };
        let export = percent(export.as_bytes());
        match self {
            Address::Unix(path) => {
                let path = percent(path.as_os_str().as_encoded_bytes());
                Some(format!("{scheme}+unix:///{export}?socket={path}"))
            }
            Address::Tcp(address) if address.ip().is_unspecified() => {
                Some(format!("{scheme}://localhost:{}/{export}", address.port()))
            }
            Address::Tcp(address) => Some(format!("{scheme}://{address}/{export}")),
            Address::Unknown => None,
        }
    }
}

/// As a part of a URI.
fn percent(bytes: &[u8]) -> String {
    let mut text = String::new();
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            text.push(byte.into());
        } else {
            // Writing to a String does not fail.
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_can_be_pasted() {
        let unix = Address::Unix("/run/a b&c.sock".into());
        assert_eq!(
            unix.uri("x?ü", false).unwrap(),
            "nbd+unix:///x%3F%C3%BC?socket=/run/a%20b%26c.sock"
        );
        let tcp = Address::Tcp("[::1]:10809".parse().unwrap());
        assert_eq!(tcp.uri("root", true).unwrap(), "nbds://[::1]:10809/root");
        let any = Address::Tcp("0.0.0.0:1".parse().unwrap());
        assert_eq!(any.uri("root", false).unwrap(), "nbd://localhost:1/root");
        assert_eq!(Address::Unknown.uri("root", false), None);
    }

    #[test]
    fn what_does_not_listen_is_not_adopted() {
        let file: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
        assert!(matches!(Listener::adopt(file), Err(ListenError::Inherited(_))));
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(matches!(Listener::adopt(socket.into()), Err(ListenError::Inherited(_))));
        let listening = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listening.local_addr().unwrap();
        let adopted = Listener::adopt(listening.into()).unwrap();
        assert_eq!(adopted.address(), &Address::Tcp(at));
    }
}
