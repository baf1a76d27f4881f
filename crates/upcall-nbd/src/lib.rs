//! The NBD frontend: what clients of the Network Block Device protocol ask becomes requests.
//!
//! The path of a request: a client thread receives bytes (`stream`), and a pure state
//! machine makes a [`Command`](commands::Command) of them ([`commands`]). Its data goes to
//! memory of the connection's own (`pool`), and its requests to a queue thread of the
//! worker, as an [`NbdQueue`] (`queue`). What has ended comes back the same way and is
//! written in the style that the client understands ([`reply`]).
//!
//! | module | its one idea |
//! |---|---|
//! | `wire` | the numbers of the protocol |
//! | `export` | what a client is told of a disk |
//! | `handshake` | from the first byte to the export that is used; pure |
//! | `commands` | from bytes to commands that cannot be wrong; pure |
//! | `reply` | answers in three styles; pure |
//! | `job` | from a command to requests, one after the other; pure |
//! | `queue` | to the worker's queue threads and back |
//! | `pool`, `output` | what a connection keeps for its data and for what it sends |
//! | `stream`, `tls` | a socket, in the clear or not |
//! | `connection` | one client, from its first byte to its end |
//! | `client_thread`, `server`, `listener` | many clients |
//! | `extents` | what a disk consists of |
//!
//! Always true: nothing a client says is believed before it is checked; what a client can
//! make us keep is bounded for each connection, and so is the number of connections; no
//! client can keep another, or a queue thread, waiting.
#![forbid(unsafe_code)]

mod client_thread;
pub mod commands;
mod connection;
mod export;
mod extents;
pub mod handshake;
mod job;
mod listener;
mod output;
mod pool;
mod queue;
pub mod reply;
mod server;
mod stream;
mod tls;
#[allow(missing_docs, reason = "the protocol's names and numbers")]
pub mod wire;

pub use export::{ExportError, ExportInfo};
pub use extents::Extents;
pub use handshake::TlsMode;
pub use listener::{Address, ListenError, Listener};
pub use queue::NbdQueue;
pub use server::{ExportConfig, Level, Limits, Log, Queues, Server, ServerBuilder};
pub use tls::{Tls, TlsError, TlsFiles};
