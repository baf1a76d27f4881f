//! Which files a daemon may use, and how they are put together: its command line.
//!
//! All files are opened here, once, checked and locked, and stay open as long as the store:
//! a daemon that is started again gets the same. It is told descriptors (`/proc/self/fd/N`),
//! never names; what else an image names, it is told to do without (`backing: null`) or
//! cannot open ([`confine`](crate::image::confine)).

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, FileType, Mode, OFlags, ResolveFlags};
use serde_json::{Value, json};

use crate::OpenError;
use crate::image::format::ImageFormat;
use crate::image::remote::NbdServer;
use crate::image::vmdk::{self, Descriptor};
use crate::image::{ImageOptions, ImageSource, Layer};
use crate::raw::{self, lock};

/// A file that the daemon may open.
#[derive(Debug)]
pub(crate) struct Allowed {
    pub file: File,
    pub is_writable: bool,
    pub is_device: bool,
}

/// A VMDK's descriptor: the file, and what the daemon gets in its place.
#[derive(Debug)]
struct Text {
    original: File,
    given: OwnedFd,
}

/// What files are opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// To be served: they are locked.
    Serve,
    /// To be looked at, for reading, while others may have them and write to them.
    Look,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Plan {
    files: Vec<Allowed>,
    texts: Vec<Text>,
    secret: Option<OwnedFd>,
    /// In the order in which they refer to each other.
    nodes: Vec<Value>,
    /// Who has the disk, if it is in no file.
    server: Option<NbdServer>,
    read_only: bool,
    purpose: Purpose,
}

/// Sockets that a daemon inherits, each its own.
pub(crate) struct Sockets {
    /// Where it listens, as a vhost-user device.
    pub requests: OwnedFd,
    /// Where it listens, as an NBD server that only reads.
    pub questions: OwnedFd,
    /// A connection to who has the disk.
    pub server: Option<OwnedFd>,
}

impl Sockets {
    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        [&self.requests, &self.questions].into_iter().chain(&self.server).map(|fd| fd.as_fd())
    }
}

/// How a daemon reads and writes files that are opened with O_DIRECT; others it leaves to threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Aio {
    /// By io_submit(2): as many requests at once as have come.
    Native,
    /// A thread for each request that is in flight.
    Threads,
}

/// More than any passphrase has.
const SECRET_BYTES_MAX: u64 = 64 << 10;

/// The name of the node that is exported.
pub(crate) const TOP: &str = "disk";

impl Plan {
    pub fn open(options: &ImageOptions, purpose: Purpose) -> Result<Plan, OpenError> {
        let read_only = options.read_only || purpose == Purpose::Look;
        let mut plan = Plan {
            files: vec![],
            texts: vec![],
            secret: None,
            nodes: vec![],
            server: None,
            read_only,
            purpose,
        };
        let path = match &options.source {
            ImageSource::File(path) => path,
            ImageSource::Server(server) => {
                plan.server = Some(server.clone());
                return Ok(plan);
            }
        };
        let mut below = Value::Null;
        for (index, layer) in options.backing.iter().enumerate().rev() {
            let name = format!("backing{index}");
            let node = plan.image(options, layer, &name, true, &below)?;
            plan.nodes.push(node);
            below = Value::String(name);
        }
        let top = Layer { format: options.format, path: path.clone() };
        let mut node = plan.image(options, &top, TOP, read_only, &below)?;
        if let Some(path) = &options.data_file {
            node["data-file"] = plan.file(path, "data", read_only, options.direct)?.into();
        }
        if let Some(secret) = &options.secret {
            plan.secret = Some(
                keep_secret(secret)
                    .map_err(|source| system(path, "keep its secret in memory", source))?,
            );
            node["encrypt"] = json!({ "format": "luks", "key-secret": "secret" });
        }
        plan.nodes.push(node);
        Ok(plan)
    }

    /// The node of one image; opens its files.
    fn image(
        &mut self,
        options: &ImageOptions,
        layer: &Layer,
        name: &str,
        read_only: bool,
        below: &Value,
    ) -> Result<Value, OpenError> {
        let file_name = format!("{name}-file");
        let file = if layer.format == ImageFormat::Vmdk {
            self.vmdk_file(options, &layer.path, &file_name, read_only)?
        } else {
            self.file(&layer.path, &file_name, read_only, options.direct)?
        };
        let mut node = json!({
            "driver": layer.format.name(),
            "node-name": name,
            "file": file,
            "read-only": read_only,
            "discard": "unmap",
            "cache": { "direct": options.direct, "no-flush": false },
        });
        if layer.format.can_have_backing() {
            node["backing"] = below.clone();
        }
        if self.purpose == Purpose::Look {
            // Or it would lock a VMDK's extents.
            node["force-share"] = true.into();
        }
        Ok(node)
    }

    /// A file by itself; gives its node's name.
    fn file(
        &mut self,
        path: &Path,
        node_name: &str,
        read_only: bool,
        direct: bool,
    ) -> Result<String, OpenError> {
        let (file, kind) = raw::open_file(path, read_only, true)?;
        self.lock(&file, path, read_only, Locks::All)?;
        let is_device = kind == FileType::BlockDevice;
        let driver = if is_device { "host_device" } else { "file" };
        self.nodes.push(node_of_file(driver, node_name, file.as_raw_fd(), read_only, direct));
        self.files.push(Allowed { file, is_writable: !read_only, is_device });
        Ok(node_name.to_owned())
    }

    /// A VMDK's file: itself, or a text made of its descriptor, and its extents.
    fn vmdk_file(
        &mut self,
        options: &ImageOptions,
        path: &Path,
        node_name: &str,
        read_only: bool,
    ) -> Result<String, OpenError> {
        let (file, _) = raw::open_file(path, read_only, true)?;
        let failed = |source| system(path, "read its descriptor", source);
        let mut start = Vec::new();
        (&file)
            .take(vmdk::DESCRIPTOR_BYTES_MAX as u64 + 1)
            .read_to_end(&mut start)
            .map_err(failed)?;
        if !vmdk::is_descriptor(&start) {
            drop(file);
            return self.file(path, node_name, read_only, options.direct);
        }
        self.lock(&file, path, read_only, Locks::All)?;
        let refused =
            |reason| OpenError::Image { name: path.display().to_string(), format: "vmdk", reason };
        let descriptor = Descriptor::parse(&start).map_err(refused)?;
        let folder = options.extents.as_deref().ok_or_else(|| OpenError::Extents {
            name: path.display().to_string(),
            extents: descriptor.extents().collect::<Vec<_>>().join(", "),
        })?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder_fd = rustix::fs::open(folder, flags, Mode::empty())
            .map_err(|error| system(folder, "open the folder of extents", error.into()))?;
        let mut names = Vec::new();
        for extent in descriptor.extents() {
            let (file, path) = open_extent(&folder_fd, folder, extent, read_only)?;
            self.lock(&file, &path, read_only, Locks::BesideQemu)?;
            names.push(by_descriptor(file.as_raw_fd()));
            self.files.push(Allowed { file, is_writable: !read_only, is_device: false });
        }
        let given = memory_file("upcall-vmdk", descriptor.with_names(&names).as_bytes())
            .map_err(|source| system(path, "make a descriptor", source))?;
        // No O_DIRECT: it is memory.
        self.nodes.push(node_of_file("file", node_name, given.as_raw_fd(), read_only, false));
        self.texts.push(Text { original: file, given });
        Ok(node_name.to_owned())
    }

    fn lock(
        &self,
        file: &File,
        path: &Path,
        read_only: bool,
        which: Locks,
    ) -> Result<(), OpenError> {
        let taken = match (self.purpose, which) {
            (Purpose::Look, _) => return Ok(()),
            (Purpose::Serve, Locks::All) => lock::take(file, read_only),
            (Purpose::Serve, Locks::BesideQemu) => lock::take_beside_qemu(file, read_only),
        };
        match taken {
            Ok(true) => Ok(()),
            Ok(false) => Err(OpenError::Busy {
                name: path.display().to_string(),
                holder: lock::holder(file),
                read_only,
            }),
            Err(source) => Err(system(path, "lock it", source)),
        }
    }

    /// Files that may be opened.
    pub fn files(&self) -> &[Allowed] {
        &self.files
    }

    /// Descriptors that the daemon gets, at the same numbers.
    pub fn inherited(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let texts = self.texts.iter().map(|text| text.given.as_fd());
        let secret = self.secret.iter().map(|secret| secret.as_fd());
        self.files.iter().map(|allowed| allowed.file.as_fd()).chain(texts).chain(secret)
    }

    /// A connection to who has the disk, for one daemon; none if it is in files.
    pub fn connect(&self) -> io::Result<Option<OwnedFd>> {
        self.server.as_ref().map(NbdServer::connect).transpose()
    }

    /// Waits for what a daemon that has ended may still have in flight past the page cache. The
    /// kernel waits for that before a process ends, unless somebody is just looking at its memory
    /// (`/proc/PID/cmdline`): then it waits in the looker's place. To allocate a byte that is
    /// there waits for all direct IO of the file (ext4, XFS); where the file system cannot, or
    /// does not wait, this does nothing.
    pub fn wait_for_late_io(&self) {
        let files = self.files.iter().filter(|allowed| allowed.is_writable && !allowed.is_device);
        for allowed in files {
            let _ = rustix::fs::fallocate(&allowed.file, FallocateFlags::KEEP_SIZE, 0, 1);
        }
    }

    /// The daemon's arguments.
    pub fn arguments(&self, sockets: &Sockets, aio: Aio) -> Vec<String> {
        let (requests, questions) = (sockets.requests.as_raw_fd(), sockets.questions.as_raw_fd());
        let mut args = Vec::new();
        if let Some(secret) = &self.secret {
            let file = by_descriptor(secret.as_raw_fd());
            args.extend(["--object".to_owned(), format!("secret,id=secret,file={file}")]);
        }
        let remote = self.server.as_ref().zip(sockets.server.as_ref());
        let remote = remote.map(|(server, fd)| nodes_of_server(server, fd, self.read_only));
        for node in self.nodes.iter().chain(remote.iter().flatten()) {
            let mut node = node.clone();
            // Only what goes past the page cache can be handed to the kernel in batches.
            if aio == Aio::Native && node["cache"]["direct"] == true && node.get("aio").is_some() {
                node["aio"] = "native".into();
            }
            args.extend(["--blockdev".to_owned(), node.to_string()]);
        }
        let writable = if self.read_only { "off" } else { "on" };
        args.extend([
            "--export".to_owned(),
            format!(
                "type=vhost-user-blk,id=export,node-name={TOP},writable={writable},num-queues=1,\
                 addr.type=fd,addr.str={requests}"
            ),
            "--nbd-server".to_owned(),
            format!("addr.type=fd,addr.str={questions}"),
            "--export".to_owned(),
            format!("type=nbd,id=questions,node-name={TOP},writable=off"),
        ]);
        args
    }

    /// When the daemon has ended: what it changed in a descriptor it was given in place of the
    /// file's is changed in the file: the content id.
    pub fn settle(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        for text in &self.texts {
            let (mut given, mut original) = (Vec::new(), Vec::new());
            let limit = vmdk::DESCRIPTOR_BYTES_MAX as u64;
            let reader = File::from(text.given.try_clone()?);
            read_start(&reader, limit, &mut given)?;
            read_start(&text.original, limit, &mut original)?;
            if let (Some((_, digits)), Some((at, old))) =
                (vmdk::content_id(&given), vmdk::content_id(&original))
                && digits != old
            {
                text.original.write_all_at(&digits, at as u64)?;
                text.original.sync_data()?;
            }
        }
        Ok(())
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // The kernel may hold a description a little longer than we do.
        self.files.iter().for_each(|allowed| lock::release(&allowed.file));
        self.texts.iter().for_each(|text| lock::release(&text.original));
    }
}

/// What of a file is locked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Locks {
    /// Everything: the daemon is told not to lock it.
    All,
    /// What QEMU does not use: the daemon locks the rest itself, as it cannot be told not to.
    BesideQemu,
}

/// Opens a file of this plain name in a folder, and nothing else.
fn open_extent(
    folder_fd: &OwnedFd,
    folder: &Path,
    name: &str,
    read_only: bool,
) -> Result<(File, PathBuf), OpenError> {
    let path = folder.join(name);
    let access = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
    let flags = access | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let opened = rustix::fs::openat2(folder_fd, name, flags, Mode::empty(), resolve);
    let file = File::from(opened.map_err(|error| raw::not_opened(&path, read_only, error.into()))?);
    let stat =
        rustix::fs::fstat(&file).map_err(|error| system(&path, "look at it", error.into()))?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    if kind != FileType::RegularFile {
        return Err(OpenError::Extent { name: path.display().to_string() });
    }
    Ok((file, path))
}

fn node_of_file(driver: &str, name: &str, fd: RawFd, read_only: bool, direct: bool) -> Value {
    json!({
        "driver": driver,
        "node-name": name,
        "filename": by_descriptor(fd),
        "locking": "off",
        "aio": "threads",
        "read-only": read_only,
        "discard": "unmap",
        "cache": { "direct": direct, "no-flush": false },
    })
}

fn nodes_of_server(server: &NbdServer, socket: &OwnedFd, read_only: bool) -> [Value; 2] {
    let client = json!({
        "driver": "nbd",
        "node-name": "server",
        "server": { "type": "fd", "str": socket.as_raw_fd().to_string() },
        "export": server.export,
        "read-only": read_only,
        "discard": "unmap",
    });
    let disk = json!({
        "driver": "raw",
        "node-name": TOP,
        "file": "server",
        "read-only": read_only,
        "discard": "unmap",
    });
    [client, disk]
}

fn by_descriptor(fd: RawFd) -> String {
    format!("/proc/self/fd/{fd}")
}

/// A copy: it may come from a pipe, and is needed again with each daemon.
fn keep_secret(path: &Path) -> io::Result<OwnedFd> {
    let mut secret = Vec::new();
    File::open(path)?.take(SECRET_BYTES_MAX).read_to_end(&mut secret)?;
    memory_file("upcall-secret", &secret)
}

fn memory_file(name: &str, bytes: &[u8]) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC)?;
    let file = File::from(fd);
    file.write_all_at(bytes, 0)?;
    Ok(file.into())
}

fn read_start(file: &File, limit: u64, into: &mut Vec<u8>) -> io::Result<()> {
    let length = file.metadata()?.len().min(limit);
    into.resize(length as usize, 0);
    file.read_exact_at(into, 0)
}

fn system(path: &Path, action: &'static str, source: io::Error) -> OpenError {
    OpenError::System { name: path.display().to_string(), action, source }
}
