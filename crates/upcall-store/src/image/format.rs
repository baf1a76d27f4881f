//! Names and facts of the formats that are served. A format is always said, never probed.

use std::fmt;

/// How an image is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ImageFormat {
    /// The disk's bytes as they are. Here only below another image.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
    /// VMware's: monolithicSparse, monolithicFlat, twoGbMaxExtentSparse and -Flat, and
    /// streamOptimized for reading.
    Vmdk,
    /// Hyper-V's.
    Vhdx,
    /// VirtualBox's.
    Vdi,
    /// Virtual PC's, `.vhd`.
    Vpc,
}

impl ImageFormat {
    /// All of them.
    pub const ALL: [ImageFormat; 6] = [
        ImageFormat::Raw,
        ImageFormat::Qcow2,
        ImageFormat::Vmdk,
        ImageFormat::Vhdx,
        ImageFormat::Vdi,
        ImageFormat::Vpc,
    ];

    /// As QEMU calls it.
    pub const fn name(self) -> &'static str {
        match self {
            ImageFormat::Raw => "raw",
            ImageFormat::Qcow2 => "qcow2",
            ImageFormat::Vmdk => "vmdk",
            ImageFormat::Vhdx => "vhdx",
            ImageFormat::Vdi => "vdi",
            ImageFormat::Vpc => "vpc",
        }
    }

    /// The format of a name.
    pub fn from_name(name: &str) -> Option<ImageFormat> {
        ImageFormat::ALL.into_iter().find(|format| format.name() == name)
    }

    /// Whether an image may have another one below it.
    pub const fn can_have_backing(self) -> bool {
        matches!(self, ImageFormat::Qcow2 | ImageFormat::Vmdk)
    }

    /// Whether zeroes can be written by giving space back. Where they cannot, a discard would
    /// cost as much as a write, so it is not offered.
    pub(crate) const fn can_unmap(self) -> bool {
        matches!(self, ImageFormat::Qcow2)
    }
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
