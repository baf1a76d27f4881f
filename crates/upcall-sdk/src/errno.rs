//! Errors, as the block layer knows them.

use std::{fmt, io};

/// A positive errno value of Linux, 1 to 4095.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(i32);

impl Errno {
    /// Input/output error: what a guest can make of any failure.
    pub const EIO: Errno = Errno(libc::EIO);
    /// Too many in flight; try again.
    pub const EAGAIN: Errno = Errno(libc::EAGAIN);
    /// Out of memory.
    pub const ENOMEM: Errno = Errno(libc::ENOMEM);
    /// Invalid argument.
    pub const EINVAL: Errno = Errno(libc::EINVAL);
    /// No such device: a disk that was not granted.
    pub const ENODEV: Errno = Errno(libc::ENODEV);
    /// No space left.
    pub const ENOSPC: Errno = Errno(libc::ENOSPC);
    /// Read-only.
    pub const EROFS: Errno = Errno(libc::EROFS);
    /// Too long.
    pub const E2BIG: Errno = Errno(libc::E2BIG);
    /// Not supported.
    pub const EOPNOTSUPP: Errno = Errno(libc::EOPNOTSUPP);
    /// The instance is closing or closed.
    pub const ESHUTDOWN: Errno = Errno(libc::ESHUTDOWN);
    /// Timed out.
    pub const ETIMEDOUT: Errno = Errno(libc::ETIMEDOUT);
    /// Nobody waits for the request any more.
    pub const ECANCELED: Errno = Errno(libc::ECANCELED);

    /// The errno of a positive number; anything that is none becomes `EIO`.
    pub const fn from_raw(raw: i32) -> Errno {
        if raw >= 1 && raw <= 4095 { Errno(raw) } else { Errno::EIO }
    }

    /// As a positive number.
    pub const fn raw(self) -> i32 {
        self.0
    }

    /// As the header writes it.
    pub(crate) const fn negative(self) -> i32 {
        -self.0
    }

    /// A status of the header, 0 or a negative errno, as a result.
    pub(crate) fn result(status: i32) -> Result<(), Errno> {
        if status == 0 { Ok(()) } else { Err(Errno::from_raw(status.wrapping_neg())) }
    }
}

impl From<io::Error> for Errno {
    fn from(error: io::Error) -> Errno {
        Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({})", self.0)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

impl std::error::Error for Errno {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_is_no_errno_becomes_eio() {
        for raw in [0, -5, 4096, i32::MIN] {
            assert_eq!(Errno::from_raw(raw), Errno::EIO);
        }
        assert_eq!(Errno::from_raw(28), Errno::ENOSPC);
    }

    #[test]
    fn a_status_is_a_result() {
        assert_eq!(Errno::result(0), Ok(()));
        assert_eq!(Errno::result(-28), Err(Errno::ENOSPC));
        assert_eq!(Errno::result(i32::MIN), Err(Errno::EIO));
        assert_eq!(Errno::result(7), Err(Errno::EIO));
    }
}
