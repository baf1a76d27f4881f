//! How an image is opened, and what it is as a disk then.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use upcall_block::{DiskInfo, Op, OpSet};

use super::vhost::Device;
use super::{ImageFormat, NbdServer};
use crate::OpenError;
use crate::raw::OnFailure;

/// The program that reads formats.
const PROGRAM: &str = "qemu-storage-daemon";

/// An image below another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Its format.
    pub format: ImageFormat,
    /// Its file. Never written to.
    pub path: PathBuf,
}

/// Where an image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageSource {
    /// In a file, or in files that are found from there.
    File(PathBuf),
    /// With an NBD server, which has the disk as it is: [`ImageFormat::Raw`].
    Server(NbdServer),
}

impl fmt::Display for ImageSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ImageSource::File(path) => path.display().fmt(f),
            ImageSource::Server(server) => server.fmt(f),
        }
    }
}

/// How to open an image.
#[derive(Clone)]
pub struct ImageOptions {
    /// The image's file, or who has it.
    pub source: ImageSource,
    /// The format; of a file not [`ImageFormat::Raw`], which is
    /// [`RawStore`](crate::RawStore)'s.
    pub format: ImageFormat,
    /// Never write to it.
    pub read_only: bool,
    /// O_DIRECT: no second cache in the host.
    pub direct: bool,
    /// The images below it, nearest first. What an image itself names is not looked at.
    pub backing: Vec<Layer>,
    /// qcow2: the file with the data, where it is not in the image.
    pub data_file: Option<PathBuf>,
    /// VMDK: the folder with the extents that a descriptor names. None: there may be none.
    pub extents: Option<PathBuf>,
    /// qcow2: the file with the passphrase of its LUKS encryption, and nothing else.
    pub secret: Option<PathBuf>,
    /// The program; looked for in PATH if it is a plain name.
    pub program: PathBuf,
    /// How long the daemon may take for one request, and to start, before it is replaced.
    pub patience: Duration,
    /// Told when a daemon is gone and another one started, or could not be.
    pub on_restart: Option<OnFailure>,
    /// Told when the store fails for good.
    pub on_failure: Option<OnFailure>,
    /// It has failed for good already, as somebody knows who opened it before: what was said
    /// then. Nobody is told again.
    pub failed: Option<String>,
}

impl ImageOptions {
    /// For writing, direct, alone.
    pub fn new(format: ImageFormat, path: impl Into<PathBuf>) -> ImageOptions {
        ImageOptions::of(ImageSource::File(path.into()), format)
    }

    /// A disk of an NBD server, for writing.
    pub fn of_server(server: NbdServer) -> ImageOptions {
        ImageOptions::of(ImageSource::Server(server), ImageFormat::Raw)
    }

    fn of(source: ImageSource, format: ImageFormat) -> ImageOptions {
        ImageOptions {
            source,
            format,
            read_only: false,
            direct: true,
            backing: vec![],
            data_file: None,
            extents: None,
            secret: None,
            program: PROGRAM.into(),
            patience: Duration::from_secs(30),
            on_restart: None,
            on_failure: None,
            failed: None,
        }
    }

    /// The image's file, if it is one.
    pub fn file(&self) -> Option<&Path> {
        match &self.source {
            ImageSource::File(path) => Some(path),
            ImageSource::Server(_) => None,
        }
    }

    pub(super) fn name(&self) -> String {
        self.source.to_string()
    }

    /// What options contradict each other.
    pub(super) fn check(&self) -> Result<(), OpenError> {
        let format = self.format.name();
        let refused = |reason: &str| {
            Err(OpenError::Image { name: self.name(), format, reason: reason.to_owned() })
        };
        let chain =
            std::iter::once(self.format).chain(self.backing.iter().map(|layer| layer.format));
        let last = self.backing.len();
        if chain.enumerate().any(|(index, format)| index < last && !format.can_have_backing()) {
            return refused("only qcow2 and vmdk images can have another image below them");
        }
        if self.format != ImageFormat::Qcow2 && (self.data_file.is_some() || self.secret.is_some())
        {
            return refused("a data file and a secret are for qcow2 images");
        }
        match (&self.source, self.format) {
            (ImageSource::File(_), ImageFormat::Raw) => {
                refused("a raw image is served without qemu-storage-daemon")
            }
            (ImageSource::File(_), _) | (ImageSource::Server(_), ImageFormat::Raw) => Ok(()),
            (ImageSource::Server(_), _) => refused("what an NBD server has is served as it is"),
        }
    }
}

impl ImageOptions {
    /// What a daemon's device is as a disk that is opened so.
    pub(super) fn info(&self, device: &Device) -> DiskInfo {
        let mut ops = OpSet::NONE.with(Op::Read).with(Op::Flush);
        if !self.read_only {
            ops = ops.with(Op::Write);
            if device.write_zeroes_max > 0 {
                ops = ops.with(Op::WriteZeroes);
                ops = if self.format.can_unmap() { ops.with(Op::Discard) } else { ops };
            }
        }
        DiskInfo {
            capacity: device.capacity,
            block_size: 512,
            physical_block_size: 4096,
            read_only: self.read_only,
            ops,
            // The usual size of a cluster; what is smaller is zeroed.
            discard_granularity: 64 << 10,
        }
    }

    /// For people.
    pub(super) fn describe(&self, info: &DiskInfo) -> String {
        let mut text = format!(
            "{} image {} of {} bytes, {}, {}, by qemu-storage-daemon",
            self.format,
            self.source,
            info.capacity,
            if info.read_only { "read-only" } else { "read-write" },
            if self.direct { "direct" } else { "buffered" },
        );
        for layer in &self.backing {
            text.push_str(&format!(", over {} image {}", layer.format, layer.path.display()));
        }
        text
    }
}

impl fmt::Debug for ImageOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImageOptions")
            .field("source", &self.source)
            .field("format", &self.format)
            .field("read_only", &self.read_only)
            .field("direct", &self.direct)
            .field("backing", &self.backing)
            .finish_non_exhaustive()
    }
}
