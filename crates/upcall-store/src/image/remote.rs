//! A disk that another NBD server has. The daemon is its client, on a connection that is made
//! here: the daemon itself may connect to nobody. Each daemon gets a new one.
//!
//! Nobody can lock such a disk; that it has one writer is for the operator to see to.

use std::fmt;
use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

/// Where an NBD server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdPlace {
    /// A Unix socket.
    Unix(PathBuf),
    /// `HOST:PORT`.
    Tcp(String),
}

/// An export of an NBD server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdServer {
    /// Where it listens.
    pub place: NbdPlace,
    /// The export's name; empty for the server's default.
    pub export: String,
}

/// For each address of the host.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);

impl NbdServer {
    /// A connection to it, on which nothing was said.
    pub(crate) fn connect(&self) -> io::Result<OwnedFd> {
        match &self.place {
            NbdPlace::Unix(path) => UnixStream::connect(path).map(OwnedFd::from),
            NbdPlace::Tcp(address) => {
                let mut last = io::Error::other("its host has no address");
                for address in address.to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, CONNECT_PATIENCE) {
                        Ok(socket) => return Ok(socket.into()),
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
        }
    }
}

impl fmt::Display for NbdServer {
    /// As a URI, without escapes: for messages.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            NbdPlace::Unix(path) => {
                write!(f, "nbd+unix:///{}?socket={}", self.export, path.display())
            }
            NbdPlace::Tcp(address) => write!(f, "nbd://{address}/{}", self.export),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_named_as_a_uri() {
        let server = |place| NbdServer { place, export: "e".into() };
        let unix = server(NbdPlace::Unix("/s".into()));
        assert_eq!(unix.to_string(), "nbd+unix:///e?socket=/s");
        let tcp = server(NbdPlace::Tcp("host:10809".into()));
        assert_eq!(tcp.to_string(), "nbd://host:10809/e");
    }

    #[test]
    fn where_nobody_listens_there_is_no_connection() {
        let server = |place| NbdServer { place, export: String::new() };
        assert!(server(NbdPlace::Unix("/no/such/socket".into())).connect().is_err());
        assert!(server(NbdPlace::Tcp("127.0.0.1:1".into())).connect().is_err());
    }
}
