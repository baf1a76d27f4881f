//! The control socket of a worker: HTTP and JSON on a Unix socket.
//!
//! [`resource`] is what goes over it, [`Server`] the worker's side, on a thread of its own that
//! no request of a guest ever waits for, [`Client`] that of whoever asks. What is offered is
//! described by `docs/control.openapi.json`, which a test compares with the code.
//!
//! Who may connect is said by the socket's permissions. Whoever connects may look; only root and
//! the user that the worker runs as may change something, and each change is told in the log
//! with who asked for it.
#![forbid(unsafe_code)]

mod client;
mod events;
mod metrics;
mod problem;
pub mod resource;
mod said;
mod server;
mod snapshot;

pub use client::{Client, ClientError, Follow};
pub use events::Events;
pub use problem::Problem;
pub use said::{Said, sink};
pub use server::{Server, ServerError, Shown, openapi};
