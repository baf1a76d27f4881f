//! Why a gap file cannot be used, in words for the operator.

use std::io;

use crate::file::FileError;

/// Why a gap file cannot be used. The text names the file and the way out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GapError {
    /// Somebody else has it open.
    #[error("{name}: in use by another process; stop the worker that serves this disk")]
    Busy {
        /// The file.
        name: String,
    },
    /// Written by a later version.
    #[error("{name}: has version {version}, this program knows version 1; use a newer upcall")]
    Version {
        /// The file.
        name: String,
        /// The file's version.
        version: u32,
    },
    /// A symbolic link, a folder, a device, ...
    #[error("{name}: is no regular file; move it away")]
    NotAFile {
        /// The file.
        name: String,
    },
    /// What the system refuses.
    #[error("{name}: cannot {action}: {source}")]
    System {
        /// The file.
        name: String,
        /// What was tried.
        action: &'static str,
        /// What the kernel says.
        source: io::Error,
    },
}

impl GapError {
    pub(crate) fn of_file(name: &str, error: FileError) -> GapError {
        let name = name.to_owned();
        match error {
            FileError::Version(version) => GapError::Version { name, version },
            FileError::Io(action, source) => GapError::System { name, action, source },
        }
    }

    pub(crate) fn system(name: &str, action: &'static str, source: io::Error) -> GapError {
        GapError::System { name: name.to_owned(), action, source }
    }
}
