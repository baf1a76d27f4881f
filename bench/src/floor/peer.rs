//! The other side of a floor: this program, started again, on a core of its own.
//!
//! It is told on its command line what to play and where the shared memory is; its standard
//! input and output are the bells, where there are some.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use upcall_ring::{Access, Mapping, memfd};

use super::{cache_line, ring, wake};
use crate::process;

/// The first argument of a program that is to be a peer.
pub const FLAG: &str = "--peer";

/// Bytes of the memory that both share.
pub const BYTES: usize = 4096;
/// Where this side writes, and where the peer does: lines of their own, far enough apart
/// that no processor fetches them together.
pub const OURS: usize = 0;
/// See [`OURS`].
pub const THEIRS: usize = 1024;
/// Written to [`OURS`] to end a peer.
pub const END: u32 = u32::MAX;

/// A running peer. Killed when dropped, if it has not ended.
pub struct Peer(Child);

impl Peer {
    /// Starts `kind` on `core`; it finds the memory by the descriptor of ours.
    pub fn start(
        kind: &str,
        core: usize,
        memory: &OwnedFd,
        bells: Option<(OwnedFd, OwnedFd)>,
    ) -> Result<Peer, String> {
        let path = format!("/proc/{}/fd/{}", std::process::id(), memory.as_raw_fd());
        let own = std::env::current_exe().map_err(|error| error.to_string())?;
        let mut command = Command::new(own);
        command.args([FLAG, kind, &core.to_string(), &path]);
        match bells {
            Some((there, back)) => {
                command.stdin(Stdio::from(there)).stdout(Stdio::from(back));
            }
            None => {
                command.stdin(Stdio::null()).stdout(Stdio::null());
            }
        }
        let child = command.spawn().map_err(|error| format!("no peer process: {error}"))?;
        Ok(Peer(child))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Shared memory of a floor, made by this side.
pub fn memory() -> Result<(Arc<Mapping>, OwnedFd), String> {
    let fd = memfd("upcall-bench-floor", BYTES).map_err(|error| error.to_string())?;
    let mapping =
        Mapping::new(&fd, 0, BYTES, Access::ReadWrite).map_err(|error| error.to_string())?;
    Ok((Arc::new(mapping), fd))
}

/// Is the peer: what follows [`FLAG`] on the command line. Returns when the other side ends.
pub fn play(args: &[String]) -> Result<(), String> {
    let [kind, core, path] = args else { return Err("a peer needs three arguments".into()) };
    let core = core.parse().map_err(|_| "no core".to_owned())?;
    process::pin(None, &[core]).map_err(|error| error.to_string())?;
    let file =
        File::options().read(true).write(true).open(path).map_err(|error| error.to_string())?;
    if kind == ring::KIND {
        return ring::play(&file);
    }
    let memory =
        Mapping::new(&file, 0, BYTES, Access::ReadWrite).map_err(|error| error.to_string())?;
    match kind.as_str() {
        cache_line::KIND => cache_line::play(&memory),
        wake::FUTEX => wake::play_futex(&memory),
        wake::EVENTFD => wake::play_eventfd(&memory),
        _ => return Err(format!("no peer plays {kind}")),
    }
    Ok(())
}
