//! A filter's shared object, opened and looked at from outside.
//!
//! Only its ELF header is read here, to choose the filter host of the right width; no code
//! of it runs. What is wrong further in, the dynamic loader of the filter host says.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::FilterError;

/// Pointer width of a filter, and so of its filter host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// x86-64.
    Bits64,
    /// i386.
    Bits32,
}

impl Width {
    /// 64 or 32.
    pub fn bits(self) -> u32 {
        match self {
            Width::Bits64 => 64,
            Width::Bits32 => 32,
        }
    }
}

/// An open shared object for x86-64 or i386.
#[derive(Debug)]
pub struct FilterFile {
    path: PathBuf,
    file: File,
    width: Width,
}

impl FilterFile {
    /// Opens `path` and checks its ELF header. The descriptor stays open, so that whatever
    /// is started from this is the file that was checked, though its path changes.
    pub fn open(path: impl AsRef<Path>) -> Result<FilterFile, FilterError> {
        let path = path.as_ref().to_owned();
        // Non-blocking, so that a pipe given by mistake is refused instead of waited for.
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(&path);
        let file = match opened {
            Ok(file) => file,
            Err(source) => return Err(FilterError::Open { path, source }),
        };
        match file.metadata() {
            Ok(metadata) if metadata.is_file() => {}
            Ok(_) => return Err(FilterError::NotAFile { path }),
            Err(source) => return Err(FilterError::Open { path, source }),
        }
        let mut header = [0; HEADER_SIZE];
        match file.read_exact_at(&mut header, 0) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                let found = "shorter than an ELF header".to_owned();
                return Err(FilterError::NotSharedObject { path, found });
            }
            Err(source) => return Err(FilterError::Open { path, source }),
        }
        match parse_header(&header) {
            Ok(width) => Ok(FilterFile { path, file, width }),
            Err(Unfit::NotSharedObject(found)) => Err(FilterError::NotSharedObject { path, found }),
            Err(Unfit::WrongMachine(found)) => Err(FilterError::WrongMachine { path, found }),
        }
    }

    /// The same file, whatever is at its path by now.
    pub fn try_clone(&self) -> io::Result<FilterFile> {
        let (path, width) = (self.path.clone(), self.width);
        Ok(FilterFile { path, file: self.file.try_clone()?, width })
    }

    /// As it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Of its code.
    pub fn width(&self) -> Width {
        self.width
    }
}

impl AsFd for FilterFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

const HEADER_SIZE: usize = 20;

#[derive(Debug, PartialEq)]
enum Unfit {
    NotSharedObject(String),
    WrongMachine(String),
}

/// The first bytes of an ELF file: magic, class (1: 32 bits, 2: 64), byte order (1: little
/// endian), ..., at 16 the type (3: shared object), at 18 the machine.
fn parse_header(header: &[u8; HEADER_SIZE]) -> Result<Width, Unfit> {
    if header[..4] != *b"\x7fELF" {
        return Err(Unfit::NotSharedObject("not an ELF file".into()));
    }
    let (class, order) = (header[4], header[5]);
    if order != 1 {
        return Err(Unfit::WrongMachine("not little-endian".into()));
    }
    let kind = u16::from_le_bytes([header[16], header[17]]);
    let machine = u16::from_le_bytes([header[18], header[19]]);
    let width = match (class, machine) {
        (2, 62) => Width::Bits64,
        (1, 3) => Width::Bits32,
        (1, 62) => return Err(Unfit::WrongMachine("x32: x86-64 with 32-bit pointers".into())),
        (2, 183) => return Err(Unfit::WrongMachine("AArch64".into())),
        _ => {
            return Err(Unfit::WrongMachine(format!("ELF class {class}, machine {machine}")));
        }
    };
    match kind {
        3 => Ok(width),
        1 => Err(Unfit::NotSharedObject("an object file that is not linked yet".into())),
        2 => Err(Unfit::NotSharedObject("a program".into())),
        4 => Err(Unfit::NotSharedObject("a core dump".into())),
        _ => Err(Unfit::NotSharedObject(format!("ELF type {kind}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(class: u8, order: u8, kind: u16, machine: u16) -> [u8; HEADER_SIZE] {
        let mut header = [0; HEADER_SIZE];
        header[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', class, order]);
        header[16..18].copy_from_slice(&kind.to_le_bytes());
        header[18..20].copy_from_slice(&machine.to_le_bytes());
        header
    }

    #[test]
    fn shared_objects_of_both_widths_are_known() {
        assert_eq!(parse_header(&header(2, 1, 3, 62)), Ok(Width::Bits64));
        assert_eq!(parse_header(&header(1, 1, 3, 3)), Ok(Width::Bits32));
    }

    #[test]
    fn other_machines_are_named() {
        for (class, order, machine, name) in [
            (1, 1, 62, "x32"),
            (2, 1, 183, "AArch64"),
            (2, 1, 3, "class 2, machine 3"),
            (1, 1, 40, "class 1, machine 40"),
            (2, 2, 62, "little-endian"),
            (0, 1, 62, "class 0"),
        ] {
            match parse_header(&header(class, order, 3, machine)) {
                Err(Unfit::WrongMachine(found)) => assert!(found.contains(name), "{found}"),
                other => panic!("{class} {order} {machine}: {other:?}"),
            }
        }
    }

    #[test]
    fn what_is_no_shared_object_is_named() {
        for (kind, name) in [(1, "not linked"), (2, "a program"), (4, "core dump"), (9, "type 9")] {
            match parse_header(&header(2, 1, kind, 62)) {
                Err(Unfit::NotSharedObject(found)) => assert!(found.contains(name), "{found}"),
                other => panic!("{kind}: {other:?}"),
            }
        }
        let mut magic = header(2, 1, 3, 62);
        magic[3] = b'f';
        assert!(matches!(parse_header(&magic), Err(Unfit::NotSharedObject(_))));
    }
}
