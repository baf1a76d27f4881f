//! One user at a time for a gap file.

use std::fs::{File, TryLockError};
use std::time::{Duration, Instant};

use crate::GapError;

/// How long a lock may outlive its holder: while a dead worker's memory is given back, or a
/// child that it started has not become its program yet and holds copies of its descriptors.
const GRACE: Duration = Duration::from_secs(1);

/// Takes a lock with `attempt`, [`File::try_lock`] or [`File::try_lock_shared`]; waits up to
/// [`GRACE`] for one that is held. The lock ends with the file.
pub(crate) fn lock(
    name: &str,
    file: &File,
    attempt: fn(&File) -> Result<(), TryLockError>,
) -> Result<(), GapError> {
    let start = Instant::now();
    loop {
        match attempt(file) {
            Ok(()) => return Ok(()),
            Err(TryLockError::Error(error)) => return Err(GapError::system(name, "lock", error)),
            Err(TryLockError::WouldBlock) if start.elapsed() < GRACE => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(TryLockError::WouldBlock) => {
                return Err(GapError::Busy { name: name.to_owned() });
            }
        }
    }
}
