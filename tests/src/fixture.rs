//! The usual test: one disk behind some filters, served, used, ended, and its image read.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::build::{c_filter, root, rust_filter};
use crate::scratch::Scratch;
use crate::server::{Ended, Server};

/// A filter and how it is placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Filter {
    Trace,
    Xor,
    /// Built for 32 bits.
    Xor32,
    /// In the worker itself.
    XorInline,
    Throttle,
    /// Delays some requests: they end in another order than they came in.
    Delay,
}

impl Filter {
    /// What to say after `--filter`, for the disk `disk`.
    pub fn argument(self, disk: &str, scratch: &Scratch) -> String {
        let (file, rest) = match self {
            Filter::Trace => {
                let lines = scratch.text("trace.jsonl");
                (c_filter("trace", 64), format!(",param.file={lines}"))
            }
            Filter::Xor => (c_filter("xor", 64), String::new()),
            Filter::Xor32 => (c_filter("xor", 32), String::new()),
            Filter::XorInline => (c_filter("xor", 64), ",placement=inline".into()),
            // High enough not to slow a test down.
            Filter::Throttle => (rust_filter("throttle"), ",param.iops=1000000".into()),
            Filter::Delay => (
                rust_filter("fault"),
                ",param.effect=delay,param.delay=2ms,param.probability=0.1".into(),
            ),
        };
        format!("disk={disk},file={}{rest}", file.display())
    }

    fn changes_data(self) -> bool {
        matches!(self, Filter::Xor | Filter::Xor32 | Filter::XorInline)
    }
}

/// The chains that a client is tested through.
pub const CHAINS: [&[Filter]; 6] = [
    &[],
    &[Filter::Trace],
    &[Filter::Xor],
    &[Filter::Trace, Filter::Xor, Filter::Throttle],
    &[Filter::Xor32, Filter::Delay],
    &[Filter::XorInline, Filter::Trace],
];

/// A raw image, served as the disk `root`.
#[derive(Debug)]
pub struct Disk {
    /// Where its files are.
    pub scratch: Scratch,
    /// Where it listens.
    pub socket: PathBuf,
    /// What it writes to.
    pub image: PathBuf,
    server: Option<Server>,
    chain: Vec<Filter>,
}

impl Disk {
    /// Serves a new image of `bytes` bytes with `queues` queues behind `chain`; `options`
    /// are added to `--disk`, each with a comma before it.
    pub fn serve(bytes: u64, queues: usize, options: &str, chain: &[Filter]) -> Disk {
        let scratch = Scratch::new();
        let image = scratch.image("disk.img", bytes);
        let socket = scratch.join("disk.sock");
        let mut disk = Disk { scratch, socket, image, server: None, chain: chain.to_vec() };
        disk.start(queues, options);
        disk
    }

    /// Serves it again, after [`stop`](Self::stop).
    pub fn start(&mut self, queues: usize, options: &str) {
        // Not every temporary folder knows O_DIRECT; tests of it ask for it.
        let direct = if options.contains("direct=") { "" } else { ",direct=off" };
        let main = format!(
            "name=root,file={},socket={},queues={queues}{options}{direct}",
            self.image.display(),
            self.socket.display()
        );
        let mut args = vec!["--disk".to_owned(), main];
        for filter in &self.chain {
            args.extend(["--filter".to_owned(), filter.argument("root", &self.scratch)]);
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        self.server = Some(Server::start(&self.scratch, &args));
    }

    /// The process that serves it.
    pub fn server(&self) -> &Server {
        self.server.as_ref().expect("served")
    }

    /// Waits for the end of a server that was asked to end.
    pub fn end(&mut self) -> Ended {
        self.server.take().expect("served").wait()
    }

    /// Ends the server and expects that it ends in good order.
    #[track_caller]
    pub fn stop(&mut self) {
        self.server.take().expect("served").stop();
    }

    /// The image as the guest saw it: what its filters changed is undone by an independent
    /// reader.
    pub fn plain_image(&self) -> PathBuf {
        let mut image = self.image.clone();
        for (index, filter) in self.chain.iter().enumerate() {
            if filter.changes_data() {
                let plain = self.scratch.join(&format!("plain{index}.img"));
                undo_xor(&image, &plain);
                image = plain;
            }
        }
        image
    }
}

fn undo_xor(image: &Path, plain: &Path) {
    let status = Command::new("python3")
        .arg(root().join("filters/xor/unxor.py"))
        .args([image, plain])
        .status()
        .unwrap();
    assert!(status.success(), "unxor.py: {status}");
}
