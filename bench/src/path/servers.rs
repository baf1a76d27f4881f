//! The programs that are compared, each serving one disk.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use upcall_tests::{Scratch, Server};

use crate::filters::programs;
use crate::process::{self, wait_for_file};

/// Bytes of the disks.
pub const CAPACITY: u64 = 256 << 20;
/// The name of the program that serves the disk, in rounds.
pub const SERVER: &str = "server";
/// The name of filter hosts in rounds, all together.
pub const HOSTS: &str = "filter hosts";

const PATIENCE: Duration = Duration::from_secs(20);

/// What a disk is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disk {
    /// Nothing: reads give zeroes, writes are forgotten.
    Null,
    /// A raw file, past the page cache.
    Raw,
    /// A qcow2 image, past the page cache: ours is read by a qemu-storage-daemon of our own.
    Qcow2,
}

impl Disk {
    /// In the names of cases.
    pub fn word(self) -> &'static str {
        match self {
            Disk::Null => "null",
            Disk::Raw => "raw O_DIRECT",
            Disk::Qcow2 => "qcow2 O_DIRECT",
        }
    }
}

/// A running server of one disk. Ends when dropped.
pub struct Serving {
    program: Program,
    /// Where it listens.
    pub socket: PathBuf,
    /// Where it listens for a second client, if the first way takes one alone.
    pub second_socket: Option<PathBuf>,
    /// Its processes, by the names they have in rounds.
    pub watched: Vec<(String, u32)>,
}

/// The process itself; kept to be ended.
enum Program {
    /// `upcall serve`.
    Upcall { _server: Server },
    /// Somebody else's.
    Peer(Child),
}

impl Drop for Serving {
    fn drop(&mut self) {
        if let Program::Peer(child) = &mut self.program {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// `upcall serve` with a chain of these filters, each as behind `file=` of `--filter`.
pub fn upcall(
    scratch: &Scratch,
    name: &str,
    disk: Disk,
    queues: usize,
    filters: &[PathBuf],
) -> Result<Serving, String> {
    let socket = scratch.join(&format!("{name}.sock"));
    let what = match disk {
        Disk::Null => format!("null={CAPACITY}"),
        Disk::Raw => format!("file={}", image(scratch, name)?.display()),
        Disk::Qcow2 => format!("file={},format=qcow2", qcow2(scratch, name)?.display()),
    };
    let mut command = Command::new(programs().join("upcall"));
    command.arg("serve").arg("--log-level=warn").arg("--disk");
    command.arg(format!("name={name},{what},socket={},queues={queues}", socket.display()));
    for filter in filters {
        command.arg("--filter").arg(format!("disk={name},file={}", filter.display()));
    }
    let server = Server::spawn(scratch, command);
    let pid = server.pid().as_raw_pid() as u32;
    let children = process::children(pid).into_iter().map(|pid| (role(pid), pid));
    let watched = std::iter::once((SERVER.to_owned(), pid)).chain(children).collect();
    let program = Program::Upcall { _server: server };
    Ok(Serving { program, socket, second_socket: None, watched })
}

/// What a process that `upcall serve` has started is there for.
fn role(pid: u32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    if name.starts_with("qemu-") { "image daemon".into() } else { HOSTS.into() }
}

/// qemu-storage-daemon, with a thread of its own for the disk, as one who wants it fast
/// starts it.
pub fn qemu_storage_daemon(
    scratch: &Scratch,
    name: &str,
    disk: Disk,
    queues: usize,
) -> Result<Serving, String> {
    exports(scratch, disk, queues, &[name])
}

/// As [`qemu_storage_daemon`], with a second export of the same disk.
pub fn qemu_storage_daemon_with_two_exports(
    scratch: &Scratch,
    name: &str,
    disk: Disk,
    queues: usize,
) -> Result<Serving, String> {
    exports(scratch, disk, queues, &[name, &format!("{name}-second")])
}

/// The first of the exports' names is the image's, too.
fn exports(
    scratch: &Scratch,
    disk: Disk,
    queues: usize,
    names: &[&str],
) -> Result<Serving, String> {
    let name = names[0];
    let what = match disk {
        // Reads fill the guest's memory, as ours do.
        Disk::Null => format!("driver=null-co,node-name=disk,size={CAPACITY},read-zeroes=on"),
        Disk::Raw => format!(
            "driver=file,node-name=disk,filename={},cache.direct=on,aio=io_uring",
            image(scratch, name)?.display()
        ),
        Disk::Qcow2 => format!(
            "driver=qcow2,node-name=disk,file.driver=file,file.filename={},file.cache.direct=on,file.aio=io_uring",
            qcow2(scratch, name)?.display()
        ),
    };
    let log = scratch.join(&format!("{name}.log"));
    let log = File::create(&log).map_err(|error| format!("{}: {error}", log.display()))?;
    let mut command = Command::new("qemu-storage-daemon");
    command.args(["--object", "iothread,id=thread", "--blockdev", &what]);
    let sockets: Vec<PathBuf> =
        names.iter().map(|name| scratch.join(&format!("{name}.sock"))).collect();
    for (name, socket) in names.iter().zip(&sockets) {
        command.arg("--export").arg(format!(
            "type=vhost-user-blk,id={name},node-name=disk,writable=on,num-queues={queues},iothread=thread,addr.type=unix,addr.path={}",
            socket.display()
        ));
    }
    let child =
        command.stdin(Stdio::null()).stderr(log).spawn().map_err(|error| {
            format!("qemu-storage-daemon (Debian: qemu-system-common): {error}")
        })?;
    let watched = vec![(SERVER.to_owned(), child.id())];
    let mut sockets = sockets.into_iter();
    let socket = sockets.next().unwrap_or_default();
    let second_socket = sockets.next();
    let serving = Serving { program: Program::Peer(child), socket, second_socket, watched };
    for socket in [Some(&serving.socket), serving.second_socket.as_ref()].into_iter().flatten() {
        wait_for_file(socket, PATIENCE)?;
    }
    Ok(serving)
}

/// A file with data in all its blocks: a hole would be read without the disk.
pub fn image(scratch: &Scratch, name: &str) -> Result<PathBuf, String> {
    let path = scratch.join(&format!("{name}.img"));
    write_image(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(path)
}

/// The same as a qcow2 image, all of it allocated.
fn qcow2(scratch: &Scratch, name: &str) -> Result<PathBuf, String> {
    let raw = image(scratch, name)?;
    let path = scratch.join(&format!("{name}.qcow2"));
    let output = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .args([&raw, &path])
        .output()
        .map_err(|error| format!("qemu-img (Debian: qemu-utils): {error}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    std::fs::remove_file(&raw).map_err(|error| format!("{}: {error}", raw.display()))?;
    let written = File::open(&path).and_then(|file| settle(&file));
    written.map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(path)
}

fn write_image(path: &Path) -> std::io::Result<()> {
    let mut file = File::create_new(path)?;
    let block = vec![0x5a; 1 << 20];
    for _ in 0..CAPACITY / block.len() as u64 {
        file.write_all(&block)?;
    }
    file.write_all_at(&[1], 0)?;
    settle(&file)
}

/// Nothing of a file is in the page cache any more: whoever goes past it first would have to write
/// it back, and to throw it out, page by page.
fn settle(file: &File) -> std::io::Result<()> {
    file.sync_all()?;
    Ok(rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed)?)
}
