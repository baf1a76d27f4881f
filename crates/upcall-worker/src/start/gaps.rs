//! The files in which is recorded what bypassed filters miss.

use std::path::{Path, PathBuf};

use upcall_chain::OnFailure;

use super::state::StateFolder;
use super::{Starting, StartingDisk};
use crate::config::{LogLevel, LogSink};
use crate::error::StartError;

/// Files and folders that are made for a worker that may yet not start. Removed then.
#[derive(Default)]
pub(crate) struct Made {
    paths: Vec<PathBuf>,
}

impl Made {
    /// This is to be made, unless it is there.
    pub(crate) fn note(&mut self, path: &Path) {
        if std::fs::symlink_metadata(path).is_err() {
            self.paths.push(path.to_owned());
        }
    }

    /// The worker has started.
    pub(crate) fn keep(mut self) {
        self.paths.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in self.paths.iter().rev() {
            // A folder in which somebody else has put something stays.
            let _ = std::fs::remove_file(path).or_else(|_| std::fs::remove_dir(path));
        }
    }
}

/// Opens the gap file of each slot that needs one. Where there can be none, a filter whose
/// policy nobody chose is held instead.
pub(super) fn open_gaps(
    disk: &mut StartingDisk,
    hosts: &[Starting],
    state: &mut StateFolder,
    made: &mut Made,
    log: &LogSink,
) -> Result<(), StartError> {
    if disk.chain.info().read_only {
        return Ok(());
    }
    let records: Vec<bool> = disk
        .chain
        .slots()
        .zip(&disk.slots)
        .map(|((_, spec), slot)| slot.on_failure.records_gaps(spec))
        .collect();
    let capacity = disk.chain.info().capacity;
    for (slot, records) in disk.slots.iter_mut().zip(records) {
        if !records {
            continue;
        }
        let filter = hosts[slot.host].recipe.description.name.clone();
        match state.gaps(&disk.config, &slot.state_name, capacity, made) {
            Ok(None) => {}
            Ok(Some((gaps, is_damaged))) => {
                if is_damaged {
                    let text = format!(
                        "disk {}: the record {}.gaps was damaged; what it cannot tell any more \
                         counts as missed by filter {filter}",
                        disk.name, slot.state_name
                    );
                    log(LogLevel::Warn, &text);
                }
                slot.gaps = Some(gaps);
            }
            Err(why) if slot.is_policy_chosen => {
                let disk = disk.name.to_string();
                return Err(StartError::Gaps { disk, filter, why });
            }
            Err(why) => {
                let text = format!(
                    "disk {}: what filter {filter} would miss cannot be recorded ({why}): should \
                     it fail, requests wait for it (on-failure=hold)",
                    disk.name
                );
                log(LogLevel::Warn, &text);
                slot.on_failure = OnFailure::Hold;
            }
        }
    }
    Ok(())
}
