//! The folder of one disk: made, locked, and its files opened. See the crate's promise.

use std::fs::{File, TryLockError};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use crate::handover::{FILE_MAX, Handover};
use crate::{State, StateError, sidecar};

/// How long a lock may outlive its holder.
const GRACE: Duration = Duration::from_secs(1);
const SIDECAR: &str = ".sidecar";
const HANDOVER: &str = "handover";

/// Where the state of the filters on an image is kept: beside the file itself, if `image` is a
/// symbolic link.
pub fn folder_of(image: &Path) -> io::Result<PathBuf> {
    let mut path = image.canonicalize()?.into_os_string();
    path.push(".upcall");
    Ok(path.into())
}

/// The name of a filter's files in the folder. `number` counts, from 0, the mentions of that
/// filter for this disk in the order in which its filters were given, whatever their place in
/// the chain is: so another `order=` changes nothing.
pub fn name_of(filter: &str, number: usize) -> String {
    format!("{filter}-{number}")
}

/// Whether a worker has handed over to the next in the folder at `path`; who looks holds the
/// image, so that nobody does so now.
pub fn has_handover(path: &Path) -> bool {
    path.join(HANDOVER).symlink_metadata().is_ok()
}

/// A disk's folder, locked until dropped.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    folder: File,
    owner: Option<(Uid, Gid)>,
}

impl Folder {
    /// Opens the folder, or makes it, for the one worker that serves the disk. What is made
    /// belongs to the owner of `image`, if one is given and we may give files away.
    pub fn open_or_create(path: &Path, image: Option<&Path>) -> Result<Folder, StateError> {
        let failed = |action| move |error| system(path, action, error);
        let owner = match image {
            Some(image) => {
                let stat = rustix::fs::stat(image).map_err(failed("find its image's owner"))?;
                Some((Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid)))
            }
            None => None,
        };
        let made = match rustix::fs::mkdir(path, Mode::RWXU) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(error) => return Err(system(path, "make the folder", error)),
        };
        let folder = open_folder(path)?;
        let folder = Folder { path: path.to_owned(), folder, owner };
        if made {
            give_away(&folder.folder, folder.owner).map_err(failed("give it to its owner"))?;
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            let parent = File::open(parent.unwrap_or(Path::new(".")))
                .map_err(|source| io_error(path, "open the folder it is in", source))?;
            rustix::fs::fsync(&parent).map_err(failed("make it durable"))?;
        }
        let stat = rustix::fs::fstat(&folder.folder).map_err(failed("look at it"))?;
        if stat.st_mode & 0o022 != 0 {
            return Err(StateError::Exposed { path: path.to_owned() });
        }
        folder.lock(File::try_lock)?;
        Ok(folder)
    }

    /// Opens a folder that is there, for reading it while no worker has it.
    pub fn open_offline(path: &Path) -> Result<Folder, StateError> {
        let folder = Folder { path: path.to_owned(), folder: open_folder(path)?, owner: None };
        folder.lock(File::try_lock_shared)?;
        Ok(folder)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The sidecar of that name, for a filter host; made, with an empty state, if there is none.
    pub fn sidecar(&self, name: &str) -> Result<OwnedFd, StateError> {
        let file = format!("{name}{SIDECAR}");
        if let Some(found) = self.open_file(&file, OFlags::RDWR)? {
            return Ok(found.into());
        }
        self.create(&file, sidecar::write_new).map(OwnedFd::from)
    }

    /// What the sidecar of that name holds. The outer None: there is no such file; the inner:
    /// it is damaged.
    pub fn read_sidecar(&self, name: &str) -> Result<Option<Option<State>>, StateError> {
        let file = format!("{name}{SIDECAR}");
        let Some(found) = self.open_file(&file, OFlags::RDONLY)? else { return Ok(None) };
        let state = sidecar::parse(&found)
            .map_err(|source| io_error(&self.path.join(&file), "read it", source))?;
        Ok(Some(state))
    }

    /// What the worker before this one handed over, if it did. The outer None: it did not; the
    /// inner: the file is damaged.
    pub fn handover(&self) -> Result<Option<Option<Handover>>, StateError> {
        let Some(file) = self.open_file(HANDOVER, OFlags::RDONLY)? else { return Ok(None) };
        let mut bytes = Vec::new();
        file.take(FILE_MAX as u64)
            .read_to_end(&mut bytes)
            .map_err(|source| io_error(&self.path.join(HANDOVER), "read it", source))?;
        Ok(Some(Handover::parse(&bytes)))
    }

    /// Hands over to the next worker; durable when this returns.
    pub fn hand_over(&self, handover: &Handover) -> Result<(), StateError> {
        self.create(HANDOVER, |mut file| file.write_all(&handover.bytes())).map(drop)
    }

    /// The handover has been taken up: from now on there is none.
    pub fn end_handover(&self) -> Result<(), StateError> {
        let failed = |error| system(&self.path.join(HANDOVER), "remove it", error);
        match rustix::fs::unlinkat(&self.folder, HANDOVER, AtFlags::empty()) {
            Ok(()) => rustix::fs::fsync(&self.folder).map_err(failed),
            Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(failed(error)),
        }
    }

    /// The names of all sidecars in it, in order.
    pub fn sidecars(&self) -> Result<Vec<String>, StateError> {
        self.names(SIDECAR)
    }

    /// The names, in order, of all files that end in `.gaps`, without that.
    pub fn gaps(&self) -> Result<Vec<String>, StateError> {
        self.names(".gaps")
    }

    fn names(&self, suffix: &str) -> Result<Vec<String>, StateError> {
        let failed = |error| system(&self.path, "list it", error);
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            names.extend(name.strip_suffix(suffix).map(str::to_owned));
        }
        names.sort();
        Ok(names)
    }

    /// A regular file, or None if there is nothing of that name.
    fn open_file(&self, name: &str, access: OFlags) -> Result<Option<File>, StateError> {
        let path = || self.path.join(name);
        let wrong = || StateError::Kind { path: path(), wanted: "a regular file" };
        // Nonblocking: a pipe of that name must not keep us.
        let flags = access | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = match rustix::fs::openat(&self.folder, name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP | Errno::ISDIR | Errno::NXIO) => return Err(wrong()),
            Err(error) => return Err(system(&path(), "open it", error)),
        };
        let stat =
            rustix::fs::fstat(&file).map_err(|error| system(&path(), "look at it", error))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(wrong());
        }
        Ok(Some(file))
    }

    /// It gets its name when it is whole and durable.
    fn create(
        &self,
        name: &str,
        fill: impl FnOnce(&File) -> io::Result<()>,
    ) -> Result<File, StateError> {
        let path = self.path.join(name);
        let failed = |error| system(&path, "make it", error);
        let unfinished = format!("{name}.new");
        match rustix::fs::unlinkat(&self.folder, &unfinished, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(failed(error)),
        }
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.folder, &unfinished, flags, Mode::RUSR | Mode::WUSR)
            .map_err(failed)?;
        let file = File::from(file);
        give_away(&file, self.owner).map_err(failed)?;
        fill(&file).map_err(|source| io_error(&path, "make it", source))?;
        rustix::fs::fsync(&file).map_err(failed)?;
        rustix::fs::renameat(&self.folder, &unfinished, &self.folder, name).map_err(failed)?;
        rustix::fs::fsync(&self.folder).map_err(failed)?;
        Ok(file)
    }

    fn lock(&self, attempt: fn(&File) -> Result<(), TryLockError>) -> Result<(), StateError> {
        let start = Instant::now();
        loop {
            match attempt(&self.folder) {
                Ok(()) => return Ok(()),
                Err(TryLockError::Error(source)) => {
                    return Err(io_error(&self.path, "lock it", source));
                }
                Err(TryLockError::WouldBlock) if start.elapsed() < GRACE => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(StateError::Busy { path: self.path.clone() });
                }
            }
        }
    }
}

impl AsFd for Folder {
    /// The folder itself, to open gap files in.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }
}

fn open_folder(path: &Path) -> Result<File, StateError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(folder) => Ok(folder.into()),
        Err(Errno::NOENT) => Err(StateError::Missing { path: path.to_owned() }),
        Err(Errno::LOOP | Errno::NOTDIR) => {
            Err(StateError::Kind { path: path.to_owned(), wanted: "a folder" })
        }
        Err(error) => Err(system(path, "open it", error)),
    }
}

/// Only root may give files away; whoever else made it owns it.
fn give_away(file: &File, owner: Option<(Uid, Gid)>) -> Result<(), Errno> {
    match owner {
        Some((user, group)) if rustix::process::geteuid().is_root() => {
            rustix::fs::fchown(file, Some(user), Some(group))
        }
        _ => Ok(()),
    }
}

fn system(path: &Path, action: &'static str, error: Errno) -> StateError {
    io_error(path, action, error.into())
}

fn io_error(path: &Path, action: &'static str, source: io::Error) -> StateError {
    StateError::System { path: path.to_owned(), action, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};

    struct Place(PathBuf);

    impl Place {
        fn new(name: &str) -> Place {
            let path =
                std::env::temp_dir().join(format!("upcall-st-{name}-{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&path);
            std::fs::create_dir(&path).unwrap();
            std::fs::write(path.join("a.img"), [0; 512]).unwrap();
            Place(path.canonicalize().unwrap())
        }

        fn image(&self) -> PathBuf {
            self.0.join("a.img")
        }

        fn folder(&self) -> PathBuf {
            folder_of(&self.image()).unwrap()
        }

        fn open(&self) -> Result<Folder, StateError> {
            Folder::open_or_create(&self.folder(), Some(&self.image()))
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_folder_is_beside_its_image_also_through_a_link_and_for_its_owner_alone() {
        let place = Place::new("beside");
        let link = place.0.join("link");
        symlink(place.image(), &link).unwrap();
        assert_eq!(folder_of(&link).unwrap(), place.0.join("a.img.upcall"));
        if rustix::process::geteuid().is_root() {
            chown(place.image(), Some(1234), Some(1235)).unwrap();
        }
        let folder = place.open().unwrap();
        folder.sidecar("f-0").unwrap();
        let owner = std::fs::metadata(place.image()).unwrap();
        for (path, mode) in [(place.folder(), 0o700), (place.folder().join("f-0.sidecar"), 0o600)] {
            let meta = std::fs::metadata(path).unwrap();
            assert_eq!(meta.permissions().mode() & 0o777, mode);
            assert_eq!((meta.uid(), meta.gid()), (owner.uid(), owner.gid()));
        }
    }

    #[test]
    fn one_worker_has_a_folder_and_nobody_reads_it_meanwhile() {
        let place = Place::new("lock");
        let missing = Folder::open_offline(&place.folder());
        assert!(matches!(missing, Err(StateError::Missing { .. })));
        let folder = place.open().unwrap();
        assert!(matches!(place.open(), Err(StateError::Busy { .. })));
        let offline = Folder::open_offline(&place.folder());
        assert!(matches!(offline, Err(StateError::Busy { .. })));
        drop(folder);
        let one = Folder::open_offline(&place.folder()).unwrap();
        Folder::open_offline(&place.folder()).unwrap();
        drop(one);
        place.open().unwrap();
    }

    #[test]
    fn links_pipes_and_open_doors_are_refused() {
        let place = Place::new("links");
        let elsewhere = place.0.join("elsewhere");
        std::fs::create_dir(&elsewhere).unwrap();
        symlink(&elsewhere, place.folder()).unwrap();
        assert!(matches!(place.open(), Err(StateError::Kind { wanted: "a folder", .. })));
        std::fs::remove_file(place.folder()).unwrap();
        let folder = place.open().unwrap();
        symlink("/dev/null", place.folder().join("l-0.sidecar")).unwrap();
        rustix::fs::mknodat(&folder, "p-0.sidecar", FileType::Fifo, Mode::RUSR, 0).unwrap();
        std::fs::create_dir(place.folder().join("d-0.sidecar")).unwrap();
        for name in ["l-0", "p-0", "d-0"] {
            let opened = folder.sidecar(name);
            assert!(matches!(opened, Err(StateError::Kind { .. })), "{name}: {opened:?}");
        }
        drop(folder);
        let open = std::fs::Permissions::from_mode(0o722);
        std::fs::set_permissions(place.folder(), open).unwrap();
        assert!(matches!(place.open(), Err(StateError::Exposed { .. })));
    }

    #[test]
    fn a_sidecar_is_made_once_and_found_again_where_the_folder_is_moved() {
        let place = Place::new("moved");
        let folder = place.open().unwrap();
        std::fs::write(place.folder().join("f-0.sidecar.new"), b"left by a crash").unwrap();
        let file = File::from(folder.sidecar("f-0").unwrap());
        assert!(!place.folder().join("f-0.sidecar.new").exists());
        assert_eq!(folder.sidecars().unwrap(), ["f-0"]);
        std::os::unix::fs::FileExt::write_all_at(&file, b"rotten", 0).unwrap();
        drop((file, folder));
        let moved = place.0.join("b.img.upcall");
        std::fs::rename(place.folder(), &moved).unwrap();
        let folder = Folder::open_or_create(&moved, None).unwrap();
        folder.sidecar("f-0").unwrap();
        let state = folder.read_sidecar("f-0").unwrap().unwrap().unwrap();
        assert!(!state.is_doubled && state.bytes.is_empty(), "one slot is damaged, one is whole");
        assert_eq!(folder.read_sidecar("g-0").unwrap(), None);
        std::fs::write(moved.join("f-0.sidecar"), b"").unwrap();
        assert_eq!(folder.read_sidecar("f-0").unwrap(), Some(None), "damaged, not empty");
    }
}
