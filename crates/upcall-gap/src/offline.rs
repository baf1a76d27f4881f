//! Reading a gap file that no worker uses. Changes nothing.

use std::fs::File;
use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, Mode, OFlags};

use crate::GapError;
use crate::file::{Damage, read_header, read_pages};
use crate::format::page_count;
use crate::lock::lock;
use crate::map::{Gap, Ranges};

/// What a gap file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The largest size in bytes that the disk had; 0 if the headers are damaged.
    pub capacity: u64,
    /// What is marked, in the order of the disk, neighbours joined. If the headers are damaged:
    /// everything there is, `u64::MAX` bytes from 0.
    pub gaps: Vec<Gap>,
    /// What could not be believed, and is therefore among [`gaps`](Self::gaps).
    pub damage: Damage,
}

/// Reads the gap file `name` in `folder`; None if there is none. Refused while a worker has it
/// open. Follows no symbolic link; costs time and memory in proportion to the file's length.
pub fn read(folder: BorrowedFd<'_>, name: &str) -> Result<Option<Report>, GapError> {
    let Some(mut file) = open_at(folder, name, OFlags::RDONLY)? else { return Ok(None) };
    lock(name, &file, File::try_lock_shared)?;
    let header = read_header(&mut file).map_err(|error| GapError::of_file(name, error))?;
    let Some(header) = header else {
        let damage = Damage { headers: true, pages: 0 };
        let gaps = vec![Gap { offset: 0, length: u64::MAX }];
        return Ok(Some(Report { capacity: 0, gaps, damage }));
    };
    let length = file.metadata().map_err(|error| GapError::system(name, "read", error))?.len();
    // The header's word for the size is not taken: a page is looked for where the file has bytes.
    let expected = page_count(header.capacity);
    let present = expected.min(length / crate::format::PAGE_BYTES as u64);
    let mut damage = Damage::default();
    let mut ranges = Ranges::new(header.capacity);
    read_pages(&mut file, &header.id, 0..present, |_, bits| match bits {
        Some(bits) => bits.iter().for_each(|word| ranges.push_word(*word)),
        None => {
            damage.pages += 1;
            (0..crate::format::PAGE_WORDS).for_each(|_| ranges.push_word(u64::MAX));
        }
    });
    damage.pages += expected - present;
    if present < expected {
        ranges.push_rest_marked();
    }
    Ok(Some(Report { capacity: header.capacity, gaps: ranges.finish(), damage }))
}

/// A regular file, or None if there is nothing of that name.
pub(crate) fn open_at(
    folder: BorrowedFd<'_>,
    name: &str,
    access: OFlags,
) -> Result<Option<File>, GapError> {
    // Nonblocking: a pipe of that name must not keep us.
    let flags = access | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = match rustix::fs::openat(folder, name, flags, Mode::empty()) {
        Ok(file) => file,
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        Err(rustix::io::Errno::LOOP | rustix::io::Errno::ISDIR | rustix::io::Errno::NXIO) => {
            return Err(GapError::NotAFile { name: name.to_owned() });
        }
        Err(error) => return Err(GapError::system(name, "open", error.into())),
    };
    let stat = rustix::fs::fstat(&file)
        .map_err(|error| GapError::system(name, "look at", error.into()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(GapError::NotAFile { name: name.to_owned() });
    }
    Ok(Some(file.into()))
}
