//! The sidecar: an instance's own small durable state, which travels with the disk.

use crate::{Errno, Instance, sys};

/// The way to an instance's sidecar. For a filter whose [`Info`](crate::Info) says `sidecar`;
/// for any other every call gives [`Errno::EOPNOTSUPP`]. Any thread may use it, in `open` too.
///
/// ```no_run
/// # use upcall_sdk::{Errno, Instance};
/// # fn open(instance: Instance) -> Result<(), Errno> {
/// let starts = match *instance.sidecar().read()? {
///     [] => 0,
///     ref bytes => u64::from_le_bytes(bytes.try_into().map_err(|_| Errno::EIO)?),
/// };
/// instance.sidecar().write(&(starts + 1).to_le_bytes())?;
/// instance.sidecar().sync()
/// # }
/// ```
#[derive(Clone, Copy)]
pub struct Sidecar<'a> {
    instance: &'a Instance,
}

impl Instance {
    /// The instance's sidecar.
    pub fn sidecar(&self) -> Sidecar<'_> {
        Sidecar { instance: self }
    }
}

impl Sidecar<'_> {
    /// Most bytes of a state.
    pub const MAX: usize = sys::SIDECAR_MAX;

    /// The state as last written; empty in the beginning. What it is in `open` is durable.
    /// [`Errno::EIO`]: the state is damaged; a new one may be written.
    pub fn read(&self) -> Result<Vec<u8>, Errno> {
        let mut state = vec![0; Self::MAX];
        let size = Self::MAX as u32;
        let length = self.instance.open_call(|services, raw| {
            // SAFETY: the instance is open; the buffer has `size` bytes.
            unsafe { (services.sidecar_read)(raw, state.as_mut_ptr().cast(), size) }
        })?;
        let length = usize::try_from(length).map_err(|_| Errno::from_raw(-length))?;
        state.truncate(length);
        Ok(state)
    }

    /// Replaces the whole state, in memory only. [`Errno::E2BIG`]: more than
    /// [`MAX`](Self::MAX) bytes.
    pub fn write(&self, state: &[u8]) -> Result<(), Errno> {
        let length = u32::try_from(state.len()).map_err(|_| Errno::E2BIG)?;
        let status = self.instance.open_call(|services, raw| {
            // SAFETY: the instance is open; `state` is `length` bytes.
            unsafe { (services.sidecar_write)(raw, state.as_ptr().cast(), length) }
        })?;
        Errno::result(status)
    }

    /// Makes the state as last written durable, as a whole: a crash leaves the state before or
    /// this one. Blocks for IO: call it from `open`, from blocking work or a thread of your
    /// own. After an error a crash still leaves the state before or this one; try again.
    pub fn sync(&self) -> Result<(), Errno> {
        let status = self.instance.open_call(|services, raw| {
            // SAFETY: the instance is open.
            unsafe { (services.sidecar_sync)(raw) }
        })?;
        Errno::result(status)
    }
}
