//! qemu-storage-daemon as the peer: no one here wrote it, so a client that is wrong fails
//! against it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::scratch::Scratch;

const PROGRAM: &str = "qemu-storage-daemon";

/// A running qemu-storage-daemon that serves one raw image. Killed when dropped.
#[derive(Debug)]
pub struct Reference {
    child: Child,
    socket: PathBuf,
}

impl Reference {
    /// Serves `image` at the socket `reference.sock` in `scratch`.
    pub fn start(scratch: &Scratch, image: &Path, queues: usize) -> Reference {
        let socket = scratch.join("reference.sock");
        let image = image.display();
        let log = File::create(scratch.join("reference.log")).unwrap();
        let child = Command::new(PROGRAM)
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=disk,filename={image},discard=unmap"))
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues={queues},\
                 addr.type=unix,addr.path={}",
                socket.display()
            ))
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("{PROGRAM}: {error} (scripts/deps installs it)"));
        let deadline = Instant::now() + Duration::from_secs(20);
        while !socket.exists() {
            assert!(Instant::now() < deadline, "{PROGRAM} does not listen");
            thread::sleep(Duration::from_millis(20));
        }
        Reference { child, socket }
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for Reference {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
