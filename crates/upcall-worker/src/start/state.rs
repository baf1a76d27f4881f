//! Where the filters of a disk keep their state: see `upcall-state`.

use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use upcall_gap::Gaps;
use upcall_state::{Folder, Handover, folder_of, has_handover, name_of, volatile};

use super::gaps::Made;
use super::system;
use crate::config::{DiskConfig, LogLevel, LogSink, StoreConfig};
use crate::error::StartError;

/// A disk's folder, opened when it is first needed, and locked as long as this lives.
#[derive(Default)]
pub(crate) struct StateFolder {
    folder: Option<Folder>,
    /// What the disk's filters are called so far.
    named: HashSet<String>,
    /// Where it is, and the image it is beside: for a disk that has a place for it.
    place: Option<(PathBuf, Option<PathBuf>)>,
    /// What the worker before handed over.
    handover: Option<Handover>,
    /// Nothing is opened: only what a chain would be is asked.
    is_trial: bool,
}

/// What a disk's state is kept in.
enum Kept {
    At(PathBuf),
    InMemory,
    Nowhere,
}

impl StateFolder {
    /// That of a disk that is only looked at.
    pub(super) fn trial() -> StateFolder {
        StateFolder { is_trial: true, ..StateFolder::default() }
    }

    /// Looks whether a worker before handed something over. The folder is opened only then:
    /// several workers may read an image whose folder is there.
    pub(super) fn look_for_handover(
        &mut self,
        disk: &DiskConfig,
        log: &LogSink,
    ) -> Result<(), StartError> {
        let Ok(Kept::At(path)) = kept(disk) else { return Ok(()) };
        self.place = Some((path.clone(), image_of(disk).map(Path::to_owned)));
        if self.is_trial || disk.read_only || !has_handover(&path) {
            return Ok(());
        }
        let found = self.folder(disk, path)?.handover();
        let found =
            found.map_err(|source| StartError::State { disk: disk.name.clone(), source })?;
        if found == Some(None) {
            let text = format!(
                "disk {}: what the worker before handed over is damaged: its filters begin \
                 without what they had saved",
                disk.name
            );
            log(LogLevel::Error, &text);
        }
        self.handover = found.flatten();
        Ok(())
    }

    /// What the worker before handed over, if it did.
    pub(crate) fn handover(&self) -> Option<&Handover> {
        self.handover.as_ref()
    }

    /// It was taken up.
    pub(crate) fn end_handover(&self) -> Result<(), String> {
        match &self.folder {
            Some(folder) => folder.end_handover().map_err(|error| error.to_string()),
            None => Ok(()),
        }
    }

    /// Hands over to the next worker; durable when this returns. A folder is made only if
    /// there is something to say.
    pub(crate) fn hand_over(&mut self, handover: &Handover) -> Result<(), String> {
        let is_nothing = *handover == Handover { write_cache: true, ..Handover::default() };
        if is_nothing && self.folder.is_none() {
            return Ok(());
        }
        if self.folder.is_none() {
            let Some((path, image)) = &self.place else {
                return Err("the disk has no folder for its state; say one with state=DIR".into());
            };
            let opened = Folder::open_or_create(path, image.as_deref());
            self.folder = Some(opened.map_err(|error| error.to_string())?);
        }
        let folder = self.folder.as_ref().expect("it is open");
        folder.hand_over(handover).map_err(|error| error.to_string())
    }

    /// Takes a name that was given to an instance; false if another one has it.
    pub(super) fn take_name(&mut self, name: &str) -> bool {
        self.named.insert(name.to_owned())
    }

    /// The name of the next instance of a filter, and of its files. To be called once for each
    /// of the disk's filters that was given no name, in the order in which the configuration
    /// names them, and after the names that were given are taken.
    pub(super) fn name_next(&mut self, filter: &str) -> String {
        let mut names = (0..).map(|number| name_of(filter, number));
        names.find(|name| self.take_name(name)).unwrap_or_default()
    }

    /// The sidecar of an instance.
    pub(crate) fn sidecar(
        &mut self,
        disk: &DiskConfig,
        filter: &str,
        name: &str,
        log: &LogSink,
    ) -> Result<Arc<OwnedFd>, StartError> {
        let kept = if self.is_trial { Kept::InMemory } else { kept(disk)? };
        match kept {
            Kept::At(path) => {
                let folder = self.folder(disk, path)?;
                folder
                    .sidecar(name)
                    .map(Arc::new)
                    .map_err(|source| StartError::State { disk: disk.name.clone(), source })
            }
            Kept::InMemory => {
                if self.is_trial {
                    let file = volatile()
                        .map_err(|source| system(&disk.name, "keep a filter's state", source))?;
                    return Ok(Arc::new(file.into()));
                }
                let text = format!(
                    "disk {}: the state of filter {filter} is in memory, as the disk is, and \
                     lost with it; state=DIR keeps it",
                    disk.name
                );
                log(LogLevel::Info, &text);
                let file = volatile()
                    .map_err(|source| system(&disk.name, "keep a filter's state", source))?;
                Ok(Arc::new(file.into()))
            }
            Kept::Nowhere => {
                Err(StartError::NoState { disk: disk.name.clone(), filter: filter.to_owned() })
            }
        }
    }

    /// The file in which is recorded what an instance misses, and whether it was damaged; None
    /// where the disk is as short-lived as the record would be.
    pub(crate) fn gaps(
        &mut self,
        disk: &DiskConfig,
        name: &str,
        capacity: u64,
        made: &mut Made,
    ) -> Result<Option<(Gaps, bool)>, String> {
        let path = match kept(disk).map_err(|error| error.to_string())? {
            Kept::At(path) => path,
            Kept::InMemory => return Ok(None),
            Kept::Nowhere => return Err("it is in no file; say with state=DIR where".into()),
        };
        let file = format!("{name}.gaps");
        made.note(&path);
        made.note(&path.join(&file));
        let folder = self.folder(disk, path).map_err(|error| error.to_string())?;
        let (gaps, damage) =
            Gaps::open_in(folder.as_fd(), &file, capacity).map_err(|error| error.to_string())?;
        Ok(Some((gaps, damage.is_some())))
    }

    fn folder(&mut self, disk: &DiskConfig, path: PathBuf) -> Result<&Folder, StartError> {
        if self.folder.is_none() {
            let opened = Folder::open_or_create(&path, image_of(disk))
                .map_err(|source| StartError::State { disk: disk.name.clone(), source })?;
            self.folder = Some(opened);
        }
        Ok(self.folder.as_ref().expect("it was just opened"))
    }
}

/// The file that holds the disk, if it is one.
fn image_of(disk: &DiskConfig) -> Option<&Path> {
    match &disk.store {
        StoreConfig::Raw { path, .. } => Some(path),
        StoreConfig::Image(options) => options.file(),
        StoreConfig::Memory { .. } | StoreConfig::Null { .. } | StoreConfig::Custom(_) => None,
    }
}

fn kept(disk: &DiskConfig) -> Result<Kept, StartError> {
    let failed = |source| system(&disk.name, "find the folder for its filters' state", source);
    Ok(match (&disk.state, image_of(disk)) {
        (Some(path), _) => Kept::At(path.clone()),
        (None, Some(path)) => {
            if path.metadata().map_err(failed)?.file_type().is_block_device() {
                Kept::Nowhere
            } else {
                Kept::At(folder_of(path).map_err(failed)?)
            }
        }
        // It outlives us.
        (None, None) if matches!(disk.store, StoreConfig::Image(_)) => Kept::Nowhere,
        (None, None) => Kept::InMemory,
    })
}
