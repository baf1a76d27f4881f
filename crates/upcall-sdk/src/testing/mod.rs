//! A host in the test's own process: feed a filter requests, see what it does.
//!
//! [`Host`] calls the filter through the same C table that a filter host calls, and serves
//! the same table of services. Time is virtual and stands still until
//! [`Host::advance`]; disks are memory; nothing happens by itself: issued requests,
//! blocking work and completions wait until the test says so, so that a test can put them
//! into any order. [`Host::run`] does it all for those that do not care.
//!
//! What a framework would count as a violation fails the test when the host is dropped.
//!
//! ```
//! # use upcall_sdk::{Errno, Filter, Info, Instance, Op, OpSet, Request, Verdict};
//! # struct Mine;
//! # impl Filter for Mine {
//! #     const INFO: Info = Info { name: c"mine", ops: OpSet::ALL, ..Info::NEW };
//! #     type Context = ();
//! #     fn open(_: Instance) -> Result<Self, Errno> { Ok(Mine) }
//! #     fn start_io<'a>(&self, request: Request<'a, Self>) -> Verdict<'a> { request.pass() }
//! # }
//! use upcall_sdk::testing::{Host, State};
//!
//! let mut host = Host::<Mine>::builder().disk(1 << 20).open().unwrap();
//! let id = host.write(4096, &[7; 512]);
//! assert_eq!(host.state(id), State::Below { watched: false });
//! assert_eq!(host.run(id), Ok(()));
//! assert_eq!(host.stored(0)[4096..4608], [7; 512]);
//! ```

mod host;
mod page;
mod params;
mod world;

pub use host::{Builder, Host, RequestId, State};
pub use page::check_manual_page;
pub(crate) use world::virtual_now;
pub use world::{IssueId, IssuedIo};
