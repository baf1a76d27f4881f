//! Serves a disk in memory over vhost-user-blk, one connection after the other: the
//! smallest thing that a virtual machine can be started with.
//!
//! ```text
//! cargo run -p upcall-vhost --features mock --example ram_disk -- /tmp/disk.sock 64
//! qemu-system-x86_64 -m 512 -object memory-backend-memfd,id=mem,size=512M,share=on \
//!     -machine memory-backend=mem -chardev socket,id=c,path=/tmp/disk.sock \
//!     -device vhost-user-blk-pci,chardev=c,num-queues=1 ...
//! ```
#![forbid(unsafe_code)]

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use upcall_ring::Doorbell;
use upcall_vhost::mock::{ThreadHost, disk_info};
use upcall_vhost::{BlkConfig, BlkOptions, Listener, serve_connection};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<_> = std::env::args().collect();
    let [_, path, mebibytes] = &arguments[..] else {
        return Err("usage: ram_disk SOCKET MEBIBYTES".into());
    };
    let capacity = mebibytes.parse::<usize>()? << 20;
    let options = BlkOptions { queues: 4, serial: "ram-disk".into(), ..BlkOptions::default() };
    let config = Arc::new(BlkConfig::new(disk_info(capacity as u64), options)?);
    let listener = Listener::bind(Path::new(path), Some(0o600))?;
    let (never, mut host) = (Doorbell::new()?, ThreadHost::new(capacity));
    while let Some(stream) = listener.accept(never.as_fd())? {
        let result = serve_connection(stream, config.clone(), &mut host, never.as_fd());
        let calls = std::mem::take(&mut *host.calls.lock().expect("no panic"));
        println!("{result:?} {calls:?}");
    }
    Ok(())
}
