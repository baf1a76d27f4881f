//! Why a disk's state cannot be used, in words for the operator.

use std::io;
use std::path::PathBuf;

/// Why a disk's state cannot be used. The text names the place and the way out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// Another worker has it.
    #[error("{}: in use by another process; stop the worker that serves this disk", .path.display())]
    Busy {
        /// The folder.
        path: PathBuf,
    },
    /// There is no such folder.
    #[error("{}: no such folder: no filter of this disk has kept anything", .path.display())]
    Missing {
        /// The folder.
        path: PathBuf,
    },
    /// A symbolic link, a file where a folder should be, ...
    #[error("{}: is not {wanted}; move it away", .path.display())]
    Kind {
        /// What is there.
        path: PathBuf,
        /// What should be there.
        wanted: &'static str,
    },
    /// Others may write to the folder, and so could exchange what is in it.
    #[error("{}: others may write to it; run: chmod go-w {}", .path.display(), .path.display())]
    Exposed {
        /// The folder.
        path: PathBuf,
    },
    /// What the system refuses.
    #[error("{}: cannot {action}: {source}", .path.display())]
    System {
        /// The folder or file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the kernel says.
        source: io::Error,
    },
}
